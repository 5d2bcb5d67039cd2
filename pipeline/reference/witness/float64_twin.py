"""A float64 twin of a pipeline's segments: the same functions, the same random draws, nine more digits.

Finite differences lose half of the digits, so they are made in float64. A segment's twin is a copy of its model with
every floating dtype replaced; values are cast up.

Random layers draw other numbers in float64 than in float32. So while a twin runs, Keras's random functions draw as the
model itself does and cast the result (`drawing`). A layer that draws in another way gives other outputs than the model:
`check_twin` finds the first stage of which that is so.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial, wraps
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from pipeline.reference.witness.flow import WitnessRefusedError, dtype_of, heads_of, refusing
from stages.keras_internals import layers_of, own_seed_generators, replaced_draws, wrap_call
from stages.loss.head import Head
from stages.recipe.attributes import FLOATS
from stages.recipe.by_value import copied
from stages.tape.model_call import Part
from stages.worker import snapshot
from stages.worker.hosted_stage import HostedStage

WIDE = "float64"
_DRAWING = ("normal", "uniform", "truncated_normal", "gamma", "beta", "binomial")
"""Random functions of Keras that take a dtype; `dropout` takes a tensor."""


@contextmanager
def wide_floats() -> Iterator[None]:
    """Let Keras make float64 of what says nothing else, in this process."""
    floatx, policy = keras.config.floatx(), keras.config.dtype_policy()
    keras.config.set_floatx(WIDE)
    keras.config.set_dtype_policy(WIDE)
    try:
        yield
    finally:
        keras.config.set_floatx(floatx)
        keras.config.set_dtype_policy(policy)


@contextmanager
def drawing(narrow: str) -> Iterator[None]:
    """Let Keras's random functions draw in a narrow dtype and cast up, in this thread.

    Inside another such block the inner one counts.

    Args:
        narrow: What the model draws in.
    """
    outer = getattr(_DRAWN_IN, "dtype", None)
    _DRAWN_IN.dtype = narrow
    try:
        with nullcontext() if outer is not None else replaced_draws(_NARROWED):
            yield
    finally:
        _DRAWN_IN.dtype = outer


_DRAWN_IN = threading.local()
"""Its `dtype`: what this thread's random layers draw in; None or missing: as they say."""


def _drawn(draw: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(draw)
    def draws(*args: Any, dtype: Any = None, **kwargs: Any) -> Any:
        narrow = getattr(_DRAWN_IN, "dtype", None)
        if narrow is None or str(dtype or WIDE) != WIDE:
            return draw(*args, dtype=dtype, **kwargs)
        return tf.cast(draw(*args, dtype=narrow, **kwargs), WIDE)

    return draws


def _dropout(draw: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(draw)
    def dropout(inputs: Any, rate: Any, *args: Any, **kwargs: Any) -> Any:
        narrow = getattr(_DRAWN_IN, "dtype", None)
        if narrow is None or inputs.dtype != WIDE:
            return draw(inputs, rate, *args, **kwargs)
        return inputs * tf.cast(draw(tf.ones_like(inputs, dtype=narrow), rate, *args, **kwargs), WIDE)

    return dropout


_NARROWED = {**dict.fromkeys(_DRAWING, _drawn), "dropout": _dropout}


def _draw_as(ours: Any, twin: Any) -> None:
    """Let every layer of a twin draw in the dtype of the layer that it stands for."""
    for layer, copy in zip(layers_of(ours), layers_of(twin), strict=True):
        if own_seed_generators(copy) and layer.compute_dtype in FLOATS:
            wrap_call(copy, partial(_drawing_in, narrow=layer.compute_dtype))


def _drawing_in(call: Callable[..., Any], narrow: str) -> Callable[..., Any]:
    @wraps(call)
    def called(*args: Any, **kwargs: Any) -> Any:
        with drawing(narrow):
            return call(*args, **kwargs)

    return called


class Twin:
    """The float64 twin of one stage.

    Args:
        hosted: The stage, with its values.

    Attributes:
        model: The twin.
        narrow: What the stage's own model computes in, and what draws where no layer says otherwise.
        heads: Its objectives in float64.

    Raises:
        WitnessRefusedError: It cannot be made.
    """

    def __init__(self, hosted: HostedStage) -> None:
        self.hosted = hosted
        self.narrow = dtype_of(hosted.stage.model)
        with wide_floats(), refusing(hosted, "its float64 copy cannot be made"):
            self.model = Part(self._build(), hosted.spec.name).model  # inner layers hand masks on by themselves
            self.heads: list[Head] = heads_of(hosted, WIDE)
            _draw_as(hosted.stage.model, self.model)
        for tie in hosted.ties:
            if tie.stages[0] != hosted.spec.index:
                self.model.trainable_variables[tie.place].regularizer = None

    def _build(self) -> Any:
        ours = self.hosted.stage.model
        twin = copied(ours, f"the model {ours.name!r}", floats=WIDE)
        self._fill(twin)
        return twin

    def _fill(self, twin: Any) -> None:
        values = snapshot.read(self.hosted.stage.model.variables)
        narrow = [v.path for v in twin.variables if v.dtype in FLOATS and v.dtype != WIDE]
        if len(values) != len(twin.variables) or narrow:
            raise WitnessRefusedError(
                f"stage {self.hosted.spec.name!r}: its float64 copy has {len(twin.variables)} variables of "
                f"{len(values)}, {', '.join(narrow) or 'none'} of them in another dtype; give its layers no dtype"
            )
        for variable, value in zip(twin.variables, values, strict=True):
            variable.assign(value.astype(WIDE) if variable.dtype == WIDE else value)


def check_twin(
    hosted: HostedStage, taken: Sequence[Any], given: Sequence[Any], ours: Sequence[Any], allowed: float
) -> None:
    """Compare what a stage and its twin give.

    Args:
        hosted: The stage.
        taken: What the twin took.
        given: What it gave.
        ours: What the stage's own model gave.
        allowed: Largest difference, as a part of the largest |value| that the twin took, gave or holds: what
            normalisation makes zero is not judged by its own size.

    Raises:
        WitnessRefusedError: They compute different things.
    """
    values = [*taken, *given, *(variable.value.read_value() for variable in hosted.stage.trainable_variables)]
    scale = max(
        (float(np.max(np.abs(np.asarray(v, np.float64)), initial=0.0)) for v in values if _is_float(v)), default=1.0
    )
    for (name, _), a, b in zip(hosted.spec.outputs, ours, given, strict=False):
        apart = float(np.max(np.abs(np.asarray(a, np.float64) - np.asarray(b, np.float64)), initial=0.0))
        if not apart <= allowed * scale:
            raise WitnessRefusedError(
                f"stage {hosted.spec.name!r}: its float64 copy gives another {name!r} (by {apart:.2g}); a layer of it "
                "draws numbers in a way of its own, or computes in a dtype of its own"
            )


def _is_float(tensor: Any) -> bool:
    return bool(tf.as_dtype(tensor.dtype).is_floating)


__all__ = ["Twin", "check_twin", "drawing", "wide_floats"]
