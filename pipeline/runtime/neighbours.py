"""The neighbours of a worker: stages that it sends to, those upstream of each, and masks that some do not get."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from stages.worker.stage_spec import StageSpec
from transport.message import DRIVER


def neighbours(placed: Sequence[StageSpec]) -> set[int]:
    """Stages in other workers that a worker sends to: consumers downstream, producers upstream, sharers of variables.

    Args:
        placed: The stages that the worker hosts.
    """
    found: set[int] = set()
    for spec in placed:
        found |= {consumer for _, consumers in spec.outputs for consumer in consumers}
        found |= {source for _, source in spec.inputs if source != DRIVER}
        found |= {stage for tie in spec.ties for stage in tie.stages if stage != spec.index}
    return found - {spec.index for spec in placed}


def upstream_of(specs: Mapping[int, StageSpec]) -> dict[int, list[int]]:
    """{stage: the stages that it takes tensors from}."""
    return {i: sorted({source for _, source in spec.inputs if source != DRIVER}) for i, spec in specs.items()}


def unmasked_pairs(
    specs: Mapping[int, StageSpec], strips: Mapping[int, Sequence[str]]
) -> dict[int, list[tuple[str, int]]]:
    """{stage: [(tensor, consumer that gets it without its mask)]}, since an earlier consumer takes the mask off.

    Args:
        specs: The stages by number.
        strips: {stage: names of inputs that lose their mask there}.
    """
    return {
        index: [
            (name, consumer)
            for name, consumers in spec.outputs
            for consumer in consumers
            if any(name in strips[earlier] for earlier in consumers if earlier < consumer)
        ]
        for index, spec in specs.items()
    }


__all__ = ["neighbours", "unmasked_pairs", "upstream_of"]
