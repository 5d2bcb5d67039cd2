"""The page of a report as a document: whole, alone, escaped; `test_report_browser` opens it."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import tomllib
from dataclasses import replace
from fnmatch import fnmatch
from html.parser import HTMLParser

import pytest

from pipeline.compare.rows import Flow
from pipeline.report.report import Report
from tests.pipeline.report import synthetic_reports as reports
from tests.sources import ROOT

VOID = {"meta", "link", "input", "br"}
ADDRESSES = {"src", "href", "action", "data", "poster", "srcset", "xlink:href", "formaction"}
MAKERS = [
    reports.healthy,
    reports.failing,
    reports.not_finite,
    reports.long,
    reports.towers,
    reports.hostile,
]
every_report = pytest.mark.parametrize("make", MAKERS, ids=lambda make: make.__name__)


class Page(HTMLParser):
    """Reads a page strictly: every element that is opened is closed in turn."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: list[tuple[str, dict[str, str | None]]] = []
        self.inside: dict[str, list[str]] = {}
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        assert len({name for name, _ in attrs}) == len(attrs), f"an attribute stands twice in {tag} {attrs}"
        self.seen.append((tag, dict(attrs)))
        self.inside.setdefault(tag, []).append("")
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.seen.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open and self.open[-1] == tag, f"</{tag}> closes {self.open[-3:]}"
        self.open.pop()

    def handle_data(self, data):
        if self.open:
            self.inside[self.open[-1]][-1] += data

    def all(self, tag):
        return [attributes for name, attributes in self.seen if name == tag]


@every_report
def test_every_element_is_closed_and_every_id_is_one(make):
    page = Page(make().to_html())
    assert page.open == []
    ids = [attributes["id"] for _, attributes in page.seen if "id" in attributes]
    assert len(ids) == len(set(ids))
    known = set(ids)
    for _, attributes in page.seen:
        for name in ("aria-labelledby", "for"):
            assert name not in attributes or attributes[name] in known


@every_report
def test_the_page_needs_nothing_from_outside(make):
    page = Page(make().to_html())
    addresses = [(tag, a[name]) for tag, a in page.seen for name in ADDRESSES if name in a]
    assert addresses == [("link", "data:,")]
    [policy] = [a["content"] for a in page.all("meta") if a.get("http-equiv") == "Content-Security-Policy"]
    assert policy.startswith("default-src 'none';") and "unsafe" not in policy and "http" not in policy
    style = "".join(page.inside["style"])
    assert "@import" not in style and "url(" not in style
    for tag, attributes in page.seen:
        assert "style" not in attributes, f"the policy forbids the style of {tag}"
        assert not [name for name in attributes if name.startswith("on")]


def test_the_policy_lets_just_this_script_and_this_style_run():
    page = Page(reports.healthy().to_html())
    [policy] = [a["content"] for a in page.all("meta") if a.get("http-equiv") == "Content-Security-Policy"]
    _, script = page.inside["script"]
    for code, place in ((script, "script-src"), (page.inside["style"][0], "style-src")):
        digest = base64.b64encode(hashlib.sha256(code.encode()).digest()).decode()
        assert f"{place} 'sha256-{digest}'" in policy


def test_what_users_named_stays_text():
    report = reports.hostile()
    html = report.to_html()
    page = Page(html)
    assert len(page.all("script")) == 2 and page.all("img") == page.all("b") == []
    data, _ = page.inside["script"]
    assert not re.search(r"[<>&]", data)
    assert json.loads(data)["flow"]["stages"] == list(report.flow.stages)
    assert "<script>window.broken" not in html and "<img src=x" not in html
    labels = [a["aria-label"] for _, a in page.seen if "data-part" in a]
    assert any(label.startswith(report.flow.stages[1]) for label in labels)


@every_report
def test_the_page_holds_the_report_as_data(make):
    report = make()
    data, _ = Page(report.to_html()).inside["script"]
    held = json.loads(data)
    assert {key: held[key] for key in report.as_dict()} == report.as_dict()
    assert len(held["phases"]) == len(report.rows)
    keys = re.findall(r'data-part="([^"]+)"', report.to_html())
    assert sorted(keys) == sorted(held["parts"])
    assert (held["first_row"] >= 0) == (report.first is not None)


def test_the_first_deviations_row_is_found_also_where_it_is_not_a_number():
    report = reports.not_finite()
    copied = replace(report, first=replace(report.first, row=replace(report.first.row)))
    for each in (report, copied):
        data, _ = Page(each.to_html()).inside["script"]
        assert json.loads(data)["first_row"] == len(report.rows) - 1


def test_verdict_checks_and_reasons_are_there_without_any_script():
    html = reports.failing().to_html()
    static = html[: html.index('<script type="application/json"')]
    assert "Not equal to one tape" in static
    assert "stage &#x27;middle&#x27; computes another dL/dOut" in static
    assert "not made: stage &#x27;middle&#x27;: layer &#x27;dropout&#x27; draws random numbers" in static
    assert "3 of 13 deviate" in static and "6 compared, all equal bits" in static
    assert "9.5e-07: compiled: fused operations round differently" in static


def test_the_timeline_has_every_action_in_words():
    report = reports.healthy()
    page = Page(report.to_html())
    spans = [a for _, a in page.seen if a.get("class", "").startswith("span ") and "data-tip" in a]
    told = [a["data-tip"] for a in spans]
    assert len(told) == len(report.flow.timeline.spans)
    assert told.count("bottom: forward of microbatch 1, 10 ms, from 10 to 20 ms, on worker 0") == 1
    assert [a["tabindex"] for a in spans] == ["-1"] * len(spans)


def test_a_report_of_nothing_is_a_page_too():
    nan = float("nan")
    html = Report((), (), nan, nan, reports.BITS, "nothing").to_html()
    page = Page(html)
    assert page.open == [] and "Nothing was compared" in html
    assert "No pipeline was recorded" in html and "No timeline was recorded" in html
    assert page.all("svg") == []


def test_without_edges_and_timeline_the_stages_are_shown():
    page = Page(reports.healthy(flow=Flow()).to_html())
    assert len([a for _, a in page.seen if a.get("class", "").startswith("part stage")]) == 3


def test_the_pages_pieces_are_installed_with_the_package():
    data = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]["pipeline"]
    pieces = [
        path.relative_to(ROOT / "pipeline").as_posix() for path in (ROOT / "pipeline" / "report" / "page").iterdir()
    ]
    assert len(pieces) == 3
    for piece in pieces:
        assert any(fnmatch(piece, pattern) for pattern in data), piece
