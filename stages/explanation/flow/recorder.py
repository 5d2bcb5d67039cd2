"""Record what a block of eager code does as a graph; see `stages.explanation.flow.graph`.

    with Recorder() as recorder:
        ...                      # every operation, conversion to NumPy, tape and gradient in here is seen
    recorder.graph, recorder.tapes

While it is open, compiled functions run operation by operation, calls of Keras layers say where an operation belongs,
and reads of variables are made visible (TensorFlow's fast path reads them without telling anybody). All that is put
back when it closes, also after an exception. It changes no number: the same operations run on the same values.

Rules:

1. Only the thread that opened it is recorded; one recorder is open in a process at a time.
2. Before a variable is written for the first time, its value is kept, so that whoever opened it can put it back.
3. A line is the user's if its file is none of TensorFlow's, Keras's, NumPy's, Python's or ours.
"""

from __future__ import annotations

import linecache
import sys
import sysconfig
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from stages.errors import HandoffError
from stages.explanation.flow.graph import FlowGraph, Line, Node
from stages.explanation.flow.holders import handle_place, holder_of
from stages.keras_internals import layer_call
from stages.origin import ROOT
from stages.put_back import random_numbers_put_back
from stages.tape.eagerly import eagerly
from stages.tensorflow_internals import (
    COMPILED_CALL,
    FAST_PATH,
    RECORD_OPERATION,
    EagerTensor,
    TensorFlowVariable,
    drawing_seeds_from,
    dtype_behind,
    read_behind,
    recording_is_stopped,
    replaced,
    seen_operations,
    stop_recording,
    write_behind,
)

_STDLIB = sysconfig.get_paths()["stdlib"]
_LIBRARIES = (
    *(str(Path(str(module.__file__)).parent) for module in (tf, keras, np)),
    *(str(ROOT / name) for name in ("stages", "pipeline", "transport")),
)
_SITE = ("site-packages", "dist-packages")
_PLUMBING = ("optree", "wrapt", "tree", "absl")
_OTHER_SEEDS = "the seeds of explanations"
_GENERATED = "__autograph_generated_file"
_WRITES = ("Assign", "ResourceApply", "ResourceSparseApply", "ResourceScatter", "ResourceStridedSliceAssign", "Rng")
_busy = threading.Lock()

BOUNDARY = "run_and_explain"
"""The function of ours that the explained code is called by, where it is called."""


class Recorder:
    """Records while it is open.

    Args:
        stages: {id of a model: name of the stage that it is}.
    """

    def __init__(self, stages: Mapping[int, str] | None = None) -> None:
        self.graph = FlowGraph()
        self.kept: dict[int, tuple[Any, Any]] = {}
        """{id of a handle: (handle, value before the first write)}."""
        self._stages = dict(stages or {})
        self._stage = ""
        self.layers: list[Any] = []
        """The layers that were called from outside of any other."""
        self._layers: list[Any] = []
        self._tapes: set[int] = set()
        self._muted: set[int] = set()
        self._new: set[int] = set()
        self.predicting = False
        """Whether `predict` is running, which is one conversion, whatever is inside."""
        self.compiled = False
        """Whether a `tf.function` of the user's was called, which runs eagerly meanwhile."""
        self._given_arrays = False
        self._paused = 0
        self._thread = 0
        self._closing = ExitStack()

    def __enter__(self) -> Recorder:
        if not _busy.acquire(blocking=False):
            raise HandoffError("another explanation is being recorded in this process; finish it first")
        self._thread = threading.get_ident()
        with ExitStack() as stack:
            stack.callback(_busy.release)
            stack.enter_context(eagerly())
            stack.enter_context(warnings.catch_warnings())
            warnings.filterwarnings("ignore", message="Even though the `tf.config.experimental_run_functions_eagerly")
            stack.enter_context(replaced(*FAST_PATH, self._fast_path))
            stack.enter_context(replaced(*RECORD_OPERATION, self._custom))
            stack.enter_context(replaced(*layer_call(), self._layer_call))
            stack.enter_context(replaced(*COMPILED_CALL, self._function_call))
            stack.enter_context(seen_operations(self._operation))
            self._closing = stack.pop_all()
        return self

    def __exit__(self, *_: Any) -> None:
        self._closing.close()

    @property
    def here(self) -> bool:
        """Whether what happens now is to be recorded."""
        return not self._paused and threading.get_ident() == self._thread

    def replace_while_open(self, owner: Any, name: str, make: Callable[[Any], Any]) -> None:
        """Replace an attribute until the recorder closes; `make` gets the original."""
        self._closing.enter_context(replaced(owner, name, make))

    @contextmanager
    def pause(self) -> Iterator[None]:
        """See nothing for a while."""
        self._paused += 1
        try:
            yield
        finally:
            self._paused -= 1

    def tape_opened(self, tape: Any) -> None:
        """A tape of the user's records from now on."""
        self._tapes.add(id(tape))

    def tape_closed(self, tape: Any) -> None:
        """Note that a tape of the user's does not record any more."""
        self._tapes.discard(id(tape))

    @contextmanager
    def tape_muted(self, tape: Any) -> Iterator[None]:
        """A tape of the user's that is open does not record for a while."""
        self._muted.add(id(tape))
        try:
            yield
        finally:
            self._muted.discard(id(tape))

    def note_array(self, tensor: Any) -> None:
        """Note that a tensor was made of a NumPy array or scalar."""
        if tensor.dtype.is_floating:
            self.graph.arrays.setdefault(self.graph.seen(tensor), (len(self.graph.nodes), user_line()[0]))

    def restore(self) -> None:
        """Give every variable that was written the value it had."""
        with stop_recording():
            for handle, value in self.kept.values():
                write_behind(handle, value)

    def node(self, kind: str, operation: str, inputs: Any, outputs: Any, **more: Any) -> Node:
        """Append what just happened, with where it happened."""
        line, literals = user_line()
        more.setdefault("layer", self.layer_path())
        return self.graph.add(
            Node(
                len(self.graph.nodes),
                kind,
                operation,
                tuple(inputs),
                tuple(outputs),
                stage=self._stage,
                line=line,
                literals=literals,
                tapes=frozenset(self._tapes),
                muted=frozenset(self._muted),
                stopped=recording_is_stopped(),
                stateful=any(getattr(layer, "stateful", False) for layer in self._layers),
                **more,
            )
        )

    def layer_path(self) -> str:
        """Names of the layers that are being called, outermost first, those of stages left out: ``block/dense``."""
        return "/".join(layer.name for layer in self._layers if id(layer) not in self._stages)

    def _operation(
        self, operation: Any, inputs: Any, attributes: Any, outputs: Any, op_name: Any = None, graph: Any = None
    ) -> None:
        if graph is not None or not self.here:
            return
        name = operation.decode() if isinstance(operation, bytes) else str(operation)
        seen = self.graph.seen
        new = [one for one in inputs if self._given_arrays and self.graph.number(one) is None]
        taken = [seen(tensor) for tensor in inputs]
        for tensor in new:
            self.note_array(tensor)
        if name == "VarHandleOp":
            self._new.add(id(outputs[0]))
        if name.startswith(_WRITES) and inputs and inputs[0].dtype == tf.resource:
            handle = taken[0]
            before = [] if name == "AssignVariableOp" else [self.graph.content.get(handle, handle)]
            content = self.graph.content[handle] = self.graph.pseudo()
            given = [seen(tensor) for tensor in outputs]
            self.node("write", name, [*before, *taken[1:]], [content, *given], attributes=(handle,), owner=writer())
            return
        place = handle_place(name)
        if place is not None:
            handle = taken.pop(place)
            kept = [] if place else [self.graph.content.get(handle, handle)]
            content = self.graph.content[handle] = self.graph.pseudo()
            given = [content, *map(seen, outputs)]
            self.node("write", name, [*kept, *taken], given, attributes=(handle,), owner=holder_of(name))
            return
        content_read = [self.graph.content[value] for value in taken if value in self.graph.content]
        self.node("operation", name, [*taken, *content_read], map(seen, outputs), attributes=tuple(attributes or ()))

    def _custom(self, original: Any) -> Any:
        def recorded(
            op_type: Any, output_tensors: Any, input_tensors: Any, backward_function: Any, forward_function: Any = None
        ) -> None:
            original(op_type, output_tensors, input_tensors, backward_function, forward_function)
            inputs, outputs = list(input_tensors), list(output_tensors)
            if self.here and all(isinstance(tensor, EagerTensor) for tensor in (*outputs, *inputs)):
                seen = self.graph.seen
                self.node("custom", str(op_type), map(seen, inputs), map(seen, outputs), backward=backward_function)

        return recorded

    def _layer_call(self, original: Any) -> Any:
        recorder = self

        def call(layer: Any, *args: Any, **kwargs: Any) -> Any:
            if not recorder.here:
                return original(layer, *args, **kwargs)
            recorder._stage = recorder._stages.get(id(layer), recorder._stage)
            if not recorder._layers and not any(layer is one for one in recorder.layers):
                recorder.layers.append(layer)
            recorder._layers.append(layer)
            try:
                return original(layer, *args, **kwargs)
            finally:
                recorder._layers.pop()

        return call

    def _function_call(self, original: Any) -> Any:
        def call(function: Any, *args: Any, **kwargs: Any) -> Any:
            home = str(getattr(function.python_function, "__module__", "")).partition(".")[0]
            self.compiled = self.compiled or (self.here and home not in ("keras", "tensorflow"))
            return original(function, *args, **kwargs)

        return call

    def _fast_path(self, original: Any) -> Any:
        def execute(ctx: Any, operation: Any, name: Any, *args: Any) -> Any:
            if not self.here:
                return original(ctx, operation, name, *args)
            if str(operation).startswith(_WRITES):
                self._keep(args[0])
            self._given_arrays = any(isinstance(one, np.ndarray | np.generic) for one in args)
            try:
                return original(ctx, operation, name, *map(_read, args))
            finally:
                self._given_arrays = False

        return execute

    def _keep(self, handle: Any) -> None:
        """Remember a variable's value before it is written; one that was made just now has none."""
        if id(handle) in self.kept or id(handle) in self._new or (dtype := dtype_behind(handle)) is None:
            return
        with self.pause(), stop_recording():
            self.kept[id(handle)] = (handle, tf.identity(read_behind(handle, dtype)))


@contextmanager
def random_states() -> Iterator[None]:
    """Python's, NumPy's and TensorFlow's own random states are as before; Keras's are variables.

    TensorFlow draws a seed for every random operation and keeps how far each seed got. So inside, seeds are drawn from
    another generator: those that the user's code would draw next must not have been used. (Operations with a seed of
    their own do go on.)
    """
    with random_numbers_put_back(), drawing_seeds_from(_OTHER_SEEDS):
        yield


def user_line(skip: Callable[[str], bool] | None = None) -> tuple[Line | None, tuple[Any, ...]]:
    """The innermost line of the user's that is being executed, and the constants in its function's code.

    Args:
        skip: Says of a function's name whether it may stand between the user's line and us; None: all may. If one that
            may not is met first, there is no line.
    """
    frame: Any = sys._getframe(1)
    generated: tuple[str, int] | None = None
    while frame is not None:
        code = frame.f_code
        if generated is not None and (line := _before_autograph(frame, *generated)) is not None:
            return line, ()
        if generated is None and code.co_filename.rpartition("/")[2].startswith(_GENERATED):
            generated = (code.co_filename, frame.f_lineno)
        if code.co_name == BOUNDARY and _is_ours(code.co_filename):
            return None, ()  # what is outside asked for the explanation and is not explained
        if is_users(code.co_filename):
            text = linecache.getline(code.co_filename, frame.f_lineno).strip()
            return Line(code.co_filename, frame.f_lineno, code.co_name, text), code.co_consts
        if skip is not None and not _is_ours(code.co_filename) and not skip(f"{code.co_filename}:{code.co_name}"):
            return None, ()
        frame = frame.f_back
    return None, ()


def _before_autograph(frame: Any, file: str, number: int) -> Line | None:
    """The user's own line for one that AutoGraph generated, from the frame of the call that converted the function."""
    converted = frame.f_locals.get("converted_f") if frame.f_code.co_name == "converted_call" else None
    for place, origin in getattr(converted, "ag_source_map", {}).items():
        if (place.filename, place.lineno) == (file, number):
            code = origin.source_code_line.strip()
            return Line(origin.loc.filename, origin.loc.lineno, origin.function_name, code)
    return None


def user_frame() -> Any:
    """The innermost frame of the user's."""
    frame: Any = sys._getframe(1)
    while frame is not None and not is_users(frame.f_code.co_filename):
        frame = frame.f_back
    return frame


def arrays_of_frames() -> list[Any]:
    """The NumPy arrays that the user's functions have at hand, by name or one level inside of a list or dict."""
    found: list[Any] = []
    frame: Any = sys._getframe(1)
    while frame is not None:
        if is_users(frame.f_code.co_filename):
            for value in (*frame.f_locals.values(), *frame.f_globals.values()):
                inside = value.values() if type(value) is dict else value if type(value) in (list, tuple) else (value,)
                found += [one for one in inside if isinstance(one, np.ndarray)]
        frame = frame.f_back
    return list({id(one): one for one in found}.values())


_known: dict[str, bool] = {}


def is_users(file: str) -> bool:
    """Whether a source file is the user's."""
    found = _known.get(file)
    if found is None:
        in_site = any(f"/{site}/" in file for site in _SITE)
        found = _known[file] = not (
            file.startswith("<")
            or file.rpartition("/")[2].startswith(_GENERATED)
            or file.startswith(_LIBRARIES)
            or (file.startswith(_STDLIB) and not in_site)
            or (in_site and any(f"/{name}/" in file for name in _PLUMBING))
        )
    return found


def _is_ours(file: str) -> bool:
    return file.startswith(str(ROOT / "stages"))


def writer() -> str:
    """Which metric, optimizer, layer or moving average is writing a variable."""
    frame: Any = sys._getframe(1)
    kinds = {"metric": keras.metrics.Metric, "optimizer": keras.optimizers.Optimizer, "layer": keras.Layer}
    kinds |= {"average": tf.train.ExponentialMovingAverage}
    while frame is not None:
        owner = frame.f_locals.get("self")
        for kind, family in kinds.items():
            if isinstance(owner, family):
                return f"{kind} {owner.name}"
        frame = frame.f_back
    return ""


def _read(argument: Any) -> Any:
    """A variable's value in its place, read in a way that can be seen."""
    if isinstance(argument, TensorFlowVariable):
        return argument.value()
    if isinstance(argument, list | tuple) and any(isinstance(one, TensorFlowVariable) for one in argument):
        return [_read(one) for one in argument]
    return argument


__all__ = ["Recorder", "arrays_of_frames", "is_users", "random_states", "user_frame", "user_line"]
