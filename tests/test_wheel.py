"""The built wheel in an environment of the user's own: nothing of the repository is seen there, and everything works.

The environment borrows the libraries of this one (a path file adds their folder, without the path files in it, so no
editable installation counts); nothing is downloaded.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import numpy as np
import pytest

from tests.sources import ROOT, repository_files

pytestmark = pytest.mark.gate

TRAINING = """
import keras
import numpy as np
import pipeline, stages, transport
from pipeline import Pipeline

model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(3, activation="tanh"), keras.layers.Dense(1)])
x, y = np.random.default_rng(0).normal(size=(8, 4)).astype("float32"), np.ones((8, 1), "float32")
with Pipeline.split(model, stages=2, microbatches=2) as pipe:
    pipe.compile("sgd", "mean_squared_error", run_eagerly=True)
    pipe.fit(x, y, batch_size=8, verbose=0)
    report = pipe.verify(x, y)
    report.raise_if_failed()
    report.save("report.html")
print(*(module.__file__ for module in (pipeline, stages, transport)), sep="\\n")
"""

TESTING = """
import keras
import numpy as np
from pipeline import Pipeline

def test_a_pipeline(assert_single_tape):
    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(3), keras.layers.Dense(1)])
    pipe = Pipeline.split(model, stages=2, microbatches=2, transport="inproc")
    pipe.compile("sgd", "mean_squared_error", run_eagerly=True)
    assert_single_tape(pipe, np.ones((4, 4), "float32"), np.ones((4, 1), "float32"))
"""


class Installed:
    """A virtual environment with the wheel in it, and a folder to work in."""

    def __init__(self, root: Path) -> None:
        self.environment, self.folder = root / "environment", root / "elsewhere"
        self.folder.mkdir()

    def run(self, *command: str) -> str:
        """What a program of the environment prints; its environment knows neither the repository nor this Python."""
        clean = {name: os.environ[name] for name in ("HOME", "LD_LIBRARY_PATH") if name in os.environ}
        clean |= {"PATH": f"{self.environment / 'bin'}{os.pathsep}{os.environ['PATH']}", "TF_CPP_MIN_LOG_LEVEL": "3"}
        program = [str(self.environment / "bin" / command[0]), *command[1:]]
        found = subprocess.run(program, cwd=self.folder, env=clean, capture_output=True, text=True, timeout=110)
        assert found.returncode == 0, found.stdout + found.stderr
        return found.stdout


def checked(*command: str | Path, cwd: Path) -> None:
    found = subprocess.run([*map(str, command)], cwd=cwd, capture_output=True, text=True, timeout=110)
    assert found.returncode == 0, found.stdout + found.stderr


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Installed:
    """The wheel of a copy of the repository, installed; the copy is gone."""
    root = tmp_path_factory.mktemp("wheel")
    for path in repository_files():
        copy = root / "source" / path.relative_to(ROOT)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, copy)
    pip = (sys.executable, "-m", "pip", "--disable-pip-version-check", "--no-input")
    offline = ("--no-index", "--no-deps")
    checked(*pip, "wheel", *offline, "--no-build-isolation", "-w", root / "dist", root / "source", cwd=root)
    shutil.rmtree(root / "source")
    there = Installed(root)
    venv.create(there.environment, symlinks=True, with_pip=False)
    python = there.environment / "bin" / "python"
    site = Path(sysconfig.get_path("purelib", "venv", {"base": str(there.environment)}))
    (site / "borrowed.pth").write_text(f"{Path(np.__file__).parents[1]}\n")
    (wheel,) = (root / "dist").iterdir()
    checked(*pip, "--python", python, "install", *offline, "--ignore-installed", wheel, cwd=root)
    return there


def test_it_trains_verifies_and_writes_the_page_from_its_own_files(installed: Installed) -> None:
    files = installed.run("python", "-c", TRAINING).split()
    assert len(files) == 3 and all(Path(file).is_relative_to(installed.environment) for file in files)
    page = (installed.folder / "report.html").read_text()
    script = (ROOT / "pipeline" / "report" / "page" / "page.js").read_text()
    assert script.strip() in page


def test_its_command_plans_and_says_what_it_can(installed: Installed) -> None:
    assert "tapeline demo" in installed.run("tapeline", "--help")
    assert installed.run("tapeline", "plan", "--stages", "2", "--microbatches", "3").count("\n") >= 2


def test_its_pytest_plugin_is_found(installed: Installed) -> None:
    (installed.folder / "test_theirs.py").write_text(TESTING)
    assert "1 passed" in installed.run("python", "-m", "pytest", "-q", "-p", "no:cacheprovider", "test_theirs.py")


def test_every_source_and_type_marker_is_in_it(installed: Installed) -> None:
    packages = {p.relative_to(ROOT).as_posix() for p in repository_files() if p.is_relative_to(ROOT / "pipeline")}
    packages |= {p.relative_to(ROOT).as_posix() for p in repository_files() if p.is_relative_to(ROOT / "stages")}
    packages |= {p.relative_to(ROOT).as_posix() for p in repository_files() if p.is_relative_to(ROOT / "transport")}
    site = Path(sysconfig.get_path("purelib", "venv", {"base": str(installed.environment)}))
    assert sorted(name for name in packages if not (site / name).is_file()) == []
    assert not (site / "tests").exists()
