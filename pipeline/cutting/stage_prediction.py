"""The predicted time and memory of one stage, and the most bytes that the stages of a worker keep at once.

What a compiled stage keeps of a microbatch, from an action on (eager tapes keep what TensorFlow sees fit):

               forward                        input half             weight half
    kept       kept tensors, outputs          what the second reads  nothing
    recompute  inputs, outputs                the same               nothing
    at once    gradients of its inputs        the same               nothing

*At once* is a stage with a loss whose outputs no other stage takes: it goes forward and backward in one function, which
has the kept tensors only while it runs; in halves, what the weight half reads is there from then on.

While a backward (or its input half) runs, there are also the gradients inside the stage that gradients of variables
read, since nothing makes TensorFlow use one before it makes the next; with `recompute` the kept tensors too.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from pipeline.plan.simulator import Cost
from stages.actions import Action, Kind

__all__ = ["StagePrediction", "peak_bytes"]


@dataclass(frozen=True, slots=True)
class StagePrediction:
    """The predicted time and memory of one stage.

    Attributes:
        name: The stage's name.
        forward: Seconds of a microbatch's forward.
        backward: Seconds of its backward.
        transfer: Seconds from the end of a forward until what later stages read is there.
        sent: Bytes that a microbatch's forward sends to other stages.
        parameters: Elements of its variables.
        memory: Bytes of variables, gradients and optimizer slots.
        activations: Bytes that one open microbatch keeps for its backward; `at_once`: while it runs.
        weight_half: Seconds of that part of a backward that only gradients of variables need.
        left: Bytes that a microbatch keeps between the halves of its backward.
        at_once: Whether it goes forward and backward in one function.
        returned: Bytes of the gradients of its inputs.
        at_work: Bytes that its backward has while it runs, beside what is kept.
        under_way: Bytes of what it takes and gives, there and back: a message of each on its way.
    """

    name: str
    forward: float
    backward: float
    transfer: float
    sent: float
    parameters: int
    memory: int
    activations: int
    weight_half: float = 0.0
    left: int = 0
    at_once: bool = False
    returned: int = 0
    at_work: int = 0
    under_way: int = 0

    @property
    def cost(self) -> Cost:
        """What the simulator asks for."""
        return Cost(self.forward, self.backward - self.weight_half, self.weight_half, self.transfer)

    def bytes_of(self, kind: Kind, halved: bool) -> int:
        """Bytes that are kept for a microbatch from an action on, less what it frees.

        Args:
            kind: The action's.
            halved: Whether its backwards come in halves.
        """
        left = self.left if halved else 0
        forward = self.returned + left if self.at_once else self.activations
        return {
            Kind.FORWARD: forward,
            Kind.BACKWARD: -forward,
            Kind.BACKWARD_INPUT: left - forward,
            Kind.BACKWARD_WEIGHT: -left,
        }[kind]


def peak_bytes(stages: Sequence[StagePrediction], program: Iterable[Action], *, between: bool = False) -> int:
    """The most bytes that microbatches take at once.

    Args:
        stages: All stages.
        program: Actions in their order, of one worker or of one stage.
        between: Count only what is kept from one action to the next, and not what one has while it runs.
    """
    actions = list(program)
    halved = {action.stage for action in actions if action.kind is Kind.BACKWARD_INPUT}
    now = peak = 0
    for action in actions:
        stage = stages[action.stage]
        works = (Kind.FORWARD,) if stage.at_once else (Kind.BACKWARD, Kind.BACKWARD_INPUT)
        if action.kind in works and not between:
            peak = max(peak, now + stage.at_work)
        now += stage.bytes_of(action.kind, action.stage in halved)
        peak = max(peak, now)
    return peak
