"""What `compile` was given, made ready for the stages: optimizers, their slots, the loss scale."""
