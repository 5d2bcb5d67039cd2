"""A training program as Keras users write them, run twice: by Keras on the whole model, and through a pipeline.

    the same seed ──► build() ──► compile(**compiled()) ──► fit(**fit()) ──► weights, history, predictions     Keras
                  └─► build() ──► Pipeline.split ──► the same                                               a pipeline

Eagerly, with one microbatch a batch, both must agree to the last bit. Compiled, or over several microbatches, they must
agree within rounding, measured against the largest change that training made to a weight.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import keras
import numpy as np
import pytest

from pipeline import Pipeline

SEED = 7
COMPILING = 4
"""How many times as far as compiled Keras from eager Keras a compiled pipeline may be."""

Arguments = Callable[[], dict[str, Any]]


@dataclass(frozen=True, eq=False)
class Program:
    """A model, how it is compiled, and on what it is trained; all made anew for each run.

    Attributes:
        build: Makes the model.
        compiled: Makes the arguments of `compile`.
        fit: Makes the arguments of `fit`.
        inputs: Makes what `predict` takes; default: the ``x`` of `fit`.
        cuts: Where `Pipeline.split` cuts, as its arguments.
        microbatches: Into how many parts a batch may be cut and still mean the same; 1 where a layer looks across the
            batch or draws random numbers.
        options: More arguments of `Pipeline.split`.
        policy: The global dtype policy.
        sums_apart: Whether three or more uses of one tensor or variable lie on both sides of a cut, so that their
            gradients are added in another order than under one tape (see test_meeting_gradients.py).
        rounding: What is allowed where numbers are not equal to the bit, of the largest change of a weight.
        zeros: Parts of the paths of weights whose gradient is zero but for rounding (a bias of attention's keys), which
            some optimizers make as large as any; left out where numbers agree within rounding only.
    """

    build: Callable[[], Any]
    compiled: Arguments
    fit: Arguments
    inputs: Callable[[], Any] | None = None
    cuts: dict[str, Any] = field(default_factory=lambda: {"stages": 2})
    microbatches: int = 4
    options: dict[str, Any] = field(default_factory=dict)
    policy: str = "float32"
    sums_apart: bool = False
    rounding: float = 1e-5
    zeros: tuple[str, ...] = ()

    def x(self) -> Any:
        """What `predict` takes."""
        return self.fit()["x"] if self.inputs is None else self.inputs()


@dataclass(frozen=True)
class Outcome:
    """What training left behind.

    Attributes:
        paths: The weights' paths, in the order of the model's weights.
        before: The weights as they were made.
        weights: The weights after training.
        history: {name: value per epoch}.
        outputs: Predictions, flat.
        merged: Predictions of the merged model, called directly; for Keras: of the model itself.
    """

    paths: Sequence[str]
    before: Sequence[np.ndarray[Any, Any]]
    weights: Sequence[np.ndarray[Any, Any]]
    history: dict[str, list[float]]
    outputs: Sequence[np.ndarray[Any, Any]]
    merged: Sequence[np.ndarray[Any, Any]]


@functools.cache
def plain(program: Program, run_eagerly: bool = True) -> Outcome:
    """Keras alone."""
    model = _built(program)
    before, paths = model.get_weights(), [weight.path for weight in model.weights]
    model.compile(**{**program.compiled(), "run_eagerly": run_eagerly})
    keras.utils.set_random_seed(SEED)
    history = model.fit(**{"verbose": 0, **program.fit()}).history
    return Outcome(paths, before, model.get_weights(), history, _predictions(model, program), _called(model, program))


def split(program: Program, *, run_eagerly: bool = True, microbatches: int = 1, **options: Any) -> Outcome:
    """A pipeline of the same model."""
    model = _built(program)
    before, paths = model.get_weights(), [weight.path for weight in model.weights]
    options = {"transport": "inproc", "microbatches": microbatches, **program.cuts, **program.options, **options}
    with Pipeline.split(model, **options) as pipe:
        pipe.compile(**{**program.compiled(), "run_eagerly": run_eagerly})
        keras.utils.set_random_seed(SEED)
        history = pipe.fit(**{"verbose": 0, **program.fit()}).history
        outputs, merged = _predictions(pipe, program), _called(pipe.merge(), program)
        return Outcome(paths, before, pipe.get_weights(), history, outputs, merged)


def assert_same_bits(ours: Outcome, theirs: Outcome) -> None:
    """Weights, history and predictions are equal, bit for bit; and training did change the weights."""
    assert any(not np.array_equal(a, b) for a, b in zip(theirs.before, theirs.weights, strict=True))
    assert list(ours.history) == list(theirs.history)
    for name, values in theirs.history.items():
        np.testing.assert_array_equal(np.asarray(ours.history[name]), np.asarray(values), err_msg=name)
    for what in ("before", "weights", "outputs", "merged"):
        pairs = zip(getattr(ours, what), getattr(theirs, what), strict=True)
        for i, (a, b) in enumerate(pairs):
            where = theirs.paths[i] if what in ("before", "weights") else i
            assert a.dtype == b.dtype, (what, where)
            np.testing.assert_array_equal(a, b, err_msg=f"{what}: {where}")


def assert_same_within_rounding(ours: Outcome, theirs: Outcome, program: Program) -> None:
    """Weights differ by at most `rounding` of the largest change of a weight, and the losses and predictions little.

    Or a weight by `COMPILING` times what compiling alone changes of it in Keras, where that is more: an optimizer that
    divides by a gradient's size makes much of one that is nearly zero.
    """
    assert max(_difference(a, b) for a, b in zip(theirs.before, theirs.weights, strict=True)) > 0
    apart = _apart(ours, theirs, program)
    far = {path: by for path, by in apart.items() if by > program.rounding}
    if far:
        compiling = _apart(plain(program, run_eagerly=False), plain(program), program)
        far = {path: (by, compiling[path]) for path, by in far.items() if by > COMPILING * compiling[path]}
        assert far == {}, "{weight: (difference, what compiling changes)}, of the largest change of a weight"
        theirs = plain(program, run_eagerly=False)
    assert list(ours.history) == list(theirs.history)
    for name, values in theirs.history.items():
        np.testing.assert_allclose(ours.history[name], values, rtol=1e-4, atol=1e-6, err_msg=name)
    for a, b in zip([*ours.outputs, *ours.merged], [*theirs.outputs, *theirs.merged], strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4)


def assert_eager_is_keras(program: Program, **options: Any) -> None:
    """Eager stages, one microbatch a batch: the bits of Keras."""
    ours, theirs = split(program, **options), plain(program)
    if program.sums_apart:
        assert_same_within_rounding(ours, theirs, program)
    else:
        assert_same_bits(ours, theirs)


def assert_compiled_is_keras(program: Program, **options: Any) -> None:
    """Compiled stages, over several microbatches where they mean the same as the whole batch: Keras within rounding."""
    options = {"microbatches": program.microbatches, **options}
    assert_same_within_rounding(split(program, run_eagerly=False, **options), plain(program), program)


def each(programs: dict[str, Program], check: Sequence[str] = (), gate: Sequence[str] = ()) -> Any:
    """Programs by name, as a test's parameters: `check` run at every level, `gate` in the gate too, all in the soak."""
    assert {*check, *gate} <= set(programs)
    marks = {name: pytest.mark.gate if name in gate else pytest.mark.soak for name in programs if name not in check}
    params = [pytest.param(one, id=name, marks=marks.get(name, ())) for name, one in programs.items()]
    return pytest.mark.parametrize("program", params)


def _apart(ours: Outcome, theirs: Outcome, program: Program) -> dict[str, float]:
    """{number and path of a weight: by how much it differs, of the largest change that training made to any}."""
    change = max(_difference(a, b) for a, b in zip(theirs.before, theirs.weights, strict=True))
    triples = enumerate(zip(theirs.paths, ours.weights, theirs.weights, strict=True))
    return {
        f"{number} {path}": _difference(a, b) / change
        for number, (path, a, b) in triples
        if not any(part in path for part in program.zeros)
    }


def _built(program: Program) -> Any:
    keras.backend.clear_session()  # so that automatic names count from the same number
    keras.config.set_dtype_policy(program.policy)
    try:
        keras.utils.set_random_seed(SEED)
        return program.build()
    finally:
        keras.config.set_dtype_policy("float32")


def _predictions(trained: Any, program: Program) -> list[np.ndarray[Any, Any]]:
    return [np.asarray(output) for output in keras.tree.flatten(trained.predict(program.x(), verbose=0))]


def _called(model: Any, program: Program) -> list[np.ndarray[Any, Any]]:
    tensors = keras.tree.map_structure(keras.ops.convert_to_tensor, program.x())
    return [np.asarray(output) for output in keras.tree.flatten(model(tensors, training=False))]


def _difference(a: np.ndarray[Any, Any], b: np.ndarray[Any, Any]) -> float:
    return float(np.max(np.abs(a.astype("float64") - b.astype("float64")), initial=0))
