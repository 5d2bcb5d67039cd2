"""What can go wrong in one segment, named so that a caller can tell the families apart.

`HandoffError` and `SegmentError` are the caller's mistakes; they are raised before anything has changed, so the stage
can still be used. `StageFailure` wraps an exception that user code (a layer, a loss, a builder) raised.
"""

from __future__ import annotations


class StageError(Exception):
    """Base of every error that this package raises on purpose."""


class SegmentError(StageError):
    """A segment's recipe is wrong or cannot be carried out."""


class HandoffError(StageError):
    """A forward or backward was called out of order, or with tensors that do not fit."""


class RecipeError(StageError):
    """An object (model, layer, loss, metric, optimizer) cannot be described so that a worker can make it again."""
