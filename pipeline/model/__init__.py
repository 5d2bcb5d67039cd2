"""A Keras model as a graph of calls: reading it, playing parts of it, wiring and merging them."""
