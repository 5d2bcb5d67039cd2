"""Commands and workers write nothing of TensorFlow's to standard error, unless the environment asks for it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.commands.quiet import LEVEL, without_native_lines
from tests.sources import ROOT

NATIVE = [
    b"WARNING: All log messages before absl::InitializeLog() is called are written to STDERR\n",
    b"I0000 00:00:1795844655.803965    9489 port.cc:153] oneDNN custom operations are on. You may see\n",
    b"E0000 00:00:1795844681.940239    9489 cuda_platform.cc:52] failed call to cuInit: INTERNAL: CUDA error\n",
    b"2026-11-28 05:46:15.891604: E external/local_xla/xla/stream_executor/cuda/cuda_fft.cc:477] Unable to register\n",
    b"2026-11-28 05:46:15.891604: I tensorflow/core/util/port.cc:153] oneDNN custom operations are on.\n",
    b"To enable the following instructions: AVX2 FMA, in other operations, rebuild TensorFlow\n",
]
OTHERS = [
    b"UserWarning: something of the user's\n",
    b"F0000 00:00:1795844655.803965    9489 tensor.cc:1] Check failed\n",
    b"2026-11-28 05:46:15.891604: F tensorflow/core/framework/tensor.cc:1] Check failed\n",
    b"INFO: mine\n",
    b"without an end",
]
MODEL = """
import keras
import numpy as np
from pipeline import Pipeline

def make():
    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(3), keras.layers.Dense(1)])
    pipe = Pipeline.split(model, stages=2, microbatches=2)
    pipe.compile("sgd", "mean_squared_error", run_eagerly=True)
    return pipe, np.ones((4, 4), "float32"), np.ones((4, 1), "float32")
"""


def run(folder: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """A fresh Python in a folder, with nothing in its environment that says how TensorFlow should log."""
    (folder / "small_model.py").write_text(MODEL)
    clean = {name: os.environ[name] for name in ("PATH", "HOME", "LD_LIBRARY_PATH") if name in os.environ}
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=folder,
        env={**clean, "PYTHONPATH": f"{ROOT}{os.pathsep}{folder}", **environment},
        capture_output=True,
        text=True,
        timeout=110,
    )


def test_tensorflows_lines_are_left_out_and_all_others_kept(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv(LEVEL)
    with without_native_lines():
        os.write(2, b"".join([*NATIVE[:3], *OTHERS[:2], *NATIVE[3:], *OTHERS[2:]]))
    os.write(2, b" - and on\n")
    assert capfd.readouterr().err.encode() == b"".join(OTHERS) + b" - and on\n"
    assert os.environ[LEVEL] == "3"


def test_what_was_written_before_an_error_is_kept(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv(LEVEL)
    with pytest.raises(ZeroDivisionError), without_native_lines():
        print("before", file=sys.__stderr__, flush=True)
        os.write(2, b"before\n" + NATIVE[0])
        _ = 1 / 0
    assert capfd.readouterr().err.count("before") == 2


def test_who_says_a_level_is_left_alone(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv(LEVEL, "1")
    with without_native_lines():
        os.write(2, b"".join(NATIVE))
    assert capfd.readouterr().err.encode() == b"".join(NATIVE)
    assert os.environ[LEVEL] == "1"


@pytest.mark.gate
def test_a_command_with_workers_and_a_reference_is_silent(tmp_path: Path) -> None:
    found = run(tmp_path, "-m", "pipeline", "verify", "small_model:make")
    assert (found.returncode, found.stderr) == (0, "")
    assert "equal to one tape" in found.stdout


@pytest.mark.gate
def test_a_command_tells_what_tensorflow_says_if_it_is_asked(tmp_path: Path) -> None:
    found = run(tmp_path, "-m", "pipeline", "explain", "small_model:make", TF_CPP_MIN_LOG_LEVEL="0")
    assert found.returncode == 0
    assert "oneDNN" in found.stderr or "cpu_feature_guard" in found.stderr


@pytest.mark.gate
def test_workers_are_silent_where_the_users_environment_says_nothing(tmp_path: Path) -> None:
    """In a script of the user's: its own process says what it says, the workers nothing."""
    script = (
        "import os\n"
        "from pipeline.commands.quiet import LEVEL, import_quietly\n"
        "import_quietly()\n"
        "del os.environ[LEVEL]\n"
        "from small_model import make\n"
        "pipe, x, y = make()\n"
        "with pipe: print(pipe.verify(x, y).ok)\n"
    )
    found = run(tmp_path, "-c", script)
    assert (found.returncode, found.stdout, found.stderr) == (0, "True\n", "")
