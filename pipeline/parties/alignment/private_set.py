"""Private set intersection of two parties' row ids, by Diffie and Hellman in the group ristretto255.

    here                                   there
    a H(x) for each x, sorted   ──────▶    b (a H(x)), in the order in which they came   ──────▶
                                ◀──────    b H(y) for each y, sorted
    a (b H(y)), in that order   ──────▶
    both: what is in {ab H(x)} and in {ab H(y)} is in both sets

Each learns which of its own ids the other has too, and how many the other has. Sorting by the blinded points hides in
which order the ids stand. What this is not: safe from a party that lies. One that sends ids it guesses learns whether
they are there; so small domains (birthdays, postal codes) can be tried out in full by who does not keep to the rules.
Every exchange has fresh secrets of its own. The set of ids is never shown, but who reads the process's memory reads it.

Source: Meadows 1986; Huberman, Franklin and Hogg 1999; the group: RFC 9496, by libsodium (`rbcl`).
"""

from __future__ import annotations

import hashlib
import importlib
from collections.abc import Iterable
from itertools import pairwise
from typing import Any, Final

from pipeline.errors import DataError
from pipeline.parties.row_ids import id_bytes

POINT: Final = 32
"""Bytes of a point."""
MOST_IDS: Final = 10_000_000
_TAG: Final = b"tapeline row id 1\x00"


class PrivateSet:
    """One party's side of one exchange.

    An id is text or a whole number; the text "7" and the number 7 are two ids.

    Args:
        ids: One for each row, all different.

    Raises:
        DataError: An id repeats, is neither text nor a whole number, or there are none; the group's library is not
            installed.
    """

    def __init__(self, ids: Iterable[Any]) -> None:
        self._group = _group()
        self._hashes = [id_hash(one) for one in ids]
        if not 0 < len(self._hashes) <= MOST_IDS:
            raise DataError(f"an intersection takes 1 to {MOST_IDS} ids, received {len(self._hashes)}")
        if len(set(self._hashes)) != len(self._hashes):
            raise DataError(f"row ids must differ, received {len(self._hashes) - len(set(self._hashes))} repeated ones")
        self._secret = self._group.crypto_core_ristretto255_scalar_random()
        blinded = [
            (self._times(self._group.crypto_core_ristretto255_from_hash(hashed)), row)
            for row, hashed in enumerate(self._hashes)
        ]
        blinded.sort()
        self._rows = [row for _, row in blinded]
        self._sent = b"".join(point for point, _ in blinded)
        self._theirs: list[bytes] | None = None
        self._common: list[bytes] | None = None

    def blinded(self) -> bytes:
        """What is sent first: this party's ids as points that nobody else can read, 32 bytes each, sorted."""
        return self._sent

    def answered(self, theirs: bytes) -> bytes:
        """The other party's points with this one's secret on top, in the order in which they came.

        Args:
            theirs: What the other's `blinded` gave.

        Raises:
            DataError: It is no such thing: of another length, points that are none, one twice, not sorted; or this
                exchange has answered once.
        """
        if self._theirs is not None:
            raise DataError("an exchange of ids answers once: begin another one, with fresh secrets")
        points = self._points(theirs, "the other party's ids")
        if any(one >= next_one for one, next_one in pairwise(points)):
            raise DataError("the other party's ids must be sorted points that differ, received others")
        answer = [self._times(point) for point in points]
        self._theirs = answer
        return b"".join(answer)

    def intersection(self, answer: bytes) -> list[int]:
        """The rows whose ids both have, in an order that is the same at both parties.

        Args:
            answer: What the other's `answered` gave for this party's `blinded`.

        Returns:
            Numbers of this party's rows, ordered by the hash of their ids.

        Raises:
            DataError: There was no `answered` yet, or the answer is not one of as many points as were sent.
        """
        if self._theirs is None:
            raise DataError("an intersection needs the other party's ids first: call `answered` with them")
        mine = self._points(answer, "the answer to this party's ids")
        if len(mine) != len(self._rows) or len(set(mine)) != len(mine):
            raise DataError(f"expected an answer of {len(self._rows)} different points, received {len(set(mine))}")
        both = set(self._theirs)
        self._common = sorted(both.intersection(mine))
        rows = [row for row, point in zip(self._rows, mine, strict=True) if point in both]
        return sorted(rows, key=lambda row: self._hashes[row])

    def mark(self) -> bytes:
        """A hash of what `intersection` found in common: of points under both secrets, so it tells nothing of ids.

        Raises:
            DataError: There was no `intersection` yet.
        """
        if self._common is None:
            raise DataError("a mark is of what was found: call `intersection` first")
        return hashlib.blake2b(_TAG + b"".join(self._common), digest_size=32).digest()

    def _times(self, point: bytes) -> bytes:
        return bytes(self._group.crypto_scalarmult_ristretto255(self._secret, point))

    def _points(self, sent: bytes, what: str) -> list[bytes]:
        if not sent or len(sent) % POINT or len(sent) > MOST_IDS * POINT:
            raise DataError(f"{what} must be 1 to {MOST_IDS} points of {POINT} bytes, received {len(sent)} bytes")
        points = [sent[at : at + POINT] for at in range(0, len(sent), POINT)]
        valid = self._group.crypto_core_ristretto255_is_valid_point
        if not all(any(point) and valid(point) for point in points):
            raise DataError(f"{what} must be points of the group, received others")
        return points


def id_hash(one: Any) -> bytes:
    """64 bytes that stand for an id, the same at every party.

    Raises:
        DataError: It is neither text nor a whole number.
    """
    item = getattr(one, "item", None)
    value = item() if callable(item) else one  # of NumPy
    said = id_bytes(value)
    if said is None:
        raise DataError(f"a row id must be text or a whole number, received {type(value).__name__}")
    return hashlib.blake2b(_TAG + said).digest()


def _group() -> Any:
    try:
        return importlib.import_module("rbcl")
    except ImportError as error:
        raise DataError("aligning rows in private takes a group library: pip install 'tapeline[psi]'") from error
