"""The flow of gradients through recorded operations, as a graph."""
