"""Train one Keras model across several processes: composing stages, planning, training, verifying.

Names are imported when first used, so that planning and `--help` never load TensorFlow.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from pipeline.origin import check_origins

check_origins()

if TYPE_CHECKING:  # the same names once more, for type checkers and editors
    from pipeline.boundary_norms import BoundaryNorms as BoundaryNorms
    from pipeline.callbacks import PipelineCheckpoint as PipelineCheckpoint
    from pipeline.cuts import CutTable as CutTable
    from pipeline.errors import CheckpointError as CheckpointError
    from pipeline.errors import CompileError as CompileError
    from pipeline.errors import DataError as DataError
    from pipeline.errors import Fault as Fault
    from pipeline.errors import MicrobatchError as MicrobatchError
    from pipeline.errors import PipelineClosedError as PipelineClosedError
    from pipeline.errors import PipelineError as PipelineError
    from pipeline.errors import PlanError as PlanError
    from pipeline.errors import ScheduleError as ScheduleError
    from pipeline.errors import SplitError as SplitError
    from pipeline.errors import StalledError as StalledError
    from pipeline.errors import TimelineError as TimelineError
    from pipeline.errors import VerificationError as VerificationError
    from pipeline.errors import WiringError as WiringError
    from pipeline.errors import WorkerDiedError as WorkerDiedError
    from pipeline.errors import WorkerError as WorkerError
    from pipeline.microbatch import microbatch_sizes as microbatch_sizes
    from pipeline.pipeline import Pipeline as Pipeline
    from pipeline.plan import Plan as Plan
    from pipeline.plan import validate as validate
    from pipeline.plots import save_timeline as save_timeline
    from pipeline.prediction import Comparison as Comparison
    from pipeline.prediction import Prediction as Prediction
    from pipeline.recurrent import stateful as stateful
    from pipeline.schedules import SCHEDULES as SCHEDULES
    from pipeline.schedules import build_plan as build_plan
    from pipeline.schedules import schedule_named as schedule_named
    from pipeline.simulator import Cost as Cost
    from pipeline.simulator import simulate as simulate
    from pipeline.timeline import Span as Span
    from pipeline.timeline import Timeline as Timeline
    from pipeline.verify_every import VerifyEvery as VerifyEvery
    from stages.segment import Segment as Segment

_HOME = {
    # training
    "Pipeline": "pipeline.pipeline",
    "PipelineCheckpoint": "pipeline.callbacks",
    "Segment": "stages.segment",
    "stateful": "pipeline.recurrent",
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
    # watching training
    "BoundaryNorms": "pipeline.boundary_norms",
    "VerifyEvery": "pipeline.verify_every",
    # cuts
    "Comparison": "pipeline.prediction",
    "CutTable": "pipeline.cuts",
    "Prediction": "pipeline.prediction",
    # errors
    "CheckpointError": "pipeline.errors",
    "CompileError": "pipeline.errors",
    "DataError": "pipeline.errors",
    "Fault": "pipeline.errors",
    "MicrobatchError": "pipeline.errors",
    "PipelineClosedError": "pipeline.errors",
    "PipelineError": "pipeline.errors",
    "PlanError": "pipeline.errors",
    "ScheduleError": "pipeline.errors",
    "SplitError": "pipeline.errors",
    "StalledError": "pipeline.errors",
    "TimelineError": "pipeline.errors",
    "VerificationError": "pipeline.errors",
    "WiringError": "pipeline.errors",
    "WorkerDiedError": "pipeline.errors",
    "WorkerError": "pipeline.errors",
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
