"""Rows of an explanation: the verdict of a real tape on every source, with the reason that the graph gives."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import tensorflow as tf

from stages.explanation.flow.graph import FlowGraph
from stages.explanation.flow.user_tapes import GradientCall, Source, handle_of
from stages.explanation.reasons import ADVICE, Finding, GradientWay, reason
from stages.explanation.rows import CONNECTED, NOT_CONNECTED, ZERO, ExplanationRow
from stages.explanation.zero_or_not_finite import Differentiate, status_of, where_not_finite, where_zero
from stages.tensorflow_internals import GradientFunction, replaced_gradient_function, stop_recording


def real_gradients(tape: Any, target: Any, sources: Sequence[Source]) -> tuple[list[Any], str]:
    """What a persistent tape says, and a note where TensorFlow raises since an operation has no registered gradient.

    That operation then sends none back, so that the other variables can be judged.
    """
    given = [handle_of(source.given) for source in sources]
    with _forgiving() as missing:  # recording goes on: what is computed again in the backward opens tapes of its own
        found = tape.gradient(target, given) if tf.is_tensor(target) else [None] * len(given)
    names = ", ".join(sorted(missing))
    note = f"TensorFlow raises LookupError when this target is differentiated: no gradient is registered for {names}"
    return list(found), note if missing else ""


@contextmanager
def _forgiving() -> Iterator[set[str]]:
    """Operations without a registered gradient send none back; yields their names."""
    missing: set[str] = set()

    def forgiving(original: GradientFunction) -> GradientFunction:
        def gradient(name: str, attributes: Any, count: int, *rest: Any) -> Any:
            try:
                found = original(name, attributes, count, *rest)
            except LookupError:
                missing.add(name)
                return [None] * count
            # For "no gradient" a tf.py_function gives the number 0, and what takes that for a tensor may fail.
            return fitting(found, rest[0]) if name == "EagerPyFunc" else found

        return gradient

    def fitting(found: Any, inputs: Any) -> list[Any]:
        gradients = list(found) if isinstance(found, list | tuple) else [found]
        pairs = zip(gradients, inputs, strict=True)
        return [g if g is None or g.shape == given.shape else tf.zeros_like(given) for g, given in pairs]

    with replaced_gradient_function(forgiving):
        yield missing


def rows_of(graph: FlowGraph, asked: GradientCall, tape: Any) -> list[ExplanationRow]:
    """One row for every source of a call of `tape.gradient`; `tape` can be asked for more."""
    name = " + ".join(asked.targets)
    targets = [graph.seen(handle_of(target)) for target in asked.targets.values()]
    flat = list(asked.targets.values())

    def ask(tensors: list[Any]) -> Sequence[Any]:
        with _forgiving(), stop_recording():
            return list(tape.gradient(flat, tensors))

    way = GradientWay(graph, asked, targets)
    line = "" if asked.line is None else str(asked.line)
    return [
        replace(_row(way, source, gradient, name, ask), asked=line)
        for source, gradient in zip(asked.sources, asked.found, strict=True)
    ]


def _row(way: GradientWay, source: Source, gradient: Any, target: str, ask: Differentiate) -> ExplanationRow:
    status, norm = status_of(gradient)
    frozen = source.variable and not source.trainable
    if status == NOT_CONNECTED:
        found = reason(way, source)
        return _none_row(source, target, found, frozen)
    if frozen:
        why = "the variable has trainable=False: it is not trained, though a gradient reaches it when a tape is asked"
        advice = ADVICE["trainable=False"]
        return ExplanationRow(source.name, target, status, "trainable=False", why, advice, (), norm, frozen=True)
    if status == CONNECTED:
        return ExplanationRow(source.name, target, status, norm=norm)
    if status == ZERO and _is_filled(source, ask):
        found = reason(way, source)
        return replace(_none_row(source, target, found, frozen), status=ZERO, norm=norm)
    where = where_zero if status == ZERO else where_not_finite
    name, why, advice, blockers = where(way.graph, source.value, way.targets, ask)
    return ExplanationRow(source.name, target, status, name, why, advice, tuple(blockers), norm)


def _is_filled(source: Source, ask: Differentiate) -> bool:
    """Whether zeros stand for "none", as `tape.batch_jacobian` gives them."""
    try:
        return ask([handle_of(source.given)])[0] is None
    except (LookupError, RuntimeError, tf.errors.OpError):
        return False


def _none_row(source: Source, target: str, found: Finding, frozen: bool) -> ExplanationRow:
    return ExplanationRow(
        source.name,
        target,
        NOT_CONNECTED,
        found.reason,
        found.why,
        found.advice,
        found.blockers,
        frozen=frozen or found.reason == "trainable=False",
        certain=found.certain,
    )


__all__ = ["real_gradients", "rows_of"]
