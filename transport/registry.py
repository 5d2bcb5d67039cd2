"""The registry of transports, by the scheme of their addresses.

ZeroMQ is imported with the first transport that needs it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from os import PathLike
from pathlib import Path
from typing import Final

from transport.channel import Transport
from transport.errors import BadAddress
from transport.inproc import InprocTransport
from transport.limits import DEFAULT_LIMITS, Limits
from transport.one_host.local import LocalTransport
from transport.saying import did_you_mean

AUTO: Final = "local"
"""The scheme for processes of one host where nobody asks for another."""


def _ipc(directory: Path | None, limits: Limits, keys: Sequence[str] | None) -> Transport:
    from transport.zeromq import IpcTransport

    return IpcTransport(directory, limits)


def _tcp(directory: Path | None, limits: Limits, keys: Sequence[str] | None) -> Transport:
    from transport.keys import RunKeys
    from transport.zeromq import TcpTransport

    return TcpTransport(None, limits, None if keys is None else RunKeys(*keys))


TRANSPORTS: dict[str, Callable[[Path | None, Limits, Sequence[str] | None], Transport]] = {
    "inproc": lambda directory, limits, keys: InprocTransport(directory, limits),
    "local": lambda directory, limits, keys: LocalTransport(directory, limits),
    "ipc": _ipc,
    "tcp": _tcp,
}
"""Scheme -> factory(directory, limits, keys)."""


def open_transport(
    scheme_or_address: str,
    directory: str | PathLike[str] | None = None,
    limits: Limits = DEFAULT_LIMITS,
    keys: Sequence[str] | None = None,
) -> Transport:
    """Opens the transport of a scheme ("ipc") or of an address ("ipc:///run/x/stage0").

    Args:
        scheme_or_address: "inproc", "local", "ipc", "tcp", or an address that begins with one of them.
        directory: where ipc puts its socket files; by default a private temporary one, removed on close.
        limits: the largest message, the same on both sides.
        keys: of the run (`new_keys`), for tcp, the same on both sides; default: those of this process and its forks.

    Raises:
        BadAddress: an unknown scheme.
    """
    scheme = scheme_or_address.partition("://")[0]
    if scheme not in TRANSPORTS:
        known = ", ".join(TRANSPORTS)
        raise BadAddress(f"unknown transport {scheme!r}, known are {known}{did_you_mean(scheme, TRANSPORTS)}")
    return TRANSPORTS[scheme](None if directory is None else Path(directory), limits, keys)


def new_keys(scheme: str) -> list[str] | None:
    """Keys of a run that nobody else has, for `open_transport`, or None where a scheme's connections need none."""
    if scheme != "tcp":
        return None
    from transport.keys import RunKeys

    return RunKeys.new().plain()
