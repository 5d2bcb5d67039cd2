"""Keras layers of the project's own."""
