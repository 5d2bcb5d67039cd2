"""The gradients of a stage: tapes, eager and compiled, accumulation, states through time."""
