"""Run compiled functions operation by operation for a while."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import tensorflow as tf

__all__ = ["eagerly"]


@contextmanager
def eagerly() -> Iterator[None]:
    """Compiled functions run operation by operation: one compiled call has no path between two of its outputs."""
    before = tf.config.functions_run_eagerly()
    tf.config.run_functions_eagerly(True)
    try:
        yield
    finally:
        tf.config.run_functions_eagerly(before)
