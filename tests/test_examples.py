"""Every example runs from an empty folder and ends by checking itself; one that is not listed here fails."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from tests.sources import ROOT

ARGUMENTS = {
    "two_tapes.py": (),
    "jacobian_memory.py": (),
    "classifier.py": (),
    "character_model.py": ("--steps", "160"),
    "rnn_by_hand.py": (),
    "vanilla_rnn.py": (),
    "ragged_series.py": (),
    "influence.py": (),
    "several_passes.py": (),
    "state_gradients.py": (),
    "character_windows.py": ("--sequence", "64", "--units", "32", "--steps", "20", "--timed", "2", "--rounds", "1"),
    "applications.py": ("--epochs", "2", "--accuracy", "0.3"),
    "fine_tuning.py": (),
}
# Half a minute each; what they show is tested elsewhere too.
LONG = {"character_model.py", "several_passes.py", "applications.py", "state_gradients.py", "character_windows.py"}


@pytest.mark.timeout(420)
@pytest.mark.parametrize(
    "name",
    [
        pytest.param(path.name, marks=pytest.mark.soak if path.name in LONG else pytest.mark.gate)
        for path in sorted((ROOT / "examples").glob("*.py"))
    ],
)
def test_example_passes_its_own_check(name, tmp_path):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "TF_CPP_MIN_LOG_LEVEL": "2"}
    command = [sys.executable, str(ROOT / "examples" / name), *ARGUMENTS[name]]
    run = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=400)
    assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-3000:]
