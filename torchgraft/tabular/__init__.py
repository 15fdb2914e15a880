"""You hold tables or event logs."""
