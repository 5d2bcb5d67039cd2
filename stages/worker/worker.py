"""A worker: one process (or thread) that hosts stages and does what the driver says.

    driver ── command 1, 2, 3 ... ──► worker ── replies, losses, errors ──► driver
                                        ▲  │ activations, gradients
                                        │  ▼
                                   neighbouring workers

Rules:

1. Commands are numbered; the worker does them in order and answers each with one reply of the same number, except
   ``apply`` and ``discard``, which need no answer.
2. An exception is reported once, with its traceback, the stage and the action; after that the worker only waits for
   the end. It never continues with a half-done step.
3. ``apply(step)`` updates the variables of all its stages, at most once a step.
"""

from __future__ import annotations

import gc
import json
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from stages.actions import Action, from_array
from stages.errors import HandoffError
from stages.grid import Grid
from stages.tape.tensors import to_array, to_tensor
from stages.tape.window_states import Carried
from stages.worker import snapshot
from stages.worker.hosted_stage import HostedStage, StageSpec
from stages.worker.kept_values import EVERYTHING, Kept
from stages.worker.observers import Norms, Values
from stages.worker.status import StatusBoard
from stages.worker.step_program import Links, Program, StepOrder, Stopped
from transport.channel import Outbox
from transport.errors import TransportError
from transport.mailbox import Mailbox
from transport.message import DRIVER, Key, Message
from transport.registry import open_transport

CONNECT_SECONDS = 30.0
"""How long a neighbour may take to accept a connection."""
_TRACEBACK_CHARACTERS = 12000
_NAMED = 20
"""So many variables are named that could not be put back."""


def main(spec: Mapping[str, Any], board: np.ndarray[Any, Any]) -> None:
    """Entry of a worker.

    Args:
        spec: Plain data: ``worker`` (its number), ``incarnation``, ``transport`` (scheme), ``directory`` (for socket
            files), ``driver`` (address), ``stages`` (list of `StageSpec.plain`), ``own_process``.
        board: Status board, int64 of shape (8,).
    """
    serve(Worker, spec, board)


def serve(kind: type[Worker], spec: Mapping[str, Any], board: np.ndarray[Any, Any]) -> None:
    """Open the ways in and out and let a worker of this kind serve until the run ends."""
    transport = open_transport(spec["transport"], spec["directory"])
    with transport, transport.bind(None) as inbox, transport.connect(spec["driver"], CONNECT_SECONDS) as driver:
        worker = kind(spec, board, Mailbox(inbox, incarnation=spec["incarnation"]), driver, transport.connect)
        worker.greet(inbox.address)
        worker.serve()


class Worker:
    """The state of a worker; see the module for the protocol."""

    def __init__(
        self,
        spec: Mapping[str, Any],
        board: np.ndarray[Any, Any],
        mailbox: Mailbox,
        driver: Outbox,
        connect: Callable[[str, float], Outbox],
    ) -> None:
        self.number: int = spec["worker"]
        self.incarnation: int = spec["incarnation"]
        self.specs = [StageSpec.of(stage) for stage in spec["stages"]]
        self.own_process: bool = spec["own_process"]
        self.board, self.mailbox, self.driver, self._connect = StatusBoard(board), mailbox, driver, connect
        self.hosted: dict[int, HostedStage] = {}
        self.plans: dict[int, list[Action]] = {}
        self._outboxes: dict[int, Outbox] = {DRIVER: driver}
        self._program: Program | None = None
        self._stepped: set[str] = set()
        self._applied = -1
        self._seen: Values | Norms | None = None
        self._kept: dict[int, Kept] = {}
        self._commands: dict[str, Callable[[int, Any], Any]] = {
            "connect": self._do_connect,
            "build": self._do_build,
            "plan": self._do_plan,
            "step": self._do_step,
            "apply": self._do_apply,
            "discard": self._do_discard,
            "get": self._do_get,
            "set": self._do_set,
            "call": self._do_call,
            "seen": self._do_seen,
            "keep": self._do_keep,
            "put_back": self._do_put_back,
            "strips": self._do_strips,
            "unmask": self._do_unmask,
        }

    def greet(self, address: str) -> None:
        """Tell the driver where this worker's inbox is."""
        self._tell("hello", 0, {"address": address})

    def serve(self) -> None:
        """Do commands until the driver ends the run."""
        number = 0
        try:
            while True:
                number += 1
                message = self._take(Key("command", number, self._place()))
                order: Any = message.value
                self.board.busy()
                answer = self._commands[order["do"]](number, order)
                if answer is not None:
                    self._tell("reply", number, answer)
                self.board.idle()
        except Stopped:
            pass
        except TransportError as error:
            self._report(number, error)
        except Exception as error:
            self._report(number, error)
            self._wait_for_the_end()
        finally:
            for outbox in self._outboxes.values():
                outbox.close()

    def _place(self) -> int:
        return self.specs[0].index

    def _take(self, key: Key) -> Message:
        message = self.mailbox.take((key,))
        if message.kind == "stop":
            raise Stopped
        return message

    def _tell(self, kind: str, number: int, value: Any, array: np.ndarray[Any, Any] | None = None) -> None:
        self.driver.send(
            Message(kind, self.incarnation, number, DRIVER, self._place(), value=value, array=array), CONNECT_SECONDS
        )

    def _send(self, message: Message) -> None:
        self._outboxes[message.stage].send(message, CONNECT_SECONDS)

    def _do_connect(self, number: int, order: Mapping[str, Any]) -> dict[str, Any]:
        """Open a way to every process that hosts a stage this worker sends to."""
        opened: dict[str, Outbox] = {}
        for stage, address in order["peers"].items():
            if address not in opened:
                opened[address] = self._connect(address, CONNECT_SECONDS)
            self._outboxes[int(stage)] = opened[address]
        return {}

    def _do_build(self, number: int, order: Mapping[str, Any]) -> None:
        for spec in self.specs:
            self.board.building(spec.index)
            self.hosted[spec.index] = HostedStage(spec)
        self.board.busy()
        if self.own_process:
            gc.freeze()
        described = {str(index): hosted.describe().plain() for index, hosted in self.hosted.items()}
        self._tell_long(number, described)

    def _do_plan(self, number: int, order: Mapping[str, Any]) -> None:
        array = self._take(Key("plan", number, self._place())).array
        assert array is not None
        self.plans[order["plan"]] = list(from_array(array))

    def _do_step(self, number: int, order: Mapping[str, Any]) -> dict[str, Any]:
        what = StepOrder(
            order["step"],
            order["mode"],
            Grid(tuple(order["sizes"]), tuple(order["lengths"])),
            tuple(order["sample_weights"]),
            order["trace"],
            order["loss_scale"],
            order["truncate"],
            order["observe"],
        )
        links = Links(self._take, self._send, self.incarnation, self.board)
        before = self._keep(("states", "metrics")) if what.mode == "gradients" else {}
        if what.mode == "masks":
            for hosted in self.hosted.values():
                hosted.prediction_masks = {}
        self._program = Program(what, self.plans[order["plan"]], self.hosted, links)
        answer: dict[str, Any] = self._program.run()
        if order["norms"]:
            answer["squared_norm"] = sum(h.squared_norm(order["loss_scale"]) for h in self.hosted.values())
        if order["finite"]:
            answer["finite"] = all(hosted.all_finite() for hosted in self.hosted.values())
        for kept in before.values():
            kept.put_back()
        if not before and what.mode not in ("predict", "masks"):
            answer["metrics"] = self._metrics()
        answer["masked"] = any(hosted.prediction_masks for hosted in self.hosted.values())
        if what.trace:
            answer["spans"] = [list(span) for span in self._program.spans]
        self._seen = self._program.observer
        if isinstance(self._seen, Norms):
            answer["norms"] = [[*place, squares] for place, squares in self._seen.squares.items()]
        self._program = None
        self.mailbox.clear(what.step + 1)
        if self.own_process and what.mode not in self._stepped:
            self._stepped.add(what.mode)
            gc.freeze()
        return answer

    def _keep(self, groups: Sequence[str]) -> dict[int, Kept]:
        return {index: Kept(hosted, groups) for index, hosted in self.hosted.items()}

    def _do_keep(self, number: int, order: Mapping[str, Any]) -> dict[str, Any]:
        """Set all values aside."""
        self._kept = self._keep(EVERYTHING)
        return {}

    def _do_put_back(self, number: int, order: Mapping[str, Any]) -> dict[str, Any]:
        """Put back what `keep` set aside; answers with the paths of variables that are not as they were."""
        for kept in self._kept.values():
            kept.put_back()
        changed = {str(index): kept.changed()[:_NAMED] for index, kept in self._kept.items()}
        self._kept = {}
        return {"changed": changed}

    def _do_seen(self, number: int, order: Mapping[str, Any]) -> None:
        """Send what was seen at the cuts in the last step, and forget it."""
        seen = self._seen.seen if isinstance(self._seen, Values) else {}
        self._seen = None
        self._tell_long(number, [list(sight) for sight in seen], list(seen.values()))

    def _tell_long(self, number: int, value: Any, arrays: Sequence[np.ndarray[Any, Any] | None] = ()) -> None:
        """Answer with plain data of any length, as JSON in an array: messages' own values are small; and arrays."""
        for i, array in enumerate(arrays):
            message = Message("variable", self.incarnation, number, DRIVER, self._place(), microbatch=i, array=array)
            self.driver.send(message, CONNECT_SECONDS)
        self._tell("reply", number, {"arrays": len(arrays)}, np.frombuffer(json.dumps(value).encode(), np.uint8))

    def _metrics(self) -> dict[str, float]:
        found: dict[str, float] = {}
        for hosted in self.hosted.values():
            if any(head.has_metrics for head in hosted.heads):
                found |= hosted.heads.results()
        return found

    def _do_apply(self, number: int, order: Mapping[str, Any]) -> None:
        if order["step"] <= self._applied:
            return
        self._applied = order["step"]
        for index, hosted in self.hosted.items():
            rate = order["learning_rates"].get(str(index))
            if rate is not None:
                hosted.optimizer.learning_rate = rate
            hosted.stage.apply(hosted.optimizer, order.get("scale"), order.get("divisor"))

    def _carried(self, index: int) -> Carried:
        carried = self.hosted[index].stage.carried
        assert carried is not None
        return carried

    def _do_discard(self, number: int, order: Mapping[str, Any]) -> None:
        for hosted in self.hosted.values():
            hosted.stage.zero_gradients()

    def _do_get(self, number: int, order: Mapping[str, Any]) -> dict[str, Any]:
        counts = {}
        for index in self.hosted:
            values = self._values(order["what"], index)
            counts[str(index)] = len(values)
            for i, value in enumerate(values):
                message = Message("variable", self.incarnation, number, DRIVER, index, microbatch=i, array=value)
                self.driver.send(message, CONNECT_SECONDS)
        return {"counts": counts}

    def _values(self, what: str, index: int) -> Sequence[np.ndarray[Any, Any] | None]:
        """What a stage has under a name: ``gradients``, ``kept states``, or as `HostedStage.variables` calls it."""
        hosted = self.hosted[index]
        if what == "gradients":
            return hosted.gradients()
        if what == "kept states":
            kept = {} if hosted.stage.carried is None else hosted.stage.carried.kept
            return [to_array(state) for k in sorted(kept) for state in kept[k]]
        return snapshot.read(hosted.variables(what))

    def _do_set(self, number: int, order: Mapping[str, Any]) -> dict[str, Any]:
        for index, count in order["counts"].items():
            arrays = [self._take(Key("variable", number, int(index), microbatch=i)).array for i in range(count)]
            self._set(order["what"], int(index), arrays)
        return {}

    def _set(self, what: str, index: int, arrays: Sequence[np.ndarray[Any, Any] | None]) -> None:
        """Write what a stage has under a name; `_values` the other way."""
        values = [array for array in arrays if array is not None]
        if what == "kept states":
            self._begin_with(index, values)
        else:
            self.hosted[index].set(what, values)

    def _begin_with(self, index: int, values: Sequence[np.ndarray[Any, Any]]) -> None:
        """Let a stage begin with states that another run's batch left, microbatch after microbatch."""
        if values:
            carried = self._carried(index)
            count = len(carried)
            carried.kept = {
                k: tuple(to_tensor(np.array(value)) for value in values[k * count : (k + 1) * count])
                for k in range(len(values) // count)
            }

    def _do_call(self, number: int, order: Mapping[str, Any]) -> dict[str, Any]:
        """Small services on every hosted stage."""
        for hosted in self.hosted.values():
            if order["name"] == "reset_metrics":
                hosted.heads.reset()
            elif order["name"] == "reset_state":
                if hosted.stage.carried is not None:
                    hosted.stage.carried.reset()
            elif order["name"] == "finalize":
                if hosted.optimizer is not None:
                    hosted.optimizer.finalize_variable_values(hosted.stage.trainable_variables)
            else:
                raise HandoffError(f"unknown service {order['name']!r}")
        return {}

    def _do_strips(self, number: int, order: Mapping[str, Any]) -> dict[str, Any]:
        """Names of the tensors whose mask a layer of the stage takes off."""
        return {
            str(index): [hosted.spec.inputs[place][0] for place in hosted.stage.strips()]
            for index, hosted in self.hosted.items()
        }

    def _do_unmask(self, number: int, order: Mapping[str, Any]) -> None:
        for index, pairs in order["pairs"].items():
            self.hosted[int(index)].unmasked = frozenset((name, consumer) for name, consumer in pairs)

    def _report(self, number: int, error: Exception) -> None:
        """Tell the driver what happened, as far as the driver is still there (rule 2)."""
        action = self._program.current if self._program is not None else None
        spec = next((s for s in self.specs if action is not None and s.index == action.stage), None)
        if spec is None:
            built = len(self.hosted)
            spec = self.specs[min(built, len(self.specs) - 1)]
        text = "".join(traceback.format_exception(error))
        value = {
            "stage": spec.name,
            "index": spec.index,
            "step": self._program.order.step if self._program is not None else -1,
            "action": action.describe() if action is not None else "",
            "type": type(error).__name__,
            "message": str(error)[:_TRACEBACK_CHARACTERS],
            "traceback": text[-_TRACEBACK_CHARACTERS:],
            "building": not self.hosted,
            "time": time.time(),
        }
        try:
            self._tell("error", number, value)
        except TransportError:
            traceback.print_exc()

    def _wait_for_the_end(self) -> None:
        """Hold on to nothing but the inbox, until the driver says stop (or the process is ended)."""
        self.hosted.clear()
        self._program = None
        try:
            while self.mailbox.receive().kind != "stop":
                pass
        except TransportError:
            pass


__all__ = ["Worker", "main", "serve"]
