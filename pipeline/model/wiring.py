"""Wire segments by the names of their tensors: equal names are connected.

    Segment(..., outputs=("h",))  ──h──►  Segment(..., inputs=("h",))

A chain needs no names: each segment takes what the one before it gives. A name that several segments take is sent to
each of them. A name that nobody gives is an input of the pipeline; one that nobody takes is an output.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from pipeline.errors import WiringError
from stages.actions import Wiring
from stages.recipe.segment import Segment, names_of
from stages.tape.tensors import compatible
from stages.worker.description import StageDescription
from transport.message import DRIVER


@dataclass(frozen=True)
class Wires:
    """The wiring of a pipeline's stages: the tensors that each takes and gives, and their other ends.

    Attributes:
        names: The stages' names.
        takes: For each stage its inputs as (tensor name, producing stage, or DRIVER).
        gives: For each stage its outputs as (tensor name, consuming stages ascending).
        inputs: Names of the pipeline's inputs, in the order of the stages that take them.
        outputs: (tensor name, stage) of the pipeline's outputs, in the model's order.
        labels: What these outputs are called in `compile`, for targets and in metrics.
    """

    names: tuple[str, ...]
    takes: tuple[tuple[tuple[str, int], ...], ...]
    gives: tuple[tuple[tuple[str, tuple[int, ...]], ...], ...]
    inputs: tuple[str, ...]
    outputs: tuple[tuple[str, int], ...]
    labels: tuple[str, ...]

    @property
    def stages(self) -> int:
        """How many stages there are."""
        return len(self.names)

    @property
    def labelled(self) -> list[tuple[str, str]]:
        """(tensor name, label) of the outputs."""
        return [(name, label) for (name, _), label in zip(self.outputs, self.labels, strict=True)]

    def upstream(self) -> Wiring:
        """For each stage the stages it takes tensors from; what plans are checked against."""
        return Wiring({i: sorted({s for _, s in takes if s != DRIVER}) for i, takes in enumerate(self.takes)})


def wire(
    segments: Sequence[Segment],
    inputs_first: Sequence[str] = (),
    outputs_named: Sequence[str] | None = None,
    labels: Sequence[str] | None = None,
) -> Wires:
    """Connect segments by name.

    Args:
        segments: In the order of the data flow.
        inputs_first: Inputs of the pipeline that come first, in this order; the others follow as the stages take them.
        outputs_named: The pipeline's outputs, in order; default: what nobody takes.
        labels: What `compile` calls them; default: the same names.

    Raises:
        WiringError: A name that two segments give, a cycle, or a pipeline without an output; all faults together.
    """
    names = names_of(segments)
    inputs, outputs = _named(segments)
    faults: list[str] = []
    producer: dict[str, int] = {}
    for i, given in enumerate(outputs):
        for name in given:
            if name in producer:
                faults.append(f"{name!r} is given by both {names[producer[name]]!r} and {names[i]!r}")
            producer[name] = i
    takes = tuple(tuple((name, producer.get(name, DRIVER)) for name in taken) for taken in inputs)
    for i, taken in enumerate(takes):
        for name, source in taken:
            if source >= i:
                faults.append(
                    f"stage {names[i]!r} takes {name!r} from {names[source]!r}, which does not come before it; "
                    "list the segments in the order of the data flow"
                )
    gives = tuple(
        tuple((name, tuple(j for j, taken in enumerate(inputs) if name in taken)) for name in given)
        for given in outputs
    )
    finals = tuple((name, i) for i, given in enumerate(gives) for name, consumers in given if not consumers)
    if outputs_named is not None:
        unknown = [name for name in outputs_named if name not in producer]
        if unknown:
            faults.append(f"no segment gives the output(s) {', '.join(map(repr, unknown))}; given are {list(producer)}")
        idle = [name for name, _ in finals if name not in outputs_named]
        if idle:
            faults.append(f"nobody takes {', '.join(map(repr, idle))}, and it is not among the outputs")
        finals = tuple((name, producer.get(name, 0)) for name in outputs_named)
    if not finals and not faults:
        faults.append("there is no output: every tensor is taken by some segment")
    if not segments:
        faults = ["a pipeline needs at least one segment"]
    if faults:
        raise WiringError("the segments cannot be wired: " + "; ".join(faults))
    free = dict.fromkeys(name for taken in takes for name, source in taken if source == DRIVER)
    free = dict.fromkeys(name for name in (*inputs_first, *free) if name in free)
    return Wires(names, takes, gives, tuple(free), finals, tuple(labels or (name for name, _ in finals)))


def check_shapes(wires: Wires, stages: Mapping[int, StageDescription]) -> None:
    """Compare what each stage gives with what the next one takes.

    Args:
        wires: Who gives what to whom.
        stages: How the built stages describe themselves.

    Raises:
        WiringError: Tensors that do not fit, all together.
    """
    given: dict[str, tuple[int, Sequence[int | None]]] = {}
    for i, stage in stages.items():
        for (name, _), output in zip(wires.gives[i], stage.outputs or (), strict=False):
            given[name] = (i, output.shape)
    faults = []
    for i, stage in stages.items():
        for (name, _), taken in zip(wires.takes[i], stage.inputs or (), strict=False):
            wanted = taken.shape
            source, shape = given.get(name, (DRIVER, wanted))
            if not compatible(shape, wanted):
                faults.append(
                    f"stage {wires.names[i]!r} takes {name!r} with the shape {tuple(wanted)} (None is any size), stage "
                    f"{wires.names[source]!r} gives {tuple(shape)}"
                )
    if faults:
        raise WiringError("the segments do not fit together: " + "; ".join(faults))


def _named(segments: Sequence[Segment]) -> tuple[list[tuple[str, ...]], list[tuple[str, ...]]]:
    """Input and output names of every segment; those of a chain are made up."""
    inputs, outputs = [], []
    before: tuple[str, ...] = ()
    for i, segment in enumerate(segments):
        default = before if i else _count("x", segment, "inputs")
        inputs.append(segment.inputs or default)
        before = segment.outputs or _count(f"y{i}", segment, "outputs")
        outputs.append(before)
    return inputs, outputs


def _count(stem: str, segment: Segment, what: str) -> tuple[str, ...]:
    """As many names as the model has tensors; one where it is only built in the worker."""
    tensors = getattr(segment.model, what, None) or [None]
    tensors = tensors[: len(tensors) - len(segment.states)]
    return (stem,) if len(tensors) == 1 else tuple(f"{stem}_{i}" for i in range(len(tensors)))
