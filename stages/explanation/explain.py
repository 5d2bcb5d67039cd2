"""Explanations of gradients that are None, zero or not finite: of a model or function, and of a block of own code.

    print(explain(lambda: loss_fn(y, model(x)), variables=model.variables))

    with explaining() as explanation:            # your own tapes, as they stand in your code
        with tf.GradientTape() as tape:
            ...
        tape.gradient(loss, variables)
    print(explanation)

Both run the code once, eagerly, and record it as a graph (`stages.explanation.flow.graph`). Whether there is a gradient
is always what a real tape says. The first way leaves everything as it was: what was written into variables is put back.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import keras
import tensorflow as tf

from stages.errors import HandoffError
from stages.explanation.flow.conversions import watch_conversions
from stages.explanation.flow.graph import FlowGraph
from stages.explanation.flow.recorder import Recorder, arrays_of_frames, random_states
from stages.explanation.flow.through_python import link_by_change, link_by_value
from stages.explanation.flow.user_tapes import GradientCall, TapeLog, handle_of, leaf_names, make_sources, unique
from stages.explanation.in_functions import gradients_as_compiled, note_of_loops, row_as_compiled
from stages.explanation.rows import Explanation, ExplanationRow
from stages.explanation.runs import run_of
from stages.explanation.verdicts import real_gradients, rows_of
from stages.keras_internals import layers_of, own_trainable_variables
from stages.stage import Stage

Variables = Iterable[Any] | Mapping[str, Any]


def explain(
    what: Any,
    inputs: Any = None,
    y: Any = None,
    *,
    loss: Any = None,
    variables: Variables | None = None,
    training: bool = True,
) -> Explanation:
    """Say of every variable whether the gradient of a target reaches it, and if not, why.

    Args:
        what: A function that computes a target and returns it (or a dict or list of targets): a loss, an output, a
            final state. Or a Keras model or layer, or a `Stage`, which is called with `inputs`.
        inputs: What `what` is called with; None: a function is called without arguments.
        y: With a model: the target of its loss. The target is then the loss with the model's own losses, else every
            output (and every state of a stage) is one.
        loss: With `y`: a Keras loss, by name or object; default: what the model was compiled with, or the stage has.
        variables: What gradients are asked for: variables or tensors, or a dict of them by name. Default: of a model
            (or the models that a function calls) all weights, not what it keeps for itself, such as moving statistics;
            and every trainable variable that is read.
        training: Passed to models.

    Returns:
        One row for every target and variable.

    Raises:
        HandoffError: There is nothing to run or to differentiate.

    What the function writes into variables, and the random states of Python, NumPy, Keras and TensorFlow, are put back
    (not those of `tf.random` operations that are given a seed of their own).
    If a variable seems not to be used, the function is run again with that variable changed, to see whether its value
    reaches the target outside of TensorFlow. Compiled functions run eagerly. All tensors of the run stay in memory.

    Example:
        >>> model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(2), keras.layers.Lambda(tf.round)])
        >>> explain(model, np.ones((4, 3), "float32")).of("dense/kernel").reason
        'rounding'
    """
    model = what.model if isinstance(what, Stage) else what if isinstance(what, keras.Layer) else None
    if model is None and not callable(what):
        raise HandoffError(
            f"explain needs a function, a Keras model or layer, or a Stage, received {type(what).__name__}"
        )
    if model is not None and inputs is None:
        raise HandoffError(f"explain needs inputs to call the model {model.name!r} with: explain(model, x)")
    if model is not None and not model.built:
        model(inputs)
    stage = what.name if isinstance(what, Stage) else ""
    run = run_of(what, inputs, y, loss, training)
    chosen = _named(variables) if variables is not None else None if model is None else trained_weights(model)
    return run_and_explain(
        run,
        chosen,
        stages={id(model): stage} if stage else None,
        headline=_headline(what),
        prefix=f"{stage}/" if stage else "",
    )


@contextmanager
def explaining() -> Iterator[Explanation]:
    """Explain every `tape.gradient` of a block of your own code: each None, zero and infinity that it gives.

    Yields:
        An `Explanation` that is empty in the block and filled when the block is left, also by an exception.

    What the block does, it does: variables it updates stay updated. A step of `model.fit` can be in it as well.
    Tensors of the whole block stay in memory, so keep it to one step.

    Example:
        >>> w = tf.Variable(1.0)
        >>> with explaining() as explanation, tf.GradientTape() as tape:
        ...     loss = tf.round(w * 2.0)
        ...     _ = tape.gradient(loss, w)
        >>> explanation.of("w").reason
        'rounding'
    """
    explanation = Explanation("explained")
    with tf.GradientTape(persistent=True) as shadow:
        recorder = Recorder()
        log = None
        try:
            with recorder:
                watch_conversions(recorder)
                log = TapeLog(recorder, shadow)
                known = arrays_of_frames()
                yield explanation
        finally:
            if log is not None:
                with shadow.stop_recording():
                    for asked in log.asked:
                        asked.known = known
                        _link(recorder.graph, asked)
                    rows = [row for asked in log.asked for row in rows_of(recorder.graph, asked, shadow)]
                first: dict[Any, ExplanationRow] = {}
                for row in rows:
                    first.setdefault(_same_row(row), row)
                explanation.rows = tuple(first.values())
                explanation.notes = tuple(dict.fromkeys([*log.notes, *note_of_loops(recorder)]))


def _link(graph: FlowGraph, asked: GradientCall) -> None:
    """Complete the ways through NumPy and Python that a None may be due to."""
    targets = [graph.seen(handle_of(target)) for target in asked.targets.values()]
    for source, gradient in zip(asked.sources, asked.found, strict=True):
        if gradient is None:
            link_by_value(graph, source.value, targets)


def _same_row(row: ExplanationRow) -> tuple[Any, ...]:
    """What makes a row of a loop's later step worth showing."""
    return row.target, row.name, row.status, row.reason, row.asked


def run_and_explain(
    run: Callable[[], Mapping[str, Any]],
    variables: Mapping[str, Any] | None,
    *,
    stages: Mapping[int, str] | None = None,
    headline: str = "explained",
    prefix: str = "",
) -> Explanation:
    """`explain` for a function that returns named targets.

    Args:
        run: Computes the targets.
        variables: Name -> variable or tensor; None: the trainable variables that `run` reads.
        stages: {id of a model: name of the stage that it is}.
        headline: What is explained.
        prefix: In front of every name.
    """
    recorder = Recorder(stages)
    given = None if variables is None else [handle_of(one) for one in variables.values()]
    with random_states():
        try:
            with recorder, tf.GradientTape(persistent=True) as tape:
                watch_conversions(recorder)
                for one in given or ():
                    if one.dtype != tf.resource and one.dtype.is_floating:
                        tape.watch(one)
                recorder.tape_opened(tape)
                targets = dict(run())
        finally:
            recorder.restore()
    chosen = dict(variables) if variables is not None else _used(recorder, tape)
    sources = make_sources(recorder.graph, {f"{prefix}{name}": one for name, one in chosen.items()})
    watched = {source.value: 0 for source in sources if not source.variable}
    watched |= {recorder.graph.seen(variable.handle): 0 for variable in tape.watched_variables()}
    rows: list[ExplanationRow] = []
    notes: list[str] = []
    tensors = [one for one in given or () if one.dtype != tf.resource and one.dtype.is_floating]
    compiled = gradients_as_compiled(run, tensors, sources, recorder)
    for name, target in targets.items():
        asked = GradientCall(id(tape), {name: target}, sources, [], watched, True, None, len(recorder.graph.nodes))
        asked.found, note = real_gradients(tape, target, sources)
        notes += [note] if note else []
        unseen = [s for s, g in zip(sources, asked.found, strict=True) if g is None and s.variable]
        again = partial(_again, run, stages, name)
        asked.reruns = link_by_change(recorder.graph, unseen, recorder.graph.seen(target), again)
        found = rows_of(recorder.graph, asked, tape)
        if name in compiled:
            pairs = zip(found, compiled[name], strict=True)
            found = [row_as_compiled(row, gradient, recorder.graph) for row, gradient in pairs]
        rows += found
    return Explanation(headline, tuple(rows), tuple(dict.fromkeys(notes)))


def _again(run: Callable[[], Mapping[str, Any]], stages: Mapping[int, str] | None, name: str) -> tuple[FlowGraph, int]:
    """Run once more, leaving no trace: what happened, and the target's number."""
    recorder = Recorder(stages)
    with random_states():
        try:
            with recorder:
                watch_conversions(recorder)
                target = dict(run())[name]
        finally:
            recorder.restore()
    return recorder.graph, recorder.graph.seen(target)


def _used(recorder: Recorder, tape: Any) -> dict[str, Any]:
    """The weights of all models and layers that were called, and what else was read of variables."""
    found = [item for layer in recorder.layers for item in trained_weights(layer).items()]
    known = {id(handle_of(variable)) for _, variable in found}
    found += [(str(v.name).removesuffix(":0"), v) for v in tape.watched_variables() if id(v.handle) not in known]
    return dict(zip(unique([name for name, _ in found]), [one for _, one in found], strict=True))


def _named(variables: Variables) -> dict[str, Any]:
    if isinstance(variables, Mapping):
        return dict(variables)
    given = list(variables) if isinstance(variables, Iterable) and not tf.is_tensor(variables) else [variables]
    return dict(zip(leaf_names(given, "source"), given, strict=True))


def trained_weights(model: Any) -> dict[str, Any]:
    """A model's weights that are, or could be, trained; by path."""
    found = {id(v) for layer in layers_of(model) for v in own_trainable_variables(layer)}
    weights = [v for v in model.weights if id(v) in found or v.trainable]
    return dict(zip(unique([v.path for v in weights]), weights, strict=True))


def _headline(what: Any) -> str:
    name = getattr(what, "name", None) or getattr(what, "__name__", type(what).__name__)
    return "explained" if name == "<lambda>" else f"explained {name}"


__all__ = ["explain", "explaining", "run_and_explain", "trained_weights"]
