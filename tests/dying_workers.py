"""Workers that die, or freeze, where a test says so.

A test writes down faults, one a line; a worker that comes to the place of one takes it off the list, so that it happens
once, and does to itself what it says. Places, in the order in which a worker comes by them:

    launched                     before anything
    before DO, behind DO         an order, carried out and written down, not answered: "before build", "behind apply"
    before MODE, behind MODE     a step, by its mode: "before train", "behind test"
    forward K, backward K        microbatch K, its inputs are there (all kinds of backward)
    waits forward K ...          the same, it waits for its inputs
    shared gradients             before they are brought together; "norms": before they are squared
    updated                      the update is made, and nothing of it written down
    writing                      half of the weights are written down
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import signal
from pathlib import Path

from stages.actions import Kind
from stages.process.boundary_memory import BoundaryMemory, Region
from stages.worker import hosted_stage, tied_gradients, worker
from stages.worker.orders import StepOrder
from stages.worker.status import Status, StatusBoard

FAULTS = "TAPELINE_TEST_FAULTS"
"""The variable of the environment that names the list."""


def plan_faults(path, *faults):
    """Write down (stage, place, how) of the faults that are to come."""
    Path(path).write_text("".join(json.dumps(fault) + "\n" for fault in faults))


def left(path):
    """The faults that have not happened."""
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


def die(how):
    """End, or freeze, this process."""
    if how == "exit":
        os._exit(3)
    os.kill(os.getpid(), {"kill": signal.SIGKILL, "stop": signal.SIGSTOP, "segv": signal.SIGSEGV}[how])


def meet(stages, place):
    """Come by a place."""
    path = os.environ[FAULTS]
    if Path(path).stat().st_size == 0:
        return
    with Path(path).open("r+") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        faults = [json.loads(line) for line in file]
        mine = next((fault for fault in faults if fault[0] in stages and fault[1] == place), None)
        if mine is None:
            return
        faults.remove(mine)
        file.seek(0)
        file.truncate()
        file.write("".join(json.dumps(fault) + "\n" for fault in faults))
        file.flush()
    die(mine[2])


class _Board(StatusBoard):
    def __init__(self, slots, stages):
        super().__init__(slots)
        self._stages, self._written = stages, slots

    def waiting(self, source):
        super().waiting(source)
        meet(self._stages, f"waits {self._place()}")

    def running(self):
        super().running()
        meet(self._stages, self._place())

    def _place(self):
        action = Status.of(self._written).action
        return f"{'forward' if action.kind == Kind.FORWARD else 'backward'} {action.microbatch}"


class _Halves(list):
    """Arrays that are seen as a whole once, to be measured, and then half."""

    def __init__(self, arrays, stages):
        super().__init__(arrays)
        self._stages, self._rounds = stages, 0

    def __iter__(self):
        self._rounds += 1
        for k, array in enumerate(super().__iter__()):
            if self._rounds == 2 and k == len(self) // 2:
                meet(self._stages, "writing")
            yield array


class Dying(worker.Worker):
    """A worker that comes by places."""

    def __init__(self, spec, board, *given):
        super().__init__(spec, board, *given)
        self.names = [stage.name for stage in self.specs]
        self.board = _Board(board, self.names)

    def obey(self, order):
        name = order.mode.value if isinstance(order, StepOrder) else order.do
        meet(self.names, f"before {name}")
        super().obey(order)

    def _written_down(self, deed, boundary):
        both = super()._written_down(deed, boundary)

        def then(order):
            reply = both(order)
            meet(self.names, f"behind {order.mode.value if isinstance(order, StepOrder) else order.do}")
            return reply

        return then

    def apply(self, order):
        super().apply(order)
        meet(self.names, "updated")


def main(spec, board):
    """Entry of such a worker."""
    names = [stage["name"] for stage in spec["stages"]]
    meet(names, "launched")
    join, norms, write = tied_gradients.join, hosted_stage.HostedStage.squared_norms, BoundaryMemory.write

    def joined(*given):
        meet(names, "shared gradients")
        return join(*given)

    def squared(*given):
        meet(names, "norms")
        return norms(*given)

    def written(memory, region, stamp, head, arrays):
        write(memory, region, stamp, head, _Halves(arrays, names) if region == Region.LARGE else arrays)

    tied_gradients.join, hosted_stage.HostedStage.squared_norms, BoundaryMemory.write = joined, squared, written
    with contextlib.suppress(KeyboardInterrupt):
        worker.serve(Dying, spec, board)
