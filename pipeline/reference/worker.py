"""The reference of `verify`: one tape over the joined model, in a worker process of its own.

A process of its own, since results of convolutions depend on the size of TensorFlow's thread pools, which is set once
per process. It is set to the pipeline's values before each question, and may be asked many.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from pipeline.compare.tolerance import TRIES, eps, magnifies
from pipeline.distance import distance
from pipeline.reference.explain import explain_joined
from pipeline.reference.one_tape.batch import Whole
from pipeline.reference.one_tape.optimizer import ReferenceOptimizer, reference_optimizers, share_values
from pipeline.reference.one_tape.single_tape import SingleTape
from pipeline.reference.orders import Explain, MakeOptimizers, Witness
from pipeline.reference.witness.chain import by_chain_rule
from pipeline.reference.witness.differences import differences
from pipeline.reference.witness.results import Differences, WitnessGradients
from pipeline.reference.witness.whole_batch import batch_at_once
from stages.actions import Action
from stages.errors import HandoffError
from stages.tape.accumulate import dense
from stages.tape.tensors import to_array
from stages.worker.base import BaseWorker, serve
from stages.worker.hosted_stage import HostedStage
from stages.worker.kept_values import Kept
from stages.worker.observers import Sight, ValueObserver
from stages.worker.orders import Apply, Mode, Order, StepOrder
from stages.worker.reply import Reply, StepReply
from stages.worker.stage_spec import StageSpec
from transport.message import DRIVER, Key, Message

Array = np.ndarray[Any, Any]
_FORWARD = ("model", "metrics", "layer states")
"""The variables that a forward pass may change."""


class ReferenceWorker(BaseWorker):
    """A worker that hosts all stages and computes a step's gradients under one tape."""

    def __init__(self, *given: Any) -> None:
        super().__init__(*given)
        self._optimizers: dict[int, ReferenceOptimizer] = {}
        self._found: dict[int, list[Any]] = {}
        self._tape: SingleTape | None = None
        self._batch: Whole | None = None

    def own_deeds(self) -> Mapping[type[Order], Callable[[Any], Reply]]:
        """Questions about the last batch, and optimizers that are told apart from the stages."""
        return {MakeOptimizers: self._do_optimizers, Witness: self._do_witness, Explain: self._do_explain}

    def host(self, spec: StageSpec) -> HostedStage:
        """Build a stage without an optimizer: the reference's own are made by `MakeOptimizers`."""
        return HostedStage(replace(spec, undecayed=()), updates=False)

    @property
    def tape(self) -> SingleTape:
        """The tape over all stages, whose traces serve every step."""
        if self._tape is None:
            self._tape = SingleTape([self.hosted[index] for index in sorted(self.hosted)])
        return self._tape

    @property
    def batch(self) -> Whole:
        """The batch of the last step.

        Raises:
            HandoffError: There was none.
        """
        if self._batch is None:
            raise HandoffError("the reference was asked about a batch before it was given one")
        return self._batch

    def _do_optimizers(self, order: MakeOptimizers) -> Reply:
        undecayed = {stage.index: stage.undecayed for stage in self.specs}
        self._optimizers = reference_optimizers(self.tape.hosted, undecayed)
        return Reply({str(i): optimizer.described() for i, optimizer in self._optimizers.items()})

    def _do_witness(self, order: Witness) -> Reply:
        hosted, batch = self.tape.hosted, self.batch
        witnesses: dict[str, Callable[[], WitnessGradients | Differences]] = {
            "chain": lambda: by_chain_rule(hosted, batch, order.memory_limit),
            "differences": lambda: differences(hosted, batch, order.seed),
            "batch": lambda: batch_at_once(hosted, batch),
        }
        return Reply(*witnesses[order.check]().to_wire())

    def _do_explain(self, order: Explain) -> Reply:
        return Reply(explain_joined(self.tape.hosted, self.batch, order.target, order.statuses))

    def undo(self, order: Order) -> bool:
        """Not done: the reference gets all values anew with every question, or is started anew."""
        return False

    def undo_last_step(self) -> None:
        """Forget its gradients; there is nothing else that a next question would go on from."""
        self.discard()

    def step(self, order: StepOrder) -> StepReply:
        """Outputs, or losses and gradients, of a whole batch."""
        batch = self._batch = self._receive(order)
        for hosted in self.tape.hosted:
            hosted.go(order.ways)
        if order.mode is Mode.MASKS:
            return StepReply({})  # the joined model looks for itself
        if order.mode is Mode.PREDICT:
            return StepReply({}, roundings=self._predict(order.step, batch))
        return self._differentiate(batch, order.observe)

    def _differentiate(self, batch: Whole, observe: str) -> StepReply:
        """Losses, metrics and gradients of a batch; compiled, beside what compiling alone changes."""
        tape = self.tape
        weights = tape.weights(batch)
        tape.counting = any(head.has_metrics for hosted in tape.hosted for head in hosted.heads)

        def run(compiled: bool) -> tuple[Any, dict[Sight, Array | None]]:
            seen = ValueObserver()
            tape.observer = seen if observe else None
            losses, self._found = tape.sums(batch, weights, compiled)
            return losses, seen.seen

        compiled = not tape.hosted[0].spec.run_eagerly and not tape.couples
        before = [Kept(hosted, _FORWARD) for hosted in tape.hosted] if compiled else []
        losses, seen = run(compiled=False)
        roundings: dict[str, float] = {}
        if compiled:
            _put_back(before)
            eager = self._found, seen
            losses, seen = run(compiled=True)
            found = self._found
            roundings = _roundings(eager, (found, seen))
            if magnifies(roundings):
                after = [Kept(hosted, _FORWARD) for hosted in tape.hosted]
                for seed in range(TRIES):
                    both: list[TapeRun] = []
                    for compile_it in (False, True):
                        _put_back(before)
                        self._disturb(seed)
                        _, disturbed = run(compile_it)
                        both.append((self._found, disturbed))
                    again = _roundings(*both)
                    roundings = {kind: max(value, again[kind]) for kind, value in roundings.items()}
                _put_back(after)
                self._found = found
        self._seen = ValueObserver(seen)
        by_stage = {int(index): (by_head, own) for index, (by_head, own) in losses.items()}
        return StepReply(by_stage, metrics=self._metrics(), inner_metrics=self._inner_metrics(), roundings=roundings)

    def _receive(self, order: StepOrder) -> Whole:
        """The batch of a step, whole."""
        inputs, targets, sample_weights = {}, {}, {}
        for stage in self.tape.hosted:
            index = stage.spec.index
            for name, source in stage.spec.inputs:
                if source == DRIVER:
                    inputs[name] = self._array("activation", order.step, index, name)
            for label in stage.labels if order.mode.with_loss else ():
                targets[label] = self._array("target", order.step, index, label)
                if label in order.sample_weights:
                    sample_weights[label] = self._array("sample_weight", order.step, index, label)
        return Whole(inputs, targets, sample_weights, order.grid, order.scale, order.truncate)

    def _predict(self, step: int, batch: Whole) -> dict[str, float]:
        """Send the outputs of a batch, microbatch by microbatch; what compiling alone changes in them."""
        tape = self.tape
        compiled = not tape.hosted[0].spec.run_eagerly
        found: list[list[Array]] = []
        names = tape.finals(batch.grid)
        for run in [tape.outputs, *([tape.compiled_outputs] if compiled else [])]:
            found.append([to_array(t) for k in range(len(batch.grid.sizes)) for t in run(batch, k)])
        for (index, name, k, w), array in zip(names, found[-1], strict=True):
            message = Message("output", self.incarnation, step, DRIVER, index, name, k, w, array=array)
            self.driver.send(message, None)
        if not compiled:
            return {}
        roundings = {"prediction": largest_difference(list(zip(*found, strict=True)))}
        if magnifies(roundings):
            before = [Kept(hosted, _FORWARD) for hosted in tape.hosted]
            for seed in range(TRIES):
                self._disturb(seed)
                both = [
                    [to_array(t) for k in range(len(batch.grid.sizes)) for t in run(batch, k)]
                    for run in (tape.outputs, tape.compiled_outputs)
                ]
                again = largest_difference(list(zip(*both, strict=True)))
                roundings["prediction"] = max(roundings["prediction"], again)
                _put_back(before)
        return roundings

    def _disturb(self, seed: int) -> None:
        """Change every floating variable by at most one rounding of its dtype, at random: all behind it rounds anew."""
        draw = np.random.default_rng(seed)
        for hosted in self.tape.hosted:
            for variable in hosted.variables("model"):
                value = variable.numpy()
                if precision := eps(value.dtype.name):
                    noise = 1 + precision * draw.uniform(-1, 1, value.shape)
                    variable.assign((value.astype(np.float64) * noise).astype(value.dtype))
        share_values(self.tape.hosted)

    def apply(self, order: Apply) -> None:
        """One update by the reference's own optimizers, which clip by themselves."""
        for index, optimizer in self._optimizers.items():
            optimizer.apply(self._found, order.learning_rates.get(index), order.divisor)
        share_values(self.tape.hosted)

    def discard(self) -> None:
        """Forget the gradients under the one tape; the batch stays, for questions about it."""
        self._found = {}

    def _array(self, kind: str, step: int, stage: int, tensor: str) -> Array:
        return self._taken_array(Key(kind, step, stage, DRIVER, tensor))

    def gradients(self, index: int) -> Sequence[Array | None]:
        """The part of the one tape's gradients that belongs to a stage."""
        return [None if g is None else np.array(dense(g)) for g in self._found[index]]

    def given_gradients(self, index: int) -> Sequence[Any | None]:
        """As the one tape gave them."""
        return self._found[index]

    def set_given_gradients(self, index: int, gradients: Sequence[Any | None]) -> None:
        """Let the next update be made from others."""
        self._found[index] = list(gradients)

    def optimizer_values(self, index: int) -> Sequence[Array]:
        """Those of the optimizer whose first stage it is."""
        return self._optimizers[index].read() if index in self._optimizers else []

    def set_optimizer_values(self, index: int, values: Sequence[Array]) -> None:
        """Write them."""
        self._optimizers[index].write(values)

    def at_work(self) -> tuple[int, Action | None]:
        """One tape has no actions."""
        return -1, None

    def let_go(self) -> None:
        """Drop the batch and the tape's traces."""
        self._batch = self._tape = None


def main(spec: Mapping[str, Any], board: Array) -> None:
    """Entry of the reference's process; the arguments are a worker's."""
    serve(ReferenceWorker, spec, board)


TapeRun = tuple[Mapping[int, Sequence[Any]], Mapping[Sight, Array | None]]
"""Gradients by stage, and what was seen at the cuts."""


def _roundings(one: TapeRun, other: TapeRun) -> dict[str, float]:
    """How far two runs of the same tape are apart, by kind, as a part of the largest |value| of the other."""
    pairs = [(a, b) for i, part in one[0].items() for a, b in zip(part, other[0][i], strict=True)]
    found = {"gradient": largest_difference(pairs)}
    for what in {sight.what for sight in other[1]}:
        places = [sight for sight in other[1] if sight.what == what]
        found[f"{what} at a cut"] = largest_difference([(one[1][sight], other[1][sight]) for sight in places])
    return found


def _put_back(kept: Sequence[Kept]) -> None:
    for one in kept:
        one.put_back()


def largest_difference(pairs: Sequence[tuple[Any, Any]]) -> float:
    """The largest `distance` of pairs, as a part of the largest |value| in any; 0 where it tells nothing.

    That is where nothing is different from zero, or an entry is finite in one of two alone.
    """
    arrays = [(dense(a), np.asarray(dense(b), np.float64)) for a, b in pairs if a is not None and b is not None]
    largest = max((float(np.abs(b[np.isfinite(b)]).max(initial=0.0)) for _, b in arrays), default=0.0)
    apart = max((distance(a, b, largest) for a, b in arrays), default=0.0)
    return apart if largest and np.isfinite(apart) else 0.0


__all__ = ["ReferenceWorker", "main"]
