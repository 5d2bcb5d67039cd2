"""The user's own tapes while a recorder was open: when they recorded, what they watched, what they were asked."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import keras
import tensorflow as tf

from stages.explanation.flow.edges import Edges
from stages.explanation.flow.graph import FlowGraph, Line
from stages.explanation.flow.recorder import Recorder, user_frame, user_line
from stages.tensorflow_internals import (
    TAPE_ASKED,
    TAPE_CLOSED,
    TAPE_JACOBIANS,
    TAPE_OPENED,
    TAPE_STOPPED,
    TAPE_WATCHES,
    TensorFlowVariable,
    watches_accessed_variables,
)

_NONE = tf.UnconnectedGradients.NONE


@dataclass(eq=False)
class Source:
    """A variable or tensor that a gradient was asked for.

    Attributes:
        name: The variable's path, the name that the user gave a tensor, or its place.
        given: The variable or tensor.
        value: Its number in the graph (of the handle, for a variable).
        variable: Whether it is one.
        trainable: For a variable, its flag.
    """

    name: str
    given: Any
    value: int
    variable: bool
    trainable: bool = True


@dataclass(eq=False)
class GradientCall:
    """One call of `tape.gradient`, `jacobian`, `batch_jacobian`, or of `ForwardAccumulator.jvp`.

    Attributes:
        tape: id of the tape.
        targets: {name: tensor}; together they were differentiated.
        sources: What for.
        found: The gradients, or None, in the order of the sources.
        watched: {value: the node before which it was watched}.
        accesses: Whether the tape watches the variables that are read.
        line: Where.
        when: How many nodes there were.
        reruns: {number of a variable: what running the code again says of it}; of `explain` only.
        known: Arrays that were there before, which are no results of the run.
    """

    tape: int
    targets: dict[str, Any]
    sources: list[Source]
    found: list[Any]
    watched: dict[int, int] = field(default_factory=dict)
    accesses: bool = True
    line: Line | None = None
    when: int = 0
    reruns: Mapping[int, Any] = field(default_factory=dict)
    known: Sequence[Any] = ()


class TapeLog:
    """Sees the tapes of a block.

    Args:
        recorder: The open recorder.
        shadow: A persistent tape of ours that should watch what the user's tapes watch, or None.
    """

    def __init__(self, recorder: Recorder, shadow: Any = None) -> None:
        self.asked: list[GradientCall] = []
        self.notes: list[str] = []
        self._recorder = recorder
        self._shadow = shadow
        self._watched: dict[int, dict[int, int]] = {}
        self._alive: list[Any] = []
        self._used: dict[int, str] = {}
        self._primals: dict[int, Any] = {}
        self._inside = False
        recorder.replace_while_open(*TAPE_OPENED, self._opened)
        recorder.replace_while_open(*TAPE_CLOSED, self._closed)
        recorder.replace_while_open(*TAPE_WATCHES, self._watch)
        recorder.replace_while_open(*TAPE_ASKED, self._gradient)
        recorder.replace_while_open(*TAPE_STOPPED, self._stop_recording)
        for place in TAPE_JACOBIANS:
            recorder.replace_while_open(*place, self._jacobian)
        forward = tf.autodiff.ForwardAccumulator
        for name, make in (("__init__", self._forward), ("__enter__", self._begun), ("__exit__", self._ended)):
            recorder.replace_while_open(forward, name, make)
        recorder.replace_while_open(forward, "jvp", self._jvp)

    def _opened(self, original: Any) -> Any:
        def push(tape: Any) -> Any:
            if self._recorder.here and tape is not self._shadow:
                self._alive.append(tape)  # ids of tapes must not be used twice
                self._recorder.tape_opened(tape)
            return original(tape)

        return push

    def _closed(self, original: Any) -> Any:
        def pop(tape: Any) -> Any:
            self._recorder.tape_closed(tape)
            return original(tape)

        return pop

    def _stop_recording(self, original: Any) -> Any:
        @contextmanager
        def stopped(tape: Any) -> Iterator[None]:
            with original(tape), self._recorder.tape_muted(tape):
                yield

        return stopped

    def _watch(self, original: Any) -> Any:
        def watch(tape: Any, tensor: Any) -> Any:
            original(tape, tensor)
            if self._recorder.here and tape is not self._shadow:
                for one in tf.nest.flatten(tensor):
                    place = self._recorder.graph.seen(handle_of(one))
                    self._watched.setdefault(id(tape), {}).setdefault(place, len(self._recorder.graph.nodes))
                    if self._shadow is not None and tf.is_tensor(one) and one.dtype.is_floating:
                        original(self._shadow, one)

        return watch

    def _gradient(self, original: Any) -> Any:
        def gradient(
            tape: Any, target: Any, sources: Any, output_gradients: Any = None, unconnected_gradients: Any = _NONE
        ) -> Any:
            mine = tape is self._shadow or self._inside
            if not self._recorder.here or mine or not tf.executing_eagerly():
                return original(tape, target, sources, output_gradients, unconnected_gradients)
            line, _ = user_line()
            when = len(self._recorder.graph.nodes)
            try:
                found = original(tape, target, sources, output_gradients, _NONE)
            except RuntimeError as error:
                if id(tape) in self._used:
                    self.notes.append(
                        f"the tape was asked a second time at {line}, and had been used up at {self._used[id(tape)]}: "
                        "make it with persistent=True, or ask for all gradients in one call"
                    )
                raise error
            except AttributeError as error:
                self._note_foreign(target, sources, line)
                raise error
            except (LookupError, tf.errors.OpError) as error:
                first = str(error).strip().splitlines()[0]
                self.notes.append(f"tape.gradient at {line} raised {type(error).__name__}: {first[:200]}")
                self._asked(tape, target, sources, None, line, when)
                raise error
            self._used[id(tape)] = str(line)
            self._asked(tape, target, sources, found, line, when)
            wants_zeros = tf.UnconnectedGradients(unconnected_gradients) == tf.UnconnectedGradients.ZERO
            return _with_zeros(found, sources) if wants_zeros else found

        return gradient

    def _jacobian(self, original: Any) -> Any:
        """Of `tape.jacobian` and `tape.batch_jacobian`, which call `tape.gradient` for every row."""

        def jacobian(tape: Any, target: Any, *args: Any, **kwargs: Any) -> Any:
            if not self._recorder.here or self._inside or not tf.executing_eagerly():
                return original(tape, target, *args, **kwargs)
            (line, _), when, self._inside = user_line(), len(self._recorder.graph.nodes), True
            try:
                found = original(tape, target, *args, **kwargs)
            finally:
                self._inside = False
            sources = args[0] if args else kwargs.get("sources", kwargs.get("source"))
            self._asked(tape, target, sources, found, line, when)
            return found

        return jacobian

    def _forward(self, original: Any) -> Any:
        def init(accumulator: Any, primals: Any, tangents: Any) -> None:
            self._primals[id(accumulator)] = primals
            self._alive.append(accumulator)
            original(accumulator, primals, tangents)

        return init

    def _begun(self, original: Any) -> Any:
        def enter(accumulator: Any) -> Any:
            self._recorder.tape_opened(accumulator)
            return original(accumulator)

        return enter

    def _ended(self, original: Any) -> Any:
        def leave(accumulator: Any, *error: Any) -> Any:
            self._recorder.tape_closed(accumulator)
            return original(accumulator, *error)

        return leave

    def _jvp(self, original: Any) -> Any:
        """Of `tf.autodiff.ForwardAccumulator`: one product for all primals, so one verdict for all."""

        def jvp(accumulator: Any, primals: Any, unconnected_gradients: Any = _NONE) -> Any:
            found, sources = original(accumulator, primals, _NONE), self._primals.get(id(accumulator))
            if self._recorder.here and sources is not None and tf.is_tensor(primals):
                given = [found] * len(tf.nest.flatten(sources))
                self._asked(accumulator, primals, sources, given, user_line()[0], len(self._recorder.graph.nodes))
            wants_zeros = tf.UnconnectedGradients(unconnected_gradients) == tf.UnconnectedGradients.ZERO
            return original(accumulator, primals, unconnected_gradients) if wants_zeros else found

        return jvp

    def _note_foreign(self, target: Any, sources: Any, line: Line | None) -> None:
        """The tape was given what is no tensor: TensorFlow's own error does not say which."""
        for what, given in (("target", target), ("source", sources)):
            for one in tf.nest.flatten(given):
                if not tf.is_tensor(one) and not hasattr(one, "handle"):
                    kind = type(one).__name__
                    self.notes.append(
                        f"tape.gradient at {line} was given a {what} that is no tensor but a {kind}: what left "
                        "TensorFlow has no gradient; keep it a tensor inside the tape"
                    )

    def _asked(self, tape: Any, target: Any, sources: Any, found: Any, line: Line | None, when: int) -> None:
        targets = dict(zip(leaf_names(target, "target"), tf.nest.flatten(target), strict=True))
        flat = tf.nest.flatten(sources)
        gradients = [None] * len(flat) if found is None else list(_flat_gradients(found, len(flat)))
        graph = self._recorder.graph
        graph.gradients.update(graph.seen(g) for g in gradients if tf.is_tensor(g))
        watched = dict(self._watched.get(id(tape), {}))
        forward = id(tape) in self._primals
        for variable in () if forward else tape.watched_variables():
            watched.setdefault(graph.seen(variable.handle), 0)
        if forward:
            watched |= {graph.seen(handle_of(one)): 0 for one in tf.nest.flatten(self._primals[id(tape)])}
        self.asked.append(
            GradientCall(
                id(tape),
                targets,
                make_sources(graph, dict(zip(leaf_names(sources, "source"), flat, strict=True))),
                gradients,
                watched,
                not forward and watches_accessed_variables(tape),
                line,
                when,
            )
        )


def _with_zeros(found: Any, sources: Any) -> Any:
    """Gradients with zeros where there are none, as TensorFlow gives them with ``unconnected_gradients="zero"``."""
    flat = tf.nest.flatten(sources)
    gradients = _flat_gradients(found, len(flat))
    filled = [tf.zeros(s.shape, s.dtype) if g is None else g for g, s in zip(gradients, flat, strict=True)]
    return tf.nest.pack_sequence_as(sources, filled) if tf.nest.is_nested(sources) else filled[0]


def is_tracked(graph: FlowGraph, asked: GradientCall, value: int) -> bool:
    """Whether a tape follows a value: it watches it, or saw it computed from what it follows."""
    edges = Edges(graph, asked.tape)
    found = set(asked.watched)
    _, before = graph.ancestors([value])
    for node in sorted(before, key=lambda node: node.index):
        for position, value in enumerate(node.inputs):
            late = value in asked.watched and asked.watched[value] > node.index and value not in graph.makers
            if value in found and not late and edges.passes(node, position):
                found.update(node.outputs)
                break
    return value in found


def make_sources(graph: FlowGraph, given: dict[str, Any]) -> list[Source]:
    """Name -> variable or tensor, as sources."""
    return [
        Source(name, one, graph.seen(handle_of(one)), is_variable(one), getattr(one, "trainable", True))
        for name, one in given.items()
    ]


def handle_of(source: Any) -> Any:
    """What stands for a variable or tensor in the graph and on the tape."""
    return source.handle if is_variable(source) else source


def is_variable(source: Any) -> bool:
    """Whether it is a variable of TensorFlow's or Keras's."""
    return isinstance(source, keras.Variable | TensorFlowVariable)


def leaf_names(structure: Any, otherwise: str) -> list[str]:
    """A name for each leaf: a variable's path, the name of a local variable of the user's, or its place."""
    if isinstance(structure, Mapping) and not any(tf.nest.is_nested(value) for value in structure.values()):
        return [str(key) for key in sorted(structure)]
    leaves = tf.nest.flatten(structure)
    frame = user_frame()
    local = {} if frame is None else {id(value): name for name, value in frame.f_locals.items()}
    several = f" {{}} of {len(leaves)}" if len(leaves) > 1 else ""
    names = [_name(leaf, local) or f"{otherwise}{several.format(i)}" for i, leaf in enumerate(leaves)]
    return list(unique(names))


def unique(names: Sequence[str]) -> Iterator[str]:
    """Names told apart by a number where they are equal."""
    counts: dict[str, int] = {}
    for name in names:
        counts[name] = counts.get(name, 0) + 1
        yield name if counts[name] == 1 else f"{name} #{counts[name]}"


def _name(leaf: Any, local: dict[int, str]) -> str | None:
    if isinstance(leaf, keras.Variable):
        return str(leaf.path)
    if is_variable(leaf):
        name = str(leaf.name).removesuffix(":0")
        return local.get(id(leaf), name) if name == "Variable" else name
    return local.get(id(leaf))


def _flat_gradients(found: Any, count: int) -> Sequence[Any]:
    if found is None or tf.is_tensor(found) or isinstance(found, tf.IndexedSlices):
        return [found]
    flat = tf.nest.flatten(found)
    return flat if len(flat) == count else list(found)


__all__ = [
    "GradientCall",
    "Source",
    "TapeLog",
    "handle_of",
    "is_tracked",
    "is_variable",
    "leaf_names",
    "make_sources",
    "unique",
]
