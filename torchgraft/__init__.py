"""Published machine-learning techniques as grafts onto your own PyTorch model."""

__version__ = "0.1.0"
