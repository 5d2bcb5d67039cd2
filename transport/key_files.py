"""Key files of parties: a pair that only its owner can read, a public file to give away, and the pinned keys of others.

    FOLDER/NAME.key            mode 0600: name, public and secret key
    FOLDER/NAME.pub            name and public key, to be given away
    FOLDER/trusted/NAME.pub    the pinned public key of another party; the name is a local one

Rules:

1. A file of ours appears whole or not at all, never takes the place of another one, and never goes through a symbolic
   link: it is written under a name that nobody has (O_EXCL, O_NOFOLLOW), synchronised, and then linked to its own.
2. A secret file is read only if it is a plain file of this user that nobody else can open; a pinned key only if nobody
   else can write its file, the folder that it is in, or the one above.
3. What is pinned is the key. A name that is pinned to one key is never silently pinned to another.
"""

from __future__ import annotations

import hashlib
import os
import re
import secrets
import stat
import tomllib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import zmq
from zmq.utils import z85

from transport.errors import KeyFileError

FOLDER_VARIABLE: Final = "TAPELINE_KEYS"
"""The variable of the environment that names another folder than the default, ``~/.tapeline``."""

_NAME: Final = re.compile(r"[A-Za-z][A-Za-z0-9_-]{0,63}")
_LARGEST: Final = 4096
"""Bytes that a key file may have."""
_PUBLIC_FIELDS: Final = ("name", "public")
_SECRET_FIELDS: Final = ("name", "public", "secret")


@dataclass(frozen=True)
class PartyKeys:
    """The key pair of one party.

    Args:
        name: The party.
        public: 40 characters (Z85).
        secret: The same.
    """

    name: str
    public: str
    secret: str = field(repr=False)

    @classmethod
    def new(cls, name: str) -> PartyKeys:
        """A pair that nobody else has."""
        public, secret = zmq.curve_keypair()
        return cls(checked_name(name), public.decode(), secret.decode())


class KeyFolder:
    """The folder with the key files of this user.

    Args:
        path: Default: what the variable `TAPELINE_KEYS` says, else ``~/.tapeline``. Made, with mode 0700, when needed.
    """

    def __init__(self, path: str | Path | None = None) -> None:
        self.path = Path(path or os.environ.get(FOLDER_VARIABLE) or Path.home() / ".tapeline")

    def new(self, name: str) -> PartyKeys:
        """Make a pair and write both of its files.

        Raises:
            KeyFileError: There is one of this name, or the folder cannot be written.
        """
        keys = PartyKeys.new(name)
        _folder(self.path)
        own = self.path / f"{name}.key"
        for path in (own, self.path / f"{name}.pub"):
            if os.path.lexists(path):
                raise KeyFileError(f"{path} exists, and a key is never overwritten; choose another name, or remove it")
        lines = f'name = "{name}"\npublic = "{keys.public}"\n'
        _write_new(own, f'# The SECRET key of {name}: give it to nobody.\n{lines}secret = "{keys.secret}"\n', 0o600)
        _write_new(self.path / f"{name}.pub", f"# The public key of {name}: to be given away.\n{lines}", 0o644)
        return keys

    def own(self, name: str) -> PartyKeys:
        """The pair of this name.

        Raises:
            KeyFileError: It is not there, others can read it, or it is no key file.
        """
        path = self.path / f"{checked_name(name)}.key"
        found = _fields(path, _SECRET_FIELDS, secret=True)
        public = checked_key(found["public"], path)
        secret = checked_key(found["secret"], path)
        if found["name"] != name:
            raise KeyFileError(f"{path} holds the key of {found['name']!r}, not of {name!r}")
        if zmq.curve_public(secret.encode()).decode() != public:
            raise KeyFileError(f"the public key in {path} does not belong to its secret key")
        return PartyKeys(name, public, secret)

    def trust(self, file: str | Path, name: str | None = None) -> tuple[str, str]:
        """Pin the public key in a file that another party gave away.

        Args:
            file: Its ``.pub`` file.
            name: The local name; default the one in the file.

        Returns:
            The name and the public key.

        Raises:
            KeyFileError: It is no public file, or the name is pinned to another key.
        """
        found = _fields(Path(file), _PUBLIC_FIELDS, secret=False)
        public = checked_key(found["public"], file)
        name = checked_name(found["name"] if name is None else name)
        pinned = self.trusted()
        if name in pinned:
            if pinned[name] == public:
                return name, public
            raise KeyFileError(
                f"{name!r} is pinned to another key ({fingerprint(pinned[name])}) than the one in {file} "
                f"({fingerprint(public)}); if the change is meant, say first: tapeline keys revoke {name}"
            )
        _folder(self.path)
        _folder(self.path / "trusted")
        _write_new(self.path / "trusted" / f"{name}.pub", f'name = "{name}"\npublic = "{public}"\n', 0o644)
        return name, public

    def revoke(self, name: str) -> str:
        """Trust a key no longer; sessions that are open see it before their next step. Gives the public key.

        Raises:
            KeyFileError: No key of this name is pinned.
        """
        pinned = self.trusted()
        if name not in pinned:
            known = ", ".join(sorted(pinned)) or "none"
            raise KeyFileError(f"no key is pinned under the name {name!r}; pinned are: {known}")
        (self.path / "trusted" / f"{name}.pub").unlink(missing_ok=True)
        return pinned[name]

    def trusted(self) -> dict[str, str]:
        """{local name: public key} of all pinned keys.

        Raises:
            KeyFileError: A file among them is no public file, or others can write what is pinned.
        """
        files = sorted((self.path / "trusted").glob("*.pub"))
        for path in (self.path, self.path / "trusted", *files) if files else ():
            _not_written_by_others(path)
        found = {}
        for path in files:
            try:
                found[path.stem] = checked_key(_fields(path, _PUBLIC_FIELDS, secret=False)["public"], path)
            except KeyFileError:
                if os.path.lexists(path):  # else the key was revoked just now
                    raise
        return found

    def names(self) -> list[str]:
        """The names of the pairs that are this user's own."""
        return sorted(path.stem for path in self.path.glob("*.key"))


def fingerprint(public: str) -> str:
    """Eight groups of four hexadecimal digits of a public key, to be read out by telephone."""
    digest = hashlib.sha256(b"tapeline public key\0" + z85.decode(public.encode())).hexdigest()
    return " ".join(digest[place : place + 4] for place in range(0, 32, 4))


def checked_name(name: object) -> str:
    """A name of a party: a letter, then letters, digits, ``-`` and ``_``, at most 64 characters.

    Raises:
        KeyFileError: It is none.
    """
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise KeyFileError(f"a party's name is a letter, then up to 63 letters, digits, - and _; received {name!r}")
    return name


def checked_key(key: object, where: object) -> str:
    """A key: 40 characters that are Z85.

    Raises:
        KeyFileError: It is none.
    """
    try:
        if isinstance(key, str) and len(key) == 40 and z85.encode(z85.decode(key.encode())).decode() == key:
            return key
    except (ValueError, KeyError, UnicodeEncodeError, OverflowError):
        pass
    raise KeyFileError(f"{where}: expected a key of 40 Z85 characters, received something else")


def _folder(path: Path) -> None:
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise KeyFileError(f"cannot make the folder {path}: {error.strerror}") from error


def _not_written_by_others(path: Path) -> None:
    try:
        status = path.stat()
    except FileNotFoundError:  # a key that was revoked just now
        return
    except OSError as error:
        raise KeyFileError(f"cannot read {path}: {error.strerror}") from error
    if status.st_mode & 0o022 or status.st_uid not in (os.geteuid(), 0):
        raise KeyFileError(
            f"{path} can be written by others (mode {stat.S_IMODE(status.st_mode):04o}), who may have pinned keys of "
            f"their own; say: chmod go-w {path}, then compare the fingerprints: tapeline keys list"
        )


def _write_new(path: Path, text: str, mode: int) -> None:
    """Write a file that is not there yet; see the module's first rule."""
    draft = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    try:
        descriptor = os.open(draft, flags, mode)
        try:
            with os.fdopen(descriptor, "w", encoding="ascii") as file:
                os.fchmod(descriptor, mode)  # whatever the umask says
                file.write(text)
                file.flush()
                os.fsync(descriptor)
            os.link(draft, path)
        finally:
            draft.unlink(missing_ok=True)
        folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    except FileExistsError as error:
        raise KeyFileError(f"{path} exists, and a key is never overwritten") from error
    except OSError as error:
        raise KeyFileError(f"cannot write {path}: {error.strerror}") from error


def _fields(path: Path, names: tuple[str, ...], *, secret: bool) -> dict[str, Any]:
    """The fields of a key file, every one a string."""
    text = _read(path, secret)
    try:
        found = tomllib.loads(text)
    except (tomllib.TOMLDecodeError, RecursionError) as error:
        raise KeyFileError(f"{path} is no key file: {error}") from error
    if "secret" in found and not secret:
        raise KeyFileError(f"{path} holds a SECRET key; what is given away and trusted is the .pub file")
    if set(found) != set(names):
        raise KeyFileError(f"{path} is no key file: expected {', '.join(names)}, received {', '.join(found) or 'none'}")
    return found


def _read(path: Path, secret: bool) -> str:
    flags = os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC | (os.O_NOFOLLOW if secret else 0)
    try:
        descriptor = os.open(path, flags)
    except FileNotFoundError as error:
        raise KeyFileError(
            f"there is no file {path}" + (f"; tapeline keys new {path.stem}" if secret else "")
        ) from error
    except OSError as error:
        raise KeyFileError(f"cannot read {path}: {error.strerror}") from error
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode) or status.st_size > _LARGEST:
            raise KeyFileError(f"{path} is no key file: expected a plain file of at most {_LARGEST} bytes")
        if secret and (status.st_mode & 0o077 or status.st_uid != os.geteuid()):
            raise KeyFileError(
                f"{path} holds a secret key and can be opened by others (mode {stat.S_IMODE(status.st_mode):04o}); if "
                f"nobody has read it, say: chmod 600 {path}; else make a new key"
            )
        return os.read(descriptor, _LARGEST).decode("ascii")
    except UnicodeDecodeError as error:
        raise KeyFileError(f"{path} is no key file: {error.reason}") from error
    finally:
        os.close(descriptor)


__all__ = ["FOLDER_VARIABLE", "KeyFolder", "PartyKeys", "checked_key", "checked_name", "fingerprint"]
