"""The command line does what its help says: demo, verify, explain, plan, bench, clear errors, an exit status."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.commands.cli import main
from tests.sources import ROOT

COMMANDS = ("demo", "verify", "explain", "plan", "doctor", "bench", "keys", "psi", "party")


def tapeline(*arguments: str, folder: Path, seconds: float = 240) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "pipeline", *arguments]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=seconds)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_explains_itself_with_an_example(command, capsys):
    with pytest.raises(SystemExit) as leaving:
        main([command, "--help"])
    assert leaving.value.code == 0
    assert f"example:\n  tapeline {command}" in capsys.readouterr().out


def test_no_command_prints_the_help_and_fails(capsys):
    assert main([]) == 2
    assert "tapeline demo" in capsys.readouterr().out


def test_plan_draws_the_schedule(capsys):
    assert main(["plan", "--schedule", "gpipe", "--stages", "2", "--microbatches", "3"]) == 0
    assert "gpipe" in capsys.readouterr().out


def test_an_unknown_schedule_is_one_line_and_status_2(capsys):
    assert main(["plan", "--schedule", "1f2b"]) == 2
    assert "did you mean '1f1b'" in capsys.readouterr().err


@pytest.mark.parametrize("what", ["nothing", "json:", "no_such_module:make"])
def test_verify_of_what_is_not_there_says_what_is_expected(what, capsys):
    assert main(["verify", what]) == 2
    assert "module:function" in capsys.readouterr().err


MODULE = """
import keras, numpy as np
from pipeline import Pipeline

def make():
    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(5, activation="tanh"), keras.layers.Dense(1)])
    pipe = Pipeline.split(model, stages=2, microbatches=2)
    pipe.compile("sgd", "mean_squared_error", run_eagerly=True)
    return pipe, np.ones((6, 4), "float32"), np.zeros((6, 1), "float32")

"""


@pytest.mark.gate
@pytest.mark.timeout(300)
def test_verify_prints_the_table_and_its_exit_status_is_the_verdict(tmp_path):
    (tmp_path / "my_model.py").write_text(MODULE)
    good = tapeline("verify", "my_model:make", "--json", "report.json", folder=tmp_path)
    assert good.returncode == 0, good.stderr
    assert "equal to one tape (bit for bit)" in good.stdout
    assert json.loads((tmp_path / "report.json").read_text())["ok"] is True


@pytest.mark.gate
@pytest.mark.timeout(300)
def test_demo_reaches_its_accuracy_verifies_and_leaves_its_artefacts(tmp_path):
    run = tapeline("demo", "--output", "found", folder=tmp_path)
    assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-3000:]
    last = run.stdout.strip().splitlines()[-1]
    assert last.startswith("test accuracy 0.9")
    assert "equal to one tape" in last
    assert "found/verification.html" in last
    assert json.loads((tmp_path / "found/verification.json").read_text())["ok"] is True
    assert (tmp_path / "found/timeline.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.gate
@pytest.mark.timeout(300)
def test_demo_fails_where_the_accuracy_is_not_reached(tmp_path):
    run = tapeline("demo", "--epochs", "1", "--output", "found", folder=tmp_path)
    assert run.returncode == 1, run.stdout[-3000:]
    assert "below 0.97" in run.stdout
