"""Files that are not ours: nothing unknown is removed, no command is run, no damage takes more than an error."""

from __future__ import annotations

import hashlib
import json
import os
import resource
import shutil
import signal
import stat
import subprocess
import sys
import zipfile
from os import system
from pathlib import Path

import keras
import numpy as np
import pytest

from pipeline import CheckpointError, Pipeline
from pipeline.saving import folder
from pipeline.saving.trust import check_code
from tests.sources import ROOT

X = np.ones((4, 3), "float32")


@pytest.fixture(scope="module")
def pipe():
    model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(2), keras.layers.Dense(1)])
    with Pipeline.split(model, stages=2, microbatches=2, transport="inproc") as pipe:
        pipe.compile("sgd", "mse", run_eagerly=True)
        pipe.train_on_batch(X, X[:, :1])
        yield pipe


@pytest.fixture(scope="module")
def saved(pipe, tmp_path_factory):
    path = tmp_path_factory.mktemp("saved") / "c"
    pipe.save(path)
    return path


@pytest.fixture
def copy(saved, tmp_path):
    return Path(shutil.copytree(saved, tmp_path / "c"))


def refused(path, match, **options):
    with pytest.raises(CheckpointError, match=match):
        Pipeline.load(path, transport="inproc", **options).close()


def test_only_a_checkpoint_of_ours_is_replaced(pipe, tmp_path):
    for manifest in ('{"format": "of a browser extension"}', "[1]", "nothing", None):
        theirs = tmp_path / "theirs"
        theirs.mkdir()
        (theirs / "mine.txt").write_text("mine")
        if manifest is not None:
            (theirs / "manifest.json").write_text(manifest)
        before = sorted(theirs.iterdir())
        with pytest.raises(CheckpointError, match="exists and is no checkpoint"):
            pipe.save(theirs)
        assert sorted(theirs.iterdir()) == before
        shutil.rmtree(theirs)


def test_a_link_stays_a_link(pipe, tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "latest").symlink_to(tmp_path / "disk" / "run")
    for _ in range(2):
        pipe.save(tmp_path / "latest")
        assert (tmp_path / "latest").is_symlink()
        assert (tmp_path / "disk" / "run" / "manifest.json").is_file()
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["disk", "latest"]


def test_modes_follow_the_folder(pipe, tmp_path):
    before = os.umask(0o022)
    try:
        for mode, files in ((0o700, 0o600), (0o755, 0o644), (0o750, 0o640)):
            home = tmp_path / oct(mode)
            home.mkdir(mode=mode)
            pipe.save(home / "c")
            assert stat.S_IMODE((home / "c").stat().st_mode) == mode
            assert {stat.S_IMODE(file.stat().st_mode) for file in (home / "c").iterdir()} == {files}
        (home / "c").chmod(0o700)
        pipe.save(home / "c")
        assert stat.S_IMODE((home / "c").stat().st_mode) == 0o700, "that of the one that was replaced"
    finally:
        os.umask(before)


KILLED = """
import os, pathlib, signal, sys
sys.path.insert(0, {root!r})
from pipeline.saving import folder

with folder.writing(pathlib.Path({path!r})) as place:
    with folder.new_file(place / "stage-0.npz") as file:
        os.write(file, b"x" * 1000)
    (place / "notes.txt").write_text("never thrown away")
    os.kill(os.getpid(), signal.SIGKILL)
"""


assert callable(system)  # a name of Python itself in a module that is not


def leftovers(folder):
    return [entry for entry in folder.iterdir() if entry.name.startswith(".c[1].saving-")]


def test_what_a_killed_save_left_is_cleaned_by_the_next_one_and_a_living_ones_is_not(pipe, tmp_path):
    program = KILLED.format(root=str(ROOT), path=str(tmp_path / "c[1]"))
    ended = subprocess.run([sys.executable, "-c", program], check=False, capture_output=True)
    assert ended.returncode == -signal.SIGKILL
    assert len(leftovers(tmp_path)) == 1
    with folder.writing(tmp_path / "c[1]") as living:
        with folder.new_file(living / "stage-0.npz"):
            pass
        pipe.save(tmp_path / "c[1]")
        assert leftovers(tmp_path) == [living]
        assert (tmp_path / "c[1]" / "notes.txt").read_text() == "never thrown away"
        with folder.new_file(living / "manifest.json"):
            pass
    assert [entry.name for entry in tmp_path.iterdir()] == ["c[1]"]


def edit(path, change):
    manifest = json.loads((path / "manifest.json").read_text())
    change(manifest)
    (path / "manifest.json").write_text(json.dumps(manifest))


def builder(reference, **kwargs):
    def change(manifest):
        manifest["original"], manifest["compile"] = None, None
        for segment in manifest["segments"]:
            segment["recipe"] = {"build": reference, "kwargs": kwargs}

    return change


def test_a_recipe_runs_no_command(copy, tmp_path):
    trace = tmp_path / "trace"
    edit(copy, builder("os:system", command=f"touch {trace}"))
    refused(copy, r"loading this checkpoint would run 'os:system'.*say Pipeline.load\(path, trust=\['os'\]\)")
    for nested in ("subprocess:run", "numpy:load", "keras.utils:get_file"):
        edit(copy, builder(nested))
        refused(copy, f"would run '{nested}'")
    assert not trace.exists()


def test_a_name_that_leads_out_of_its_module_is_judged_by_where_it_leads():
    """Ours and Keras's modules import Python's own: what is reached through them is not ours."""
    for name in ("pipeline.saving.folder:os.system", "keras.src.utils.file_utils:os.remove", f"{__name__}:system"):
        with pytest.raises(CheckpointError, match=f"would run '{name}'"):
            check_code([{"function": name}], False)
    check_code([{"function": "keras.losses:mean_squared_error"}, {"function": f"{__name__}:leftovers"}], False)


def test_a_class_of_a_module_that_nobody_imported_is_not_imported(copy, tmp_path, monkeypatch):
    (tmp_path / "planted.py").write_text(f"import pathlib\npathlib.Path({str(tmp_path / 'trace')!r}).touch()\n")
    monkeypatch.syspath_prepend(str(tmp_path))

    def change(manifest):
        layer = manifest["original"]["keras"]["config"]["layers"][1]
        layer["module"], layer["class_name"], layer["registered_name"] = "planted", "Dense", "planted>Dense"

    edit(copy, change)
    refused(copy, "would run 'planted:Dense'")
    edit(copy, lambda manifest: manifest["compile"].update(loss={"function": "planted:loss"}))
    refused(copy, "planted:loss")
    assert not (tmp_path / "trace").exists()


def archive(path, compress=zipfile.ZIP_STORED, **entries):
    """Write a stage's archive, and its digest into the manifest."""
    with zipfile.ZipFile(path / "stage-0.npz", "w", compress) as file:
        for name, content in entries.items():
            file.writestr(name.replace("_", "/") + ".npy", content)
    resign(path)


def resign(path):
    digest = hashlib.sha256((path / "stage-0.npz").read_bytes()).hexdigest()
    edit(path, lambda manifest: manifest["stages"][0].update(sha256=digest))


def header(shape, descr="<f4"):
    text = f"{{'descr': {descr!r}, 'fortran_order': False, 'shape': {shape!r}}}".ljust(117) + "\n"
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text.encode()


def no_archive(path):
    (path / "stage-0.npz").write_bytes(b"PK\x03\x04 and nothing behind it")
    resign(path)


HOSTILE = {
    "no archive": no_archive,
    "a bomb": lambda path: archive(path, zipfile.ZIP_DEFLATED, model_0=header((1 << 24,)) + bytes(1 << 26)),
    "a huge shape": lambda path: archive(path, model_0=header((1 << 40,)) + bytes(4)),
    "an endless shape": lambda path: archive(path, model_0=header((1 << 62, 1 << 62)) + bytes(4)),
    "objects": lambda path: archive(path, model_0=header((1,), "|O") + bytes(8)),
    "no header": lambda path: archive(path, model_0=b"not of NumPy"),
    "nothing": lambda path: archive(path),
    "deep JSON": lambda path: (path / "manifest.json").write_text("[" * 200_000),
    "deep recipes": lambda path: edit(path, lambda m: m.update(original=json.loads("[" * 900 + "]" * 900))),
    "wrong kinds": lambda path: edit(path, lambda m: m.update(stages=7)),
    "no stages": lambda path: edit(path, lambda m: m["stages"].clear()),
    "wrong places": lambda path: edit(path, lambda m: m["stages"][0].update(slots=[["a", 1]])),
    "a path": lambda path: edit(path, lambda m: m["stages"][0].update(file="../c/stage-0.npz")),
    "other dtypes": lambda path: edit(path, lambda m: m["stages"][0]["dtypes"].update({"model/0": "system"})),
    "no layers": lambda path: edit(path, lambda m: m["original"]["keras"]["config"].update(layers=[{}])),
    "a pipe": lambda path: ((path / "manifest.json").unlink(), os.mkfifo(path / "manifest.json")),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_damage_is_one_error_in_bounded_memory(copy, name):
    HOSTILE[name](copy)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    refused(copy, "damaged|no part of a checkpoint")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 60 << 10, "kilobytes"
