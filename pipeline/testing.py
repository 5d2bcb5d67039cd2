"""For test suites: one line that fails, with the report, unless a pipeline hands over what one tape computes.

    from pipeline.testing import assert_matches_single_tape

    def test_my_pipeline():
        with Pipeline.split(model(), stages=3) as pipe:
            pipe.compile("adam", "mse", run_eagerly=True)
            assert_matches_single_tape(pipe, x, y)

With pytest the fixture ``assert_single_tape`` of `pipeline.pytest_plugin` does the same and closes the pipeline.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Unpack

from pipeline.report.report import SingleTapeError
from pipeline.verify.question import Asked, Question, checks_named

if TYPE_CHECKING:
    from pipeline.pipeline import Pipeline
    from pipeline.report.report import Report

__all__ = ["SingleTapeError", "assert_matches_single_tape"]


def assert_matches_single_tape(
    pipe: Pipeline,
    x: Any,
    y: Any = None,
    sample_weight: Any = None,
    **question: Unpack[Asked],
) -> Report:
    """Verify a compiled pipeline on one batch; its weights, optimizer, statistics and seeds stay as they are.

    A check that was asked for by its name and could not be made fails as well: a test that checks nothing must not
    pass. ``"all"`` asks for whatever can be made.

    Args:
        pipe: The pipeline, compiled; it stays open.
        x: As in `Pipeline.train_on_batch`, like `y` and `sample_weight`.
        **question: As in `Pipeline.verify`: `checks`, `steps`, `tolerance`, `memory_limit` and `seed`.

    Returns:
        The report.

    Raises:
        SingleTapeError: Something differs by more than its tolerance, or a named check was not made.
        VerificationError: An unknown check.
    """
    __tracebackhide__ = True
    report = pipe.verify(x, y, sample_weight, **question)
    if not report.ok:
        raise SingleTapeError(f"the hand-off is not right: {report.summary()}\n\n{report.text(every=False)}", report)
    checks = question.get("checks", Question.checks)
    asked = () if checks == "all" else checks_named(checks)
    made = {check.name: check for check in report.checks}
    missed = [name for name in asked if name not in made or not made[name].ran]
    if missed:
        told = "; ".join(f"{name!r}: {made[name].reason if name in made else 'no reason given'}" for name in missed)
        raise SingleTapeError(f"asked for by name, but not checked: {told}\n\n{report.text(every=False)}", report)
    return report
