"""You hold images and a classifier."""
