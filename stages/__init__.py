"""One segment of a model as a live stage: its tape, its gradients, its worker.

Names are imported when first used, so that code which only plans (`stages.actions`) never loads TensorFlow.
"""

from __future__ import annotations

import importlib
from typing import Any

_HOME = {
    # the hand-off
    "Stage": "stages.stage",
    "Segment": "stages.segment",
    # the chain rule with full Jacobians
    "chain_rule": "stages.jacobian",
    "jacobian_bytes": "stages.jacobian",
    "MemoryLimitExceeded": "stages.jacobian",
    # what a worker can do
    "Action": "stages.actions",
    "Kind": "stages.actions",
    "Wiring": "stages.actions",
    "chain": "stages.actions",
    "dependencies": "stages.actions",
    # errors
    "HandoffError": "stages.errors",
    "SegmentError": "stages.errors",
    "StageError": "stages.errors",
}

__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'stages' has no attribute {name!r}; it has {', '.join(__all__)}")
    value = getattr(importlib.import_module(_HOME[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
