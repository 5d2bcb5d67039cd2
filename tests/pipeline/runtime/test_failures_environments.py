"""Where a user may be: a script without a guard, a notebook, a thread, a folder with a `pipeline.py` of their own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading

import numpy as np
import pytest

from tests.failures import DEADLINE, X, Y, tripping
from tests.sources import ROOT

MY_PARTS = """
import keras

class Doubles(keras.layers.Layer):
    def call(self, x):
        return 2 * x

def bottom():
    return keras.Sequential([keras.Input((4,)), keras.layers.Dense(4), Doubles()])
"""

PROGRAM = """
import json, keras
import numpy as np
from my_parts import Doubles, bottom
from pipeline import Pipeline, Segment

class Halves(keras.layers.Layer):
    def call(self, x):
        return x / 2

def top():
    return keras.Sequential([keras.Input((4,)), keras.layers.Dense(4)])

def less(y_true, y_pred):
    return keras.ops.mean(abs(y_true - y_pred), axis=-1)

def train(pipe, loss="mse"):
    with pipe:
        pipe.compile("sgd", loss)
        return pipe.fit(np.ones((8, 4)), np.ones((8, 4)), epochs=2, verbose=0).history["loss"]

def main():
    here = keras.Sequential([keras.Input((4,)), Doubles(), keras.layers.Dense(4)])
    print("seen", json.dumps({
        "file": "__file__" in globals(),
        "loss": train(Pipeline([Segment(bottom), here])),
        "mine": train(Pipeline([Segment(top), keras.Sequential([keras.Input((4,)), Halves()])]), less),
        "lambda": train(Pipeline([Segment(lambda: top())]), lambda a, b: keras.ops.mean((a - b) ** 2, axis=-1)),
    }), flush=True)
"""

CALLS = {
    "script": ("file", "main()"),
    "notebook": ("argument", "import asyncio\nasync def cell(): main()\nasyncio.run(cell())"),
}


@pytest.mark.gate
@pytest.mark.parametrize("where", CALLS)
def test_works_without_a_main_guard_with_all_that_lives_in_main(script, where):
    """A notebook's cells run in a process whose `__main__` has no file, in its main thread, inside an event loop."""
    how, call = CALLS[where]
    (script.folder / "my_parts.py").write_text(MY_PARTS)
    code, output = script(f"{PROGRAM}\n{call}\n", how).finish()
    assert code == 0, output
    assert "Traceback" not in output
    seen = [json.loads(text.removeprefix("seen ")) for text in output.splitlines() if text.startswith("seen ")]
    assert len(seen) == 1, "the program ran once, and no worker ran it again"
    assert seen[0]["file"] is (where == "script")
    for what in ("loss", "mine", "lambda"):
        first, last = seen[0][what]
        assert last < first


STRICT = """
import keras
import numpy as np
from pipeline import Pipeline

model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(3), keras.layers.Dense(1)])
with Pipeline.split(model, stages=2, microbatches=3) as pipe:
    pipe.compile("sgd", "mean_squared_error", run_eagerly=True)
    pipe.fit(np.ones((8, 4)), np.ones((8, 1)), verbose=0)
    print(keras.config.floatx(), keras.config.image_data_format(), pipe.verify(np.ones((8, 4)), np.ones((8, 1))).ok)
"""


@pytest.mark.gate
def test_works_under_what_an_environment_may_say(tmp_path):
    """All at once: warnings are errors, the program comes from standard input, no home,
    settings of Keras in a file, one thread, no GPU, and a temporary folder whose path is too long for a socket.
    """
    folder = tmp_path / ("scratch" * 20)
    folder.mkdir()
    (tmp_path / "keras.json").write_text('{"floatx": "float64", "image_data_format": "channels_first"}')
    said = {"KERAS_HOME": str(tmp_path), "TMPDIR": str(folder), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "-1"}
    environment = {name: value for name, value in os.environ.items() if name != "HOME"}
    ended = subprocess.run(
        [sys.executable, "-W", "error", "-"],
        input=STRICT,
        env={**environment, **said, "PYTHONPATH": str(ROOT)},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=DEADLINE,
    )
    assert ended.stdout == "float64 channels_first True\n", ended.stdout + ended.stderr
    assert list(folder.iterdir()) == []


@pytest.mark.gate
@pytest.mark.usefixtures("nothing_left")
def test_works_in_a_thread_that_ends():
    """The workers stay when the thread that started them is gone, and serve another one."""
    pipes, losses = [], []

    def start():
        pipes.append(tripping({}, {}))
        losses.append(pipes[0].train_on_batch(X, Y))

    thread = threading.Thread(target=start)
    thread.start()
    thread.join(DEADLINE)
    losses.append(pipes[0].train_on_batch(X, Y))
    pipes.pop().close()
    assert np.isfinite(losses).all()
    assert losses[1] < losses[0]


@pytest.mark.parametrize(
    ("theirs", "imports"), [("stages", "pipeline"), ("transport", "pipeline"), ("pipeline", "stages")]
)
def test_users_module_that_hides_one_of_ours_is_named_at_the_import(tmp_path, theirs, imports):
    (tmp_path / f"{theirs}.py").write_text("")
    (tmp_path / "script.py").write_text(f"import {imports}\nprint('not reached')")
    ended = run(tmp_path / "script.py")
    assert ended.returncode == 1
    assert f"ImportError: another module has the name {theirs!r}, which Tapeline needs" in ended.stderr
    assert f"{tmp_path / theirs}.py\n    hides {ROOT / theirs / '__init__.py'}" in ended.stderr
    assert "Rename that file" in ended.stderr


def test_users_pipeline_module_is_named_by_python_itself(tmp_path):
    """No code of ours runs then; what Python says names the file."""
    (tmp_path / "pipeline.py").write_text("")
    (tmp_path / "script.py").write_text("from pipeline import Pipeline")
    ended = run(tmp_path / "script.py")
    assert f"ImportError: cannot import name 'Pipeline' from 'pipeline' ({tmp_path / 'pipeline.py'})" in ended.stderr


def test_folder_without_code_that_has_our_name_is_no_fault(tmp_path):
    (tmp_path / "stages").mkdir()
    (tmp_path / "script.py").write_text("import pipeline, stages; print('fine')")
    assert run(tmp_path / "script.py").stdout == "fine\n"


def run(path):
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [sys.executable, str(path)], capture_output=True, text=True, cwd=path.parent, env=environment, timeout=DEADLINE
    )
