"""Verifications without what is made unasked: the check "own", and a second run of the reference where it differs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from pipeline.verify.by_own import ByOwn
from pipeline.verify.verification import Verification
from tests.faults.live import replaced


@contextmanager
def without_own() -> Iterator[None]:
    """The user's own objects are not looked at, and the reference is taken to repeat itself."""
    refused = replaced(ByOwn, "refused", lambda _: property(lambda self: "left out by a test"))
    with refused, replaced(Verification, "_chance", lambda _: lambda self, names: ""):
        yield
