"""All faults that are planted, by the room that they are in."""

from __future__ import annotations

from tests.planted import in_copies, in_flow, in_numbers, in_processes, in_training, in_verification
from tests.planted.planting import Planted

FAULTS: dict[str, tuple[Planted, ...]] = {
    "Tapes": in_numbers.TAPES,
    "Backwards in halves": in_numbers.HALVES,
    "Sums of gradients": in_numbers.SUMS,
    "What a microbatch weighs": in_numbers.WEIGHTS,
    "Wiring and masks": in_flow.WIRING,
    "Windows of time": in_flow.WINDOWS,
    "Plans": in_flow.PLANS,
    "Optimizers and loss scaling": in_training.OPTIMIZERS,
    "Changes while training": in_training.CHANGES,
    "Checkpoints": in_training.CHECKPOINTS,
    "Copies of the user's objects": in_copies.COPIES,
    "Verification": in_verification.VERIFICATION,
    "Transport": in_processes.TRANSPORT,
    "Launch and runtime": in_processes.RUNTIME,
}
