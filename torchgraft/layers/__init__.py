"""You are building a network."""
