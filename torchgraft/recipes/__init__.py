"""One module per technique: its evidence."""
