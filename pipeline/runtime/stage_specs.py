"""The specification that each worker gets of its stage: plain data, and copies of the user's own objects."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from pipeline.compiled.compiled import Compiled
from pipeline.model.shared_variables import ties
from pipeline.model.wiring import Wires
from stages.recipe.segment import Segment
from stages.recipe.stage_objects import StageObjects
from stages.worker.stage_spec import StageSpec


class SpecOptions(NamedTuple):
    """Options of a pipeline that its workers must know.

    Attributes:
        recompute: One value per stage.
        keep_state: Whether a batch begins with the states that the one before it left.
        seed: For the initialisers of parts that workers build; None leaves the process's own.
    """

    recompute: Sequence[bool]
    keep_state: bool
    seed: int | None


class Told(NamedTuple):
    """One worker's specification, and the user's variables beside those of its model, in the specification's order."""

    spec: StageSpec
    besides: list[Any]


def stage_specs(
    segments: Sequence[Segment], wires: Wires, compiled: Compiled | None, options: SpecOptions, reference: bool
) -> list[Told]:
    """What the workers of all stages are told.

    Args:
        segments: What the stages are built from.
        wires: How they are connected.
        compiled: What `compile` was given, or None.
        options: Of the pipeline.
        reference: For the process that has all stages; there one optimizer for all comes with the first.

    Raises:
        RecipeError: An object of the user's cannot be copied.
    """
    shared, found = ties(segments), []
    for index, segment in enumerate(segments):
        given = [name for name, _ in wires.gives[index]]
        variables = [] if segment.model is None else segment.model.trainable_variables
        heads = [spec for spec in (compiled.specs if compiled is not None else ()) if spec.output in given]
        optimizer, attributes = (None, {}) if compiled is None else compiled.optimizer_of(index, reference)
        judging = [] if compiled is None else compiled.judging([spec.label for spec in heads])
        objects, besides = StageObjects(segment.part, judging, optimizer).packed(
            f"stage {wires.names[index]!r}",
            foreign=_of_other_stages(segments, wires, index),
            optimizer_attributes=attributes,
        )
        spec = StageSpec(
            index=index,
            name=wires.names[index],
            objects=objects,
            inputs=wires.takes[index],
            outputs=wires.gives[index],
            states=segment.states,
            keeps_state=options.keep_state,
            finals=[name for name, _ in wires.outputs if name in given],
            heads=heads,
            ties=shared[index],
            undecayed=() if compiled is None else compiled.undecayed(index, variables),
            run_eagerly=compiled is not None and compiled.run_eagerly,
            recompute=options.recompute[index],
            paths=() if segment.model is None else [variable.path for variable in segment.model.variables],
            seed=None if segment.model is not None or options.seed is None else (options.seed + index) % 2**31,
        )
        found.append(Told(spec, besides))
    return found


def _of_other_stages(segments: Sequence[Segment], wires: Wires, index: int) -> dict[int, str]:
    """{id of a variable: the stage that has it}, of variables that are in other stages and not in this one."""
    found = {
        id(variable): f"the stage {wires.names[i]!r}"
        for i, segment in enumerate(segments)
        for variable in getattr(segment.model, "variables", ())
    }
    for variable in getattr(segments[index].model, "variables", ()):
        found.pop(id(variable), None)
    return found
