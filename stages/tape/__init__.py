"""How a stage computes its gradients: tapes, eager and compiled, accumulation, states through time."""
