"""A process that asks too late to die with its parent must notice."""

from __future__ import annotations

import signal
import subprocess
import sys

from stages.origin import ROOT


def run(parent: str) -> int:
    code = f"import os; from stages.process.lifetime import die_with_parent; die_with_parent({parent}); os._exit(3)"
    return subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode


def test_a_process_whose_parent_is_there_goes_on() -> None:
    assert run("os.getppid()") == 3


def test_a_process_whose_parent_is_gone_already_ends_at_once() -> None:
    assert run("os.getppid() + 1") == -signal.SIGKILL
