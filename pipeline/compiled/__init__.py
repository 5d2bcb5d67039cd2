"""The arguments of `compile` made ready for the stages: optimizers, their slots, the loss scale."""
