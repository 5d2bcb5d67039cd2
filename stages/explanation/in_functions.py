"""The verdict of code with compiled functions in it, which a recording runs eagerly: in a graph it may be another one.

TensorFlow passes no gradient through a loop over a data set in a `tf.function`, and makes zeros where a branch that was
not taken has none. So code with a `tf.function` in it runs once more as it is, under a plain tape, and that verdict
counts.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import tensorflow as tf

from stages.explanation.flow.graph import FlowGraph
from stages.explanation.flow.holders import holder_of, takes_from_before
from stages.explanation.flow.recorder import Recorder, random_states
from stages.explanation.flow.user_tapes import Source
from stages.explanation.reasons import ADVICE, place
from stages.explanation.rows import CONNECTED, NOT_CONNECTED, NOT_FINITE, ZERO, ExplanationRow
from stages.explanation.verdicts import real_gradients
from stages.explanation.zero_or_not_finite import status_of


def gradients_as_compiled(
    run: Callable[[], Mapping[str, Any]], watched: Sequence[Any], sources: Sequence[Source], recorder: Recorder
) -> dict[str, list[Any]]:
    """{target: its gradients}, of a plain run; {} if there is no compiled function, or the code cannot run again.

    Args:
        run: Computes named targets.
        watched: Tensors that the tape is told to watch.
        sources: What is asked for.
        recorder: Of the eager run; it knows the variables that are written.
    """
    if not recorder.compiled or takes_from_before(recorder.graph) is not None:
        return {}
    with random_states():
        try:
            with tf.GradientTape(persistent=True) as tape:
                for tensor in watched:
                    tape.watch(tensor)
                targets = dict(run())
        except Exception:  # what it raises is not what was asked
            return {}
        finally:
            recorder.restore()
    return {name: real_gradients(tape, target, sources)[0] for name, target in targets.items()}


def note_of_loops(recorder: Recorder) -> list[str]:
    """What to say of a recording in which a loop over a data set ran eagerly inside of a `tf.function`."""
    loops = any(node.operation.startswith("IteratorGetNext") for node in recorder.graph.nodes)
    if not (recorder.compiled and loops):
        return []
    return [
        "tf.functions ran eagerly here; compiled, TensorFlow passes no gradient through a loop over a data set. "
        "stages.explain(...) runs them compiled, too"
    ]


def row_as_compiled(row: ExplanationRow, gradient: Any, graph: FlowGraph) -> ExplanationRow:
    """A row of the eager run with the verdict that the compiled functions give."""
    status, norm = status_of(gradient)
    if status == row.status or row.frozen:
        return row
    if status == CONNECTED:
        return ExplanationRow(row.name, row.target, status, norm=norm)
    if status == NOT_FINITE:
        why = "compiled, the tf.function gives a gradient that is not finite"
        why += f", and the same code {_EAGERLY[row.status]} when it is run eagerly"
        return ExplanationRow(row.name, row.target, status, "not finite gradient", why, norm=norm, certain=False)
    if row.status != NOT_CONNECTED:
        loops = [node for node in graph.nodes if holder_of(node.operation) == "tf.data"]
        why = f"compiled, the tf.function passes no gradient, though the same code {_EAGERLY[row.status]} when it is "
        why += "run eagerly"
        why += ": TensorFlow has none for a loop over a data set in a graph" if loops else ""
        places = tuple(dict.fromkeys(place(node) for node in loops if node.line is not None))
        advice = ADVICE["compiled"]
        return ExplanationRow(row.name, row.target, status, "compiled", why, advice, places, norm, certain=bool(loops))
    return replace(row, status=ZERO, norm=norm, why=f"{row.why} (the compiled function makes zeros of that)")


_EAGERLY = {
    CONNECTED: "passes one",
    ZERO: "gives zeros",
    NOT_FINITE: "gives one that is not finite",
    NOT_CONNECTED: "passes none",
}
"""What the eager run said of a gradient, in words."""


__all__ = ["gradients_as_compiled", "note_of_loops", "row_as_compiled"]
