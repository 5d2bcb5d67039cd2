"""Explain the gradients of all stages, joined, in the reference process: why one is None, zero or not finite.

The stages are run under one recorded tape (`stages.explanation.flow`), so that a blockage in stage 2 explains a
variable of stage 0. What the driver asks and compares is in `pipeline.verify.explain`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from pipeline.errors import DataError
from stages.explanation.rows import CONNECTED, NOT_CONNECTED, NOT_FINITE, ZERO, Blocker, Explanation, ExplanationRow

if TYPE_CHECKING:
    from pipeline.reference.one_tape.batch import Whole
    from stages.worker.hosted_stage import HostedStage

LOSS = "loss"
_HAND_OFF = ("argmax", "cast", "comparison", "integer result")
"""Reasons with which a tensor that has no gradient may cross a cut."""


def explain_joined(
    hosted: Sequence[HostedStage], batch: Whole, target: str = LOSS, statuses: Mapping[str, str] | None = None
) -> dict[str, Any]:
    """Explain all variables of all stages; what runs in the reference process.

    Args:
        hosted: The built stages, in the order of the data flow, with the live values.
        batch: The batch. The first microbatch is explained; later ones only for variables whose gradient is zero in all
            before them, or not finite in a later one.
        target: ``loss``, a tensor that some stage gives, or ``<stage>/<state>`` for a state behind the last window.
        statuses: Of the pipeline's own gradients, by name.

    Returns:
        `Explanation.plain`. All variables, statistics and random states are as they were.
    """
    from pipeline.reference.one_tape.single_tape import SingleTape
    from stages.explanation.explain import run_and_explain

    tape = SingleTape(hosted)
    with _undisturbed(hosted):
        weights = tape.weights(batch)
    names = {id(stage.stage.model): stage.spec.name for stage in hosted}
    variables = _variables(hosted)
    rows: dict[str, ExplanationRow] = {}
    notes: dict[str, None] = {}
    for k in range(len(batch.grid.sizes)):
        run = _Run(tape, batch, weights, k, target)
        found = run_and_explain(run, variables, stages=names)
        notes |= dict.fromkeys(found.notes)
        for row in found.rows:
            rows[row.name] = _worse(rows.get(row.name), row)
        if not any(_undecided(row, (statuses or {}).get(row.name)) for row in rows.values()):
            break
    if batch.truncate is not None and not all(row.status == CONNECTED for row in rows.values()):
        whole = _Run(tape, replace(batch, truncate=None), weights, 0, target)
        for free in run_and_explain(whole, variables, stages=names).rows:
            rows[free.name] = _truncated(rows[free.name], free, batch.truncate)
    several = len(batch.grid.sizes) > 1
    crossing = run.crossing()
    done = [replace(_handed_off(row, crossing), norm=None if several else row.norm) for row in rows.values()]
    return Explanation(f"explained {len(hosted)} stages", tuple(done), tuple(notes)).plain()


class _Run:
    """One microbatch through all stages, under whatever tape is open; gives the target."""

    def __init__(self, tape: Any, batch: Whole, weights: Any, k: int, target: str) -> None:
        self.tape, self.batch, self.weights, self.k, self.target = tape, batch, weights, k, target
        self._last: Any = None

    def __call__(self) -> dict[str, Any]:
        import tensorflow as tf

        from pipeline.reference.one_tape.batch import by_head, of_microbatch, state_names
        from stages.loss.precision import float_of_losses

        tape, batch, k = self.tape, self.batch, self.k
        outputs = [name for stage in tape.hosted for name, _ in stage.spec.outputs]
        states = [name for stage in tape.hosted for name in state_names(stage)]
        # Joints make zeros of "no gradient", so there are none here.
        tape.dead = frozenset((name, w) for name in (*outputs, *states) for w in range(batch.grid.windows))
        mine = by_head(of_microbatch(self.weights, k))
        share = batch.grid.sizes[k] / batch.grid.samples
        runs = tape.run_windows(batch.microbatch(k), mine, share, tape.initial_states(batch, k))
        self._last = runs[-1]
        if self.target == LOSS:
            terms = [term * seed for run in runs for term, seed in zip(run.targets, run.seeds, strict=True)]
            return {LOSS: tf.add_n([tf.cast(term, float_of_losses()) for term in terms])}
        if self.target in self._last.tensors and self.target in outputs:
            return {self.target: self._last.tensors[self.target]}
        for stage in tape.hosted:
            for name, state in zip(stage.spec.states, state_names(stage), strict=True):
                if self.target == f"{stage.spec.name}/{name}":
                    return {self.target: self._last.states[state]}
        raise DataError(f"explain: there is no target {self.target!r}")

    def crossing(self) -> dict[tuple[str, str], str]:
        """{(producing stage, tensor): words} of all that crosses a cut and cannot have a gradient."""
        from stages.tape.tensors import is_differentiable

        stage = {one.spec.index: one.spec.name for one in self.tape.hosted}
        return {
            (one.spec.name, name): f"{name!r} crosses the cut from stage {one.spec.name} to stage "
            f"{', '.join(stage[i] for i in consumers)} as {self._last.tensors[name].dtype.name}"
            for one in self.tape.hosted
            for name, consumers in one.spec.outputs
            if consumers and not is_differentiable(self._last.tensors[name].dtype)
        }


def _variables(hosted: Sequence[HostedStage]) -> dict[str, Any]:
    """All variables that are, or could be, trained, as `Pipeline.gradients` names them; shared ones once."""
    from pipeline.reference.one_tape.batch import owned
    from stages.explanation.explain import trained_weights

    found: dict[str, Any] = {}
    for stage in hosted:
        model = stage.stage.model
        trainable = {id(v) for v in stage.stage.trainable_variables}
        mine = {id(v) for v in owned(stage)}
        could = {id(v) for v in trained_weights(model).values()} - trainable
        named = zip(stage.variable_names(), model.variables, strict=True)
        found |= {f"{stage.spec.name}/{name}": v for name, v in named if id(v) in mine | could}
    return found


def _undisturbed(hosted: Sequence[HostedStage]) -> Any:
    from pipeline.reference.witness.flow import undisturbed

    return undisturbed(hosted)


_RANK = {NOT_CONNECTED: 0, ZERO: 1, CONNECTED: 2, NOT_FINITE: 3}


def _worse(before: ExplanationRow | None, now: ExplanationRow) -> ExplanationRow:
    """What two microbatches say together: one that is not finite counts, then one that has a gradient."""
    return now if before is None or _RANK[now.status] > _RANK[before.status] else before


def _undecided(row: ExplanationRow, status: str | None) -> bool:
    """Whether a later microbatch may say more."""
    return row.status == ZERO or (status == NOT_FINITE and row.status != NOT_FINITE)


def _truncated(row: ExplanationRow, free: ExplanationRow, truncate: int) -> ExplanationRow:
    """A row, if truncation is why there is no gradient: without it there is one."""
    from stages.explanation.reasons import ADVICE

    if row.status not in (NOT_CONNECTED, ZERO) or free.status != CONNECTED:
        return row
    why = f"it reaches the target only through states, and their gradient is cut off every {truncate} window(s)"
    stage = row.name.partition("/")[0]
    places = (Blocker("StopGradient", stage=stage, what="on the states between windows"),)
    return replace(row, reason="truncation", why=why, advice=ADVICE["truncation"], blockers=places)


def _handed_off(row: ExplanationRow, crossing: Mapping[tuple[str, str], str]) -> ExplanationRow:
    """A row, with the integers that cross a cut where that is how the gradient ends."""
    if row.status != NOT_CONNECTED or not row.blockers:
        return row
    first = row.blockers[0]
    words = [text for (stage, _), text in crossing.items() if stage == first.stage and row.reason in _HAND_OFF]
    return replace(row, why=f"{row.why}; {words[0]}, and no gradient comes back through that") if words else row


__all__ = ["LOSS", "explain_joined"]
