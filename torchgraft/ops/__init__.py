"""Pure tensor functions that several techniques share or whose speed matters."""
