"""The page of a report in a real browser: what a reader sees, clicks, types and hears, in light and in dark."""

from __future__ import annotations

import json
import re

import pytest

from tests.browser import DOWN, ENTER, RIGHT, browsing, missing
from tests.pipeline.report import synthetic_reports as reports

pytestmark = pytest.mark.skipif(bool(missing()), reason=missing() or "there is a browser")


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    with browsing(tmp_path_factory.mktemp("profile")) as found:
        yield found


@pytest.fixture
def show(browser, tmp_path):
    """A function that opens a report's page; afterwards the page must not have complained of anything."""

    def opened(report, scheme="light"):
        browser.prefer(scheme)
        browser.open(report.save(tmp_path / "report.html"))
        assert browser.run("return document.documentElement.dataset.ready") == "yes"
        return browser

    yield opened
    assert browser.complaints() == []


def listed(browser):
    """The table's rows from top to bottom, by their numbers in the report."""
    script = "return [...document.querySelectorAll('#rows tbody tr[data-row]')].map(row => +row.dataset.row)"
    return browser.run(script)


def colour(browser, selector, name):
    """Red, green and blue, 0 to 255, of a computed style."""
    return tuple(map(int, re.findall(r"\d+", browser.one(selector).style(name))[:3]))


def is_red(found):
    red, green, blue = found
    return red > 150 and red > 1.5 * green and red > 1.5 * blue


def contrast(one, other):
    """The ratio of WCAG 2 between two colours."""

    def light(rgb):
        parts = [c / 255 / 12.92 if c / 255 <= 0.04045 else ((c / 255 + 0.055) / 1.055) ** 2.4 for c in rgb]
        return 0.2126 * parts[0] + 0.7152 * parts[1] + 0.0722 * parts[2]

    high, low = sorted((light(one), light(other)), reverse=True)
    return (high + 0.05) / (low + 0.05)


def test_verdict_and_first_deviation_are_on_top_and_lead_to_the_row(show):
    report = reports.failing()
    browser = show(report)
    assert browser.one("h1").text == "Not equal to one tape"
    assert browser.one("#first").text == report.first.sentence
    browser.one("#failures").click()
    browser.one("#show-first").click()
    index = report.rows.index(report.first.row)
    line = browser.one(f"tr[data-row='{index}']")
    assert line.shown and "pool1" in line.text
    assert browser.run("return document.activeElement.closest('tr').dataset.row") == str(index)
    told = browser.one(f"tr[data-of='{index}']").text
    assert "at most 8 eps of float32" in told and "microbatch 2" in told


def test_all_rows_are_in_the_order_of_the_flow_until_a_column_is_chosen(show):
    report = reports.failing()
    browser = show(report)
    flow = list(range(len(report.rows)))
    assert listed(browser) == flow
    head = browser.one("th[data-key='relative'] button")
    head.click()
    sizes = [report.rows[index].relative for index in listed(browser)]
    assert sizes == sorted(sizes, reverse=True) and sizes[0] == 0.25
    assert browser.one("th[data-key='relative']").attribute("aria-sort") == "descending"
    head.click()
    assert [report.rows[index].relative for index in listed(browser)] == sorted(sizes)
    head.click()
    assert listed(browser) == flow
    browser.one("th[data-key='stage'] button").click()
    assert listed(browser) == sorted(flow, key=lambda index: report.rows[index].stage)


def test_the_table_is_filtered_by_words_by_check_and_by_failure(show):
    report = reports.failing()
    browser = show(report)
    browser.one("#failures").click()
    failed = [index for index, row in enumerate(report.rows) if not row.ok]
    assert listed(browser) == failed
    assert browser.one("#count").text == f"{len(failed)} of {len(report.rows)} comparisons"
    browser.one("#filter").type("KERNEL bottom")
    kernels = [index for index in failed if "bottom/dense" in report.rows[index].name]
    assert listed(browser) == kernels and len(kernels) == 2
    browser.one("#failures").click()
    browser.run("const box = document.getElementById('filter'); box.value = ''; box.dispatchEvent(new Event('input'))")
    assert len(listed(browser)) == len(report.rows)
    browser.one("#check option[value='hand-off']").click()
    assert listed(browser) == [index for index, row in enumerate(report.rows) if row.check == "hand-off"]
    browser.one("#filter").type("nothing is called so")
    assert browser.one("#rows tbody").text == "No comparison matches."


def test_the_picture_is_coloured_by_verdict_for_each_direction(show):
    browser = show(reports.failing())
    arrows = {
        (link, phase): colour(browser, f"[data-part='link-{link}-{phase}'] .line", "stroke")
        for link in (0, 1, 2)
        for phase in ("forward", "backward")
    }
    assert {place for place, found in arrows.items() if is_red(found)} == {(0, "backward")}
    stages = {
        (stage, phase): colour(browser, f"[data-part='stage-{stage}-{phase}'] rect", "fill")
        for stage in (0, 1, 2)
        for phase in ("forward", "backward", "state")
    }
    bad = stages[1, "backward"]
    assert {place for place, found in stages.items() if found == bad} == {(0, "backward"), (1, "backward")}
    assert not is_red(colour(browser, "[data-part='stage-2'] > rect", "stroke"))
    assert is_red(colour(browser, "[data-part='stage-1'] > rect", "stroke"))
    assert [mark.text for mark in browser.all(".picture .culprit")] == ["▲ first to deviate"]


def test_a_part_of_the_picture_shows_its_rows_by_mouse_and_by_keyboard(show):
    report = reports.failing()
    browser = show(report)
    browser.one("[data-part='stage-1-backward']").click()
    rows = [report.rows[index] for index in listed(browser)]
    assert {row.kind for row in rows} == {"output gradient", "gradient"} and {row.stage for row in rows} == {"middle"}
    assert browser.one("[data-part='stage-1-backward']").attribute("aria-pressed") == "true"
    assert browser.one("#selected").text == "only middle: backward ✕"
    browser.one("#selected").click()
    assert len(listed(browser)) == len(report.rows)
    browser.run("document.querySelector(\"[data-part='link-0-backward']\").focus()")
    browser.press(ENTER)
    rows = [report.rows[index] for index in listed(browser)]
    assert {(row.check, row.kind, row.name) for row in rows} == {
        ("tape", "output gradient", "pool1"),
        ("hand-off", "received output gradient", "pool1"),
    }
    browser.press(" ")
    assert len(listed(browser)) == len(report.rows)


def test_the_timeline_has_a_box_for_every_action_and_tells_about_it(show):
    report = reports.failing()
    browser = show(report)
    boxes = browser.all("svg.timeline .span")
    assert len(boxes) == len(report.flow.timeline.spans) == 3 * 4 * 2
    every = "return [...document.querySelectorAll('{}')].map(box => {})".format
    sizes = browser.run(every(".span > rect", "box.getBoundingClientRect().width"))
    assert min(sizes) > 1
    legend = [colour(browser, f".legend .span.{kind}", "background-color") for kind in ("forward", "backward")]
    drawn = browser.run(every(".span.backward > rect", "getComputedStyle(box).fill"))
    assert {tuple(map(int, re.findall(r"\d+", one))) for one in drawn} == {legend[1]} != {legend[0]}
    assert not browser.one("#tip").shown
    browser.point(browser.all("svg.timeline .worker:nth-of-type(2) .span")[0])
    assert browser.one("#tip").text.startswith("middle: forward of microbatch 0, 10 ms, from 10 to 20 ms")
    assert len(browser.all("svg.timeline .same")) == 6


def test_the_timeline_is_walked_by_arrow_keys(show):
    browser = show(reports.failing())
    browser.run("document.querySelector('svg.timeline .span').focus()")
    browser.press(RIGHT)
    assert browser.one("#tip").text.startswith("bottom: forward of microbatch 1")
    browser.press(DOWN)
    assert browser.one("#tip").text.startswith("middle: forward of microbatch 0")
    assert len(browser.all("svg.timeline .span[tabindex='0']")) == 1


def test_hundreds_of_rows_come_in_pieces(show):
    report = reports.long(stages=12)
    browser = show(report)
    assert len(report.rows) > 500 and len(listed(browser)) == 300
    browser.one("#more").click()
    assert len(listed(browser)) == min(600, len(report.rows))


def test_checks_that_were_not_made_say_why(show):
    browser = show(reports.healthy())
    assert browser.one("h1").text == "Equal to one tape"
    told = [line.text for line in browser.all("table.checks tbody tr") if "not made" in line.text]
    assert len(told) == 2 and "'dropout' draws random numbers" in told[0]


def test_numbers_that_are_none_are_told_and_sorted_last(show):
    report = reports.not_finite()
    browser = show(report)
    line = browser.one(f"tr[data-row='{len(report.rows) - 1}']").text
    assert "∞" in line and "gradient only in one tape" in line
    browser.one("th[data-key='norm'] button").click()
    assert listed(browser)[-1] == len(report.rows) - 1


def test_what_users_named_is_text_and_nothing_else(show):
    report = reports.hostile()
    browser = show(report)
    browser.one(f"tr[data-row='{len(report.rows) - 1}'] .toggle").click()
    assert browser.run("return window.broken === undefined")
    assert browser.all("img, b, i, u, #rows script, header script") == []
    assert browser.one("#first").text == report.first.sentence
    assert browser.run("return document.title").endswith(report.headline)
    shown = browser.run("return [...document.querySelectorAll('#rows td.stage')].map(cell => cell.textContent)")
    assert shown == [row.stage for row in report.rows]


def test_a_script_that_came_in_all_the_same_would_not_run(show, browser):
    show(reports.healthy())
    browser.run(
        "const code = document.createElement('script'); code.textContent = 'window.broken = 5';"
        "document.body.append(code)"
    )
    assert browser.run("return window.broken === undefined")
    [refused] = browser.complaints()
    assert "Content Security Policy" in refused


def test_the_page_asks_nobody_for_anything(show):
    browser = show(reports.failing())
    assert browser.run("return performance.getEntriesByType('resource').map(entry => entry.name)") == []


def test_the_data_can_be_had_back_from_the_page(show):
    report = reports.not_finite()
    browser = show(report)
    held = json.loads(browser.run("return document.getElementById('report').textContent"))
    assert {key: held[key] for key in report.as_dict()} == report.as_dict()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_can_be_read_in_light_and_in_dark(show, scheme):
    browser = show(reports.failing(), scheme)
    paper = colour(browser, "header", "background-color")
    assert (sum(paper) < 200) == (scheme == "dark")
    pairs = [("h2#h-picture", "color", paper), (".hint", "color", paper), (".checks tbody th[scope]", "color", paper)]
    for selector, name, ground in pairs[:2]:
        assert contrast(colour(browser, selector, name), ground) >= 4.5, selector
    for state in ("equal", "within", "failed", "none"):
        swatch = f".legend .swatch.{state}"
        assert contrast(colour(browser, swatch, "color"), colour(browser, swatch, "background-color")) >= 4.5, state
    label, box = (colour(browser, ".verdict", name) for name in ("color", "background-color"))
    assert contrast(label, box) >= 4.5
    number = colour(browser, "svg.timeline .worker:nth-of-type(1) .span:nth-of-type(1) text", "fill")
    assert contrast(number, colour(browser, ".legend .swatch.forward", "background-color")) >= 4.5


def test_every_control_has_a_name_and_every_column_a_head(show):
    browser = show(reports.failing())
    nameless = browser.run(
        """return [...document.querySelectorAll('button, input, select, [role=button], [role=img], svg')].filter(
            (one) => !one.closest('[hidden]') && !(one.getAttribute('aria-label') || one.textContent.trim() ||
            (one.labels && one.labels.length))).map((one) => one.outerHTML)"""
    )
    assert nameless == []
    heads = browser.run("return document.querySelectorAll('#rows thead th[scope=col]').length")
    cells = browser.run("return document.querySelector('#rows tbody tr').children.length")
    assert heads == cells == 12
    assert browser.run("return document.documentElement.lang") == "en"
