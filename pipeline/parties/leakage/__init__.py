"""Leakage at a cut: what activations say about inputs, and gradients about labels, measured beside the loss.

What crosses a cut is encrypted on its way, and read by whom it is sent to. So each measure here plays the receiver.
"""
