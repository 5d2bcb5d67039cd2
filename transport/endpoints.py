"""Listening descriptors for ipc and tcp addresses, made here and handed to ZeroMQ.

ZeroMQ's own bind silently takes an ipc address away from a live receiver, and removes the socket file some time after
close, maybe that of a successor. With a descriptor of ours both are exact.
"""

from __future__ import annotations

import contextlib
import errno
import ipaddress
import secrets
import socket
from pathlib import Path
from typing import Final, NamedTuple

from transport.errors import AddressInUse, BadAddress, NotLoopback

_MAX_PATH: Final = 107  # sizeof(sockaddr_un.sun_path) - 1
_BACKLOG: Final = 256


class SocketFile(NamedTuple):
    """The file of one listening socket, told from another that took its name since."""

    path: Path
    device: int
    inode: int

    @classmethod
    def of(cls, path: Path) -> SocketFile:
        """Identifies the file that is there now."""
        status = path.lstat()
        return cls(path, status.st_dev, status.st_ino)

    def remove(self) -> None:
        """Removes the file unless it is gone or another one."""
        with contextlib.suppress(FileNotFoundError):
            if SocketFile.of(self.path) == self:
                self.path.unlink()


def ipc_path(address: str) -> Path:
    """The socket file of an ipc address.

    Raises:
        BadAddress: not `ipc:///absolute/path`, or longer than the system's 107 bytes.
    """
    name = address.removeprefix("ipc://")
    if name == address or not name.startswith("/"):
        raise BadAddress(f"expected an address like ipc:///directory/name, got {address!r}")
    if len(name.encode()) > _MAX_PATH:
        raise BadAddress(
            f"the path of a local socket may have {_MAX_PATH} bytes, {name!r} has {len(name.encode())}; "
            "choose a shorter directory (TMPDIR)"
        )
    return Path(name)


def tcp_host_port(address: str) -> tuple[str, int]:
    """Host and port of a tcp address.

    Raises:
        BadAddress: not `tcp://host:port`.
        NotLoopback: the host is not this host's loopback.
    """
    host, colon, port = address.removeprefix("tcp://").rpartition(":")
    if not address.startswith("tcp://") or not colon or not port.isascii() or not port.isdigit():
        raise BadAddress(f"expected an address like tcp://127.0.0.1:5555 (port 0 picks one), got {address!r}")
    if int(port) > 65535:
        raise BadAddress(f"a port is within 0 .. 65535, got {address!r}")
    host = "127.0.0.1" if host == "localhost" else host.removeprefix("[").removesuffix("]")
    try:
        loopback = ipaddress.ip_address(host).is_loopback
    except ValueError:
        loopback = False
    if not loopback:
        raise NotLoopback(
            f"{address!r} is not on this host's loopback (127.0.0.1, [::1], localhost). A run and its keys are for "
            "the processes of one host; other hosts cannot take part yet"
        )
    return host, int(port)


def listen_ipc(address: str) -> tuple[socket.socket, SocketFile]:
    """A listening local socket and its file, which only the owner can use.

    A file that a killed process left behind is replaced; one with a live receiver is not.
    """
    path = ipc_path(address)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        try:
            listener.bind(str(path))
        except OSError as error:
            if error.errno != errno.EADDRINUSE:
                raise BadAddress(f"cannot receive at {address}: {error.strerror}") from error
            _remove_stale(path, address)
            listener.bind(str(path))
        file = SocketFile.of(path)
        path.chmod(0o600)
        listener.listen(_BACKLOG)
        listener.setblocking(False)
    except BaseException:
        listener.close()
        raise
    return listener, file


def listen_tcp(address: str) -> tuple[socket.socket, str]:
    """A listening loopback socket, and its address with the real port."""
    host, port = tcp_host_port(address)
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((host, port))
            listener.listen(_BACKLOG)
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                raise AddressInUse(f"port {port} on {host} is in use; choose another, or 0") from error
            raise BadAddress(f"cannot receive at {address}: {error.strerror}") from error
        listener.setblocking(False)
    except BaseException:
        listener.close()
        raise
    port = listener.getsockname()[1]
    return listener, f"tcp://[{host}]:{port}" if family == socket.AF_INET6 else f"tcp://{host}:{port}"


def free_ipc_address(directory: Path) -> str:
    """An address in `directory` that nobody uses."""
    return f"ipc://{directory.absolute()}/{secrets.token_hex(6)}"


def _remove_stale(path: Path, address: str) -> None:
    if not path.is_socket():  # a plain file refuses connections too
        raise AddressInUse(f"{path} exists and is not a socket; choose another name")
    with contextlib.closing(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)) as probe:
        probe.setblocking(False)
        try:
            probe.connect(str(path))
        except ConnectionRefusedError:
            path.unlink(missing_ok=True)
            return
        except OSError as error:  # full backlog, no permission: not ours to remove
            raise AddressInUse(f"{address} is in use ({error.strerror}); choose another name") from error
    raise AddressInUse(f"{address} already has a receiver; close it or choose another name")
