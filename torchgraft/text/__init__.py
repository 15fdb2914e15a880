"""You hold text and a tokenizer."""
