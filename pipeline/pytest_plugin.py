"""A pytest plugin: a fixture that verifies and closes pipelines, and reports where a failed test shows them.

pytest loads it, through `tapeline_pytest`, in every run wherever the package is installed, so that it imports nothing
of the package until a test uses it, and does nothing to tests that do not.
"""

from __future__ import annotations

import hashlib
import re
import sys
from collections.abc import Generator, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import pytest

if TYPE_CHECKING:
    from pipeline.report.report import Report

_LONGEST_NAME = 120


class AssertSingleTape(Protocol):
    """`pipeline.testing.assert_matches_single_tape`, with the same arguments, for pipelines that are closed for you."""

    def __call__(self, pipe: Any, x: Any, y: Any = None, sample_weight: Any = None, **options: Any) -> Report:
        """Verify; see there."""
        ...


def pytest_addoption(parser: pytest.Parser) -> None:
    """``--tapeline-report DIR``."""
    parser.getgroup("tapeline", "pipelines and one tape").addoption(
        "--tapeline-report", metavar="DIR", help="write the page of every failed verification into DIR"
    )


@pytest.fixture
def assert_single_tape() -> Iterator[AssertSingleTape]:
    """A function that fails the test unless a pipeline matches one tape; its pipelines are closed after the test.

    Arguments, result and errors are those of `pipeline.testing.assert_matches_single_tape`.
    """
    with ExitStack() as closing:
        held: set[int] = set()

        def check(pipe: Any, x: Any, y: Any = None, sample_weight: Any = None, **options: Any) -> Report:
            __tracebackhide__ = True
            from pipeline.testing import assert_matches_single_tape

            if id(pipe) not in held:
                held.add(id(pipe))
                closing.callback(pipe.close)
            return assert_matches_single_tape(pipe, x, y, sample_weight, **options)

        yield check


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Attach the verification's report to a test that failed for it; write its page if asked to."""
    found = yield
    verified = None if call.excinfo is None else _report_of(call.excinfo.value)
    if found.failed and verified is not None:
        text = verified.text()
        folder = item.config.getoption("--tapeline-report")
        if folder is not None:
            text += f"\n\n{_written(verified, item.config.invocation_params.dir / folder, item.nodeid, call.when)}"
        found.sections.append(("verification", text))
    return found


def _report_of(error: BaseException) -> Report | None:
    """The report that an error carries; no report was made if its module was never imported."""
    module = sys.modules.get("pipeline.report.report")
    carried = getattr(error, "report", None)
    return carried if module is not None and isinstance(carried, module.Report) else None


def _written(verified: Report, folder: Path, test: str, when: str) -> str:
    """Write the page and say where it is; a disk that is full must not end the run."""
    name = re.sub(r"[^\w.-]+", "_", test)[-_LONGEST_NAME:].strip("_")
    unique = hashlib.sha256(test.encode()).hexdigest()[:8]
    path = folder / f"{name}-{unique}{'' if when == 'call' else f'-{when}'}.html"
    try:
        return f"page: {verified.save(path)}"
    except OSError as error:
        return f"the page could not be written: {error}"
