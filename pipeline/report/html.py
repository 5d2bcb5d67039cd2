"""A report as one page that needs nothing else: no network, no other file, no server.

Verdict and first deviation on top, the pipeline with its verdicts, the checks, every comparison, the step's timeline.
What is static is written here; `report/page/page.js` fills the table from the data that the page holds as JSON.

Nothing that a user named can become code: text is escaped, the table's cells are set as text, ``<``, ``>`` and ``&`` of
the JSON are written as escapes, and the page's own policy lets only this script run, by its hash, and loads nothing.
"""

from __future__ import annotations

import base64
import hashlib
import json
from importlib.resources import files
from string import Template
from typing import TYPE_CHECKING

from pipeline.report.layout import STATES, Picture, nice_bytes, phase_of, picture
from pipeline.report.report import allowances
from pipeline.report.svg import legend, pipeline_svg
from pipeline.report.timeline_svg import timeline_svg
from stages.plain_text import escaped

if TYPE_CHECKING:
    from pipeline.compare.rows import Check, Row
    from pipeline.report.report import Report


_WIDE = 40
"""Facts of more characters take two columns."""


def page(report: Report) -> str:
    """The report as HTML; equal reports give equal pages."""
    style, script = _piece("page.css"), _piece("page.js")
    drawn = picture(report)
    return Template(_piece("page.html")).substitute(
        policy=f"default-src 'none'; style-src {_hash(style)}; script-src {_hash(script)}; img-src data:; "
        "base-uri 'none'; form-action 'none'",
        title=escaped(f"{'Equal' if report.ok else 'NOT equal'} to one tape: {report.headline}"),
        style=style,
        script=script,
        verdict=_verdict(report),
        facts=_facts(report),
        picture=_picture(report, drawn),
        checks="".join(_check(report, check) for check in report.checks),
        timeline=_timeline(report),
        data=_data(report, drawn),
    )


def _piece(name: str) -> str:
    return (files("pipeline.report") / "page" / name).read_text(encoding="utf-8")


def _hash(code: str) -> str:
    digest = base64.b64encode(hashlib.sha256(code.encode()).digest()).decode()
    return f"'sha256-{digest}'"


def _verdict(report: Report) -> str:
    if report.ok:
        words, more, mark = "Equal to one tape", report.summary(), "✓"
    elif report.rows:
        words, more, mark = "Not equal to one tape", report.summary(), "✕"
    else:
        words, more, mark = "Nothing was compared", "No check could be made; the reasons are below.", "○"
    first = ""
    if report.first is not None:
        more = (
            f"{len(report.failed)} of {len(report.rows)} comparisons deviate; what comes after the first one may only"
        )
        more += " be its consequence."
        first = (
            '<p class="first"><strong>First deviation:</strong> '
            f'<span id="first">{escaped(report.first.sentence)}</span> '
            '<button type="button" id="show-first" hidden>show its row</button></p>'
        )
    kind = "good" if report.ok else "bad"
    return (
        f'<div class="verdict {kind}"><span class="mark" aria-hidden="true">{mark}</span><div>'
        f'<h1 id="verdict">{words}</h1>{first}<p>{escaped(more)}</p></div></div>'
    )


def _facts(report: Report) -> str:
    failed = len(report.failed)
    allowed = f"{report.tolerance.relative:.2g}" if report.tolerance.relative else "0 (equal bits)"
    facts = (
        ("verified", report.headline),
        ("comparisons", f"{len(report.rows)}, {failed} beyond their tolerance" if failed else f"{len(report.rows)}"),
        ("loss", f"{report.loss:.9g}"),
        ("loss of one tape", f"{report.reference_loss:.9g}"),
        ("gradients may differ by", f"{allowed}: {report.tolerance.why}"),
        ("handed over", f"{nice_bytes(sum(edge.bytes for edge in report.flow.edges))} forward in one batch"),
        ("took", f"{report.seconds:.2f} s"),
    )
    return "".join(
        f'<div class="{"wide" if len(value) > _WIDE else "fact"}"><dt>{name}</dt><dd>{escaped(value)}</dd></div>'
        for name, value in facts
    )


def _picture(report: Report, drawn: Picture) -> str:
    if not drawn.boxes:
        return "<p>No pipeline was recorded.</p>"
    return f'<div class="scroll" tabindex="-1">{pipeline_svg(report, drawn)}</div>{legend(STATES[1:] + STATES[:1])}'


def _check(report: Report, check: Check) -> str:
    """One line of the table of checks."""
    rows = [row for row in report.rows if row.check == check.name]
    failed = sum(not row.ok for row in rows)
    if not check.ran:
        state, result = "none", f"not made: {check.reason}"
    elif failed:
        state, result = "failed", f"{failed} of {len(rows)} deviate"
    else:
        bits = all(row.difference == 0.0 for row in rows)
        state, result = "equal" if bits else "within", f"{len(rows)} compared, all {'equal bits' if bits else 'agree'}"
    allowed = "<br>".join(map(escaped, allowances(rows))) or "-"
    seconds = f"{check.seconds:.2f} s" if check.ran else "-"
    return (
        f'<tr><th scope="row">{escaped(check.name)}</th><td>{escaped(check.about)}</td>'
        f'<td class="result {state}">{escaped(result)}</td><td>{allowed}</td><td class="number">{seconds}</td></tr>'
    )


def _timeline(report: Report) -> str:
    timeline = report.flow.timeline
    if timeline is None or not timeline.spans:
        return "<p>No timeline was recorded.</p>"
    kinds = sorted({span.action.kind for span in timeline.spans})
    items = "".join(
        f'<li><span class="swatch span {kind.name.lower()}"></span>{kind.phrase}</li>' for kind in kinds
    )  # fmt: skip
    summary = (
        f"{escaped(timeline.name)}: step {timeline.step_time * 1e3:.4g} ms, bubble {timeline.bubble:.1%}, "
        f"{timeline.parallelism:.2f} of {timeline.workers} workers busy. The numbers are microbatches."
    )
    return (
        f'<p>{summary}</p><div class="scroll" tabindex="-1">{timeline_svg(timeline, report.flow.stages)}</div>'
        f'<ul class="legend">{items}<li><span class="swatch bubble"></span>idle</li></ul>'
    )


def _data(report: Report, drawn: Picture) -> str:
    """What the script works on; safe inside a script element."""
    found = report.as_dict()
    found["phases"] = [phase_of(row.kind) for row in report.rows]
    found["parts"] = {part.key: {"label": part.label, "rows": part.rows} for part in drawn.parts}
    found["first_row"] = -1 if report.first is None else _index(report, report.first.row)
    text = json.dumps(found, allow_nan=False, separators=(",", ":"))
    return text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")


def _index(report: Report, wanted: Row) -> int:
    """Where the row is; by identity first, as NaN is not equal to itself."""
    same = [index for index, row in enumerate(report.rows) if row is wanted]
    named = [
        index
        for index, row in enumerate(report.rows)
        if (row.check, row.kind, row.stage, row.name) == (wanted.check, wanted.kind, wanted.stage, wanted.name)
    ]
    return next(iter([*same, *named]), -1)
