"""Norms of activations and gradients at the cuts, over time."""
