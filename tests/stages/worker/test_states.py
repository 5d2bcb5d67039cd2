"""Every order in every state: carried out, or refused in a sentence before anything was done."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest

from pipeline.reference.orders import Explain, MakeOptimizers, Witness
from pipeline.reference.worker import ReferenceWorker
from stages.errors import HandoffError
from stages.grid import Grid
from stages.process.status_board import BOARD_SLOTS
from stages.worker.base import BaseWorker
from stages.worker.orders import (
    ORDERS,
    Apply,
    Build,
    CallService,
    Connect,
    Discard,
    Get,
    Keep,
    Mode,
    Order,
    PutBack,
    Service,
    Set,
    StepOrder,
    Strips,
    TakePlan,
    TellSeen,
    Unmask,
    of_wire,
)
from stages.worker.recovery_orders import GoOnAs, WriteDown
from stages.worker.reply import Reply
from stages.worker.stage_spec import StageSpec
from stages.worker.states import COMMANDS, LEGAL, MEANING, WorkerState
from stages.worker.worker import Worker
from transport.codec import decode, encode
from transport.limits import DEFAULT_LIMITS
from transport.message import Message

STEPS = [StepOrder(3, mode, Grid((2, 1), (4,)), 1, ("y",), True, 8.0, 2, "values", True) for mode in Mode]
EXAMPLES: list[Order] = [
    *(Connect({1: "ipc://a"}), Build(), Strips(), Unmask({0: [("h", 1)]}), TakePlan(2), *STEPS),
    *(Apply(3, {0: 0.5}, 0.25, 8.0), Discard(), Get("model"), Set("model", {0: 2}), CallService(Service.FINALIZE)),
    *(Keep(), PutBack(), TellSeen(), MakeOptimizers(), Witness("chain", 1 << 20, 7), Explain("loss", {"s/k": "zero"})),
    *(GoOnAs({0: {"beta_1": 0.5}}, {0: [[["float32", [1, 2]], None], None]}), WriteDown()),
]
OF_RECOVERY = {GoOnAs, WriteDown}
BY_COMMAND = {order.command: order for order in EXAMPLES}
KNOWN = {type(order).do: type(order) for order in EXAMPLES}


class Sent:
    """The way to a driver that is not there."""

    def __init__(self) -> None:
        self.messages: list[object] = []

    def send(self, message: object, timeout: float | None = None) -> None:
        """Keep it."""
        self.messages.append(message)


def new_worker(state: WorkerState, kind: type[BaseWorker]) -> tuple[BaseWorker, Sent]:
    """A worker of one stage in a state, and what it sends to."""
    spec = StageSpec(0, "front", None, inputs=[("x", -1)], outputs=[("y", ())]).plain()
    driver = Sent()
    given = {"worker": 0, "incarnation": 0, "stages": [spec], "own_process": False}
    worker = kind(given, np.zeros(BOARD_SLOTS, np.int64), None, driver, None)  # type: ignore[arg-type]
    worker.state = state
    return worker, driver


def worker_in(state: WorkerState, kind: type[BaseWorker] = ReferenceWorker) -> tuple[BaseWorker, list[Order], Sent]:
    """A worker in a state whose deeds only note that they were done."""
    worker, driver = new_worker(state, kind)
    done: list[Order] = []
    worker._deeds = {one: lambda order: done.append(order) or Reply() for one in worker._deeds}  # type: ignore[func-returns-value]
    return worker, done, driver


@pytest.mark.parametrize(("state", "command"), list(product(WorkerState, COMMANDS)))
def test_an_order_is_carried_out_or_refused_in_a_sentence(state: WorkerState, command: str) -> None:
    order = BY_COMMAND[command]
    worker, done, driver = worker_in(state, Worker if type(order) in OF_RECOVERY else ReferenceWorker)
    if command in LEGAL[state]:
        worker.obey(order)
        assert (done, worker.state) == ([order], LEGAL[state][command])
        assert len(driver.messages) == order.answered
        return
    with pytest.raises(HandoffError) as caught:
        worker.obey(order)
    said = str(caught.value)
    assert said.startswith(f"the worker of stage 'front' was ordered to {command!r} while it is {state.value!r}")
    assert MEANING[state] in said and said.endswith(f"legal now: {', '.join(sorted(LEGAL[state]))}")
    assert (done, worker.state, driver.messages) == ([], state, [])


def test_the_table_has_every_order_of_every_worker() -> None:
    assert set(BY_COMMAND) == set(COMMANDS)
    assert set(KNOWN.values()) - OF_RECOVERY == set(worker_in(WorkerState.NEW)[0]._deeds)
    assert {*ORDERS, *OF_RECOVERY} == set(worker_in(WorkerState.NEW, Worker)[0]._deeds)


def test_gradients_are_decided_about_before_the_next_step() -> None:
    gone = {"step", "forward", "plan", "optimizers", "build", "connect", "strips", "unmask"}
    assert not gone & set(LEGAL[WorkerState.STEPPED])
    assert [state for state in WorkerState if "discard" in LEGAL[state]] == [WorkerState.STEPPED]


def test_nothing_leads_out_of_the_table_and_every_state_is_reached() -> None:
    reached, before = {WorkerState.NEW}, set()
    while reached != before:
        before = set(reached)
        reached |= {after for state in before for after in LEGAL[state].values()}
    assert reached == set(WorkerState)


@pytest.mark.parametrize("order", EXAMPLES, ids=lambda order: order.command)
def test_an_order_arrives_as_it_was_sent(order: Order) -> None:
    (frame,) = encode(Message("command", value=order.plain()))
    assert of_wire(decode([frame]).value, KNOWN) == order


def test_a_model_of_very_many_variables_can_be_explained() -> None:
    order = Explain("loss", {f"stage/variable_{k}": "connected" for k in range(DEFAULT_LIMITS.max_count + 1)})
    (frame,) = encode(Message("command", value=order.plain()))
    assert of_wire(decode([frame]).value, KNOWN) == order


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"do": "dance"}, "the driver ordered 'dance', which this worker does not know; it knows connect, build"),
        ({}, "the driver ordered None"),
        (None, "the driver ordered None"),
        ({"do": "get"}, r"the order 'get' has the parts \[\], expected \['what'\]"),
        ({"do": "keep", "more": 1}, r"the order 'keep' has the parts \['more'\], expected \[\]"),
    ],
)
def test_what_is_no_order_is_refused_in_a_sentence(data: object, message: str) -> None:
    with pytest.raises(HandoffError, match=message):
        of_wire(data, KNOWN)


@pytest.mark.parametrize("kind", [Worker, ReferenceWorker])
def test_each_method_of_a_worker_is_implemented_once(kind: type[BaseWorker]) -> None:
    concrete = {
        name
        for name, value in vars(BaseWorker).items()
        if (callable(value) or isinstance(value, property)) and not getattr(value, "__isabstractmethod__", False)
    }
    assert concrete & set(vars(kind)) - {"__doc__"} <= {"__init__"}
    assert BaseWorker.__abstractmethods__ <= set(vars(kind))


def test_nothing_is_put_back_that_was_not_set_aside() -> None:
    """Else a driver would be told that all is as it was, of values that nobody had kept."""
    worker, _ = new_worker(WorkerState.READY, ReferenceWorker)
    with pytest.raises(HandoffError, match="`keep` comes first"):
        worker.obey(PutBack())


def test_a_step_that_was_applied_is_not_applied_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """An order that is sent twice, since nobody knows whether it arrived, updates once."""
    updates: list[int] = []
    monkeypatch.setattr(Worker, "apply", lambda self, order: updates.append(order.step))
    worker, _ = new_worker(WorkerState.STEPPED, Worker)
    for step in (3, 3):
        worker.obey(Apply(step, {}, None, None))
    worker.state = WorkerState.STEPPED
    worker.obey(Apply(4, {}, None, None))
    assert updates == [3, 4]


def test_the_order_of_a_step_stays_small_for_any_number_of_microbatches_and_windows() -> None:
    """A list of 100 000 sizes would exceed what one message may hold, in the middle of a run."""
    order = StepOrder(1, Mode.TRAIN, Grid((3,) * 40_000 + (2,) * 60_000, (7,) * 5_000 + (6,) * 5_000))
    message = Message("command", value=order.plain())
    sent = encode(message, DEFAULT_LIMITS)
    assert len(sent[0]) < 1000
    assert of_wire(decode(sent).value, KNOWN) == order
