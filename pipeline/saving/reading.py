"""Files of a checkpoint as they are read: nothing is believed, and no more memory is taken than the files have bytes.

Whatever is wrong with them is one `CheckpointError`.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import stat
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from io import BufferedReader
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.errors import CheckpointError
from pipeline.saving.folder import FORMAT, MANIFEST, is_ours
from transport.errors import TapelineError

MANIFEST_BYTES = 64 << 20
"""More than any model's recipe has."""


def read_manifest(path: Path, version: int, entries: set[str]) -> dict[str, Any]:
    """The manifest of a checkpoint.

    Args:
        path: The checkpoint.
        version: What it must be of.
        entries: What it must have.

    Raises:
        CheckpointError: There is none, it is damaged, or of another version.
    """
    file = path / MANIFEST
    try:
        with _plain_file(file) as content:
            text = content.read(MANIFEST_BYTES + 1)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise CheckpointError(f"there is no checkpoint at {path} (no {MANIFEST})") from error
    if len(text) > MANIFEST_BYTES:
        raise CheckpointError(f"{file} is damaged: it has more than {MANIFEST_BYTES >> 20} MiB")
    try:
        manifest: Any = json.loads(text)
    except RecursionError:
        raise CheckpointError(f"{file} is damaged: it is nested without end") from None
    except ValueError as error:
        raise CheckpointError(f"{file} is damaged: {error}") from error
    said = manifest if isinstance(manifest, dict) else {}
    if said.get("format") != FORMAT or said.get("version") != version:
        raise CheckpointError(
            f"{path} is not a checkpoint of version {version}: it says {said.get('format')!r:.50} version "
            f"{said.get('version')!r:.50}"
        )
    missing = entries - set(said)
    if missing:
        raise CheckpointError(f"{file} is damaged: it lacks {', '.join(sorted(missing))}")
    return said


def read_arrays(path: Path, entry: Mapping[str, Any]) -> dict[str, np.ndarray[Any, Any]]:
    """The arrays of one stage.

    Args:
        path: The checkpoint.
        entry: What its manifest says of the stage.

    Raises:
        CheckpointError: The file is not there, or not what was saved.
    """
    name = str(entry["file"])
    if not is_ours(name) or name == MANIFEST:
        raise CheckpointError(f"the checkpoint {path} is damaged: it names a file {name!r:.100}")
    try:
        with _plain_file(path / name) as content:
            if hashlib.file_digest(content, "sha256").hexdigest() != entry["sha256"]:
                raise CheckpointError(
                    f"the checkpoint {path} is damaged: the content of {name} changed after it was saved"
                )
            content.seek(0)
            dtypes = entry["dtypes"]
            return {key: _typed(array, dtypes[key]) for key, array in _unpacked(content)}
    except FileNotFoundError as error:
        raise CheckpointError(f"the checkpoint {path} is not whole: {name} is missing") from error


def _unpacked(content: BufferedReader) -> Iterator[tuple[str, np.ndarray[Any, Any]]]:
    """(name, array) of an archive as `numpy.savez` writes it: not compressed, each byte in one array only."""
    size = os.fstat(content.fileno()).st_size
    with zipfile.ZipFile(content) as archive:
        found = archive.infolist()
        if sum(one.file_size for one in found) > size or any(one.compress_type != zipfile.ZIP_STORED for one in found):
            raise ValueError("the archive would be larger unpacked than it is")
        for one in found:
            with archive.open(one) as file:
                version = np.lib.format.read_magic(file)
                read_header = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
                shape, by_columns, dtype = read_header[version](file)
                if dtype.hasobject or math.prod(shape) * dtype.itemsize != one.file_size - file.tell():
                    raise ValueError(f"the array {one.filename!r:.100} is not as long as it says")
                flat = np.frombuffer(bytearray(file.read()), dtype)
                yield one.filename.removesuffix(".npy"), flat.reshape(shape, order="F" if by_columns else "C")


def _typed(array: np.ndarray[Any, Any], dtype: str) -> np.ndarray[Any, Any]:
    if array.dtype.name == dtype:
        return array
    import ml_dtypes

    return array.view(np.dtype(getattr(ml_dtypes, dtype)))


@contextmanager
def _plain_file(path: Path) -> Iterator[BufferedReader]:
    """A file that is no pipe or device, which a reader could wait for without end."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    with open(descriptor, "rb") as file:  # noqa: PTH123 - a descriptor
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise CheckpointError(f"{path} is no plain file, so it is no part of a checkpoint")
        yield file


@contextmanager
def damage_told(path: Path) -> Iterator[None]:
    """Say of whatever goes wrong with the content of files that the checkpoint is damaged; our own errors pass.

    Raises:
        CheckpointError: Something went wrong.
    """
    try:
        yield
    except TapelineError:
        raise
    except (Exception, RecursionError) as error:
        first = (str(error).splitlines() or [""])[0]
        raise CheckpointError(
            f"the checkpoint {path} is damaged, or of another model: {type(error).__name__}: {first[:300]}"
        ) from error


__all__ = ["damage_told", "read_arrays", "read_manifest"]
