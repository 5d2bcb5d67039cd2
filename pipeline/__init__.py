"""Train one Keras model across several processes: composing stages, planning, training, verifying.

Names are imported when first used, so that planning and `--help` never load TensorFlow.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pipeline.origin import check_origins

check_origins()

import stages  # noqa: E402, F401 (not before it is known to be ours; looks at the versions of TensorFlow and Keras)
from transport.lazy import load  # noqa: E402

if TYPE_CHECKING:  # the same names once more, for type checkers and editors
    from pipeline.batch.microbatch import microbatch_sizes as microbatch_sizes
    from pipeline.cutting.auto_schedule import AutoSchedule as AutoSchedule
    from pipeline.cutting.cut_table import CutTable as CutTable
    from pipeline.cutting.prediction import Comparison as Comparison
    from pipeline.cutting.prediction import Prediction as Prediction
    from pipeline.errors import CheckpointError as CheckpointError
    from pipeline.errors import CompileError as CompileError
    from pipeline.errors import DataError as DataError
    from pipeline.errors import Fault as Fault
    from pipeline.errors import FirstBatchError as FirstBatchError
    from pipeline.errors import MicrobatchError as MicrobatchError
    from pipeline.errors import NotInPipelineError as NotInPipelineError
    from pipeline.errors import OptionsError as OptionsError
    from pipeline.errors import PartyLostError as PartyLostError
    from pipeline.errors import PartyMismatchError as PartyMismatchError
    from pipeline.errors import PartyPlanError as PartyPlanError
    from pipeline.errors import PartySilentError as PartySilentError
    from pipeline.errors import PartyStoppedError as PartyStoppedError
    from pipeline.errors import PipelineClosedError as PipelineClosedError
    from pipeline.errors import PipelineError as PipelineError
    from pipeline.errors import PlanError as PlanError
    from pipeline.errors import RecoveryError as RecoveryError
    from pipeline.errors import ScheduleError as ScheduleError
    from pipeline.errors import SplitError as SplitError
    from pipeline.errors import StalledError as StalledError
    from pipeline.errors import TimelineError as TimelineError
    from pipeline.errors import UsageError as UsageError
    from pipeline.errors import VerificationError as VerificationError
    from pipeline.errors import WiringError as WiringError
    from pipeline.errors import WorkerDiedError as WorkerDiedError
    from pipeline.errors import WorkerError as WorkerError
    from pipeline.model.stateful import stateful as stateful
    from pipeline.norms.boundary_norms import BoundaryNorms as BoundaryNorms
    from pipeline.parties.leakage.leak_meter import LeakMeter as LeakMeter
    from pipeline.parties.meet import join_party as join_party
    from pipeline.parties.meet import serve_party as serve_party
    from pipeline.parties.party import Party as Party
    from pipeline.parties.party_plan import PartyPlan as PartyPlan
    from pipeline.parties.read_plan import read_plan as read_plan
    from pipeline.parties.rehearsal import rehearse as rehearse
    from pipeline.pipeline import Pipeline as Pipeline
    from pipeline.plan.bottleneck import Bottleneck as Bottleneck
    from pipeline.plan.plan import Plan as Plan
    from pipeline.plan.plan import validate as validate
    from pipeline.plan.schedules import SCHEDULES as SCHEDULES
    from pipeline.plan.schedules import build_plan as build_plan
    from pipeline.plan.schedules import schedule_named as schedule_named
    from pipeline.plan.simulator import Cost as Cost
    from pipeline.plan.simulator import simulate as simulate
    from pipeline.plan.timeline import Span as Span
    from pipeline.plan.timeline import Timeline as Timeline
    from pipeline.report.report import Report as Report
    from pipeline.report.report import SingleTapeError as SingleTapeError
    from pipeline.report.timeline_figure import save_timeline as save_timeline
    from pipeline.runtime.launch.errors import LaunchError as LaunchError
    from pipeline.runtime.launch.errors import ServerGoneError as ServerGoneError
    from pipeline.runtime.recovery.options import Recovery as Recovery
    from pipeline.runtime.recovery.options import Repair as Repair
    from pipeline.training.callbacks import PipelineCheckpoint as PipelineCheckpoint
    from pipeline.training.trace_steps import TraceSteps as TraceSteps
    from pipeline.verify.every import VerifyEvery as VerifyEvery
    from stages.errors import HandoffError as HandoffError
    from stages.errors import RecipeError as RecipeError
    from stages.errors import SegmentError as SegmentError
    from stages.errors import StageError as StageError
    from stages.explanation.rows import Explanation as Explanation
    from stages.jacobian.memory import MemoryLimitExceeded as MemoryLimitExceeded
    from stages.recipe.segment import Segment as Segment
    from transport.errors import AddressInUse as AddressInUse
    from transport.errors import BadAddress as BadAddress
    from transport.errors import ChannelClosed as ChannelClosed
    from transport.errors import ClosedError as ClosedError
    from transport.errors import KeyFileError as KeyFileError
    from transport.errors import MalformedMessage as MalformedMessage
    from transport.errors import MessageTooLarge as MessageTooLarge
    from transport.errors import MistakeError as MistakeError
    from transport.errors import NotAdmitted as NotAdmitted
    from transport.errors import NotLoopback as NotLoopback
    from transport.errors import PeerError as PeerError
    from transport.errors import PeerLost as PeerLost
    from transport.errors import TapelineError as TapelineError
    from transport.errors import TimedOutError as TimedOutError
    from transport.errors import TransportError as TransportError
    from transport.errors import TransportTimeout as TransportTimeout
    from transport.errors import Unsendable as Unsendable

_HOME = {
    # training
    "Pipeline": "pipeline.pipeline",
    "PipelineCheckpoint": "pipeline.training.callbacks",
    "Recovery": "pipeline.runtime.recovery.options",
    "Repair": "pipeline.runtime.recovery.options",
    "Segment": "stages.recipe.segment",
    "stateful": "pipeline.model.stateful",
    # split learning between organisations
    "Party": "pipeline.parties.party",
    "PartyPlan": "pipeline.parties.party_plan",
    "join_party": "pipeline.parties.meet",
    "read_plan": "pipeline.parties.read_plan",
    "rehearse": "pipeline.parties.rehearsal",
    "serve_party": "pipeline.parties.meet",
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
    "Bottleneck": "pipeline.plan.bottleneck",
    "save_timeline": "pipeline.report.timeline_figure",
    "microbatch_sizes": "pipeline.batch.microbatch",
    # watching training
    "BoundaryNorms": "pipeline.norms.boundary_norms",
    "LeakMeter": "pipeline.parties.leakage.leak_meter",
    "TraceSteps": "pipeline.training.trace_steps",
    "VerifyEvery": "pipeline.verify.every",
    # what verify and explain answer
    "Explanation": "stages.explanation.rows",
    "Report": "pipeline.report.report",
    # cuts
    "AutoSchedule": "pipeline.cutting.auto_schedule",
    "Comparison": "pipeline.cutting.prediction",
    "CutTable": "pipeline.cutting.cut_table",
    "Prediction": "pipeline.cutting.prediction",
    # errors
    "CheckpointError": "pipeline.errors",
    "CompileError": "pipeline.errors",
    "DataError": "pipeline.errors",
    "Fault": "pipeline.errors",
    "FirstBatchError": "pipeline.errors",
    "MicrobatchError": "pipeline.errors",
    "NotInPipelineError": "pipeline.errors",
    "OptionsError": "pipeline.errors",
    "PartyLostError": "pipeline.errors",
    "PartyMismatchError": "pipeline.errors",
    "PartyPlanError": "pipeline.errors",
    "PartySilentError": "pipeline.errors",
    "PartyStoppedError": "pipeline.errors",
    "PipelineClosedError": "pipeline.errors",
    "PipelineError": "pipeline.errors",
    "PlanError": "pipeline.errors",
    "RecoveryError": "pipeline.errors",
    "ScheduleError": "pipeline.errors",
    "SplitError": "pipeline.errors",
    "StalledError": "pipeline.errors",
    "TimelineError": "pipeline.errors",
    "UsageError": "pipeline.errors",
    "VerificationError": "pipeline.errors",
    "WiringError": "pipeline.errors",
    "WorkerDiedError": "pipeline.errors",
    "WorkerError": "pipeline.errors",
    "TapelineError": "transport.errors",
    "MistakeError": "transport.errors",
    "PeerError": "transport.errors",
    "TimedOutError": "transport.errors",
    "ClosedError": "transport.errors",
    "TransportError": "transport.errors",
    "Unsendable": "transport.errors",
    "MessageTooLarge": "transport.errors",
    "BadAddress": "transport.errors",
    "AddressInUse": "transport.errors",
    "NotLoopback": "transport.errors",
    "NotAdmitted": "transport.errors",
    "KeyFileError": "transport.errors",
    "MalformedMessage": "transport.errors",
    "PeerLost": "transport.errors",
    "TransportTimeout": "transport.errors",
    "ChannelClosed": "transport.errors",
    "StageError": "stages.errors",
    "SegmentError": "stages.errors",
    "HandoffError": "stages.errors",
    "RecipeError": "stages.errors",
    "MemoryLimitExceeded": "stages.jacobian.memory",
    "LaunchError": "pipeline.runtime.launch.errors",
    "ServerGoneError": "pipeline.runtime.launch.errors",
    "SingleTapeError": "pipeline.report.report",
}

__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    value = load("pipeline", _HOME, name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
