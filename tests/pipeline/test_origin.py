"""A module of the user's that has the name of one of our packages is reported with both files."""

from __future__ import annotations

import subprocess
import sys
import types
import zipfile

import pytest

import pipeline.origin
import stages.origin
from stages.origin import PACKAGES, ROOT


def hidden_by(monkeypatch, name, file):
    """Let `name` mean what the user's `file` is, as if it had been imported first."""
    module = types.ModuleType(name)
    module.__file__ = str(file)
    monkeypatch.setitem(sys.modules, name, module)


@pytest.mark.parametrize("check", [stages.origin.check_origins, pipeline.origin.check_origins])
def test_our_own_packages_are_no_fault(check):
    check()


@pytest.mark.parametrize("check", [stages.origin.check_origins, pipeline.origin.check_origins])
@pytest.mark.parametrize("name", PACKAGES)
def test_a_loaded_module_that_hides_ours_is_named(monkeypatch, tmp_path, check, name):
    theirs = tmp_path / f"{name}.py"
    hidden_by(monkeypatch, name, theirs)
    with pytest.raises(ImportError) as caught:
        check()
    text = str(caught.value)
    assert f"the name {name!r}" in text
    assert f"{theirs}\n    hides {ROOT / name / '__init__.py'}" in text
    assert "Rename that file" in text
    assert (caught.value.name, caught.value.path) == (name, str(theirs))


def test_all_hidden_packages_are_reported_together(monkeypatch, tmp_path):
    for name in ("pipeline", "transport"):
        hidden_by(monkeypatch, name, tmp_path / f"{name}.py")
    with pytest.raises(ImportError, match="'pipeline' and 'transport'"):
        stages.origin.check_origins()


def test_a_module_that_would_be_imported_is_found_on_the_path(monkeypatch, tmp_path):
    monkeypatch.delitem(sys.modules, "transport", raising=False)
    stages.origin.check_origins()
    (tmp_path / "transport.py").write_text("raise SystemExit('it must not be run')")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(ImportError, match="the name 'transport'"):
        stages.origin.check_origins()


def test_a_folder_without_code_hides_nothing(monkeypatch, tmp_path):
    monkeypatch.delitem(sys.modules, "transport", raising=False)
    (tmp_path / "transport").mkdir()
    monkeypatch.syspath_prepend(str(tmp_path))
    stages.origin.check_origins()


def test_the_same_packages_through_another_path_are_ours(monkeypatch, tmp_path):
    (tmp_path / "link").symlink_to(ROOT)
    hidden_by(monkeypatch, "transport", tmp_path / "link" / "transport" / "__init__.py")
    stages.origin.check_origins()


def test_a_zip_file_is_refused_by_name(tmp_path):
    with zipfile.ZipFile(tmp_path / "all.zip", "w") as packed:
        for name in ("pipeline/__init__.py", "pipeline/origin.py"):
            packed.write(ROOT / name, name)
    code = f"import sys; sys.path[:] = [{str(tmp_path / 'all.zip')!r}, *sys.path]; import pipeline"
    found = subprocess.run([sys.executable, "-I", "-c", code], capture_output=True, text=True, timeout=60)
    said = f"ImportError: Tapeline needs its files in a folder, and {tmp_path / 'all.zip'} is none: unpack it"
    assert said in found.stderr


def test_it_works_where_stages_itself_is_hidden(tmp_path):
    (tmp_path / "stages.py").write_text("")
    code = f"import sys; sys.path[:0] = [{str(tmp_path)!r}, {str(ROOT)!r}]; import stages; " + (
        "sys.path.insert(0, sys.path.pop(1)); from importlib import util; "
        f"spec = util.spec_from_file_location('o', {str(ROOT / 'pipeline' / 'origin.py')!r}); "
        "module = util.module_from_spec(spec); spec.loader.exec_module(module); module.check_origins()"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert f"{tmp_path / 'stages.py'}\n    hides {ROOT / 'stages' / '__init__.py'}" in ended.stderr
    assert ended.returncode == 1
