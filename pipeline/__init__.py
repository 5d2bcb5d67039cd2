"""Train one Keras model across several processes: composing stages, planning, training, verifying.

Names are imported when first used, so that planning and `--help` never load TensorFlow.
"""

from __future__ import annotations

import importlib
from typing import Any

_HOME = {
    # training
    "Pipeline": "pipeline.pipeline",
    "Segment": "stages.segment",
    # plans
    "SCHEDULES": "pipeline.schedules",
    "build_plan": "pipeline.schedules",
    "schedule_named": "pipeline.schedules",
    "Plan": "pipeline.plan",
    "validate": "pipeline.plan",
    "Cost": "pipeline.simulator",
    "simulate": "pipeline.simulator",
    "Span": "pipeline.timeline",
    "Timeline": "pipeline.timeline",
    "save_timeline": "pipeline.plots",
    "microbatch_sizes": "pipeline.microbatch",
    # errors
    "Fault": "pipeline.errors",
    "MicrobatchError": "pipeline.errors",
    "PipelineError": "pipeline.errors",
    "PlanError": "pipeline.errors",
    "ScheduleError": "pipeline.errors",
}

__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'pipeline' has no attribute {name!r}; it has {', '.join(__all__)}")
    value = getattr(importlib.import_module(_HOME[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
