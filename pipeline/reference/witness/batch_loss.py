"""The loss of a whole batch as a function of the variables, in the model's own dtype or in float64.

The batch goes forward in the pipeline's microbatches and windows, since normalisation and dropout depend on them; the
predictions are joined and judged at once by Keras's own loss, so nothing is weighed by microbatches. Its gradients by
one tape in both dtypes say how much the model itself rounds: what no check can ask of the hand-off (`rounding`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any, NamedTuple

import numpy as np
import tensorflow as tf

from pipeline.compare.tolerance import eps
from pipeline.reference.one_tape.batch import Whole, owned, state_names
from pipeline.reference.witness.float64_twin import WIDE, Twin, check_twin, drawing, wide_floats
from pipeline.reference.witness.flow import (
    Tensors,
    WitnessRefusedError,
    call_model,
    heads_of,
    initial_states,
    inputs_of,
    joined_riding,
    objective,
    own_losses,
    refusing,
    run_flow,
    undisturbed,
)
from stages.loss.head import Head
from stages.loss.precision import float_of_losses
from stages.tape.accumulate import dense
from stages.tape.model_call import CallState
from stages.worker.hosted_stage import HostedStage

VariableKey = tuple[int, int]
"""(stage, place among its trainable variables) of a variable; of a shared one its owner's."""
CallTwin = Callable[[int, int, list[Any]], Sequence[Any]]
"""(microbatch, position of the stage, what it takes) -> what it gives."""


class LossGradients(NamedTuple):
    """Gradients by one tape.

    Attributes:
        loss: Of the batch.
        variables: {variable: dL/dvariable or None}.
        cuts: dL/dtensor of every stage's outputs, microbatch after microbatch; None where there is none.
    """

    loss: float
    variables: dict[VariableKey, Any]
    cuts: list[Any]


class BatchLoss:
    """The loss of a batch.

    Args:
        hosted: The stages.
        batch: The batch.
        models: What to call in place of each stage's model: its float64 twin, or itself.
        heads: Each stage's objectives.
        dtype: What losses are added up in.
        narrow: What random numbers are drawn in, for each twin; () for the models themselves.
    """

    def __init__(
        self,
        hosted: Sequence[HostedStage],
        batch: Whole,
        models: Sequence[Any],
        heads: Sequence[Sequence[Head]],
        dtype: str,
        narrow: Sequence[str] = (),
    ) -> None:
        self.hosted, self.batch, self.models, self.heads = hosted, batch, models, heads
        self.dtype, self.narrow = dtype, narrow
        self._states = [CallState(model) for model in models]
        self._start = [state.read() for state in self._states]
        self.calls = 0

    @classmethod
    def own(cls, hosted: Sequence[HostedStage], batch: Whole) -> BatchLoss:
        """The loss by the models themselves, in the float type of losses."""
        return cls(hosted, batch, [s.stage.model for s in hosted], [heads_of(s) for s in hosted], float_of_losses())

    @classmethod
    def twin(cls, hosted: Sequence[HostedStage], batch: Whole) -> BatchLoss:
        """The loss by float64 twins of the models.

        Raises:
            WitnessRefusedError: A stage has none, or its twin computes something else.
        """
        twins = [Twin(stage) for stage in hosted]
        found = cls(hosted, batch, [t.model for t in twins], [t.heads for t in twins], WIDE, [t.narrow for t in twins])
        found._check()
        return found

    @property
    def variables(self) -> dict[VariableKey, list[Any]]:
        """{variable: the models' variable, and its copies in other stages}."""
        model = {stage.spec.index: one for stage, one in zip(self.hosted, self.models, strict=True)}
        found: dict[VariableKey, list[Any]] = {}
        for stage in self.hosted:
            ties = {tie.place: tie for tie in stage.ties}
            mine = {id(variable) for variable in owned(stage)}
            for place, variable in enumerate(stage.stage.trainable_variables):
                if id(variable) in mine:
                    homes = _places(self.hosted, ties[place].name) if place in ties else [(stage.spec.index, place)]
                    found[stage.spec.index, place] = [model[i].trainable_variables[p] for i, p in homes]
        return found

    def gradients(self) -> LossGradients:
        """The loss, and its gradients by one tape."""
        variables, cuts = self.variables, list[Any]()
        flat = [copy.value for copies in variables.values() for copy in copies]

        def call(k: int, i: int, taken: list[Any]) -> Sequence[Any]:
            outputs = call_model(self.models[i], taken)
            cuts.extend(t for t in outputs if t.dtype.is_floating)
            return outputs

        with tf.GradientTape(watch_accessed_variables=False) as tape:
            tape.watch(flat)
            loss = self.value(lambda: self.run(call))
        found = tape.gradient(loss, [*flat, *cuts])
        of_variables = iter(found[: len(flat)])
        sums: dict[VariableKey, Any] = {}
        for key, copies in variables.items():
            parts = [g for g in [next(of_variables) for _ in copies] if g is not None]
            sums[key] = sum(np.asarray(dense(g)) for g in parts) if parts else None
        return LossGradients(
            float(loss), sums, [None if g is None else np.asarray(dense(g)) for g in found[len(flat) :]]
        )

    def value(self, run: Callable[[], Any]) -> Any:
        """The loss, from the states that the models began with."""
        for state, values in zip(self._states, self._start, strict=True):
            state.write(values)
        self.calls += 1
        return run()

    def plain(self) -> Any:
        """The loss: a scalar tensor."""
        return self.run(lambda k, i, taken: call_model(self.models[i], taken))

    def traced(self) -> Callable[[], Any]:
        """`plain` in one graph; eagerly where it cannot be traced."""
        graph: Callable[[], Any] = tf.function(self.plain, autograph=False)
        try:
            self.value(graph)
        except Exception:
            return self.plain
        return graph

    def run(self, call: CallTwin) -> Any:
        """Microbatches and windows forward; their predictions joined and judged at once."""
        grid, total = self.batch.grid, tf.zeros((), self.dtype)
        parts: dict[str, list[list[Any]]] = {}
        for k, count in enumerate(grid.sizes):
            windows, own = self._windows(k, call)
            total += sum(own) * (count / grid.samples) if own else 0.0
            for name in self._judged():
                parts.setdefault(name, []).append([tensors[name] for tensors in windows])
        predictions = {name: self._predicted(name, each) for name, each in parts.items()}
        with self._wide():
            return total + objective(self.hosted, self.heads, self.batch, predictions, self.dtype)

    def _windows(self, k: int, call: CallTwin) -> tuple[list[Tensors], list[Any]]:
        """A microbatch's tensors of each window, and its own losses."""
        states = self._as_dtype(initial_states(self.hosted, self.batch, k))
        found: list[Tensors] = []
        own: list[Any] = []
        for w in range(self.batch.grid.windows):

            def one(i: int, taken: list[Any], w: int = w) -> Sequence[Any]:
                with self._wide(i), refusing(self.hosted[i], f"its forward pass in {self.dtype}"):
                    outputs = call(k, i, taken)
                    own.extend(own_losses(self.models[i], w, self.dtype))
                return outputs

            found.append(
                run_flow(self.hosted, one, {**self._as_dtype(inputs_of(self.hosted, self.batch, k, w)), **states})
            )
            states = {name: found[-1][name] for stage in self.hosted for name in state_names(stage)}
        return found, own

    def _wide(self, i: int | None = None) -> ExitStack:
        """While a twin (or a loss on twins' predictions) runs: float64 by default, numbers drawn as the model does."""
        stack = ExitStack()
        if self.narrow:
            stack.enter_context(wide_floats())
            if i is not None:
                stack.enter_context(drawing(self.narrow[i]))
        return stack

    def _as_dtype(self, tensors: Tensors) -> Tensors:
        if not self.narrow:
            return tensors
        return {name: tf.cast(t, WIDE) if t.dtype.is_floating else t for name, t in tensors.items()}

    def _judged(self) -> dict[str, bool]:
        """{output that has a loss: whether it is over time}."""
        return {
            stage.spec.outputs[head.place][0]: stage.gives_over_time(head.place)
            for stage in self.hosted
            for head in stage.heads
        }

    def _predicted(self, name: str, parts: Sequence[Sequence[Any]]) -> Any:
        over_time = self._judged()[name]
        return joined_riding([joined_riding(some, 1) if over_time else some[-1] for some in parts], 0)

    def _check(self) -> None:
        """Refuse twins that compute something else, with the first stage of which that is so.

        Half the digits of the model's own dtype must agree: rounding leaves more, another draw or another function
        does not.
        """

        own, seen = BatchLoss.own(self.hosted, self.batch), list[Sequence[Any]]()

        def noted(k: int, i: int, taken: list[Any]) -> Sequence[Any]:
            seen.append(call_model(own.models[i], taken))
            return seen[-1]

        own.value(lambda: own.run(noted))
        ours = iter(seen)

        def compared(k: int, i: int, taken: list[Any]) -> Sequence[Any]:
            outputs = call_model(self.models[i], taken)
            check_twin(self.hosted[i], taken, outputs, next(ours), eps(self.narrow[i]) ** 0.5)
            return outputs

        self.value(lambda: self.run(compared))


class Rounding(NamedTuple):
    """The distance of the model's own gradients from those of its float64 twin, on one batch.

    Attributes:
        variables: Largest difference, as a part of the largest |dL/dvariable|.
        cuts: The same of what crosses between stages.
    """

    variables: float = 0.0
    cuts: float = 0.0


def rounding(hosted: Sequence[HostedStage], batch: Whole) -> Rounding:
    """Measure a `Rounding`, by one tape in either dtype over the same microbatches; zero where there is no twin.

    The hand-off has no part in it, so what is wrong there is not taken for rounding.
    """
    try:
        with undisturbed(hosted):
            wide = BatchLoss.twin(hosted, batch).gradients()
        with undisturbed(hosted):
            own = BatchLoss.own(hosted, batch).gradients()
    except WitnessRefusedError:
        return Rounding()
    pairs = [(own.variables[key], wide.variables[key]) for key in wide.variables]
    return Rounding(apart(pairs), apart(list(zip(own.cuts, wide.cuts, strict=True))))


def apart(pairs: Sequence[tuple[Any, Any]]) -> float:
    """The largest difference of (ours, theirs), as a part of the largest |theirs|; pairs with a None are left out."""
    both = [(np.asarray(a, np.float64), b) for a, b in pairs if a is not None and b is not None]
    scale = max((float(np.max(np.abs(b), initial=0.0)) for _, b in both), default=0.0)
    apart = max((float(np.max(np.abs(a - b), initial=0.0)) for a, b in both), default=0.0)
    return apart / scale if scale else 0.0


def _places(hosted: Sequence[HostedStage], name: str) -> list[VariableKey]:
    """(stage, place) of all copies of a shared variable."""
    return [(stage.spec.index, tie.place) for stage in hosted for tie in stage.ties if tie.name == name]


__all__ = ["BatchLoss", "Rounding", "apart", "rounding"]
