"""Checkpoints and Keras's files."""
