"""The folder of a checkpoint: written beside its place, put there in one go, and nothing else is touched.

    .step-100.saving-3f2a..   locked by whoever writes it
    step-100                  the checkpoint

Rules:

1. A checkpoint is whole or not there: files and folders are flushed before the rename, and the parent after it.
2. Only a checkpoint of ours is replaced. What else is in its folder moves along; a symbolic link stays one.
3. Folders of writers that were killed are removed by the next save to the same place; a lock tells who still writes.
4. A checkpoint may be read by whom its folder says: the older checkpoint's mode, or the parent's less the umask.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import glob
import json
import os
import re
import secrets
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pipeline.errors import CheckpointError

FORMAT = "tapeline checkpoint"
MANIFEST = "manifest.json"
PROGRESS = "progress.npz"
_ARRAYS = re.compile(r"stage-\d+\.npz")


def stage_file(stage: int) -> str:
    """The name of the file with a stage's arrays."""
    return f"stage-{stage}.npz"


def is_ours(name: str) -> bool:
    """Whether a file of a checkpoint has such a name."""
    return name in (MANIFEST, PROGRESS) or _ARRAYS.fullmatch(name) is not None


def real_place(path: Path, overwrite: bool) -> Path:
    """Where a checkpoint will be, links resolved.

    Raises:
        CheckpointError: Something is there that is no checkpoint, or one and `overwrite` is False.
    """
    place = Path(os.path.realpath(path))
    if os.path.lexists(place) and not overwrite:
        raise CheckpointError(f"{path} exists; pass overwrite=True to replace it, or choose another name")
    if os.path.lexists(place) and not _is_checkpoint(place):
        raise CheckpointError(f"{path} exists and is no checkpoint; choose another name")
    return place


def _is_checkpoint(path: Path) -> bool:
    """Whether a folder has a manifest of ours, of any version, as far as that can be told."""
    manifest = path / MANIFEST
    try:
        return stat.S_ISREG(manifest.stat().st_mode) and json.loads(manifest.read_bytes())["format"] == FORMAT
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return False


@contextmanager
def writing(path: Path) -> Iterator[Path]:
    """A folder to write a checkpoint's files into, which is at `path` afterwards; if the block raises, it is gone.

    Args:
        path: As `real_place` gives it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    place, lock = _locked_folder(path)
    try:
        if path.is_dir():
            place.chmod(stat.S_IMODE(path.stat().st_mode))
        try:
            yield place
            _flush_folder(place)
            older = _put(place, path)
        except BaseException:
            _remove(place, None)
            raise
        if older is not None:
            _remove(older, path)
        _flush_folder(path.parent)
        for left in path.parent.glob(f"{glob.escape(_beginning(path))}*"):
            _remove_if_dead(left, path)
    finally:
        os.close(lock)


def remove_leftovers(folder: Path, names: str) -> None:
    """Remove what killed writers of some checkpoints have left.

    Args:
        folder: Where the checkpoints are.
        names: Of the checkpoints, a pattern as `glob` takes it.
    """
    for left in folder.glob(f".{names}.saving-*"):
        _remove_if_dead(left, None)


@contextmanager
def new_file(path: Path) -> Iterator[int]:
    """The descriptor of a new file with its folder's rights, flushed at the end."""
    mode = stat.S_IMODE(path.parent.stat().st_mode) & 0o666
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, mode)
    try:
        yield descriptor
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _beginning(path: Path) -> str:
    return f".{path.name}.saving-"


def _locked_folder(path: Path) -> tuple[Path, int]:
    """A new folder beside `path`, and the descriptor that holds its lock."""
    mode = stat.S_IMODE(path.parent.stat().st_mode) & 0o777
    while True:
        place = path.with_name(f"{_beginning(path)}{secrets.token_hex(8)}")
        place.mkdir(mode=mode | stat.S_IRWXU)
        lock = os.open(place, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        with contextlib.suppress(OSError):  # a file system without locks: nothing is cleaned up there
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if place.is_dir():  # nobody took it for a dead one's before it was locked
            return place, lock
        os.close(lock)


def _put(place: Path, path: Path) -> Path | None:
    """Put a finished folder in its place; where the older one is now, if there was one."""
    if not path.exists():
        place.rename(path)
        return None
    if _exchange(place, path):
        return place
    aside = path.with_name(f"{_beginning(path)}{secrets.token_hex(8)}")  # for a moment there is no checkpoint at `path`
    path.rename(aside)
    place.rename(path)
    return aside


def _exchange(one: Path, other: Path) -> bool:
    """Swap two names atomically (Linux: renameat2 with RENAME_EXCHANGE); False where that does not exist."""
    here, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    renameat2 = getattr(ctypes.CDLL(None), "renameat2", None)
    return renameat2 is not None and renameat2(here, os.fsencode(one), here, os.fsencode(other), exchange) == 0


def _remove(folder: Path, successor: Path | None) -> None:
    """Remove our files of a folder, and the folder; what is not ours moves to its successor, or stays where it is."""
    with contextlib.suppress(FileNotFoundError):
        for entry in list(folder.iterdir()):
            if is_ours(entry.name) and not entry.is_dir():
                entry.unlink(missing_ok=True)
            elif successor is not None and not os.path.lexists(successor / entry.name):
                entry.rename(successor / entry.name)
        with contextlib.suppress(OSError):  # something is left
            folder.rmdir()


def _remove_if_dead(folder: Path, successor: Path | None) -> None:
    """Remove a folder whose writer was killed: nobody holds its lock."""
    try:
        lock = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError:
        return
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        _remove(folder, successor)
    except OSError:
        return
    finally:
        os.close(lock)


def _flush_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


__all__ = [
    "FORMAT",
    "MANIFEST",
    "PROGRESS",
    "is_ours",
    "new_file",
    "real_place",
    "remove_leftovers",
    "stage_file",
    "writing",
]
