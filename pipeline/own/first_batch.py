"""A look at the first batch: do the workers compute what the user's own model and loss give?

Before the first update, evaluation or prediction after `compile`, a few samples of the batch go through the pipeline,
and through the user's own objects in this process. Loss, outputs and metrics must agree to within rounding. So a model
that became another one on its way into the workers is refused before it trains, with the first stage that differs.

What rounding may do is the rule of `Tolerance.elsewhere`: where the difference is no plain rounding, the own model is
run again with every variable changed by at most one rounding.
"""

from __future__ import annotations

import warnings
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np

from pipeline.batch.microbatch import microbatch_sizes
from pipeline.batch.step import Batch, StepResult
from pipeline.compare.tolerance import MARGIN, TRIES, Tolerance
from pipeline.distance import distance
from pipeline.errors import FirstBatchError
from pipeline.model.merge import StageValues
from pipeline.own.added_losses import no_mean
from pipeline.own.chance import layers_that_draw, told
from pipeline.own.coupling import THE_MODEL, coupling
from pipeline.own.layer_calls import LayerCall
from pipeline.own.lent import lent
from pipeline.own.metrics import OwnMetrics
from pipeline.own.model import OwnModel, OwnResult
from pipeline.own.runs import OwnRuns, first_of
from pipeline.own.sent import sent_whole
from pipeline.saying import users_line
from stages.worker.orders import Mode, Service

if TYPE_CHECKING:
    from pipeline.runtime.session import Session

__all__ = ["FirstBatch"]

Array = np.ndarray[Any, Any]
ROWS = 8
"""Samples per microbatch that are looked at."""
LOOKED_AT = 2
"""So many microbatches are looked at, of unequal sizes."""
THE_LOSS = "the loss"
_MEANT = (
    "What is computed must depend only on the state of layers, losses and metrics; if this difference is meant, say "
    "Pipeline(..., check_first_batch=False)."
)


class FirstBatch:
    """Looks once after each `compile` at the first batch that is trained, evaluated or predicted.

    Args:
        session: The running pipeline.
    """

    def __init__(self, session: Session) -> None:
        self._session = session
        self._seen: dict[tuple[Mode, bool], Any] = {}
        self._untold = ""
        self._warned = self._warned_of_state = self._warned_of_coupling = False
        self._parts_of: Any = self
        self._coupling_of: dict[bool, Any] = {}

    def watch(self, wanted: bool) -> None:
        """Be shown every batch, if wanted, before it counts."""
        if wanted:
            self._session.steps.look, self._session.steps.look_at_parts = self.look, self.look_at_parts

    def look(self, mode: Mode, batch: Batch) -> None:
        """Compare the pipeline with the user's own objects on part of a batch; nothing stays changed.

        Args:
            mode: `Mode.TRAIN`, `Mode.TEST` or `Mode.PREDICT`; each is looked at once, and once more in several
                microbatches where there was but one before, which says nothing of sums and of states.
            batch: The batch that is about to go through the pipeline.

        Raises:
            FirstBatchError: They differ by more than rounding; says where first, and what to do.
            CompileError: An own object was changed after `compile`.
        """
        compiled = self._session.workers.compiled
        if self._untold:  # and yet the workers went through that batch
            untold, self._untold = self._untold, ""
            warnings.warn(
                f"the first batch could not be compared with the model in this process: calling it raises {untold}",
                stacklevel=users_line(),
            )
        several = len(batch.sizes) > 1
        if any(self._seen.get((mode, how), self) is compiled for how in (several, True)) or self._cannot():
            return
        self._session.steps.plan(batch, training=mode.training)  # says what there is to say, of the batch as it is
        with self._session.steps.calling_own():
            self._compare(mode, batch)
        self._seen[mode, several] = compiled  # only now: what was refused is looked at, and refused, again

    def look_at_parts(self, batch: Batch) -> None:
        """Say or refuse what counts otherwise in microbatches than in the batch, unless a look at training did.

        Args:
            batch: What is about to be verified; nothing stays changed.

        Raises:
            FirstBatchError: A layer adds a loss that microbatches would count otherwise than Keras does.
        """
        compiled = self._session.workers.compiled
        known = self._seen.get((Mode.TRAIN, True), self) is compiled or self._parts_of is compiled
        if len(batch.sizes) == 1 or known or self._cannot():
            return
        with self._session.steps.calling_own(), self._own_runs(batch, training=True) as runs:
            try:
                _, calls = runs.first(batch)
            except Exception:  # verify tells of it
                return
            self._look_at_parts(Mode.TRAIN, batch, runs, calls)
        self._parts_of = compiled

    @contextmanager
    def _own_runs(self, batch: Batch, training: bool) -> Iterator[OwnRuns]:
        """Runs of the own model on some samples, with the workers' values; everything is put back."""
        setup, compiled = self._session.setup, self._session.workers.compiled
        own = OwnModel(setup.segments, setup.wires, setup.original, compiled)
        values = self._session.values.read("model")
        own.begin_with(self._session.values.read("layer states"))
        besides = [variable for some in self._session.workers.besides().values() for variable in some]
        with lent([*own.variables, *besides]):
            yield OwnRuns(own, values, self._few(batch), training)

    def _compare(self, mode: Mode, batch: Batch) -> None:
        with self._own_runs(batch, mode.training) as runs:
            own = runs.own
            try:
                theirs, calls = runs.first(batch)
            except Exception as error:
                self._untold = _told(error)  # if the batch is at fault, its worker tells it whole
                return
            moved = runs.training and bool(runs.few.lengths) and _differ(own.values(), runs.values)
            self._look_at_parts(mode, batch, runs, calls)
            if moved:
                mode, runs.training = Mode.TEST, False  # random numbers, which are drawn once a window there
                theirs = runs()
            ours, few = self._through_the_pipeline(mode, runs.few), runs.few
            plain = Tolerance.elsewhere(own.precision).relative
            apart = {what: by for what, by in _apart(ours, theirs).items() if by > plain}
            changes: list[dict[str, float]] = []
            if apart:
                if any(_apart(runs(), theirs).values()):
                    threads = self._session.setup.options.scheme == "inproc"
                    self._warn_of_chance(told(layers_that_draw(runs), threads))
                    return
                while (far := _beyond(apart, changes, own.precision)) and len(changes) < TRIES:
                    changes.append(_apart(runs(seed=len(changes)), theirs))
                if far:
                    own.assign(runs.values)
                    raise FirstBatchError(self._sentence(far, ours, theirs, apart[far], own, few, runs.training))
            self._compare_metrics(ours, theirs, few, max([plain, *(MARGIN * max(some.values()) for some in changes)]))

    def _look_at_parts(self, mode: Mode, batch: Batch, runs: OwnRuns, calls: Sequence[LayerCall]) -> None:
        """Say or refuse what microbatches change, just after the first run, whose calls added these losses."""
        changed = runs.own.changed_by_calls(runs.values)
        if mode is not Mode.PREDICT:
            self._refuse_sums(calls, runs.few, runs.training)
        if len(batch.sizes) == 1:
            return
        if mode is Mode.TRAIN:
            self._warn_of_state(changed, len(batch.sizes))
        if self._coupling_of.get(runs.training, self) is not self._session.workers.compiled:
            self._warn_of_coupling(_coupling(runs, changed), batch)
            self._coupling_of[runs.training] = self._session.workers.compiled

    def _compare_metrics(self, ours: OwnResult, theirs: OwnResult, few: Batch, rounding: float) -> None:
        compiled = self._session.workers.compiled
        if not ours.metrics or compiled is None:
            return
        own = OwnMetrics(compiled, self._session.setup.wires)
        try:
            far = own.apart(ours.metrics, theirs.tensors, few, rounding)
        except Exception as error:  # one may need what its worker has
            self._untold = _told(error)
            return
        if far:
            raise FirstBatchError(
                f"the first batch, looked at before it counts: {far} is another one in the workers, on equal "
                f"predictions. {_MEANT}"
            )

    def _warn_of_chance(self, drawing: str) -> None:
        """Say once which layers draw numbers that are not Keras's; where none is known, nothing is said."""
        if drawing and not self._warned:
            self._warned = True
            warnings.warn(
                f"{drawing}, and are others than Keras would draw, so neither the first batch nor "
                "verify can judge this model; draw by keras.random, with a SeedGenerator of the layer's own",
                stacklevel=users_line(),
            )

    def _warn_of_state(self, found: Mapping[str, str], microbatches: int) -> None:
        """Say of the first layer that changes itself when it is called that it will do so more often than in Keras."""
        if found and not self._warned_of_state:
            self._warned_of_state = True
            layer, variable = next(iter(found.items()))
            warnings.warn(
                f"the layer {layer!r} changes its variable {variable!r} whenever it is called, and it is called for "
                f"each of {microbatches} microbatches, where Keras calls it once a batch: training differs. With "
                "microbatches=1 it does not",
                stacklevel=users_line(),
            )

    def _warn_of_coupling(self, layer: str, batch: Batch) -> None:
        """Say once which layer gives a sample something else because of the others in its batch."""
        if layer and not self._warned_of_coupling:
            self._warned_of_coupling = True
            what = layer if layer == THE_MODEL else f"the layer {layer}"
            warnings.warn(
                f"{what} lets the samples of a batch depend on each other, and sees microbatches of {max(batch.sizes)} "
                f"samples, where Keras shows it the batch of {sum(batch.sizes)}: results differ. With microbatches=1 "
                "they do not",
                stacklevel=users_line(),
            )

    @property
    def _models(self) -> Collection[Any]:
        """The stages' models in this process."""
        return self._session.setup.models.values()

    def _cannot(self) -> bool:
        """Whether there is nothing in this process to compare with, or something else by design."""
        setup = self._session.setup
        if len(setup.models) < len(setup.segments) or setup.options.keep_state:
            return True
        return setup.original is None and any(segment.states for segment in setup.segments)

    def _few(self, batch: Batch) -> Batch:
        """The first samples of a batch, in as many microbatches; all where the model wants a fixed number."""
        samples, parts = sum(batch.sizes), len(batch.sizes)
        if self._session.setup.options.schedule_name:  # a user's function may know of so many microbatches only
            parts = min(parts, LOOKED_AT)
        rows = min(samples, ROWS * parts)
        if rows == samples or self._session.setup.one_size:
            return batch

        return first_of(batch, _unequal(rows, parts))

    def _refuse_sums(self, calls: Sequence[LayerCall], few: Batch, training: bool) -> None:
        """Refuse losses that layers add and that would count otherwise in microbatches than in the batch."""
        if len(few.sizes) == 1 or not (what := no_mean(calls, len(few.sizes), training)):
            return
        raise FirstBatchError(
            f"{what}, and microbatches={self._session.setup.options.microbatches} would count it otherwise than Keras "
            "does in the whole batch; make it a mean over samples (a sum: divide it by keras.ops.shape(inputs)[0]), or "
            "use microbatches=1"
        )

    def _through_the_pipeline(self, mode: Mode, few: Batch) -> OwnResult:
        """Loss and outputs, as far as the mode gives them; all values of the workers are put back."""
        driver = self._session.workers.driver()
        counts = mode is not Mode.PREDICT and not few.lengths  # windows of unequal length weigh alike in a metric
        with driver.keeping():
            if counts:
                driver.call(Service.RESET_METRICS)
            result = self._step(mode, few)
        if mode is Mode.TRAIN and not result.squared_norms and any(m.trainable_variables for m in self._models):
            raise FirstBatchError(
                "no variable has a gradient of the loss, so nothing would be trained (Keras: No gradients provided for "
                "any variable); pipe.explain(x, y) says which operation is in the way"
            )
        return OwnResult(result.loss, result.outputs, {}, result.losses, {}, result.metrics if counts else {})

    def _step(self, mode: Mode, few: Batch, observe: str = "") -> StepResult:
        driver, compiled = self._session.workers.driver(), self._session.workers.compiled
        scaling = None if compiled is None or not mode.training else compiled.loss_scaling
        scale = None if scaling is None else scaling.scale
        plan = self._session.steps.plan(few, training=mode.training)
        try:
            return driver.run(plan, mode, few, norms=mode.training, loss_scale=scale, observe=observe)
        finally:
            if mode.training and not driver.closed:
                driver.discard()

    def _sentence(
        self, what: str, ours: OwnResult, theirs: OwnResult, by: float, own: OwnModel, few: Batch, training: bool
    ) -> str:
        values = f" ({ours.loss:.7g} there, {theirs.loss:.7g} here)" if what == THE_LOSS else ""
        return (
            f"the first batch, looked at before it counts: {what} in the workers differs from that of the model in "
            f"this process by {by:.1e} of its size{values}, far more than rounding. {self._place(own, few, training)} "
            f"A layer, loss or setting became another one on its way into the workers. {_MEANT}"
        )

    def _place(self, own: OwnModel, few: Batch, training: bool) -> str:
        """Which stage is the first to give something else; nothing of a model that is cut in time as well."""
        if few.lengths or (self._session.workers.compiled is None and training):
            return ""
        driver = self._session.workers.driver()
        with driver.keeping():
            self._step(Mode.TRAIN if training else Mode.PREDICT, few, observe="values")
            seen = driver.seen()
        theirs = own.parts(few, training).tensors
        sent = sent_whole(seen)
        for stage, tensor in sorted(sent):
            by = distance(sent[stage, tensor], theirs[tensor])
            if by > Tolerance.elsewhere(own.precision).relative:
                name = self._session.setup.wires.names[stage]
                return f"The first to differ is stage {name!r}, in what it gives as {tensor!r}."
        last = self._session.setup.wires.names[-1]
        return f"All that crosses between stages agrees, so it is in the last stage ({last!r}) or in a loss."


def _coupling(runs: OwnRuns, changed: Collection[str]) -> str:
    try:
        return coupling(runs, runs.few, runs.training, runs.own.precision, changed)
    except Exception:  # the model may want microbatches of a certain size
        return ""


def _differ(ours: StageValues, theirs: StageValues) -> bool:
    """Whether any bit of the stages' variables does."""
    pairs = (pair for i in ours for pair in zip(ours[i], theirs[i], strict=True))
    return any(a.tobytes() != b.tobytes() for a, b in pairs)


def _told(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"


def _unequal(rows: int, parts: int) -> tuple[int, ...]:
    """The sizes of microbatches; two are of unequal sizes, so that what they weigh is seen."""
    if parts == 2 and rows > 2:
        return (rows // 2 + 1, rows - rows // 2 - 1)
    return microbatch_sizes(rows, parts)


def _beyond(apart: Mapping[str, float], changes: Sequence[Mapping[str, float]], precision: float) -> str:
    """The first of what is farther apart than rounding explains, as far as it was tried; "" if nothing is."""
    for what, by in apart.items():
        if not by <= Tolerance.elsewhere(precision, [change[what] for change in changes]).relative:
            return what
    return ""


def _apart(ours: OwnResult, theirs: OwnResult) -> dict[str, float]:
    """How far two results are apart, each as a part of the largest |value|; what only one has is left out."""
    found = {}
    for label, loss in theirs.losses.items() if len(theirs.losses) > 1 else ():
        if label in ours.losses:
            found[f"the loss of {label!r}"] = distance(np.asarray(ours.losses[label]), np.asarray(loss))
    if ours.loss is not None and theirs.loss is not None:
        found[THE_LOSS] = distance(np.asarray(ours.loss), np.asarray(theirs.loss))
    for name, array in theirs.outputs.items():
        if name in ours.outputs:
            found[f"the output {name!r}"] = distance(ours.outputs[name], array)
    return found
