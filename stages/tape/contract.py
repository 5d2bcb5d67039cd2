"""The contract of a stage's tapes, which stay open between forward and backward.

    forward(key, given)              → outputs and losses; the tape stays open under `key`
    infer(given, window)             → the same for evaluation: no tape
    backward(key, output_gradients)  → input gradients; variable gradients are accumulated
    backward_input(key, output_gradients), later backward_weight(key)   → the same in two halves
    gradients()                      → per variable the sum over microbatches, or None
    apply(optimizer, scale, divisor) → one update from those sums, which are cleared

Two classes keep it: `stages.tape.eager` and `stages.tape.compiled`. Inputs and outputs are flat values followed by the
masks of those that have one (`stages.tape.model_call`); `masked` says which.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, NamedTuple

from stages.loss.heads import Objective
from stages.tape.accumulate import Contribution, dense


class PassKey(NamedTuple):
    """The microbatch and window of the forward pass that a tape belongs to."""

    microbatch: int
    window: int = 0


class Blocks(NamedTuple):
    """The blocks of windows that gradients stay in (truncation); one block unless said otherwise.

    Attributes:
        number: Blocks per microbatch.
        length: Windows per block; None: all.
    """

    number: int = 1
    length: int | None = None

    def of(self, key: PassKey) -> int:
        """The block that a window is in, among those of all microbatches."""
        return key.microbatch * self.number + (0 if self.length is None else key.window // self.length)

    def completes(self, key: PassKey) -> bool:
        """Whether a window is the last of its block to go backward."""
        return (key.window if self.length is None else key.window % self.length) == 0


class PassInputs(NamedTuple):
    """The arguments of one forward pass.

    Attributes:
        inputs: Eager tensors (n_k, ...), flat, followed by the masks of those that have one.
        share: The microbatch's part of the batch, n_k / N: own losses count with it, so they count once a batch.
        masked: Which inputs the masks belong to.
        objective: What the part's heads need for their losses; None: no losses are computed.
    """

    inputs: Sequence[Any]
    share: float
    masked: Sequence[int] = ()
    objective: Objective | None = None


class Opened(NamedTuple):
    """The results of a forward pass.

    Attributes:
        structure: The model's nesting, with the outputs (eager) or 0 (compiled) at its leaves; None where the outputs
            come back to nobody.
        outputs: The outputs, flat, followed by the masks of those that have one.
        own_loss: The weighted sum of the part's own losses, a float scalar tensor, or None.
        losses: With an objective, one float scalar tensor per head: its loss times what the microbatch weighs.
        masked: Which outputs the masks belong to.
    """

    structure: Any
    outputs: tuple[Any, ...]
    own_loss: Any | None
    losses: tuple[Any, ...] = ()
    masked: tuple[int, ...] = ()

    @property
    def values(self) -> tuple[Any, ...]:
        """The outputs without their masks."""
        return self.outputs[: len(self.outputs) - len(self.masked)] if self.outputs else ()

    @property
    def masks(self) -> dict[int, Any]:
        """{output: its mask}."""
        return dict(zip(self.masked, self.outputs[len(self.outputs) - len(self.masked) :], strict=True))


class Tapes(ABC):
    """Open tapes and accumulated gradients of one part; see the module's drawing.

    Attributes:
        loss_scale: Factor on every loss while it is differentiated; accumulated gradients are this much too large.
        blocks: How windows are grouped when gradients are added.
        halves: Whether backwards will come in halves; set before forward.
    """

    loss_scale: float
    blocks: Blocks
    halves: bool

    @property
    def traces(self) -> int | None:
        """How many functions were traced so far; None where the part is run eagerly."""
        return None

    @abstractmethod
    def forward(self, key: PassKey, given: PassInputs) -> Opened:
        """Run the part in training, with its heads' losses where there is an objective; its tape stays open."""

    @abstractmethod
    def infer(self, given: PassInputs, window: int = 0) -> Opened:
        """Run the part for evaluation: no tape, `training=False`."""

    def backward(self, key: PassKey, output_gradients: Sequence[Any | None]) -> tuple[Any | None, ...]:
        """Close the tape: accumulate dL/dvariables, return dL/dinputs. An output without a gradient is no target."""
        found = self.backward_input(key, output_gradients)
        self.backward_weight(key)
        return found

    @abstractmethod
    def backward_input(self, key: PassKey, output_gradients: Sequence[Any | None]) -> tuple[Any | None, ...]:
        """Return dL/dinputs; what dL/dvariables need is kept until `backward_weight`, which accumulates them."""

    @abstractmethod
    def backward_weight(self, key: PassKey) -> None:
        """Accumulate dL/dvariables of a microbatch whose `backward_input` is done. Ascending, as backwards are."""

    def gradients(self) -> list[Any | None]:
        """Accumulated dL/dvariables, dense, in the order of the trainable variables; None where none exists."""
        return [dense(gradient) for gradient in self.as_given()]

    @abstractmethod
    def as_given(self) -> list[Any | None]:
        """The same as the optimizer gets them: tensors, or `tf.IndexedSlices` with rows that are not summed."""

    @abstractmethod
    def contributions(self, places: Sequence[int]) -> list[Contribution]:
        """What each microbatch adds to some variables, one entry per microbatch (or one for all, compiled)."""

    @abstractmethod
    def replace(self, places: Sequence[int], totals: Sequence[Any | None]) -> None:
        """Put other sums in place of some accumulated ones."""

    @abstractmethod
    def apply(self, optimizer: Any, scale: float | None, divisor: float | None = None) -> None:
        """One update from the accumulated gradients (over `divisor`, times `scale`), which are then cleared."""

    @abstractmethod
    def forget_updates(self) -> None:
        """Let the next update read the optimizer's numbers anew."""

    @abstractmethod
    def forget_traces(self) -> None:
        """Let the next forward read the layers' and losses' settings anew; tapes that are open stay as they are."""

    @abstractmethod
    def clear(self, failed: bool = False) -> None:
        """Drop open tapes and sums; after a call that `failed`, also what it may have added before it did."""


__all__ = ["Blocks", "Opened", "PassInputs", "PassKey", "Tapes"]
