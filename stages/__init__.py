"""One segment of a model as a live stage: its tape, its gradients, its worker.

Names are imported when first used, so that code which only plans (`stages.actions`) never loads TensorFlow.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from stages.origin import check_origins
from stages.versions import check_backend, check_versions

check_origins()
check_versions()
check_backend()

from transport.lazy import load  # noqa: E402 (not before it is known to be ours)

if TYPE_CHECKING:  # the same names once more, for type checkers and editors
    from stages.actions import Action as Action
    from stages.actions import Kind as Kind
    from stages.actions import Wiring as Wiring
    from stages.actions import chain as chain
    from stages.actions import dependencies as dependencies
    from stages.errors import HandoffError as HandoffError
    from stages.errors import RecipeError as RecipeError
    from stages.errors import SegmentError as SegmentError
    from stages.errors import StageError as StageError
    from stages.explanation.explain import explain as explain
    from stages.explanation.explain import explaining as explaining
    from stages.explanation.rows import Explanation as Explanation
    from stages.jacobian.chain_rule import MemoryLimitExceeded as MemoryLimitExceeded
    from stages.jacobian.chain_rule import chain_rule as chain_rule
    from stages.jacobian.chain_rule import jacobian_bytes as jacobian_bytes
    from stages.layers.initial_states import LearnedState as LearnedState
    from stages.layers.ragged.steps import NormAbove as NormAbove
    from stages.layers.ragged.steps import RaggedSteps as RaggedSteps
    from stages.recipe.segment import Segment as Segment
    from stages.stage import Stage as Stage
    from stages.step_influence.influence import influence as influence
    from stages.step_influence.map import InfluenceMap as InfluenceMap

_HOME = {
    # the hand-off
    "Stage": "stages.stage",
    "Segment": "stages.recipe.segment",
    # the chain rule with full Jacobians
    "chain_rule": "stages.jacobian.chain_rule",
    "jacobian_bytes": "stages.jacobian.chain_rule",
    "MemoryLimitExceeded": "stages.jacobian.chain_rule",
    # which step influences which
    "influence": "stages.step_influence.influence",
    "InfluenceMap": "stages.step_influence.map",
    # why a gradient is None, zero, or not finite
    "explain": "stages.explanation.explain",
    "explaining": "stages.explanation.explain",
    "Explanation": "stages.explanation.rows",
    # a cell that runs a different number of times on every element
    "RaggedSteps": "stages.layers.ragged.steps",
    "NormAbove": "stages.layers.ragged.steps",
    # a trainable initial state of a recurrent layer
    "LearnedState": "stages.layers.initial_states",
    # what a worker can do
    "Action": "stages.actions",
    "Kind": "stages.actions",
    "Wiring": "stages.actions",
    "chain": "stages.actions",
    "dependencies": "stages.actions",
    # errors
    "HandoffError": "stages.errors",
    "RecipeError": "stages.errors",
    "SegmentError": "stages.errors",
    "StageError": "stages.errors",
}

__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    value = load("stages", _HOME, name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
