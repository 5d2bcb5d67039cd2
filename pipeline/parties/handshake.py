"""The handshake: both ends say what they mean, and everything that differs is one error at both, before any training.

each party ─ hello ─► hub        versions, task, rows, plan's digest, a fresh nonce
hub ─ hello ─► each party        the same, and the nonces of all, which make the session's key
each ─ proof ─► the other        keyed hashes of the ids in their order and of each field of the plan
hub ─ verdict ─► each party      ready, or the names of what differs
"""

from __future__ import annotations

import hashlib
import hmac
import re
import secrets
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from typing import Any, Final

import keras
import tensorflow as tf

from pipeline.errors import PartyMismatchError, PartyStoppedError
from pipeline.parties.bound_party import BoundParty
from pipeline.parties.party import ids_mark
from pipeline.parties.party_checkpoints import EndOfEpoch
from pipeline.parties.wire import PartyWire

PROTOCOL: Final = 1
"""The version of what parties say to each other."""
_COMPARED: Final = ("protocol", "tapeline", "keras", "tensorflow", "task", "resume", "rows", "plan")
_FIELD: Final = re.compile(r"[\w.-]{1,100}")
_MOST_FIELDS: Final = 50
"""Names of fields that differ, of those that another party sends, which are told."""


def shake_hands(
    party: BoundParty, wire: PartyWire, places: Mapping[int, EndOfEpoch] | None = None
) -> tuple[bytes, int]:
    """Agree with all others.

    Args:
        party: This party.
        wire: To the others.
        places: The epochs after which this party can go on; None: it begins anew.

    Returns:
        The session's key, 32 bytes, that all parties have and nobody else; and the epoch after which all go on, 0 for
        the beginning.

    Raises:
        PartyMismatchError: They do not mean the same; names every field that differs, and no value.
    """
    mine: dict[str, Any] = {**_hello(party), "resume": places is not None}
    leads = party.name == party.plan.hub
    if leads:
        theirs = {peer: _said(wire, peer, "hello") for peer in wire.peers}
        nonces = sorted([mine["nonce"], *(str(hello.get("nonce")) for hello in theirs.values())])
        having = [hello["rows"] for hello in (mine, *theirs.values()) if hello.get("rows") is not None]
        for peer in wire.peers:
            wire.send(peer, "hello", "hello", {**mine, "rows": having[0] if having else None, "nonces": nonces})
    else:
        (hub,) = wire.peers
        wire.send(hub, "hello", "hello", {**mine, "epochs": _epochs(places, hub)})
        theirs = {hub: _said(wire, hub, "hello")}
        nonces = [str(nonce) for nonce in theirs[hub].get("nonces") or []]
        if mine["nonce"] not in nonces:
            raise PartyStoppedError(f"{hub} answered another hello than the one of this session")
    key = hashlib.sha256(b"tapeline parties\0" + "\0".join(nonces).encode()).digest()
    proof = _proof(party, key)
    for peer in wire.peers:
        wire.send(peer, "hello", "proof", proof)
    proofs = {peer: _said(wire, peer, "proof") for peer in wire.peers}
    found = {peer: _differences(mine, theirs[peer], proof, proofs[peer]) for peer in wire.peers}
    begin = 0
    if leads:
        _compare_others(theirs, proofs, proof, found)
        begin = _last_common(theirs, places)
        for peer in wire.peers:
            word = "ready" if not any(found.values()) else "refused"
            wire.send(peer, "hello", "verdict", {"verdict": word, "differs": list(found[peer]), "begin": begin})
    else:
        (hub,) = wire.peers
        verdict = _said(wire, hub, "verdict")
        begin = _whole(verdict.get("begin"))
        if begin and begin not in (places or {}):
            raise PartyStoppedError(f"{hub} wants to go on after epoch {begin}, which {party.name} has not")
        told = _field_names(verdict.get("differs"))
        found[hub] = tuple(dict.fromkeys((*found[hub], *told)))
        if verdict.get("verdict") != "ready" and not found[hub]:
            raise PartyMismatchError(f"{hub} and another party do not agree, so nothing was trained", {})
    found = {peer: names for peer, names in found.items() if names}
    if found:
        raise PartyMismatchError(_sentence(party.name, found), found)
    numbers = [hello["rows"] for hello in (mine, *theirs.values()) if hello.get("rows") is not None]
    if not numbers:
        raise PartyStoppedError("no party has rows")
    wire.rows = int(numbers[0])
    if places is not None and not begin:
        raise PartyStoppedError("there is no epoch after which all parties can go on; begin anew, without resuming")
    return key, begin


def _epochs(places: Mapping[int, EndOfEpoch] | None, peer: str) -> dict[str, Any]:
    """{epoch: the run, and the transcript with a party up to there}."""
    return {str(epoch): f"{place.run} {place.transcripts.get(peer)}" for epoch, place in (places or {}).items()}


def _last_common(theirs: Mapping[str, Mapping[str, Any]], places: Mapping[int, EndOfEpoch] | None) -> int:
    """The last epoch that all have, of one run, with equal transcripts at both ends of each connection; else 0."""
    common = set(places or {})
    for peer, hello in theirs.items():
        epochs = hello.get("epochs")
        having = epochs if isinstance(epochs, dict) else {}
        common &= {int(epoch) for epoch, mark in _epochs(places, peer).items() if having.get(epoch) == mark}
    return max(common, default=0)


def _whole(value: Any) -> int:
    return value if type(value) is int and 0 <= value < 2**40 else 0


def _hello(party: BoundParty) -> dict[str, Any]:
    try:
        own = version("tapeline")
    except PackageNotFoundError:  # its sources are on the path, and it is not installed
        own = ""
    return {
        "protocol": PROTOCOL,
        "tapeline": own,
        "keras": ".".join(keras.__version__.split(".")[:2]),
        "tensorflow": ".".join(tf.__version__.split(".")[:2]),
        "task": party.task,
        "rows": party.rows,
        "plan": party.plan.digest(),
        "nonce": secrets.token_hex(32),
    }


def _proof(party: BoundParty, key: bytes) -> dict[str, Any]:
    ids = party.party.ids
    return {"ids": None if ids is None else ids_mark(key, ids), "fields": dict(party.plan.field_marks(key))}


def _said(wire: PartyWire, peer: str, name: str) -> dict[str, Any]:
    value = wire.receive(peer, "hello", name).value
    if not isinstance(value, dict) or (name == "hello" and not _well_formed(value)):
        raise PartyStoppedError(f"{peer} sent a {name} that is none")
    return dict(value)


def _well_formed(hello: Mapping[str, Any]) -> bool:
    rows, nonces = hello.get("rows"), hello.get("nonces")
    well = isinstance(hello.get("nonce"), str) and "rows" in hello and isinstance(nonces, list | None)
    return well and (rows is None or (type(rows) is int and 0 < rows < 2**40))


def _differences(
    mine: Mapping[str, Any], theirs: Mapping[str, Any], proof: Mapping[str, Any], other: Mapping[str, Any]
) -> tuple[str, ...]:
    """Names of all that differs between two parties."""
    found = [name for name in _COMPARED if name != "rows" and mine[name] != theirs.get(name)]
    if None not in (mine["rows"], theirs["rows"]) and mine["rows"] != theirs["rows"]:
        found.append("rows")
    if not _same(proof["ids"], other.get("ids")):
        found.append("ids")
    ours, fields = proof["fields"], other.get("fields")
    fields = fields if isinstance(fields, dict) else {}
    fields_differ = [name for name in sorted({*ours, *fields}) if ours.get(name) != fields.get(name)]
    if "plan" in found and fields_differ:
        found.remove("plan")
    return (*found, *_field_names(fields_differ))


def _field_names(names: Any) -> tuple[str, ...]:
    """Those that can be names of fields, and not too many: others wrote them."""
    listed = names if isinstance(names, list) else []
    return tuple(name for name in listed if isinstance(name, str) and _FIELD.fullmatch(name))[:_MOST_FIELDS]


def _compare_others(
    theirs: Mapping[str, Mapping[str, Any]],
    proofs: Mapping[str, Mapping[str, Any]],
    proof: Mapping[str, Any],
    found: dict[str, tuple[str, ...]],
) -> None:
    """Where the hub has no rows itself, compare the others' with each other."""
    if proof["ids"] is not None:
        return
    having = [peer for peer in theirs if theirs[peer]["rows"] is not None]
    for peer in having[1:]:
        first = having[0]
        names = [] if theirs[peer]["rows"] == theirs[first]["rows"] else ["rows"]
        names += [] if _same(proofs[peer].get("ids"), proofs[first].get("ids")) else ["ids"]
        found[peer] = (*found[peer], *names)


def _same(one: Any, other: Any) -> bool:
    return one is None or other is None or hmac.compare_digest(str(one).encode(), str(other).encode())


def _sentence(name: str, found: Mapping[str, tuple[str, ...]]) -> str:
    each = [f"{name} and {peer} differ in {', '.join(names)}" for peer, names in found.items()]
    return "; ".join(each) + ": nothing was trained"


__all__ = ["PROTOCOL", "shake_hands"]
