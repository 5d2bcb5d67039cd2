"""Methods of `Pipeline` that leave it as it is: gradients, their verification and explanation, times.

Each function is a method of `pipeline.pipeline.Pipeline`, and `pipe` the pipeline.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from pipeline.plan.timeline import Timeline
from pipeline.report.report import Report
from pipeline.verify.explain import LOSS, explained
from pipeline.verify.gradients import named_gradients
from pipeline.verify.question import Question
from stages.explanation.rows import Explanation

if TYPE_CHECKING:
    from pipeline.pipeline import Pipeline


def gradients(
    pipe: Pipeline, x: Any, y: Any = None, sample_weight: Any = None
) -> dict[str, np.ndarray[Any, Any] | None]:
    """dL/dvariables of one batch in training mode; nothing is applied, and no state is changed.

    Args:
        x: Arrays (n, ...) as `fit` takes them, like `y` and `sample_weight`.

    Returns:
        {"<stage>/<variable path>": array of the variable's shape and dtype}; None where the loss does not depend
        on the variable.

    Raises:
        CompileError: There is no loss; `compile` comes first.
        DataError: The batch does not fit the model.
    """
    compiled = pipe.session.workers.needs_compile("gradients")
    return named_gradients(pipe.session, pipe.session.steps.batch(x, y, sample_weight, compiled.judged))


def verify(
    pipe: Pipeline,
    x: Any,
    y: Any = None,
    sample_weight: Any = None,
    *,
    checks: str | Sequence[str] = Question.checks,
    steps: int = Question.steps,
    tolerance: float | None = Question.tolerance,
    memory_limit: int = Question.memory_limit,
    seed: int = Question.seed,
) -> Report:
    """Check this pipeline on one batch: everything that crosses a cut, all gradients, and whatever else is asked.

    What was sent and what arrived is always compared, so is the step with that of your own objects, and all values are
    put back and compared bit for bit, your own objects' too. The reference of "tape" runs in a process of its own, with
    the same values, microbatches and thread count.

    Args:
        x: As in `train_on_batch`, like `y` and `sample_weight`.
        checks: ``"all"`` or some of: ``"tape"``, one tape over the joined model; ``"chain"``, the Jacobian chain
            rule; ``"differences"``, finite differences in float64; ``"batch"``, the whole batch under one tape
            with Keras's own loss; ``"steps"``, updates of weights, optimizer, statistics, seeds and metrics; ``"own"``,
            your own model, loss and optimizer in this process: outputs, losses, gradients and one update. It is made
            unasked too, with every verification, and the report says where it could not be.
        steps: How many updates the check ``"steps"`` makes.
        tolerance: Largest accepted difference as a part of the largest |value|; default: the rules of
            `pipeline.compare.tolerance`: 0 (bit for bit) when eager, 8 eps or what compiling alone changes when
            compiled.
        memory_limit: Bytes that a Jacobian may take in the check ``"chain"``.
        seed: Of the random directions of the check ``"differences"``.

    Returns:
        The report: ``report.ok`` is the verdict, ``report.first`` says where the flow first deviates,
        ``print(report)`` shows a table, ``report.save("report.html")`` writes a page; tests call
        ``raise_if_failed()``.

    Raises:
        VerificationError: An unknown check, or a number that cannot be.
        FirstBatchError: A layer adds a loss that microbatches would count otherwise than Keras does.
    """
    question = Question.of(checks, steps=steps, tolerance=tolerance, memory_limit=memory_limit, seed=seed)
    from pipeline.verify.verification import verified  # what only a verification takes is imported with the first

    return verified(pipe.session, x, y, sample_weight, question)


def explain(pipe: Pipeline, x: Any, y: Any = None, sample_weight: Any = None, *, target: str = LOSS) -> Explanation:
    """Why every variable's gradient of one batch is what it is: connected, zero, not finite, or not connected.

    Of those that are not connected it is said which operation, in which layer of which stage, is in the way. The
    joined model is recorded in a process of its own, so a blockage in one stage explains another. Nothing is
    applied, and no state is changed.

    Args:
        x: As in `train_on_batch`, like `y` and `sample_weight`.
        target: ``"loss"``, the name of a tensor that a stage gives, or ``"<stage>/<state>"`` for a final state.

    Returns:
        The explanation: ``print(...)`` shows a table, ``.of(name)`` one variable, ``.ok`` whether all is connected.

    Raises:
        DataError: There is no such target.
    """
    return explained(pipe.session, x, y, sample_weight, target)


def timeline(pipe: Pipeline, x: Any, y: Any = None, sample_weight: Any = None, *, repeats: int = 5) -> Timeline:
    """When each worker did what in a step without its update, in seconds; the median of several steps.

    Nothing is applied, and no state is changed. In compiled mode the last stage's forward box holds its loss and
    backward too: they are one function.

    Args:
        x: As in `train_on_batch`, like `y` and `sample_weight`.
        repeats: How many steps to measure, after one that is not counted.
    """
    return pipe.session.steps.timeline(x, y, sample_weight, repeats)
