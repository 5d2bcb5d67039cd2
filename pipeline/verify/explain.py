"""Explanations of gradients that are None, zero or not finite, over all stages: a blockage in one explains another.

    driver                                        reference process
    batch ──────────────────────────────────────► all stages joined, recorded under one tape
    gradients of the pipeline itself  ◄──compare──  rows: variable, status, reason, operation, layer, stage

The joined model says why (`pipeline.reference.explain`); that what the pipeline itself computed is the same is looked
at, and said if it is not.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from pipeline.errors import DataError
from pipeline.reference.explain import LOSS
from pipeline.reference.orders import Explain
from pipeline.verify.gradients import named_gradients
from stages.explanation.rows import CONNECTED, NOT_CONNECTED, NOT_FINITE, ZERO, Explanation
from stages.worker.orders import Mode

if TYPE_CHECKING:
    from pipeline.runtime.session import Session

__all__ = ["LOSS", "beside", "check_target", "explained", "status_of_array"]


def explained(session: Session, x: Any, y: Any, sample_weight: Any, target: str) -> Explanation:
    """Explain the gradients of a running pipeline; see `Pipeline.explain`."""
    compiled = session.workers.needs_compile("explain")
    check_target(session, target)
    expected: dict[str, str] = {}
    gradients: Mapping[str, Any] = {}
    if target == LOSS:
        batch = session.steps.batch(x, y, sample_weight, compiled.judged)
        gradients = named_gradients(session, batch)
        expected = {name: status_of_array(gradient) for name, gradient in gradients.items()}
    else:
        batch = session.steps.batch(x, None, None, judged=())
    with session.reference.telling():
        reference = session.reference.synchronised()
        if target == LOSS:  # either way the reference has the batch afterwards
            session.steps.differentiate(batch, reference)
        else:
            reference.run(session.steps.plan(batch, training=False), Mode.PREDICT, batch)
        (reply,) = reference.ask(Explain(target, expected))
    found = Explanation.from_plain(reply.value)
    return beside(found, gradients) if target == LOSS else found


def check_target(session: Session, target: str) -> None:
    """Refuse a target that the pipeline does not have.

    Raises:
        DataError: With the names that there are.
    """
    known = [LOSS, *(name for gives in session.setup.wires.gives for name, _ in gives)]
    for name, segment in zip(session.setup.wires.names, session.setup.segments, strict=True):
        known += [f"{name}/{state}" for state in segment.states]
    if target not in known:
        raise DataError(f"explain: expected a target among {', '.join(known)}, received {target!r}")


def beside(found: Explanation, gradients: Mapping[str, Any]) -> Explanation:
    """An explanation with the norms of the pipeline's own gradients, and notes where these say something else."""
    rows, notes = [], list(found.notes)
    for row in found.rows:
        if row.name not in gradients:
            rows.append(row)
            continue
        gradient = gradients[row.name]
        status = status_of_array(gradient)
        norm = None if gradient is None else float(np.linalg.norm(gradient.astype(np.float64)))
        if status != row.status and not {status, row.status} <= {ZERO, NOT_CONNECTED}:
            notes.append(
                f"{row.name}: the pipeline's gradient is {status}, under one tape it is {row.status}; ask pipe.verify"
            )
        rows.append(replace(row, norm=norm))
    return Explanation(found.headline, tuple(rows), tuple(notes))


def status_of_array(gradient: Any) -> str:
    """The status of a gradient as the driver has it."""
    if gradient is None:
        return NOT_CONNECTED
    values = np.asarray(gradient).astype(np.float64)
    if not np.isfinite(values).all():
        return NOT_FINITE
    return CONNECTED if values.any() else ZERO
