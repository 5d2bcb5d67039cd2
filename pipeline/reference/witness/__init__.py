"""Witnesses that share less with the pipeline than one tape does."""
