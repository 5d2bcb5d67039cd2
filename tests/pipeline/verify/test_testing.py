"""For test suites: the assertion fails as a test fails; the pytest plugin shows the report, writes its page, closes."""

from __future__ import annotations

import pickle
import subprocess
import sys
import tomllib
from dataclasses import replace

import keras
import numpy as np
import pytest

from pipeline import Pipeline
from pipeline.compare.rows import Check
from pipeline.errors import VerificationError
from pipeline.testing import SingleTapeError, assert_matches_single_tape
from tests.pipeline.report import synthetic_reports as reports
from tests.sources import ROOT

pytest_plugins = ["pytester"]
layers = keras.layers


class Fake:
    """What the assertion needs of a pipeline."""

    def __init__(self, report) -> None:
        self.report, self.asked, self.closed = report, None, 0

    def verify(self, x, y=None, sample_weight=None, **options):
        self.asked = ((x, y, sample_weight), options)
        return self.report

    def close(self):
        self.closed += 1


def test_what_matches_gives_its_report_and_what_was_asked_is_handed_on():
    pipe = Fake(reports.healthy())
    given = {"checks": ("tape",), "steps": 3, "tolerance": 1e-5, "memory_limit": 1000, "seed": 7}
    assert assert_matches_single_tape(pipe, "x", "y", "w", **given) is pipe.report
    assert pipe.asked == (("x", "y", "w"), given)
    assert_matches_single_tape(pipe, "x")
    assert "memory_limit" not in pipe.asked[1] and pipe.closed == 0


def test_what_deviates_is_a_failed_assertion_with_the_first_deviation_and_the_report():
    report = reports.failing()
    with pytest.raises(AssertionError) as raised:
        assert_matches_single_tape(Fake(report), "x")
    assert isinstance(raised.value, VerificationError) and raised.value.report is report
    first = str(raised.value).splitlines()[0]
    assert report.first.sentence in first
    assert "bottom/dense/kernel_1" in str(raised.value)


@pytest.mark.parametrize("checks", ["chain", ("tape", "chain"), ["chain", "batch"]], ids=str)
def test_a_named_check_that_was_not_made_fails(checks):
    with pytest.raises(SingleTapeError, match="'chain': stage 'middle': layer 'dropout' draws random numbers"):
        assert_matches_single_tape(Fake(reports.healthy()), "x", checks=checks)


def test_all_asks_for_what_can_be_made():
    assert assert_matches_single_tape(Fake(reports.healthy()), "x", checks="all").ok


def test_a_named_check_that_the_report_does_not_know_fails():
    report = reports.healthy(checks=(Check("tape", True),))
    with pytest.raises(SingleTapeError, match="not checked: 'steps': no reason given"):
        assert_matches_single_tape(Fake(report), "x", checks=("tape", "steps"))


def test_nothing_compared_is_no_success():
    with pytest.raises(SingleTapeError, match="nothing was compared"):
        assert_matches_single_tape(Fake(replace(reports.healthy(), rows=())), "x")


def test_a_report_that_is_raised_is_carried_by_its_error():
    report = reports.failing()
    with pytest.raises(SingleTapeError, match="pool1") as raised:
        report.raise_if_failed()
    assert raised.value.report is report
    reports.healthy().raise_if_failed()


def test_the_error_survives_the_way_between_processes():
    error = SingleTapeError("text", reports.failing())
    copy = pickle.loads(pickle.dumps(error))
    assert (str(copy), copy.report) == ("text", error.report)


# -- one real pipeline ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def real():
    keras.utils.set_random_seed(0)
    inner = keras.Input((6,))
    first = layers.Dense(8, activation="tanh", name="first")(inner)
    second = layers.Dense(8, activation="tanh", name="second")(first)
    outer = layers.Dense(3, activation="softmax", name="third")(layers.Add(name="sum")([first, second]))
    model = keras.Model(inner, outer)
    with Pipeline.split(model, at=["first", "second"], microbatches=3, transport="inproc") as pipe:
        pipe.compile("adam", "sparse_categorical_crossentropy", metrics=["accuracy"], run_eagerly=True)
        rng = np.random.default_rng(0)
        yield pipe, rng.standard_normal((9, 6), dtype="float32"), rng.integers(0, 3, 9)


def test_a_real_pipeline_matches_and_its_report_can_be_shown_in_every_form(real, tmp_path):
    pipe, x, y = real
    report = assert_matches_single_tape(pipe, x, y, np.linspace(0.5, 1.5, 9, dtype="float32"), checks=["tape", "steps"])
    for suffix in ("html", "json", "txt", "png", "svg"):
        assert report.save(tmp_path / f"report.{suffix}").stat().st_size > 1000
    links = {(edge.producer, edge.consumer) for edge in report.flow.edges}
    assert links == {(pipe.names[0], pipe.names[1]), (pipe.names[1], pipe.names[2]), (pipe.names[0], pipe.names[2])}
    html = (tmp_path / "report.html").read_text()
    assert "link-2-backward" in html and html.count('class="span ') == 2 * 3 * 3


def test_every_row_of_a_real_report_is_in_its_picture_unless_it_belongs_to_no_stage(real):
    from pipeline.report.layout import picture

    pipe, x, y = real
    report = pipe.verify(x, y, checks=("tape", "steps"))
    held = {index for part in picture(report).parts for index in part.rows}
    assert [row for index, row in enumerate(report.rows) if index not in held and row.stage] == []
    arrows = [arrow.part for arrow in picture(report).arrows]
    assert len(arrows) == 6 and all(len(part.rows) == 2 for part in arrows)  # one tape's, and what arrived


# -- the plugin ----------------------------------------------------------------------------------------------------

TESTS = """
    import pytest
    from tests.pipeline.report import synthetic_reports as reports
    from tests.pipeline.verify.test_testing import Fake

    made = []

    def pipe(report):
        made.append(Fake(report))
        return made[-1]

    def test_healthy(assert_single_tape):
        one = pipe(reports.healthy())
        assert assert_single_tape(one, 1, 2).ok
        assert assert_single_tape(one, 1, 2, checks="all").ok
        assert one.closed == 0

    def test_failing(assert_single_tape):
        assert_single_tape(pipe(reports.healthy()), 1)
        assert_single_tape(pipe(reports.failing()), 1, 2, 3)

    @pytest.fixture
    def verified(assert_single_tape):
        return assert_single_tape(pipe(reports.failing()), 1)

    def test_failing_in_its_fixture(verified):
        pass

    @pytest.mark.parametrize("x", ["a/b", "a\\\\b"])
    def test_directly(x):
        from pipeline.testing import assert_matches_single_tape
        assert_matches_single_tape(Fake(reports.long(deviating=1)), x)

    def test_expected(assert_single_tape):
        with pytest.raises(AssertionError):
            assert_single_tape(pipe(reports.failing()), 1)

    def test_another_failure():
        class Odd(Exception):
            report = "no report of ours"
        raise Odd

    def test_all_were_closed_once():
        assert [one.closed for one in made] == [1] * 5
"""


@pytest.fixture
def plugin(pytester, monkeypatch):
    """A function that runs the tests above with the plugin, whether or not the package is installed."""
    monkeypatch.syspath_prepend(ROOT)

    def run(*arguments):
        pytester.makepyfile(test_suite=TESTS)
        found = pytester.runpytest_inprocess("-p", "no:tapeline", "-p", "pipeline.pytest_plugin", *arguments)
        found.assert_outcomes(passed=3, failed=4, errors=1)
        return found

    return run


def test_the_fixture_verifies_closes_and_attaches_the_report(plugin):
    found = plugin("-rN")
    found.stdout.fnmatch_lines(["*SingleTapeError: the hand-off is not right: NOT equal to one tape: stage 'middle'*"])
    output = found.stdout.str()
    assert output.count("- verification -") == 4  # not with the failure that is none of ours
    assert "page:" not in output
    assert output.count("not listed: 7 activation, 1 loss") == 2 * 2  # long ones are shortened here too
    assert "in check" not in output and "pytest_plugin.py" not in output  # our own frames are hidden


def test_the_page_of_every_failed_verification_is_written_if_asked_for(plugin, pytester):
    output = plugin("--tapeline-report", "found/pages").stdout.str()
    pages = sorted((pytester.path / "found" / "pages").iterdir())
    assert len(pages) == 4 and all(page.read_text().startswith("<!doctype html>") for page in pages)
    for page in pages:
        assert f"page: {page}" in output
    names = [page.name.rpartition("-")[0] for page in pages]
    assert "test_suite.py_test_directly_a_b" in names
    assert sum("setup" in page.name for page in pages) == 1


def test_a_folder_that_cannot_be_made_does_not_end_the_run(plugin, pytester):
    (pytester.path / "file").write_text("")
    output = plugin("--tapeline-report", "file/pages").stdout.str()
    assert output.count("the page could not be written") == 4
    assert "INTERNALERROR" not in output


def test_loading_the_plugin_loads_neither_tensorflow_nor_what_it_may_need_later(pytester):
    code = """
import sys, pytest
class Look:
    def pytest_sessionfinish(self):
        heavy = {"tensorflow", "keras", "numpy", "rich", "matplotlib"} & set(sys.modules)
        ours = {name for name in sys.modules if name.split(".")[0] in ("pipeline", "stages", "transport")}
        print("loaded:", sorted(heavy), sorted(ours))
sys.exit(pytest.main(["-p", "no:tapeline", "-p", "pipeline.pytest_plugin", "-p", "no:cacheprovider"], [Look()]))
"""
    pytester.makepyfile(test_nothing="def test_nothing(): pass")
    environment = {"PYTHONPATH": str(ROOT), "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", "PATH": ""}
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, timeout=60)
    assert run.returncode == 0, run.stdout + run.stderr
    light = ["pipeline", "pipeline.origin", "pipeline.pytest_plugin", "stages", "stages.origin", "stages.versions"]
    assert f"loaded: [] {[*light, 'transport', 'transport.lazy']}" in run.stdout


@pytest.mark.parametrize("name", ["pipeline", "stages", "transport"])
def test_a_project_with_a_folder_of_our_name_can_run_its_tests(pytester, name):
    pytester.mkpydir(name).joinpath("own.py").write_text("VALUE = 7")
    pytester.makepyfile(test_own=f"from {name}.own import VALUE\n\ndef test_own(): assert VALUE == 7")
    environment = {"PYTHONPATH": f".:{ROOT}", "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", "PATH": ""}
    command = [sys.executable, "-m", "pytest", "-p", "tapeline_pytest", "-p", "no:cacheprovider"]
    run = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=60)
    assert run.returncode == 0, run.stdout + run.stderr


def test_what_pytest_loads_is_the_whole_plugin():
    import tapeline_pytest
    from pipeline import pytest_plugin

    hooks = [name for name in vars(pytest_plugin) if name.startswith("pytest_")]
    assert sorted(tapeline_pytest.__all__) == sorted([*hooks, "assert_single_tape"])
    assert all(getattr(tapeline_pytest, name) is getattr(pytest_plugin, name) for name in tapeline_pytest.__all__)


def test_the_plugin_is_announced_to_pytest_under_the_name_that_switches_it_off():
    data = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert data["project"]["entry-points"]["pytest11"] == {"tapeline": "tapeline_pytest"}
    assert data["tool"]["setuptools"]["py-modules"] == ["tapeline_pytest"]
