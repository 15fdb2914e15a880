"""You hold a pretrained language model."""
