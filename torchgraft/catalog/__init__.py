"""What exists: one Markdown card per technique."""
