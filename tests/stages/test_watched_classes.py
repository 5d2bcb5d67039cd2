"""Canaries: classes of TensorFlow whose special methods are asked where an explanation watches them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import tensorflow as tf

from stages import tensorflow_internals as internals


@pytest.mark.parametrize(
    ("place", "use", "thing"),
    [
        (internals.ITERATION, lambda tensor: [float(row) for row in tensor], tf.constant([1.0, 2.0])),
        (internals.COMPILED_CALL, lambda function: float(function()), tf.function(lambda: tf.constant(2.0))),
    ],
    ids=["loop over a tensor", "call of a tf.function"],
)
def test_a_special_method_is_asked_of_the_class(place: Any, use: Callable[[Any], Any], thing: Any) -> None:
    """And is as before afterwards."""
    seen, usual = [], use(thing)

    def watching(original: Any) -> Any:
        return lambda first, *more, **named: (seen.append(first), original(first, *more, **named))[1]

    with internals.replaced(*place, watching):
        assert use(thing) == usual
    assert seen[0] is thing
    assert use(thing) == usual
    assert len(seen) == 1
