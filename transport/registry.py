"""The registry of transports, by the scheme of their addresses."""

from __future__ import annotations

from collections.abc import Callable
from os import PathLike
from pathlib import Path
from typing import Final

from transport.channel import Transport
from transport.errors import BadAddress
from transport.inproc import InprocTransport
from transport.keys import RunKeys
from transport.limits import DEFAULT_LIMITS, Limits
from transport.one_host.local import LocalTransport
from transport.saying import did_you_mean
from transport.zeromq import IpcTransport, TcpTransport

AUTO: Final = "local"
"""The scheme for processes of one host where nobody asks for another."""

TRANSPORTS: dict[str, Callable[[Path | None, Limits], Transport]] = {
    "inproc": InprocTransport,
    "local": LocalTransport,
    "ipc": IpcTransport,
    "tcp": TcpTransport,
}
"""Scheme -> factory(directory, limits)."""


def open_transport(
    scheme_or_address: str,
    directory: str | PathLike[str] | None = None,
    limits: Limits = DEFAULT_LIMITS,
    keys: RunKeys | None = None,
) -> Transport:
    """Opens the transport of a scheme ("ipc") or of an address ("ipc:///run/x/stage0").

    Args:
        scheme_or_address: "inproc", "local", "ipc", "tcp", or an address that begins with one of them.
        directory: where ipc puts its socket files; by default a private temporary one, removed on close.
        limits: the largest message, the same on both sides.
        keys: of the run, for tcp, the same on both sides; default: those of this process and its forks.

    Raises:
        BadAddress: an unknown scheme.
    """
    scheme = scheme_or_address.partition("://")[0]
    if scheme not in TRANSPORTS:
        known = ", ".join(TRANSPORTS)
        raise BadAddress(f"unknown transport {scheme!r}, known are {known}{did_you_mean(scheme, TRANSPORTS)}")
    if keys is not None and scheme == "tcp":
        return TcpTransport(None, limits, keys)
    return TRANSPORTS[scheme](None if directory is None else Path(directory), limits)
