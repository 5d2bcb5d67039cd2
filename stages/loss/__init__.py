"""The loss at a stage's output: heads, targets, weights."""
