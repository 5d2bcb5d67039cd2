"""A cell that runs a different number of times on every element."""
