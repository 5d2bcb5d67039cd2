"""Train one Keras model across several processes: composing stages, planning, training, verifying.

Names are imported when first used, so that planning and `--help` never load TensorFlow.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from pipeline.origin import check_origins

check_origins()

if TYPE_CHECKING:  # the same names once more, for type checkers and editors
    from pipeline.batch.microbatch import microbatch_sizes as microbatch_sizes
    from pipeline.cutting.cut_table import CutTable as CutTable
    from pipeline.cutting.prediction import Comparison as Comparison
    from pipeline.cutting.prediction import Prediction as Prediction
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
    from pipeline.model.stateful import stateful as stateful
    from pipeline.norms.boundary_norms import BoundaryNorms as BoundaryNorms
    from pipeline.pipeline import Pipeline as Pipeline
    from pipeline.plan.plan import Plan as Plan
    from pipeline.plan.plan import validate as validate
    from pipeline.plan.schedules import SCHEDULES as SCHEDULES
    from pipeline.plan.schedules import build_plan as build_plan
    from pipeline.plan.schedules import schedule_named as schedule_named
    from pipeline.plan.simulator import Cost as Cost
    from pipeline.plan.simulator import simulate as simulate
    from pipeline.plan.timeline import Span as Span
    from pipeline.plan.timeline import Timeline as Timeline
    from pipeline.report.timeline_figure import save_timeline as save_timeline
    from pipeline.training.callbacks import PipelineCheckpoint as PipelineCheckpoint
    from pipeline.verify.every import VerifyEvery as VerifyEvery
    from stages.recipe.segment import Segment as Segment

_HOME = {
    # training
    "Pipeline": "pipeline.pipeline",
    "PipelineCheckpoint": "pipeline.training.callbacks",
    "Segment": "stages.recipe.segment",
    "stateful": "pipeline.model.stateful",
    # plans
    "SCHEDULES": "pipeline.plan.schedules",
    "build_plan": "pipeline.plan.schedules",
    "schedule_named": "pipeline.plan.schedules",
    "Plan": "pipeline.plan.plan",
    "validate": "pipeline.plan.plan",
    "Cost": "pipeline.plan.simulator",
    "simulate": "pipeline.plan.simulator",
    "Span": "pipeline.plan.timeline",
    "Timeline": "pipeline.plan.timeline",
    "save_timeline": "pipeline.report.timeline_figure",
    "microbatch_sizes": "pipeline.batch.microbatch",
    # watching training
    "BoundaryNorms": "pipeline.norms.boundary_norms",
    "VerifyEvery": "pipeline.verify.every",
    # cuts
    "Comparison": "pipeline.cutting.prediction",
    "CutTable": "pipeline.cutting.cut_table",
    "Prediction": "pipeline.cutting.prediction",
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
