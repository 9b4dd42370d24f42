"""Training: `loop` is the place to start reading."""
