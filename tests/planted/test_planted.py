"""The catalogue of planted faults fits the sources, and its page says what `make planted` found."""

import ast
import subprocess
import sys

import pytest

from tests.planted.catalogue import FAULTS
from tests.planted.page import MISSED, NOT_RUN, PATH, link, named, page, read
from tests.planted.planting import LEVELS, Found, Planted, PlantingError, verdict
from tests.test_supported import exists

ALL = [fault for room in FAULTS.values() for fault in room]
PAGE = PATH.read_text()


def test_every_fault_can_be_planted() -> None:
    """Its snippet is in its file once, what stands there instead is Python, and the tests that look first exist."""
    faults = []
    for fault in ALL:
        try:
            ast.parse(fault.source())
            fault.files()
        except (PlantingError, SyntaxError) as error:
            faults.append(str(error))
    assert not faults, "\n".join(faults)


def test_at_least_forty_faults_that_differ() -> None:
    assert len({fault.breaks for fault in ALL}) == len(ALL) >= 40
    assert len({(fault.path, fault.source()) for fault in ALL}) == len(ALL)


def test_of_the_faults_that_ran_the_gate_found_all_and_check_nine_in_ten() -> None:
    found = read(PAGE)
    assert found and set(found) <= {fault.breaks for fault in ALL}, "say: make planted"
    assert all(one.gate for one in found.values()), [breaks for breaks, one in found.items() if not one.gate]
    assert sum(bool(one.check) for one in found.values()) >= 0.9 * len(found)
    assert page(found) == PAGE


def test_the_tests_that_found_them_are_still_there() -> None:
    tests = {test for one in read(PAGE).values() for test in (one.check, one.gate) if "::" in test}
    assert sorted(test for test in tests if not exists(test)) == []


# -- this test's own eyes ----------------------------------------------------------------------------------------


def planted(before: str, after: str = "2", path: str = "source.py") -> Planted:
    return Planted("a number", path, before, after, ())


def test_a_snippet_that_does_not_fit_is_refused(tmp_path) -> None:
    (tmp_path / "source.py").write_text("a = 1\nb = 11\n")
    assert planted("a = 1", "a = 2").source(tmp_path) == "a = 2\nb = 11\n"
    for fault, message in [
        (planted("1"), "found it 3 times"),
        (planted("c"), "found it 0 times"),
        (planted("a", "a"), "nothing is changed|found it"),
        (planted("a", path="gone.py"), "no such file"),
    ]:
        with pytest.raises(PlantingError, match=message):
            fault.source(tmp_path)


def found_by_pytest(tree, level: str) -> str:
    command = [sys.executable, "-m", "pytest", "-x", "-v", "-p", "no:cacheprovider", *LEVELS[level][:2], "tests"]
    run = subprocess.run(command, cwd=tree, capture_output=True, text=True, timeout=100)
    return verdict(run.returncode, run.stdout)


def test_the_first_failing_test_is_named(tmp_path) -> None:
    """Also where it takes the interpreter with it, or cannot be collected; a level runs its own tests only."""
    (tmp_path / "tests").mkdir()
    (tmp_path / "pyproject.toml").write_text("[tool.pytest.ini_options]\nmarkers = ['gate', 'soak']\n")
    file = tmp_path / "tests" / "test_x.py"
    file.write_text("import os, pytest\ndef test_a(): pass\n@pytest.mark.gate\ndef test_b(): assert 0\n")
    assert found_by_pytest(tmp_path, "check") == ""
    assert found_by_pytest(tmp_path, "gate") == "tests/test_x.py::test_b"
    file.write_text("import os\ndef test_a(): pass\ndef test_b_and_more(): os._exit(1)\n")
    assert found_by_pytest(tmp_path, "check") == "tests/test_x.py::test_b_and_more"
    file.write_text("import no_such_module\n")
    assert found_by_pytest(tmp_path, "check") == "tests/test_x.py"
    with pytest.raises(PlantingError, match="status 4"):
        verdict(4, "usage: pytest")


def test_a_page_is_read_as_it_was_written() -> None:
    first, second, third, *others = ALL
    found = {
        first.breaks: Found("tests/a/test_x.py::test_y", "tests/a/test_x.py::test_y"),
        second.breaks: Found("", "tests/a/test_x.py::test_y"),
        third.breaks: Found("", ""),
    }
    assert read(page(found)) == found
    assert page(found).count(MISSED) == 3 and page(found).count(NOT_RUN) == 2 * len(others) + 1
    assert named(link("tests/test_x.py")) == "tests/test_x.py"
