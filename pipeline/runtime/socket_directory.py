"""A private directory for socket files that vanishes with its owner, also when the owner is killed.

A killed process cleans up nothing, and its workers die with it. So a small process of its own (`/bin/sh`) holds the
end of a pipe from the owner: when the owner is gone, however, the pipe is at its end and the directory is removed.
It is needed only while workers connect, and costs a few milliseconds.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import subprocess
import tempfile
from pathlib import Path

__all__ = ["SocketDirectory"]

_JANITOR = 'read -r _; rm -rf -- "$0" || { sleep 1; rm -rf -- "$0"; }'
"""Twice: a worker that is just about to die may put a file into a directory that is being removed."""


class SocketDirectory:
    """A new directory that only this user can enter.

    Attributes:
        path: where it is.
    """

    path: str

    def __init__(self) -> None:
        self._owner = os.getpid()
        self._janitor: subprocess.Popen[bytes] | None = None
        while not self._made(Path(tempfile.gettempdir()) / f"tapeline-{secrets.token_hex(4)}"):
            pass  # somebody has that name already

    def _made(self, path: Path) -> bool:
        self.path = str(path)
        with contextlib.suppress(FileNotFoundError):  # no shell here: then only SIGKILL leaves a directory behind
            self._janitor = subprocess.Popen(
                ["/bin/sh", "-c", _JANITOR, self.path],
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                start_new_session=True,  # what kills the owner's group must not kill it
            )
        try:
            path.mkdir(mode=0o700)
        except FileExistsError:
            self._dismiss()  # before it removes what is not ours
            return False
        return True

    def remove(self) -> None:
        """Remove it with all that is in it. Idempotent, and without effect in a forked copy of the owner."""
        if self._owner != os.getpid():
            return
        shutil.rmtree(self.path, ignore_errors=True)
        self._dismiss()

    def _dismiss(self) -> None:
        janitor, self._janitor = self._janitor, None
        if janitor is not None:
            janitor.kill()
            janitor.wait()
            with janitor:  # closes the pipe
                pass
