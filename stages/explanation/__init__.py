"""Explanations of gradients that are None, zero or not finite."""
