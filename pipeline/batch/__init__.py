"""A batch and what it means: data as it comes, microbatches, targets and outputs, one step's orders."""
