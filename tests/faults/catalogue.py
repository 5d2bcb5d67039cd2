"""The catalogue of faults: what each simulates, where it makes sense, how it is put in, which check must find it.

A fault happens in a stage, which must be named, or on the way between two stages, which must both be.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass

from tests.faults import in_stages, in_transit, in_updates
from tests.faults import places as at
from tests.faults.live import Live
from tests.faults.places import Place, Places

NAMES = (
    "gradient scaled by 1/M",
    "gradient scaled by M",
    "gradient of one microbatch dropped",
    "gradient of one microbatch counted twice",
    "two microbatches swapped",
    "activation from the previous step",
    "weights updated between forward and backward",
    "skip-edge gradient lost",
    "tied-weight gradient not summed",
    "regulariser lost",
    "regulariser counted per microbatch",
    "same-shape transposition",
    "sample weights ignored",
    "mask lost at a cut",
    "dropout mask redrawn in recomputation",
    "BatchNormalization updated twice",
    "one bit flipped in a frame",
    "bfloat16 cast on the wire",
    "per-stage instead of global clipping",
    "optimizer applied twice",
    "stale learning rate",
)
"""What can go wrong; every name has at least one fault below."""


@dataclass(frozen=True)
class Fault:
    """One way in which one thing goes wrong.

    Attributes:
        name: One of `NAMES`.
        how: Where in the machinery, in words.
        places: Where it makes sense in a pipeline.
        inject: Puts it in at a place for a while.
        checks: The checks of `verify` that must find it.
    """

    name: str
    how: str
    places: Places
    inject: Callable[[Live, Place], AbstractContextManager[None]]
    checks: tuple[str, ...] = ("tape",)

    def __str__(self) -> str:
        return f"{self.name}: {self.how}"


def _faults() -> Iterator[Fault]:
    for name, factor in (("gradient scaled by 1/M", in_stages.ONE_M), ("gradient scaled by M", in_stages.M)):
        yield Fault(name, "as microbatches are summed", at.trained, in_stages.scaled_sum(factor))
        yield Fault(name, "as it is handed back", at.handed_back, in_stages.scaled_output_gradient(factor))
        yield Fault(name, "at the loss", at.heads, in_stages.scaled_loss(factor))
    dropped, twice = NAMES[2:4]
    yield Fault(dropped, "as microbatches are summed", at.trained, in_stages.dropped)
    yield Fault(dropped, "on the way", at.gradients, in_transit.dropped)
    yield Fault(twice, "as microbatches are summed", at.trained, in_stages.doubled)
    yield Fault(twice, "on the way", at.gradients, in_transit.doubled)
    swapped, previous = NAMES[4:6]
    yield Fault(swapped, "on the way", at.handed_on, in_transit.swapped)
    yield Fault(swapped, "in what the driver gives", at.given_to_stages, in_transit.swapped_rows)
    yield Fault(previous, "on the way", at.activations, in_transit.previous)
    yield Fault(previous, "on the way back", at.gradients, in_transit.previous)
    yield Fault(previous, "in what the driver gives", at.given_to_stages, in_transit.previous)
    early = NAMES[6]
    yield Fault(early, "after the first forward", at.trained, in_stages.updated_after_the_first_forward)
    yield Fault(early, "after the last forward", at.trained, in_stages.updated_after_the_last_forward)
    lost = NAMES[7]
    yield Fault(lost, "on the way", at.skipping, in_transit.lost)
    yield Fault(lost, "in the sum over consumers", at.joins, in_stages.left_out)
    tied = NAMES[8]
    yield Fault(tied, "at the owner", at.tied_owners, in_stages.not_summed)
    yield Fault(tied, "at a copy", at.tied_copies, in_stages.not_replaced, ("tape", "steps"))
    yield Fault(NAMES[9], "in the stage", at.own_losses, in_stages.without_own_losses)
    yield Fault(NAMES[10], "in the stage", at.own_losses, in_stages.own_losses_per_microbatch)
    transposed = NAMES[11]
    yield Fault(transposed, "in the stage", at.square, in_stages.transposed)
    yield Fault(transposed, "on the way", at.square_edges, in_transit.transposed)
    yield Fault(NAMES[12], "at the loss", at.heads, in_stages.unweighted)
    yield Fault(NAMES[13], "on the way", at.masks, in_transit.unmasked)
    yield Fault(NAMES[13], "in what a microbatch weighs", at.masked_heads, in_stages.masks_not_counted)
    yield Fault(NAMES[14], "in the stage", at.dropouts_recomputed, in_stages.redrawn)
    yield Fault(NAMES[15], "in the stage", at.normalised, in_stages.statistics_twice, ("steps",))
    yield Fault(NAMES[16], "on the way", at.all_in_frames, in_transit.flipped)
    yield Fault(NAMES[17], "on the way", at.floats_in_frames, in_transit.narrowed)
    yield Fault(NAMES[18], "in the update", at.trained, in_updates.clipped_by_itself, ("steps",))
    yield Fault(NAMES[19], "in the update", at.trained, in_updates.applied_twice, ("steps",))
    yield Fault(NAMES[20], "in the update", at.trained, in_updates.old_rate, ("steps",))


FAULTS = tuple(_faults())
