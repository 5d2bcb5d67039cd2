"""Influence between the steps of a sequence: maps of gradients between steps."""
