"""Forward passes of a stage that wait for their backward, or for the second half of it.

forward ──► open ──► backward, or input half ──► halfway ──► weight half
"""

from __future__ import annotations

from dataclasses import dataclass, field

from stages.errors import HandoffError
from stages.tape.contract import Opened, PassKey


@dataclass
class OpenPasses:
    """The open passes of one stage.

    Args:
        stage: Its name, for messages.
    """

    stage: str
    _open: dict[PassKey, tuple[Opened, int]] = field(default_factory=dict)
    _halfway: set[PassKey] = field(default_factory=set)

    def __contains__(self, key: PassKey) -> bool:
        return key in self._open

    def microbatches(self) -> tuple[int, ...]:
        """Microbatches whose backward is still to come."""
        return tuple(key.microbatch for key in self._open)

    def check_new(self, key: PassKey) -> None:
        """Before a forward pass.

        Raises:
            HandoffError: One of this number is open or halfway.
        """
        if key in self._open or key in self._halfway:
            raise HandoffError(
                f"stage {self.stage!r}: microbatch {key.microbatch} was forwarded already and waits for its backward; "
                "call backward first, give the new one another number, or forget it with zero_gradients()"
            )

    def open(self, key: PassKey, opened: Opened, inputs: int) -> None:
        """Keep what a forward pass gave, and how many inputs it took without masks and states."""
        self._open[key] = opened, inputs

    def of(self, key: PassKey) -> Opened:
        """What a forward pass gave.

        Raises:
            HandoffError: None of this number waits for its backward.
        """
        if key not in self._open:
            waiting = sorted(self.microbatches())
            raise HandoffError(
                f"stage {self.stage!r}: no forward of microbatch {key.microbatch} is waiting for its backward "
                f"(waiting: {waiting or 'none'}); forward it in training first, and go backward once for each"
            )
        return self._open[key][0]

    def go_halfway(self, key: PassKey) -> int:
        """The input gradient of an open pass is taken; how many inputs it had."""
        self._halfway.add(key)
        return self._open.pop(key)[1]

    def close(self, key: PassKey) -> None:
        """The weight gradient of a pass that is halfway is taken.

        Raises:
            HandoffError: None of this number is halfway.
        """
        if key not in self._halfway:
            raise HandoffError(
                f"stage {self.stage!r}: no input gradient of microbatch {key.microbatch} is waiting for its weight "
                f"gradient (waiting: {sorted(one.microbatch for one in self._halfway) or 'none'}); a backward in "
                "halves takes the input gradient first, and the weight gradient once"
            )
        self._halfway.remove(key)

    def forget(self) -> None:
        """Nothing waits any more."""
        self._open.clear()
        self._halfway.clear()


__all__ = ["OpenPasses"]
