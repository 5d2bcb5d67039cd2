"""Commands start without the lines in which TensorFlow tells what it found: CPU features, oneDNN, no GPU.

Part of these is written while the library is imported, by native code that looks at no setting; so what is written to
the process's standard error during the import is kept, and given on without them.
"""

from __future__ import annotations

import importlib
import os
import re
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager

LEVEL = "TF_CPP_MIN_LOG_LEVEL"
"""The variable by which a user asks for TensorFlow's lines: from 0, all, to 3, none but the last words of a crash."""

_NATIVE = re.compile(
    rb"WARNING: All log messages before absl::InitializeLog\(\) is called are written to STDERR"
    rb"|[IWE]\d{4} \d\d:\d\d:[\d.]+ +\d+ [\w./]+:\d+\] "
    rb"|\d{4}-\d\d-\d\d \d\d:\d\d:[\d.]+: [IWE] [\w./]+:\d+\] "
    rb"|To enable the following instructions: "
)
"""How TensorFlow's native lines begin; those of a crash (F) are none of these."""


def import_quietly() -> None:
    """Import TensorFlow and Keras; their lines are shown only if the environment says a `LEVEL`.

    Raises:
        ImportError: As the import does.
    """
    with without_native_lines():
        for name in ("tensorflow", "keras"):
            importlib.import_module(name)


@contextmanager
def without_native_lines() -> Iterator[None]:
    """Leave TensorFlow's lines out of what is written to standard error inside; and later ones of this process."""
    if LEVEL in os.environ:
        yield
        return
    os.environ[LEVEL] = "3"
    if sys.stderr is not None:
        sys.stderr.flush()
    try:
        terminal = os.dup(2)
    except OSError:  # the process was started without one
        yield
        return
    with tempfile.TemporaryFile() as kept:
        os.dup2(kept.fileno(), 2)
        try:
            yield
        finally:
            if sys.stderr is not None:
                sys.stderr.flush()
            os.dup2(terminal, 2)
            os.close(terminal)
            kept.seek(0)
            os.write(2, b"".join(line for line in kept if not _NATIVE.match(line)))
