"""docs/fault-matrix.md says what the code does: the same faults, models and numbers of places, nothing missed."""

import re

import pytest

from tests.faults import copies, shared
from tests.faults.cases import CASES, SCHEDULES
from tests.faults.catalogue import FAULTS, NAMES
from tests.faults.live import Live
from tests.faults.page import NONE, PATH, described, tables

PAGE = PATH.read_text()
EAGER, COMPILED, SHARED, COPIES = tables(PAGE)
CELL = re.compile(r"(\d+) of (\d+)")


@pytest.mark.parametrize("table", [EAGER, COMPILED], ids=["eager", "compiled"])
def test_every_fault_of_the_catalogue_has_its_row(table):
    assert [row[:2] for row in table] == [(fault.name, fault.how) for fault in FAULTS]
    assert {fault.name for fault in FAULTS} == set(NAMES)


def test_every_shared_fault_has_a_row_per_check():
    assert [row[:3] for row in SHARED] == [(f.name, f.how, check) for f in shared.FAULTS for check in shared.CHECKS]
    for row, fault in zip(SHARED, [f for f in shared.FAULTS for _ in shared.CHECKS], strict=True):
        assert list(row[3:]) == ["1 of 1" if case in fault.cases else NONE for case in CASES]


def test_every_fault_of_a_copy_has_its_row():
    assert [row[:3] for row in COPIES] == [(fault.name, fault.how, "own") for fault in copies.FAULTS]
    for row, fault in zip(COPIES, copies.FAULTS, strict=True):
        assert list(row[3:]) == ["1 of 1" if case in fault.where else NONE for case in CASES]


@pytest.mark.parametrize("table", [EAGER, COMPILED, SHARED, COPIES], ids=["eager", "compiled", "shared", "copies"])
def test_nothing_was_missed_or_misnamed(table):
    cells = [cell for row in table for cell in row[3:] if cell != NONE]
    assert cells
    assert all((match := CELL.fullmatch(cell)) and match[1] == match[2] != "0" for cell in cells), cells


def test_every_check_that_must_find_a_fault_is_one_that_did():
    for fault, row in zip(FAULTS, EAGER, strict=True):
        assert set(row[2].split(", ")) <= {*fault.checks, "hand-off", "tape"}


@pytest.mark.gate
@pytest.mark.parametrize("eager", [True, False], ids=["eager", "compiled"])
@pytest.mark.parametrize("case", CASES)
def test_the_places_are_those_of_the_code(case, eager):
    live = Live(CASES[case], SCHEDULES[0], eager)
    try:
        places = [len(fault.places(live)) * len(SCHEDULES) for fault in FAULTS]
        text = described(live)
    finally:
        live.close()
    column = 3 + list(CASES).index(case)
    cells = [row[column] for row in (EAGER if eager else COMPILED)]
    assert cells == [f"{count} of {count}" if count else NONE for count in places]
    assert text in PAGE


def test_healthy_pipelines_raised_no_alarm():
    assert re.search(r"^200 healthy random configurations, ", PAGE, re.MULTILINE)
    assert re.search(r": 0 false alarms\.", PAGE)
