"""Errors of a single segment or stage.

All are the caller's mistakes, raised before anything has changed, so the stage can still be used.
"""

from __future__ import annotations

from transport.errors import MistakeError, TapelineError


class StageError(TapelineError):
    """Base of every error that the package `stages` raises on purpose."""


class SegmentError(StageError, MistakeError):
    """A segment's recipe is wrong or cannot be carried out."""


class HandoffError(StageError, MistakeError):
    """A forward or backward was called out of order, or with tensors that do not fit."""


class RecipeError(StageError, MistakeError):
    """An object (model, layer, loss, metric, optimizer) cannot be described so that a worker can make it again."""
