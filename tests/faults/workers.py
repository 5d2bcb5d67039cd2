"""Entries of worker processes that damage what they send, behind the codec."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from stages.worker.orders import Connect
from stages.worker.reply import Reply
from stages.worker.worker import Worker, serve
from tests.faults.frames import DamagedDatagrams, DamagedSocket, Envelope, cast_to_bfloat16, flip_a_bit
from transport.one_host.outbox import LocalOutbox

SENDER, KIND, MICROBATCH = 1, "gradient", 1
"""What is damaged: what stage 1 hands back of one microbatch, or of all."""


def flipping(spec: Any, board: Any) -> None:
    """One bit of one gradient."""
    serve(_Flipping, spec, board)


def narrowing(spec: Any, board: Any) -> None:
    """All gradients, as bfloat16."""
    serve(_Narrowing, spec, board)


class _Damaging(Worker):
    damage: Callable[[Any], None]
    only: int | None = None

    def _do_connect(self, order: Connect) -> Reply:
        found = super()._do_connect(order)
        for outbox in {id(outbox): outbox for outbox in self._outboxes.values() if outbox is not self.driver}.values():
            if isinstance(outbox, LocalOutbox):
                outbox._datagrams = DamagedDatagrams(outbox._datagrams, self._change)  # type: ignore[method-assign]
            else:
                outbox._socket = DamagedSocket(outbox._socket, self._change)
        return found

    def _change(self, envelope: Envelope, raw: Any) -> None:
        if (envelope.source, envelope.kind) == (SENDER, KIND) and self.only in (None, envelope.microbatch):
            type(self).damage(raw)


class _Flipping(_Damaging):
    damage = staticmethod(flip_a_bit)
    only = MICROBATCH


class _Narrowing(_Damaging):
    damage = staticmethod(cast_to_bfloat16)
