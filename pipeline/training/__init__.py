"""Keras's training loop over a pipeline, and its callbacks."""
