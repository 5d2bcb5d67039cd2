"""Two commands that align rows: `serve_alignment` at the party with the open port, `join_alignment` at the other.

    join                                  serve
    its blinded ids            ──────▶
                               ◀──────    its blinded ids, and the answer to those
    the answer, and a mark     ──────▶
                               ◀──────    a mark

The marks are a hash of all that both found, under both secrets; where they differ, nothing is returned.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any, Final

import numpy as np

from pipeline.errors import DataError, PartyLostError, PartySilentError, PartyStoppedError
from pipeline.parties.alignment.private_set import POINT, PrivateSet
from stages.plain_text import printable
from transport.errors import MalformedMessage, PeerLost, TransportError, TransportTimeout
from transport.key_files import KeyFolder, PartyKeys, fingerprint
from transport.limits import Limits
from transport.message import Message
from transport.party_ends import PartyDoor, PartyLine
from transport.party_links import LinkBounds, PartyLink

MOST_ALIGNED: Final = 1_000_000
"""So many ids of the other party are taken unless more are asked for: 32 MB, and some two minutes."""
_WAITING: Final = 3
"""Messages of one step of the exchange, at most."""
_BLINDED, _ANSWERED, _MARK = "blinded ids", "answered ids", "mark of what both have"


def serve_alignment(
    ids: Iterable[Any],
    name: str,
    peer: str,
    listen: str,
    *,
    keys: KeyFolder | str | Path | None = None,
    most: int = MOST_ALIGNED,
    patience: float = 600.0,
    say: Callable[[str], None] = print,
    listening: Callable[[str], None] | None = None,
) -> list[int]:
    """Wait for the other party, and find the rows that both have.

    Args:
        ids: One for each row: text or whole numbers, all different.
        name: This party, whose key pair is in `keys`.
        peer: The other one, as its key is trusted here.
        listen: ``tcp://0.0.0.0:7443``, or a loopback address; port 0 takes a free one.
        keys: The folder with the keys; default as for `tapeline keys`.
        most: How many ids of the other party are taken at most.
        patience: Seconds to wait for its next message.
        say: Told, in sentences, what happens.
        listening: Called with the address once the other can connect.

    Returns:
        Numbers of the rows whose ids both have, in an order that is the same at both parties.

    Raises:
        DataError: The ids cannot be.
        KeyFileError: This party's key is not there, or others can read it.
        PartyStoppedError: What came is no honest part of such an exchange, or both found other rows.
        PartyLostError: The other party is gone.
        PartySilentError: It sent nothing.
    """
    mine = list(ids)
    private = PrivateSet(mine)
    own, public, bounds = _ends(name, peer, keys, len(mine), most)
    with PartyDoor(listen, own, {peer: public}, bounds) as door:
        say(f"{name} listens at {door.address} for {peer}; its fingerprint is {fingerprint(own.public)}")
        if listening is not None:
            listening(door.address)
        exchange = _Exchange(door, peer, patience, most)
        theirs = exchange.receive(_BLINDED)
        answer = exchange.honest(private.answered, theirs)
        exchange.send(_BLINDED, private.blinded())
        exchange.send(_ANSWERED, answer)
        rows: list[int] = exchange.honest(private.intersection, exchange.receive(_ANSWERED))
        exchange.agree(exchange.receive(_MARK), private.mark())
        exchange.send(_MARK, private.mark())
    say(f"{len(rows)} rows of {len(mine)} are {peer}'s too, which has {len(theirs) // POINT}")
    return rows


def join_alignment(
    ids: Iterable[Any],
    name: str,
    peer: str,
    at: str,
    *,
    keys: KeyFolder | str | Path | None = None,
    most: int = MOST_ALIGNED,
    patience: float = 600.0,
    say: Callable[[str], None] = print,
) -> list[int]:
    """Dial the other party, and find the rows that both have.

    Args:
        ids: As for `serve_alignment`, like all others but `at`.
        name: This party.
        peer: The other one.
        at: Its address, ``tcp://lab.example:7443``.
        keys: The folder with the keys.
        most: How many ids of the other party are taken at most.
        patience: Seconds to wait.
        say: Told, in sentences, what happens.

    Returns:
        As `serve_alignment`.

    Raises:
        NotAdmitted: The other does not let this key in, or who answers has not its key.
        TransportTimeout: Nobody answered.
        TapelineError: As for `serve_alignment`.
    """
    mine = list(ids)
    private = PrivateSet(mine)
    own, public, bounds = _ends(name, peer, keys, len(mine), most)
    with PartyLine(at, own, peer, public, bounds, patience) as line:
        say(f"{name} is connected with {peer} ({fingerprint(public)}) at {at}")
        exchange = _Exchange(line, peer, patience, most)
        exchange.send(_BLINDED, private.blinded())
        theirs, answer = exchange.receive(_BLINDED), exchange.receive(_ANSWERED)
        exchange.send(_ANSWERED, exchange.honest(private.answered, theirs))
        rows: list[int] = exchange.honest(private.intersection, answer)
        exchange.send(_MARK, private.mark())
        exchange.agree(exchange.receive(_MARK), private.mark())
    say(f"{len(rows)} rows of {len(mine)} are {peer}'s too, which has {len(theirs) // POINT}")
    return rows


class _Exchange:
    """What both ends do with their link.

    Args:
        link: The connection.
        peer: The other party.
        patience: Seconds to wait for a message.
        most: How many ids it may have.
    """

    def __init__(self, link: PartyLink, peer: str, patience: float, most: int) -> None:
        self._link, self._peer, self._patience, self._most = link, peer, patience, most

    def send(self, what: str, sent: bytes) -> None:
        """Send bytes under a name."""
        array = np.frombuffer(sent, np.uint8)
        try:
            self._link.send(self._peer, Message("reply", tensor=what, array=array), self._patience)
        except PeerLost as error:
            raise PartyLostError(f"aligning rows: {error}; no rows were found") from error
        except TransportTimeout as error:
            raise PartySilentError(f"aligning rows: {error}; no rows were found") from error

    def receive(self, what: str) -> bytes:
        """The next message, which must be what is waited for."""
        try:
            _, message = self._link.receive(self._patience, lambda peer, header: None)
        except PeerLost as error:
            raise PartyLostError(f"aligning rows, waiting for the {what}: {error}; no rows were found") from error
        except TransportTimeout as error:
            raise PartySilentError(
                f"aligning rows: {self._peer} did not send its {what} within {self._patience:g} s; no rows were found"
            ) from error
        except MalformedMessage as error:
            raise PartyStoppedError(f"aligning rows: {self._peer} sent no message of tapeline: {error}") from error
        array = message.array
        if message.kind == "error":
            raise PartyStoppedError(f"aligning rows: {self._peer} says: {printable(str(message.value)[:200])}")
        if message.tensor != what or array is None or array.dtype != np.uint8 or array.size > self._most * POINT:
            size = "nothing" if array is None else f"{array.size} bytes of {array.dtype}"
            raise self._stopped(
                f"expected the {what} of {self._peer}, at most {self._most} of {POINT} bytes, received {size} as "
                f"{message.tensor!r:.40}; with `most` more are taken"
            )
        return array.tobytes()

    def honest(self, deed: Callable[[bytes], Any], given: bytes) -> Any:
        """What `PrivateSet` makes of what came."""
        try:
            return deed(given)
        except DataError as error:
            raise self._stopped(f"{error}; no rows were found") from error

    def agree(self, theirs: bytes, mine: bytes) -> None:
        """Check that both found the same."""
        if theirs != mine:
            raise self._stopped(f"{self._peer} found other rows than this party, so none count")

    def _stopped(self, sentence: str) -> PartyStoppedError:
        """The error of this end, which the other end is told as well."""
        with suppress(TransportError):
            self._link.send(self._peer, Message("error", value=sentence), 1.0)
        return PartyStoppedError(f"aligning rows with {self._peer}: {sentence}")


def _ends(
    name: str, peer: str, keys: KeyFolder | str | Path | None, count: int, most: int
) -> tuple[PartyKeys, str, LinkBounds]:
    folder = keys if isinstance(keys, KeyFolder) else KeyFolder(keys)
    known = folder.trusted()
    if peer not in known:
        raise DataError(
            f"no key of {peer!r} is trusted here ({', '.join(known) or 'none is'}); say: tapeline keys trust {peer}.pub"
        )
    return folder.own(name), known[peer], LinkBounds(Limits(max_bytes=POINT * max(count, most)), messages=_WAITING)
