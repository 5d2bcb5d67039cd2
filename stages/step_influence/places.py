"""The choice of tensors, steps and variables of an influence map, by names and indices.

    outputs=                   what it means, for a function that returns ...
    2                          a tensor (batch, time, units): its step 2; a list: its element 2
    (0, 1)                     a list of lists: Out[0][1]; a tensor: [:, 0, 1] (from the axis on)
    "state"                    a dict: the whole tensor
    ("out", 3)                 a dict: step 3 of the tensor "out"
    ("out", slice(0, 4))       each of the steps 0 to 3 as an entry of its own
    ()                         a tensor: the whole of it

Rules:

1. Names and numbers lead down the structure; numbers that are left at a tensor are indices along the axis, then the
   axes behind it.
2. A source is looked up among inputs, returned tensors and the model's variables. A name that two of them have must be
   said in full: ("input", "h") or ("output", "h").
3. All that does not fit is an error that says what there is.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]
Path = tuple[str | int, ...]
INPUT, OUTPUT = "input", "output"


@dataclass(frozen=True, slots=True, eq=False)
class Piece:
    """A tensor or variable, or some steps of it.

    Attributes:
        label: for people; unique in a map.
        tensor: the whole tensor, or the variable.
        elements: int64, which elements of the flattened tensor; None for all.
    """

    label: str
    tensor: Any
    elements: Array | None

    @property
    def indices(self) -> Array:
        """The elements, spelled out."""
        return np.arange(elements_of(self.tensor)) if self.elements is None else self.elements


@dataclass(frozen=True, slots=True, eq=False)
class Root:
    """A structure that names can lead into: the inputs, or what the function returned.

    Attributes:
        name: "input" or "output".
        structure: nested dicts, lists and tuples of tensors.
        axis: the axis that a number left over at a tensor is an index of.
        argument: how the user says the axis, for messages.
    """

    name: str
    structure: Any
    axis: int
    argument: str

    @property
    def names(self) -> frozenset[str]:
        """The keys on top, if it is a dict."""
        return frozenset(map(str, self.structure)) if isinstance(self.structure, Mapping) else frozenset()


@dataclass(frozen=True, slots=True, eq=False)
class Places:
    """The tensors and variables that outputs and sources can be chosen from.

    Attributes:
        inputs, outputs: the two structures.
        variables: path -> variable, for variables that can be said by their path.
    """

    inputs: Root
    outputs: Root
    variables: Mapping[str, Any] = field(default_factory=dict)

    def choose_outputs(self, wanted: Any) -> list[Piece]:
        """The pieces that `outputs=` says; None: all floating tensors that were returned, cut into steps."""
        if wanted is None:
            return _unique(_all_steps(self.outputs), "outputs")
        pieces = [p for entry in _entries(wanted) for p in self._in_root(self.outputs, _path(entry), "outputs")]
        return _unique(pieces, "outputs")

    def choose_sources(self, wanted: Any) -> list[Piece]:
        """The pieces that `sources=` says; None: all floating inputs, cut into steps."""
        if wanted is None:
            return _unique(_all_steps(self.inputs), "sources")
        return _unique([piece for entry in _entries(wanted) for piece in self._source(entry)], "sources")

    def _source(self, entry: Any) -> list[Piece]:
        if _is_variable(entry):
            return [_variable_piece(entry)]
        path = _path(entry)
        if not path or not isinstance(path[0], str):
            return self._in_root(self.inputs, path, "sources")
        first = path[0]
        roots = [root for root in (self.inputs, self.outputs) if first in root.names]
        named = self._variables_called(first) if len(path) == 1 else []
        if len(roots) + len(named) > 1:
            several = [f"an {root.name}" for root in roots] + [f"the variable {path}" for path in named]
            raise ValueError(
                f"sources: {first!r} is the name of {' and of '.join(several)}; say "
                f'("{INPUT}", {first!r}), ("{OUTPUT}", {first!r}), or the whole path of a variable'
            )
        if named:
            return [_variable_piece(self.variables[named[0]])]
        if roots:
            return self._in_root(roots[0], path, "sources")
        for root in (self.inputs, self.outputs):
            if first == root.name:
                return self._in_root(root, path[1:], "sources")
        known = sorted({*self.inputs.names, *self.outputs.names, *self.variables})
        raise ValueError(
            f"sources: expected a step of the inputs, a name, or a variable, received {entry!r}; names are "
            f"{', '.join(known) or '(none)'}, and ('{INPUT}', ...) and ('{OUTPUT}', ...) lead into what goes in and out"
        )

    def _variables_called(self, name: str) -> list[str]:
        """The variable of that path, or else those whose path ends with it."""
        return [name] if name in self.variables else [path for path in self.variables if path.endswith(f"/{name}")]

    def _in_root(self, root: Root, path: Sequence[Any], argument: str) -> list[Piece]:
        if path and path[0] == root.name and root.name not in root.names:
            path = path[1:]
        both = self.inputs.names & self.outputs.names
        return list(_descend(root, root.structure, (), tuple(path), argument, both))


def elements_of(tensor: Any) -> int:
    """How many elements a tensor or variable has."""
    return int(np.prod(tuple(tensor.shape), dtype=np.int64))


def leaves(structure: Any, path: Path = ()) -> Iterator[tuple[Path, Any]]:
    """The tensors of a structure with the way to each; None is left out."""
    if isinstance(structure, Mapping):
        for key, value in structure.items():
            yield from leaves(value, (*path, key))
    elif isinstance(structure, list | tuple):
        for key, value in enumerate(structure):
            yield from leaves(value, (*path, key))
    elif structure is not None:
        yield path, structure


def _entries(wanted: Any) -> list[Any]:
    """One entry, or a list of them. A tuple is one entry: a way down a structure."""
    return list(wanted) if isinstance(wanted, list | range) else [wanted]


def _path(entry: Any) -> tuple[Any, ...]:
    path = entry if isinstance(entry, tuple) else (entry,)
    for part in path:
        if isinstance(part, bool) or not isinstance(part, str | int | np.integer | slice):
            raise ValueError(
                f"expected names, numbers and slices, e.g. 2, (0, 1), 'state' or ('out', 3), received {entry!r}"
            )
    return tuple(int(part) if isinstance(part, np.integer) else part for part in path)


def _descend(
    root: Root, structure: Any, done: Path, path: tuple[Any, ...], argument: str, both: frozenset[str]
) -> Iterator[Piece]:
    """Follow a path to its tensor, each of several where a slice branches."""
    where = _label(root, done, (), both)
    if not isinstance(structure, Mapping | list | tuple):
        yield from _steps(root, structure, done, path, argument, both)
    elif not path:
        raise ValueError(
            f"{argument}: {where} is not one tensor but holds {_holds(structure)}; go on to one, as in "
            f"({', '.join(map(repr, (*done, _first(structure))))})"
        )
    elif isinstance(path[0], slice) and not isinstance(structure, Mapping):
        for place in range(len(structure))[path[0]]:
            yield from _descend(root, structure[place], (*done, place), path[1:], argument, both)
    else:
        key = path[0]
        if isinstance(structure, Mapping):
            found = key in structure
        else:
            found = isinstance(key, int) and -len(structure) <= key < len(structure)
            key = key % len(structure) if found else key
        if not found:
            raise ValueError(f"{argument}: {where} has no {path[0]!r}; it holds {_holds(structure)}")
        yield from _descend(root, structure[key], (*done, key), path[1:], argument, both)


def _steps(
    root: Root, tensor: Any, done: Path, index: tuple[Any, ...], argument: str, both: frozenset[str]
) -> Iterator[Piece]:
    """The parts of a tensor that indices from the axis on choose."""
    shape, axis = tuple(int(length) for length in tensor.shape), root.axis
    where = _label(root, done, (), both)
    if not tensor.dtype.is_floating:
        raise ValueError(f"{argument}: {where} is {tensor.dtype.name}; only floating tensors have gradients")
    if not index:
        yield Piece(where, tensor, None)
        return
    rank = len(shape)
    if not -rank <= axis < rank or (axis % rank) + len(index) > rank:
        raise ValueError(
            f"{argument}: {where} has shape {shape}, which has no axis {axis + len(index) - 1} to index; "
            f"{root.argument}={axis} is the axis of the first number"
        )
    ranges: list[range] = []
    for place, part in enumerate(index):
        length = shape[axis % rank + place]
        if isinstance(part, str) or (isinstance(part, int) and not -length <= part < length):
            raise ValueError(
                f"{argument}: {where} has no {part!r} on axis {axis % rank + place}: expected numbers from 0 to "
                f"{length - 1} (shape {shape}, {root.argument}={axis})"
            )
        ranges.append(range(length)[part] if isinstance(part, slice) else range(part % length, part % length + 1))
    elements = np.arange(int(np.prod(shape, dtype=np.int64))).reshape(shape)
    for numbers in product(*ranges):
        chosen = elements[(slice(None),) * (axis % rank) + numbers]
        yield Piece(_label(root, done, numbers, both), tensor, chosen.ravel())


def _all_steps(root: Root) -> list[Piece]:
    pieces: list[Piece] = []
    for path, tensor in leaves(root.structure):
        rank = len(tensor.shape)
        if tensor.dtype.is_floating:
            # What has no axis behind the one of steps is no series: (batch, units) is one state, not `units` steps.
            index = (slice(None),) if -rank <= root.axis < -1 or 0 <= root.axis < rank - 1 else ()
            pieces += _steps(root, tensor, path, index, f"{root.name}s", frozenset())
    return pieces


def _label(root: Root, path: Path, index: Sequence[int], both: frozenset[str]) -> str:
    """``state``, ``out[3]``, ``output[0][1]``; ``input.h`` where input and output have an h."""
    if path and isinstance(path[0], str):
        name, path = (f"{root.name}.{path[0]}" if path[0] in both else path[0]), path[1:]
    else:
        name = root.name
    return name + "".join(f"[{part}]" for part in (*path, *index))


def _holds(structure: Any) -> str:
    if isinstance(structure, Mapping):
        return ", ".join(map(repr, structure)) or "nothing"
    return f"elements 0 to {len(structure) - 1}" if structure else "nothing"


def _first(structure: Any) -> Any:
    return next(iter(structure), "...") if isinstance(structure, Mapping) else 0


def _is_variable(entry: Any) -> bool:
    return hasattr(entry, "assign") and hasattr(entry, "shape") and hasattr(entry, "dtype")


def _variable_piece(variable: Any) -> Piece:
    label = str(getattr(variable, "path", None) or variable.name)
    inner = variable.value if hasattr(variable, "path") and hasattr(variable.value, "assign") else variable
    if not inner.dtype.is_floating:
        raise ValueError(f"sources: the variable {label} is {inner.dtype.name}; only floating ones have gradients")
    return Piece(label, inner, None)


def _unique(pieces: Sequence[Piece], argument: str) -> list[Piece]:
    if not pieces:
        raise ValueError(f"{argument}: expected at least one floating tensor, step or variable, received none")
    seen: dict[str, Any] = {}
    kept = []
    for piece in pieces:
        label, repeat = piece.label, 1
        while label in seen and seen[label] is not piece.tensor:  # names of plain variables need not be unique
            repeat += 1
            label = f"{piece.label}#{repeat}"
        if label in seen:
            raise ValueError(f"{argument}: {label} was named twice")
        seen[label] = piece.tensor
        kept.append(Piece(label, piece.tensor, piece.elements))
    return kept
