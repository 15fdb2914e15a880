"""One module per speed comparison: ours against a named peer."""
