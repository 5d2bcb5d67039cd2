"""A party's own checkpoints, one at the end of each epoch; all parties go on after the last epoch that all have.

    FOLDER/epoch-3.npz    arrays of all that training changes here, and a manifest: party, plan's digest, step, history
                          the transcript with each neighbour up to that step, and the run, which is the same at all
                          parties and after each resuming

Two files written at about the same time are no common state. So parties compare transcripts: a party goes on from an
epoch only if it and its neighbour have sent and received the same up to there.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import secrets
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np

from pipeline.errors import CheckpointError
from pipeline.parties.bound_party import BoundParty
from stages.put_back import held_by

KEPT_EPOCHS: Final = 3
"""Checkpoints that are kept; parties are at most one epoch apart."""
_NAME: Final = re.compile(r"epoch-(\d{1,9})\.npz")
_LARGEST_MANIFEST: Final = 1 << 24
_FAULTS: Final = (OSError, ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile, RecursionError)


@dataclass(frozen=True)
class EndOfEpoch:
    """The place in a training where a checkpoint was made.

    Attributes:
        epoch: Epochs that are done.
        step: Commits that are done.
        transcripts: {neighbour: the transcript's hash up to there, 64 hexadecimal digits}.
        history: As in `PartyResult`.
        run: The training's own mark, the same at all parties, 32 hexadecimal digits.
    """

    epoch: int
    step: int
    transcripts: Mapping[str, str]
    history: Mapping[str, list[Any]]
    run: str


class PartyCheckpoints:
    """The checkpoints of one party.

    Args:
        folder: Made when it is needed. Only files of this party and plan in it are read.
        party: Whose values.
    """

    def __init__(self, folder: str | Path, party: BoundParty) -> None:
        self._folder, self._party = Path(folder), party
        self._digest = party.plan.digest()

    def write(self, place: EndOfEpoch) -> None:
        """Write a checkpoint whole, and remove the oldest of its run beyond `KEPT_EPOCHS`.

        Raises:
            CheckpointError: It cannot be written, or would replace one of another run, plan or party.
        """
        manifest = {
            "party": self._party.name,
            "plan": self._digest,
            "epoch": place.epoch,
            "step": place.step,
            "transcripts": dict(place.transcripts),
            "history": dict(place.history),
            "run": place.run,
        }
        arrays: dict[str, Any] = {
            f"{number:06}": _plain(held_by(one).numpy()) for number, one in enumerate(self._lasting())
        }
        arrays["manifest"] = np.frombuffer(json.dumps(manifest).encode(), np.uint8)
        path = self._folder / f"epoch-{place.epoch}.npz"
        draft = self._folder / f".{path.name}.{secrets.token_hex(8)}"
        mine = (self._party.name, self._digest, place.run)
        if _whose(path) not in (None, mine):
            raise CheckpointError(f"{path} is a checkpoint of another run, plan or party, and stays as it is")
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            for left in self._folder.glob(".epoch-*.npz.*"):  # by a process that was killed while it wrote
                left.unlink(missing_ok=True)
            try:
                with draft.open("xb") as file:
                    np.savez(file, allow_pickle=False, **arrays)
                    file.flush()
                    os.fsync(file.fileno())
                draft.replace(path)
            finally:
                draft.unlink(missing_ok=True)
            own = {epoch: one for epoch, one in self._files().items() if _whose(one) == mine}
            for old in sorted(own)[:-KEPT_EPOCHS]:
                own[old].unlink(missing_ok=True)
        except OSError as error:
            raise CheckpointError(f"cannot write the checkpoint {path}: {error.strerror}") from error

    def places(self) -> dict[int, EndOfEpoch]:
        """{epoch: its place} of all whole checkpoints of this party and plan."""
        found = {}
        for epoch, path in self._files().items():
            with contextlib.suppress(*_FAULTS):
                manifest = _manifest(path)
                if (manifest["party"], manifest["plan"], manifest["epoch"]) == (self._party.name, self._digest, epoch):
                    found[epoch] = EndOfEpoch(
                        epoch, manifest["step"], manifest["transcripts"], manifest["history"], manifest["run"]
                    )
        return found

    def refuse_other_runs(self, resume: bool) -> None:
        """See that the folder is that of one run.

        Args:
            resume: Whether the training goes on; else it begins anew, and there must be no checkpoint.

        Raises:
            CheckpointError: It is not.
        """
        if not resume and self._files():
            raise CheckpointError(
                f"there are checkpoints in {self._folder} already; go on from them (resume), or begin anew in another "
                "folder"
            )
        runs = {place.run for place in self.places().values()}
        if len(runs) > 1:
            raise CheckpointError(f"{self._folder} has checkpoints of {len(runs)} runs; leave there those of one")

    def load(self, epoch: int) -> None:
        """Give the party's variables the values of a checkpoint.

        Raises:
            CheckpointError: It is damaged, or of other models; nothing was changed.
        """
        path, variables = self._files()[epoch], self._lasting()
        try:
            with np.load(path, allow_pickle=False) as file:
                if len(file.files) != len(variables) + 1:
                    raise ValueError(
                        f"it has {len(file.files) - 1} values, and the party has {len(variables)} variables"
                    )
                values = [_as(file[f"{number:06}"], held_by(one)) for number, one in enumerate(variables)]
        except _FAULTS as error:
            raise CheckpointError(f"cannot go on from the checkpoint {path}: {error}") from error
        for variable, value in zip(variables, values, strict=True):
            held_by(variable).assign(value)

    def _lasting(self) -> list[Any]:
        """Everything but metrics, which begin anew with an epoch."""
        metrics = [] if self._party.head is None else self._party.head.variables
        return [one for one in self._party.variables if not any(one is metric for metric in metrics)]

    def _files(self) -> dict[int, Path]:
        found = ((_NAME.fullmatch(path.name), path) for path in self._folder.glob("epoch-*.npz"))
        return {int(match[1]): path for match, path in found if match}


def _manifest(path: Path) -> Any:
    with np.load(path, allow_pickle=False) as file:
        return json.loads(bytes(file["manifest"][:_LARGEST_MANIFEST]))


def _whose(path: Path) -> tuple[Any, Any, Any] | None:
    """Party, plan and run of a checkpoint; None: it is none, or damaged."""
    with contextlib.suppress(*_FAULTS):
        manifest = _manifest(path)
        return manifest["party"], manifest["plan"], manifest["run"]
    return None


def _plain(value: Any) -> np.ndarray[Any, Any]:
    """An array that NumPy's files can hold: of bfloat16 its bytes."""
    array = np.asarray(value)
    return array if array.dtype.isbuiltin == 1 else array.view(np.uint8 if array.dtype.itemsize == 1 else np.uint16)


def _as(array: np.ndarray[Any, Any], like: Any) -> np.ndarray[Any, Any]:
    """The array as a value of a variable."""
    dtype = np.dtype(like.dtype.as_numpy_dtype)
    array = array if dtype.isbuiltin == 1 else array.view(dtype)
    if array.shape != tuple(like.shape) or array.dtype != dtype:
        raise ValueError(f"{array.dtype} {array.shape} is no value of {like.name!r}, {dtype} {tuple(like.shape)}")
    return array


__all__ = ["KEPT_EPOCHS", "EndOfEpoch", "PartyCheckpoints"]
