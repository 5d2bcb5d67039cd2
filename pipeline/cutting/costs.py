"""The costs of a model's calls: seconds, bytes, parameters. Values only; `pipeline.cutting.measure` measures them.

    Costs
      calls    in the model's order: what a call reads and makes, how long it takes, what it keeps for its backward
      tensors  what crosses where a cut separates the call that makes a tensor from one that reads it

All times and kept bytes are those of one microbatch of `samples` samples, on the machine that measured them.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

from pipeline.errors import SplitError

__all__ = ["CallCost", "Costs", "TensorCost", "Transfer", "Weight", "assignment"]


@dataclass(frozen=True, slots=True)
class Weight:
    """One variable of a layer.

    Attributes:
        key: Tells variables apart: a layer that is called twice names the same one twice.
        count: Its elements.
        bytes: Their bytes.
        trainable: Whether it gets a gradient, and so optimizer slots.
    """

    key: int
    count: int
    bytes: int
    trainable: bool = True


@dataclass(frozen=True, slots=True)
class TensorCost:
    """One tensor between calls.

    Attributes:
        name: What it is called at a cut.
        bytes: Bytes of one sample of it.
        differentiable: Whether a gradient of the same size comes back over a cut.
        memory: Which memory it is, by the name that `CallCost.kept` has for it; "": its own.
    """

    name: str
    bytes: float
    differentiable: bool = True
    memory: str = ""


@dataclass(frozen=True, slots=True)
class CallCost:
    """One call of a layer or operation.

    Attributes:
        name: The layer's name.
        reads: Numbers of the tensors that it takes.
        makes: Numbers of those that it gives.
        forward: Seconds of its forward in training mode.
        backward: Seconds of its backward: gradients of inputs and variables, and their accumulation.
        weights: The layer's variables, moving statistics included.
        kept: (name, bytes) of the tensors that its backward reads. Calls in one stage share those of equal name.
        weight_half: Seconds of that part of its backward that only gradients of variables need.
        left: The same as `kept`, of what this part reads: held between the halves of a backward.
    """

    name: str
    reads: tuple[int, ...]
    makes: tuple[int, ...]
    forward: float = 0.0
    backward: float = 0.0
    weights: tuple[Weight, ...] = ()
    kept: tuple[tuple[str, int], ...] = ()
    weight_half: float = 0.0
    left: tuple[tuple[str, int], ...] = ()

    @property
    def seconds(self) -> float:
        """Forward and backward."""
        return self.forward + self.backward

    @property
    def parameters(self) -> int:
        """Elements of all its variables, as `count_params` counts them."""
        return sum(weight.count for weight in self.weights)


@dataclass(frozen=True)
class Costs:
    """A model's calls with what they cost.

    Attributes:
        calls: In the model's order.
        tensors: {number: tensor}, all that calls read or make.
        inputs: Numbers of the model's inputs.
        outputs: Numbers of the model's outputs.
        samples: Samples in the microbatch that times and kept bytes are of.
    """

    calls: tuple[CallCost, ...]
    tensors: Mapping[int, TensorCost]
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    samples: int = 1

    @property
    def forward(self) -> float:
        """Seconds of all forwards of one microbatch."""
        return math.fsum(call.forward for call in self.calls)

    @property
    def backward(self) -> float:
        """Seconds of all backwards of one microbatch."""
        return math.fsum(call.backward for call in self.calls)

    def scaled(self, samples: int) -> Costs:
        """The costs of microbatches of another size, taken to be in proportion to it.

        Small microbatches take longer than that, as what TensorFlow spends on a call does not shrink with them.
        """
        if samples == self.samples:
            return self
        factor = samples / self.samples
        calls = tuple(
            replace(
                call,
                forward=call.forward * factor,
                backward=call.backward * factor,
                kept=tuple((name, round(size * factor)) for name, size in call.kept),
                weight_half=call.weight_half * factor,
                left=tuple((name, round(size * factor)) for name, size in call.left),
            )
            for call in self.calls
        )
        return replace(self, calls=calls, samples=samples)

    def memory(self, tensors: Iterable[int]) -> dict[str, int]:
        """{memory: its bytes}, of one microbatch of some tensors; those that are one memory are in it once."""
        each = [(tensor, self.tensors[tensor]) for tensor in tensors]
        return {cost.memory or f"tensor {tensor}": round(cost.bytes * self.samples) for tensor, cost in each}

    def makers(self) -> dict[int, int]:
        """{tensor: position of the call that makes it}; the model's inputs are in no call."""
        return {tensor: position for position, call in enumerate(self.calls) for tensor in call.makes}

    def readers(self) -> dict[int, tuple[int, ...]]:
        """{tensor: ascending positions of the calls that read it}, for every tensor that is read."""
        found: dict[int, list[int]] = {}
        for position, call in enumerate(self.calls):
            for tensor in dict.fromkeys(call.reads):
                found.setdefault(tensor, []).append(position)
        return {tensor: tuple(positions) for tensor, positions in found.items()}


@dataclass(frozen=True, slots=True)
class Transfer:
    """The time of a tensor's way from one worker to another, by its bytes.

    The defaults are those of ipc on two noisy cores: 1 KiB in 181 us, 4 MiB at 1.74 GB/s.
    `pipeline.cutting.transfer.measure_transfer` measures it here.

    Attributes:
        per_message: Seconds for a message of any size.
        per_byte: Seconds for each byte more.
    """

    per_message: float = 181e-6
    per_byte: float = 1 / 1.74e9

    def seconds(self, sizes: Iterable[float]) -> float:
        """Seconds for messages of these many bytes, one after the other."""
        return math.fsum(self.per_message + size * self.per_byte for size in sizes)


def assignment(cuts: Sequence[int], calls: int) -> tuple[int, ...]:
    """The stage of every call, where cuts are positions.

    Args:
        cuts: Before which calls the stages after the first begin, ascending.
        calls: How many calls there are.

    Raises:
        SplitError: A cut is out of order, out of range, or leaves an empty stage.
    """
    bounds = [0, *cuts, calls]
    if any(begin >= end for begin, end in pairwise(bounds)):
        raise SplitError(f"cuts must ascend between 1 and {calls - 1}, each once, received {list(cuts)}")
    return tuple(stage for stage, (begin, end) in enumerate(pairwise(bounds)) for _ in range(begin, end))
