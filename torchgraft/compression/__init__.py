"""You must make a model smaller, or live with one that was made smaller."""
