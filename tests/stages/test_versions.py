"""Another TensorFlow or Keras than those that were tried is said in words, before anything else goes wrong."""

import os
import subprocess
import sys
import tomllib
import warnings
from importlib.metadata import PackageNotFoundError
from types import SimpleNamespace

import pytest
from packaging.requirements import Requirement

from stages import versions
from tests.sources import ROOT


def installed(monkeypatch, **found):
    def version(name):
        if name not in found:
            raise PackageNotFoundError(name)
        return found[name]

    monkeypatch.setattr(versions, "version", version)


def test_the_ranges_are_those_of_the_declared_dependencies():
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    specifiers = {one.name: one.specifier for one in map(Requirement, declared)}
    for name, (first, beyond) in versions.SUPPORTED.items():
        assert specifiers[name] == Requirement(f"x>={first[0]}.{first[1]},<{beyond[0]}.{beyond[1]}").specifier


@pytest.mark.parametrize("found", [("2.18.0", "3.8.0"), ("2.21.0", "3.15.1"), ("2.20.0rc1", "3.12.0")])
def test_a_release_that_was_tried_passes_in_silence(monkeypatch, found):
    installed(monkeypatch, tensorflow=found[0], keras=found[1])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        versions.check_versions()


def test_what_is_not_found_is_not_judged(monkeypatch):
    installed(monkeypatch)
    versions.check_versions()


@pytest.mark.parametrize(("name", "found", "wanted"), [("tensorflow", "2.17.1", "2.18"), ("keras", "3.7.0", "3.8")])
def test_an_older_one_is_refused_with_both_versions_and_the_command(monkeypatch, name, found, wanted):
    installed(monkeypatch, **{name: found})
    words = f"{name} from {wanted}, and {found} is installed: pip install .{name}>={wanted},"
    with pytest.raises(ImportError, match=words):
        versions.check_versions()


def test_tensorflow_under_another_distributions_name_is_judged_too(monkeypatch):
    installed(monkeypatch, **{"tensorflow-cpu": "2.17.0"})
    with pytest.raises(ImportError, match=r"runs with tensorflow from 2\.18, and 2\.17\.0 is installed"):
        versions.check_versions()


@pytest.mark.parametrize(("name", "found"), [("tensorflow", "2.22.0"), ("tensorflow", "3.0.0"), ("keras", "3.16.0")])
def test_a_newer_one_is_named(monkeypatch, name, found):
    installed(monkeypatch, **{name: found})
    with pytest.warns(UserWarning, match=f"tried with {name} before .*, and {found} is installed"):
        versions.check_versions()


@pytest.fixture
def before_keras(monkeypatch, tmp_path):
    """A process that has not imported Keras, whose user has nothing set."""
    monkeypatch.delitem(sys.modules, "keras", raising=False)
    monkeypatch.delenv("KERAS_BACKEND", raising=False)
    monkeypatch.setenv("KERAS_HOME", str(tmp_path))
    return tmp_path / "keras.json"


def test_tensorflow_is_the_backend_unless_something_else_is_said(monkeypatch, before_keras):
    versions.check_backend()
    before_keras.write_text("no JSON")
    versions.check_backend()
    before_keras.write_text('{"backend": "jax"}')
    monkeypatch.setenv("KERAS_BACKEND", "tensorflow")
    versions.check_backend()


def test_another_backend_is_refused_with_who_chose_it(monkeypatch, before_keras):
    before_keras.write_text('{"floatx": "float32", "backend": "jax"}')
    with pytest.raises(ImportError, match=rf"Keras's backend is 'jax' \(by {before_keras}\): set KERAS_BACKEND=tens"):
        versions.check_backend()
    monkeypatch.setenv("KERAS_BACKEND", "torch")
    with pytest.raises(ImportError, match=r"Keras's backend is 'torch' \(by the environment variable KERAS_BACKEND\)"):
        versions.check_backend()
    monkeypatch.setitem(sys.modules, "keras", SimpleNamespace(config=SimpleNamespace(backend=lambda: "numpy")))
    with pytest.raises(ImportError, match=r"Keras's backend is 'numpy' \(keras is imported already\)"):
        versions.check_backend()


def test_the_import_of_either_package_looks_at_the_backend(tmp_path):
    """Before Keras is imported, which would say that there is no module named jax."""
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r})\nfrom pipeline import Pipeline"
    environment = {**os.environ, "KERAS_BACKEND": "jax"}
    found = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=60
    )
    assert found.returncode == 1 and found.stderr.splitlines()[-1].startswith("ImportError: tapeline trains with Tens")


def test_the_import_of_either_package_looks(tmp_path):
    """An old Keras is refused by `from pipeline import Pipeline`, whatever it lacks."""
    metadata = tmp_path / "keras-3.5.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: keras\nVersion: 3.5.0\n")
    (tmp_path / "keras.py").write_text("raise RuntimeError('was imported')\n")
    code = f"import sys; sys.path[:0] = [{str(tmp_path)!r}, {str(ROOT)!r}]\nfrom pipeline import Pipeline"
    found = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert found.returncode == 1 and "tapeline runs with keras from 3.8, and 3.5.0 is installed" in found.stderr
