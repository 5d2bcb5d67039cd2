"""Cutting a model: possible cuts, measured costs, balance, prediction of the step time."""
