"""One tape over the joined model, on the same microbatches, with Keras's own optimizer."""
