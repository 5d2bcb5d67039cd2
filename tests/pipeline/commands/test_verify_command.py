"""`tapeline verify`: its exit status tells a deviation from a failure, its flags write what they say."""

from __future__ import annotations

import json
import sys

import pytest

from pipeline.commands.cli import main
from pipeline.commands.verify import imported
from tests.pipeline.report import synthetic_reports as reports

MODULE = """
from tests.pipeline.report import synthetic_reports as reports

asked = []

class Fake:
    def __init__(self, report):
        self.report = report

    def __enter__(self):
        return self

    def __exit__(self, *error):
        asked.append("closed")

    def verify(self, *batch, **options):
        asked.append((batch, options))
        return self.report

def good(): return Fake(reports.healthy()), "x", "y"
def weighted(): return [Fake(reports.healthy()), "x", "y", "w"]
def bad(): return Fake(reports.failing()), "x", "y"
def long(): return Fake(reports.long()), "x", "y"
def short(): return Fake(reports.healthy()), "x"
def other(): return "model", "x", "y"
def single(): return Fake(reports.healthy())
def broken(): raise ZeroDivisionError("of the user's")
def breaks_in_verify():
    fake = Fake(None)
    fake.verify = lambda *batch, **options: 1 / 0
    return fake, "x", "y"
"""


@pytest.fixture
def module(tmp_path, monkeypatch):
    """A folder with the module, where the command runs; the module itself."""
    (tmp_path / "my_pipelines.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    yield lambda: sys.modules["my_pipelines"]
    sys.modules.pop("my_pipelines", None)


@pytest.mark.parametrize(("function", "status"), [("good", 0), ("weighted", 0), ("bad", 1), ("broken", 2)])
def test_the_status_is_the_verdict(module, function, status, capsys):
    assert main(["verify", f"my_pipelines:{function}"]) == status
    out, err = capsys.readouterr()
    if status == 1:
        assert out.startswith("NOT equal to one tape: stage 'middle'")
    if status == 2:
        assert "ZeroDivisionError: of the user's" in err and "could not be verified" in err


def test_the_pipeline_is_closed_and_gets_the_whole_batch_and_what_was_asked_for(module):
    assert main(["verify", "my_pipelines:weighted", "--checks", "tape, steps,tape", "--steps", "3"]) == 0
    assert module().asked == [(("x", "y", "w"), {"checks": ("tape", "steps"), "steps": 3}), "closed"]
    assert main(["verify", "my_pipelines:good", "--checks", "all"]) == 0
    assert module().asked[2] == (("x", "y"), {"checks": "all", "steps": 1})


@pytest.mark.parametrize("function", ["short", "other", "single", "nothing_of_that_name"])
def test_what_the_function_must_return_is_said(module, function, capsys):
    assert main(["verify", f"my_pipelines:{function}"]) == 2
    told = capsys.readouterr().err
    assert told.startswith("tapeline verify: ") and len(told.splitlines()) == 1
    assert "(pipeline, x, y)" in told or "module:function" in told


def test_a_verification_that_raises_is_no_verdict(module, capsys):
    assert main(["verify", "my_pipelines:breaks_in_verify"]) == 2
    assert "ZeroDivisionError" in capsys.readouterr().err
    assert module().asked == ["closed"]


def test_a_module_that_cannot_be_read_is_no_verdict(module, tmp_path, capsys):
    (tmp_path / "my_broken_module.py").write_text("1 / 0")
    assert main(["verify", "my_broken_module:make"]) == 2
    assert "ZeroDivisionError" in capsys.readouterr().err


@pytest.mark.parametrize("function", ["good", "bad"])
def test_files_are_written_whatever_the_verdict(module, tmp_path, function):
    main(["verify", f"my_pipelines:{function}", "--html", "a/r.html", "--json", "a/r.json", "--figure", "a/r.svg"])
    assert (tmp_path / "a/r.html").read_text().startswith("<!doctype html>")
    assert json.loads((tmp_path / "a/r.json").read_text())["ok"] is (function == "good")
    assert "<svg" in (tmp_path / "a/r.svg").read_text()


@pytest.mark.parametrize(("flag", "name"), [("--html", "r.txt"), ("--json", "r"), ("--figure", "r.html")])
def test_a_wrong_suffix_is_told_before_anything_runs(module, tmp_path, flag, name, capsys):
    assert main(["verify", "my_pipelines:good", flag, name]) == 2
    assert f"{flag} expects a name that ends with ." in capsys.readouterr().err
    assert "my_pipelines" not in sys.modules and not (tmp_path / name).exists()


def test_a_file_that_cannot_be_written_is_no_verdict(module, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert main(["verify", "my_pipelines:good", "--json", "file/r.json"]) == 2
    assert "file" in capsys.readouterr().err


def test_quiet_prints_the_verdict_only(module, capsys):
    assert main(["verify", "my_pipelines:bad", "--quiet"]) == 1
    assert capsys.readouterr().out == f"{reports.failing().summary()}\n"


def test_long_reports_are_listed_in_full_if_asked_for(module, capsys):
    assert main(["verify", "my_pipelines:long"]) == 0
    short = capsys.readouterr().out
    assert main(["verify", "my_pipelines:long", "--all"]) == 0
    full = capsys.readouterr().out
    assert len(short.splitlines()) < 20 and len(full.splitlines()) > len(reports.long().rows)


@pytest.mark.parametrize("checks", ["tape,chains", "", "all,tape", "hand-off"])
def test_an_unknown_check_is_a_wrong_call(module, checks, capsys):
    with pytest.raises(SystemExit) as leaving:
        main(["verify", "my_pipelines:good", "--checks", checks])
    assert leaving.value.code == 2
    assert "expected all or some of tape, chain, differences, batch, steps" in capsys.readouterr().err


def test_a_file_of_the_current_folder_hides_nothing_that_is_installed(tmp_path, monkeypatch):
    """Whoever left it there would have it run in place of the module that was meant."""
    (tmp_path / "colorsys.py").write_text("rgb_to_hls = None")
    (tmp_path / "found_here.py").write_text("make = 1")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    for name in ("colorsys", "found_here"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    assert callable(imported("colorsys:rgb_to_hls"))
    assert imported("found_here:make") == 1
