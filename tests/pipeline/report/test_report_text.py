"""A report in the terminal and as files: what failed comes first, long ones are shortened, JSON is strict."""

from __future__ import annotations

import json
import math
import xml.etree.ElementTree as ET
from dataclasses import replace
from io import StringIO

import pytest
from rich.console import Console

from pipeline.compare.rows import CHECKS
from pipeline.errors import VerificationError
from pipeline.report.report import Report
from pipeline.report.text import LONG, MOST, text
from tests.pipeline.report import synthetic_reports as reports


def test_a_failed_report_begins_with_the_first_deviation():
    report = reports.failing()
    first, *others = str(report).splitlines()
    assert first == f"NOT equal to one tape: {report.first.sentence}"
    [line] = [line for line in others if line.startswith("middle  output gradient  pool1")]
    assert line.endswith("DIFFERS, microbatch 2")


def test_rows_are_grouped_by_check_and_name_their_stage_once():
    lines = str(reports.healthy()).splitlines()
    checks = ("tape", "hand-off", "undisturbed")
    starts = {name: next(k for k, line in enumerate(lines) if line.startswith(f"{name}  ")) for name in checks}
    assert sorted(starts, key=starts.get) == list(checks)
    assert lines[starts["tape"]].endswith("13 compared, all agree, 0.41 s")
    gradients = [line for line in lines if "  gradient  " in line]
    heads = ["top", "gradient", "middle", "gradient", "bottom", "gradient"]
    assert [line.split()[0] for line in gradients] == heads


def test_checks_that_were_not_made_say_why_at_the_end():
    assert str(reports.healthy()).splitlines()[-2:] == [
        "chain: not checked: stage 'middle': layer 'dropout' draws random numbers",
        "batch: not checked: stage 'middle': layer 'batch_norm' computes statistics per microbatch",
    ]


def test_every_tolerance_is_given_with_its_reason():
    shown = str(reports.healthy())
    assert "allowed 9.5e-07: compiled: fused operations round differently, at most 8 eps of float32" in shown
    assert "allowed 0: the same operations in the same order, bit for bit" in shown


def test_of_many_tolerances_the_largest_stands_for_all():
    report = reports.healthy()
    own = [replace(row, tolerance=1e-6 * k, why=f"reason {k}") for k, row in enumerate(report.rows, 1)]
    told = [line for line in str(replace(report, rows=tuple(own))).splitlines() if line.startswith("  allowed")]
    assert told == [
        "  allowed up to 1.3e-05: reason 13 (13 tolerances, each with its row)",
        "  allowed up to 1.9e-05: reason 19 (6 tolerances, each with its row)",
        "  allowed 2.0e-05: reason 20",
        "  allowed 2.1e-05: reason 21",
        "  allowed 2.2e-05: reason 22",
    ]


def test_a_long_report_lists_what_deviates_and_counts_the_rest():
    report = reports.long(deviating=3)
    assert len(report.rows) > LONG
    shown = str(report)
    assert shown.count("DIFFERS") == 3
    assert "tape  one tape over the joined model, on the same microbatches: 3 of 335 DEVIATE" in shown
    assert "not listed: 7 activation, 1 loss, 7 output gradient, 317 gradient: largest difference 5.9e-07" in shown
    assert len(shown.splitlines()) < 30
    everything = text(report, every=True)
    assert all(row.name in everything or row.name.partition("/")[2] in everything for row in report.rows)
    assert len(everything.splitlines()) > len(report.rows)


def test_where_everything_deviates_the_first_ones_are_listed():
    shown = str(reports.long(deviating=100))
    assert shown.count("DIFFERS") == MOST
    assert f"and {100 - MOST} more that deviate" in shown


def test_a_long_report_that_agrees_is_a_few_lines():
    assert len(str(reports.long()).splitlines()) < 20


def test_no_line_is_wider_than_asked_for():
    for report in (reports.failing(), reports.long(deviating=2), reports.hostile(), reports.not_finite()):
        assert max(map(len, text(report, width=100).splitlines())) <= 100


def test_names_have_no_power_over_the_terminal():
    report = reports.healthy(headline="\x1b[2J[bold]x[/bold]\n")
    assert "\\x1b[2J[bold]x[/bold]\\n" in str(report)
    assert "\x1b" not in str(report)
    assert "[bold red]x[/nope]" in str(reports.hostile())


def test_deviating_rows_are_red_in_a_terminal():
    written = StringIO()
    Console(file=written, width=130, force_terminal=True, color_system="standard").print(reports.failing().table())
    red = [line for line in written.getvalue().splitlines() if "\x1b[1;31m" in line]
    assert sum("DIFFERS" in line for line in red) == 3


def test_numbers_that_are_none_are_shown():
    shown = str(reports.not_finite())
    assert "inf" in shown and "nan" in shown and "gradient only in one tape" in shown


def strictly(text: str) -> dict:
    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    return json.loads(text, parse_constant=refuse)


MAKERS = [reports.healthy, reports.failing, reports.not_finite, reports.hostile, reports.towers]


@pytest.mark.parametrize("make", MAKERS, ids=lambda make: make.__name__)
def test_json_is_strict_and_holds_everything(make):
    report = make()
    found = strictly(report.to_json())
    assert found == report.as_dict()
    assert [row["name"] for row in found["rows"]] == [row.name for row in report.rows]
    assert found["ok"] is report.ok
    assert len(found["flow"]["spans"]) == (0 if report.flow.timeline is None else len(report.flow.timeline.spans))
    assert found["checks"][0]["about"] == CHECKS["tape"]


def test_what_json_has_no_number_for_is_named():
    found = strictly(reports.not_finite().to_json())
    assert (found["loss"], found["rows"][-1]["norm"], found["rows"][-1]["relative"]) == ("nan", "nan", "inf")
    assert found["first"]["row"] == found["rows"][-1]


@pytest.mark.parametrize("suffix", [".html", ".json", ".txt", ".png", ".svg", ".HTML"])
def test_the_suffix_says_the_form(tmp_path, suffix):
    report = reports.failing()
    path = report.save(tmp_path / "new" / f"report{suffix}")
    data = path.read_bytes()
    if suffix == ".png":
        assert data.startswith(b"\x89PNG")
    elif suffix == ".svg":
        assert ET.fromstring(data).tag.endswith("svg")
    elif suffix == ".json":
        assert strictly(data.decode()) == report.as_dict()
    elif suffix == ".txt":
        assert data.decode() == report.text(every=True) + "\n"
    else:
        assert data.startswith(b"<!doctype html>")


@pytest.mark.parametrize("name", ["report.pdf", "report", "report.html.gz"])
def test_another_suffix_is_refused_with_those_there_are(tmp_path, name):
    with pytest.raises(VerificationError, match=r"\.html, \.json, \.txt, \.png, \.svg"):
        reports.healthy().save(tmp_path / "new" / name)
    assert list(tmp_path.iterdir()) == []


def test_saving_twice_gives_the_same_file(tmp_path):
    for suffix in (".html", ".json", ".txt", ".svg"):
        first, second = (reports.failing().save(tmp_path / f"{k}{suffix}").read_bytes() for k in (1, 2))
        assert first == second, suffix


def test_the_summary_tells_bits_from_tolerance_from_nothing():
    assert "largest difference 3.1e-08 of the largest |gradient|" in reports.healthy().summary()
    bits = reports.healthy(tolerance=reports.BITS, rows=tuple(replace(r, relative=0.0) for r in reports.rows()))
    assert bits.summary() == "equal to one tape (bit for bit): 6 gradients, all equal bits; 16 other comparisons"
    nothing = Report((), (), math.nan, math.nan, reports.BITS, "nothing")
    assert nothing.summary() == "nothing was compared" and not nothing.ok
    assert "nothing was compared" in str(nothing)
