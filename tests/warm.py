"""An interpreter that has imported TensorFlow and Keras once, and plays users' programs, each in a fork of it.

    test ── {"script", "arguments", "folder", ...} ──► interpreter ── fork ──► the program, as `__main__`
         ◄── exit status ────────────────────────────              ◄── exit ──

A fresh interpreter would import both for every program, which takes longer than most programs do. No operation has run
before the fork (a `tf.function` would hang behind it); the program gets an argument list, a path, a folder, an
environment and a `__main__` of its own, and ends as an interpreter ends, with its exit handlers.
"""

from __future__ import annotations

import contextlib
import gc
import json
import os
import select
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from tests.sources import ROOT


class WarmInterpreter:
    """The interpreter, started with its first program."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[str] | None = None

    def run(
        self,
        script: Path,
        arguments: Sequence[str] = (),
        *,
        folder: Path,
        seconds: float,
        environment: Mapping[str, str] | None = None,
    ) -> subprocess.CompletedProcess[str]:
        """Play a program.

        Args:
            script: Its file.
            arguments: Behind its name in `sys.argv`.
            folder: Where it runs.
            seconds: How long it may take.
            environment: Variables besides those of this process.

        Returns:
            Its exit status (negative: the signal that killed it) and all that it printed, errors too.

        Raises:
            TimeoutError: It took longer, and was killed.
        """
        process = self._started()
        descriptor, printed = tempfile.mkstemp()  # not in the folder, which is the program's
        os.close(descriptor)
        request = {"script": str(script), "arguments": list(arguments), "folder": str(folder), "printed": printed}
        assert process.stdin is not None and process.stdout is not None
        process.stdin.write(json.dumps({**request, "environment": dict(environment or {})}) + "\n")
        process.stdin.flush()
        if not select.select([process.stdout], [], [], seconds)[0]:
            self.close()
            raise TimeoutError(f"{script.name} took more than {seconds} s\n{_taken(printed)[-3000:]}")
        answer = process.stdout.readline()
        assert answer, "the interpreter itself ended"
        return subprocess.CompletedProcess([str(script), *arguments], int(answer), _taken(printed))

    def _started(self) -> subprocess.Popen[str]:
        if self._process is None:
            self._process = subprocess.Popen(
                [sys.executable, "-c", "from tests.warm import serve; serve()"],
                cwd=ROOT,
                env={**os.environ, "TF_CPP_MIN_LOG_LEVEL": "2"},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                start_new_session=True,  # so that what a program started is found and ended with it
            )
        return self._process

    def close(self) -> None:
        """End it, and a program that still runs."""
        process, self._process = self._process, None
        if process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            for stream in (process.stdin, process.stdout):
                if stream is not None:
                    stream.close()


def _taken(path: str) -> str:
    """The text of a file, which is removed."""
    text = Path(path).read_text()
    Path(path).unlink()
    return text


def serve() -> None:
    """Fork for every request and answer with the exit status; returns where a program has been played."""
    import keras  # noqa: F401 - once for all programs

    gc.collect()
    gc.freeze()
    for line in sys.stdin:
        child = os.fork()
        if child == 0:
            _play(json.loads(line))
            return
        _, status = os.waitpid(child, 0)
        print(os.waitstatus_to_exitcode(status), flush=True)


def _play(request: Mapping[str, Any]) -> None:
    """Be a program from its first line to its last."""
    printed = os.open(request["printed"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    nothing = os.open(os.devnull, os.O_RDONLY)
    for ours, standard in ((nothing, 0), (printed, 1), (printed, 2)):
        os.dup2(ours, standard)
    os.chdir(request["folder"])
    os.environ.update(request["environment"])
    script = Path(request["script"])
    sys.argv[:] = [str(script), *request["arguments"]]
    sys.path[0] = str(script.parent)
    main = ModuleType("__main__")
    main.__dict__.update(__file__=str(script), __builtins__=__builtins__)
    sys.modules["__main__"] = main
    exec(compile(script.read_text(), str(script), "exec"), main.__dict__)
