"""A part of a model as a recipe: how another process makes the same part."""
