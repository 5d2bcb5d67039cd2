"""A party's wire to the others: what may come is known before it comes, and both ends keep a record of what crossed.

Rules:

1. A message that is not expected now (wrong tensor, step, microbatch, shape or dtype, twice the same, a name that the
   protocol has not on this way) ends the session before memory for its array is taken. So no more is kept than one
   message of each name.
2. Nothing that is not finite is sent or used.
3. The transcript of a step is a hash over the one before it and all tensors that crossed, in the plan's order: both
   ends make it of what they sent and received, and it must be equal before either applies anything.
4. Waiting has an end, and says for whom, for what and since when.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Mapping, Set
from typing import Any, Final, NamedTuple

import numpy as np

from pipeline.errors import PartyLostError, PartySilentError, PartyStoppedError
from pipeline.parties.party_plan import PartyEdge, PartyPlan
from transport.codec import Header
from transport.errors import MalformedMessage, PeerLost, TransportTimeout
from transport.message import Message, Plain
from transport.party_links import PartyLink

ACTIVATION: Final = "activation"
GRADIENT: Final = "gradient"
SAY_EVERY: Final = 10.0
"""Seconds after which a wait is told, and again."""
_FROM_ALL: Final = frozenset({("hello", "hello"), ("hello", "proof"), ("stop", "bye"), ("error", "")})
_FROM_HUB: Final = _FROM_ALL | {("hello", "verdict"), *(("command", name) for name in ("begin", "commit", "order"))}
_TO_HUB: Final = _FROM_ALL | {("reply", "prepared")}
_SHARED: Final = {"loss": "loss", "metrics": "metrics", "predictions": "outputs"}
"""{name of an output: the plan's grant of it}."""
_LONGEST: Final = 600


class Awaited(NamedTuple):
    """The mark of a message that is waited for.

    Attributes:
        kind: Of the message.
        name: Of its tensor, or what a control message is about.
        microbatch: Its number; 0 of a control message.
    """

    kind: str
    name: str
    microbatch: int = 0

    def __str__(self) -> str:
        place = f", microbatch {self.microbatch}" if self.kind in (ACTIVATION, GRADIENT) else ""
        return f"{self.kind} {self.name!r}{place}"


class PartyWire:
    """One party's messages in one session.

    Args:
        plan: What may cross.
        name: This party.
        link: Its connections.
        say: Told, each ten seconds, what is waited for.

    Attributes:
        step: The step that is under way.
        sizes: Rows of its microbatches.
        rows: Rows of everybody, once known: of the array of an epoch's order.
        sent: Bytes of tensors that were sent, in all.
        received: Bytes of tensors that were received, in all.
    """

    def __init__(self, plan: PartyPlan, name: str, link: PartyLink, say: Callable[[str], None]) -> None:
        self.plan, self.name, self._link, self._say = plan, name, link, say
        self.step, self.rows = 0, 0
        self.sizes: tuple[int, ...] = ()
        self.sent = self.received = 0
        self._edges = {edge.tensor: edge for edge in plan.crossing(name)}
        self._inbox: dict[tuple[str, Awaited], Message] = {}
        self._crossed: dict[tuple[str, str, str, int], bytes] = {}
        self._chain = dict.fromkeys(link.peers, b"\0" * 32)

    @property
    def peers(self) -> tuple[str, ...]:
        """The parties at the other ends."""
        return self._link.peers

    def begin(self, step: int, sizes: tuple[int, ...]) -> None:
        """Expect the tensors of a step from now on."""
        self.step, self.sizes = step, sizes
        self._crossed.clear()

    def send_tensor(self, kind: str, edge: PartyEdge, microbatch: int, array: np.ndarray[Any, Any] | None) -> None:
        """Send an activation down an edge, or a gradient up; None: there is no gradient.

        Raises:
            PartyStoppedError: It is not finite.
        """
        peer = self.other_end(edge)
        self._finite(kind, edge, microbatch, array, self.name)
        self._note(peer, kind, edge.tensor, microbatch, array)
        self.sent += 0 if array is None else array.nbytes
        self._send(peer, Message(kind, step=self.step, tensor=edge.tensor, microbatch=microbatch, array=array))

    def receive_tensor(self, kind: str, edge: PartyEdge, microbatch: int) -> np.ndarray[Any, Any] | None:
        """The activation or gradient of an edge.

        Raises:
            PartyStoppedError: It is not finite, or something unexpected came.
            PartyLostError: The party is gone.
            PartySilentError: Nothing came.
        """
        peer = self.other_end(edge)
        array = self._receive(peer, Awaited(kind, edge.tensor, microbatch)).array
        self._finite(kind, edge, microbatch, array, peer)
        self._note(peer, kind, edge.tensor, microbatch, array)
        self.received += 0 if array is None else array.nbytes
        return array

    def send(
        self, peer: str, kind: str, name: str, value: Plain = None, array: np.ndarray[Any, Any] | None = None
    ) -> None:
        """Send a control message."""
        self._send(peer, Message(kind, step=self.step, tensor=name, value=value, array=array))

    def receive(self, peer: str, kind: str, name: str) -> Message:
        """A control message of the step that is under way."""
        return self._receive(peer, Awaited(kind, name))

    def tell_the_end(self, sentence: str) -> None:
        """Tell all others, as far as they are there, why this party ends the session."""
        for peer in self.peers:
            try:
                self._link.send(peer, Message("error", step=self.step, value=sentence[:_LONGEST]), 1.0)
            except (PeerLost, TransportTimeout):
                continue

    def transcript(self, peer: str) -> str:
        """The hash of all that crossed to and from a party up to this step, 64 hexadecimal digits."""
        chain = hashlib.blake2b(self._chain[peer] + self.step.to_bytes(8, "little"), digest_size=32)
        for kind in (ACTIVATION, GRADIENT):
            for edge in self.plan.between(self.name, peer):
                for microbatch in range(len(self.sizes)):
                    chain.update(self._crossed.get((peer, kind, edge.tensor, microbatch), b"-"))
        return chain.hexdigest()

    def committed(self) -> None:
        """Let the next step's transcripts go on from this one's."""
        self._chain = {peer: bytes.fromhex(self.transcript(peer)) for peer in self.peers}
        self._crossed.clear()

    def chain(self) -> dict[str, str]:
        """{neighbour: the transcript's hash up to the last commit, 64 hexadecimal digits}."""
        return {peer: chain.hex() for peer, chain in self._chain.items()}

    def go_on(self, chain: Mapping[str, str]) -> None:
        """Let transcripts go on from a checkpoint's."""
        self._chain = {peer: bytes.fromhex(chain[peer]) for peer in self.peers}

    def other_end(self, edge: PartyEdge) -> str:
        """The party at the other end of an edge."""
        ends = (self.plan.owner(edge.source), self.plan.owner(edge.target))
        return ends[1] if ends[0] == self.name else ends[0]

    def _send(self, peer: str, message: Message) -> None:
        try:
            self._link.send(peer, message, self.plan.patience)
        except PeerLost:
            self._heard_before_the_end(peer)
            raise PartyLostError(
                f"{peer} is gone (its connection has ended) in step {self.step}, when {message} was to be sent"
            ) from None
        except TransportTimeout as error:
            raise PartySilentError(f"step {self.step}: {error}; {message} could not be sent") from error

    def _heard_before_the_end(self, peer: str) -> None:
        """Raise what a party that is gone said last, if it said why."""
        try:
            while True:
                self._kept(*self._link.receive(0.0, self._check))
        except (PeerLost, TransportTimeout, MalformedMessage):
            return

    def _receive(self, peer: str, awaited: Awaited) -> Message:
        begin = time.monotonic()
        told = SAY_EVERY
        while (peer, awaited) not in self._inbox:
            waited = time.monotonic() - begin
            if waited >= self.plan.patience:
                raise PartySilentError(
                    f"{self.name} waited {self.plan.patience:g} s for {peer}'s {awaited} in step {self.step}"
                )
            if waited >= told:
                told += SAY_EVERY
                self._say(f"{self.name} waits for {peer}'s {awaited} in step {self.step}, {waited:.0f} s now")
            try:
                self._kept(*self._link.receive(min(SAY_EVERY, self.plan.patience - waited), self._check))
            except TransportTimeout:
                continue
            except PeerLost as error:
                raise PartyLostError(
                    f"{error} in step {self.step}, when {self.name} waited for {peer}'s {awaited}"
                ) from None
            except MalformedMessage as error:
                raise PartyStoppedError(f"a message that is none of this protocol came: {error}") from error
        return self._inbox.pop((peer, awaited))

    def _kept(self, sender: str, message: Message) -> None:
        if message.kind == "error":
            said = "".join(letter for letter in str(message.value)[:_LONGEST] if letter.isprintable() or letter == "\n")
            raise PartyStoppedError(f"{sender} ended the session in step {message.step}: {said}")
        if message.kind == "stop":
            self._link.let_go(sender)
        self._inbox[(sender, Awaited(message.kind, message.tensor, message.microbatch))] = message

    def _check(self, sender: str, header: Header) -> None:
        """The first rule of the module; see `transport.party_links.HeaderCheck`."""
        _, kind, _, step, _, _, tensor, microbatch, window = header.fields[:9]
        fault = ""
        edge = self._edges.get(tensor)
        if (sender, Awaited(kind, tensor, microbatch)) in self._inbox:
            fault = "it came twice"
        elif kind in (ACTIVATION, GRADIENT):
            mine = None if edge is None else self.plan.owner(edge.target if kind == ACTIVATION else edge.source)
            if edge is None or mine != self.name or self.other_end(edge) != sender:
                fault = "the plan has no such tensor on this way"
            elif step != self.step or window:
                fault = f"step {self.step} is under way"
            elif not 0 <= microbatch < len(self.sizes):
                fault = f"the step has {len(self.sizes)} microbatches"
            elif (sender, kind, tensor, microbatch) in self._crossed:
                fault = "it came twice"
            elif header.dtype is None and kind == GRADIENT:
                return
            elif (
                header.dtype is None
                or header.dtype.name != edge.dtype
                or header.shape
                != (
                    self.sizes[microbatch],
                    *edge.shape,
                )
            ):
                fault = f"expected {edge.dtype} {(self.sizes[microbatch], *edge.shape)}"
        elif (kind, tensor) not in self._controls(sender) or microbatch or window:
            fault = "there is no such message between parties on this way"
        elif kind == "command" and tensor == "order":
            if header.dtype is None or header.dtype.name != "int64" or header.shape != (self.rows,):
                fault = f"expected int64 ({self.rows},)"
        elif header.dtype is not None and (kind, tensor) != ("output", "predictions"):
            fault = "it comes with an array"
        if fault:
            found = "no array" if header.dtype is None else f"{header.dtype.name} {header.shape}"
            raise PartyStoppedError(
                f"{sender} sent what must not be: {kind} {tensor!r} of step {step}, microbatch {microbatch}, {found}; "
                f"{fault}"
            )

    def _controls(self, sender: str) -> Set[tuple[str, str]]:
        """(kind, name) of all messages without a tensor of the plan that a party may send to this one."""
        judge, found = self.plan.judge.owner, _TO_HUB if self.name == self.plan.hub else _FROM_HUB
        if self.name != judge and sender in (judge, self.plan.hub):
            found |= {("output", name) for name, grant in _SHARED.items() if self.name in self.plan.sees(grant)}
        return found

    def _note(self, peer: str, kind: str, tensor: str, microbatch: int, array: np.ndarray[Any, Any] | None) -> None:
        mark = hashlib.blake2b(f"{kind} {tensor} {microbatch}".encode(), digest_size=32)
        if array is not None:
            mark.update(f" {array.dtype.name} {array.shape} ".encode())
            mark.update(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
        self._crossed[(peer, kind, tensor, microbatch)] = mark.digest()

    def _finite(
        self, kind: str, edge: PartyEdge, microbatch: int, array: np.ndarray[Any, Any] | None, whose: str
    ) -> None:
        if array is not None and not np.isfinite(array).all():
            raise PartyStoppedError(
                f"{kind} {edge.tensor!r} of step {self.step}, microbatch {microbatch}, made by {whose}, has "
                f"{int(np.size(array) - np.isfinite(array).sum())} values that are not finite"
            )


__all__ = ["ACTIVATION", "GRADIENT", "PartyWire"]
