"""Defences at a cut, as layers of the model: explicit, seeded, and so part of what one tape and `verify` compute.

A defence of activations is the last layer of the stage that sends them, one of gradients the first layer of the stage
that sends those back. Each weakens what a receiver can tell and what the model can learn; `LeakMeter` measures the one,
the loss shows the other.
"""
