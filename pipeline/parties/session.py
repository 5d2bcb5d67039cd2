"""A session of parties, from the first hello to the last message: the hub leads, every party runs the same steps.

    hub      order (epoch) ─► all     begin (step, rows' mark) ─► all       commit (step) ─► all
    others                            rows' mark compared       prepared (transcript, rows' mark) ─► hub

Nobody applies a step before all are prepared with equal transcripts. Whatever goes wrong, each party has then the
values of its last commit, and says in one sentence what happened; it never trains on without another.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from pipeline.batch.microbatch import microbatch_sizes
from pipeline.errors import PartyLostError, PartyMismatchError, PartySilentError, PartyStoppedError, PipelineError
from pipeline.parties.bound_party import BoundParty, LastCommit
from pipeline.parties.handshake import shake_hands
from pipeline.parties.party import ids_mark, rows_key
from pipeline.parties.party_checkpoints import EndOfEpoch, PartyCheckpoints
from pipeline.parties.party_plan import PartyPlan
from pipeline.parties.party_step import PartyStep
from pipeline.parties.wire import PartyWire
from stages.plain_text import printable
from transport.message import Message
from transport.party_links import PartyLink

Array = np.ndarray[Any, Any]


@dataclass
class PartyResult:
    """The results that a party may see.

    Attributes:
        history: {"loss" and metrics' names: a value an epoch}; empty where nothing was granted.
        predictions: The model's output for all rows in their order, (rows, ...), where it was asked for and granted.
        steps: Commits.
        sent: Bytes of tensors sent to other parties.
        received: Bytes of tensors received from them.
    """

    history: dict[str, list[Any]] = field(default_factory=dict)
    predictions: Array | None = None
    steps: int = 0
    sent: int = 0
    received: int = 0


class PartySession:
    """One party's session.

    Args:
        party: The party under the plan.
        link: Its connections, all made.
        trusted: Asked before every step, with a party's name; a session ends when one is trusted no longer.
        say: Told, in sentences, what is waited for and what an epoch gave.
        checkpoints: Where a checkpoint is written after each epoch; None: nowhere.
        resume: Whether to go on from the last epoch that all parties have.
    """

    def __init__(
        self,
        party: BoundParty,
        link: PartyLink,
        trusted: Callable[[str], bool],
        say: Callable[[str], None],
        checkpoints: PartyCheckpoints | None = None,
        resume: bool = False,
    ) -> None:
        self._party, self._plan = party, party.plan
        self._wire = PartyWire(party.plan, party.name, link, say)
        self._step = PartyStep(party, self._wire)
        self._trusted, self._say = trusted, say
        self._checkpoints = checkpoints
        self._places = checkpoints.places() if checkpoints is not None and resume else None
        self._rows_key = b""
        self._run = ""
        self._held = LastCommit(party)
        self._result = PartyResult()

    @property
    def _leads(self) -> bool:
        return self._party.name == self._plan.hub

    def run(self) -> PartyResult:
        """Agree, do the task, say goodbye.

        Raises:
            PartyMismatchError: The parties do not mean the same; nothing was trained.
            PartyStoppedError: Something came or was made that must not be, or another party stopped.
            PartyLostError: Another party is gone.
            PartySilentError: Another party sent nothing for as long as the plan says.
        """
        try:
            key, begin = shake_hands(self._party, self._wire, self._places)
            ids = self._party.party.ids
            self._rows_key = b"" if ids is None else rows_key(key, ids)
            self._run = hashlib.sha256(b"tapeline run\0" + key).hexdigest()[:32]
            if self._party.task == "train":
                self._train(self._resumed(begin))
            else:
                self._infer()
            self._wire.step = self._result.steps + 1
            for peer in self._wire.peers:
                self._wire.send(peer, "stop", "bye")
            for peer in self._wire.peers:
                self._wire.receive(peer, "stop", "bye")
        except BaseException as error:
            self._held.put_back()
            if not isinstance(error, PartyMismatchError):  # the verdict has said it
                self._wire.tell_the_end(_told(error))
            if self._result.steps and isinstance(error, PipelineError):
                error.add_note(f"{self._party.name} has the values of its last commit, step {self._result.steps}")
            raise
        self._result.sent, self._result.received = self._wire.sent, self._wire.received
        return self._result

    def _resumed(self, epoch: int) -> int:
        """Take the values that this party had after an epoch; 0 takes those that it has."""
        if epoch and self._places is not None and self._checkpoints is not None:
            place = self._places[epoch]
            self._checkpoints.load(epoch)
            self._run = place.run
            self._wire.go_on(place.transcripts)
            self._result.steps = place.step
            self._result.history = {name: list(values) for name, values in place.history.items()}
            self._held = LastCommit(self._party)
            self._say(f"{self._party.name} goes on after epoch {epoch}, step {place.step}")
        return epoch

    def _train(self, begin: int) -> None:
        if not batches(self._wire.rows, self._plan, drop=True):
            raise PartyStoppedError(
                f"there is no whole batch: {self._wire.rows} rows, {self._plan.batch} a batch, and drop_last leaves "
                "out what is smaller"
            )
        for epoch in range(begin, self._plan.epochs):
            order = self._order(epoch)
            total, counted = 0.0, 0
            self._party.count_anew()
            for batch in batches(len(order), self._plan, drop=True):
                rows = order[batch]
                loss = self._train_step(rows)
                total, counted = total + (loss or 0.0) * len(rows), counted + len(rows)
            self._tell(epoch, total / max(counted, 1))
            if self._checkpoints is not None:
                done = EndOfEpoch(epoch + 1, self._result.steps, self._wire.chain(), self._result.history, self._run)
                self._checkpoints.write(done)
        self._step.finish()
        self._held = LastCommit(self._party)

    def _train_step(self, rows: Array) -> float | None:
        step = self._result.steps + 1
        mark = self._begin(step, rows)
        judged = self._step.forward(rows, training=True)
        self._step.backward()
        self._agree(step, mark)
        self._step.apply()
        self._wire.committed()
        self._result.steps = step
        self._held = LastCommit(self._party)
        return judged.loss

    def _begin(self, step: int, rows: Array) -> str | None:
        """Start a step together: the same rows at every party."""
        for peer in self._wire.peers:
            if not self._trusted(peer):
                raise PartyStoppedError(
                    f"the key of {peer} is trusted no longer, so the session ends before step {step}"
                )
        self._wire.begin(step, microbatch_sizes(len(rows), self._plan.microbatches))
        ids = self._party.party.ids
        mark = None if ids is None else ids_mark(self._rows_key, [ids[row] for row in rows])
        if self._leads:
            for peer in self._wire.peers:
                self._wire.send(peer, "command", "begin", mark)
        else:
            message = self._wire.receive(self._plan.hub, "command", "begin")
            self._expect_step(message)
            self._same_rows(self._plan.hub, step, mark, message.value)
        return mark

    def _agree(self, step: int, mark: str | None) -> None:
        """Prepared at all, then commit."""
        if not self._leads:
            hub = self._plan.hub
            self._wire.send(hub, "reply", "prepared", {"transcript": self._wire.transcript(hub), "rows": mark})
            self._expect_step(self._wire.receive(hub, "command", "commit"))
            return
        marks: dict[str, Any] = {self._party.name: mark}
        for peer in self._wire.peers:
            message = self._wire.receive(peer, "reply", "prepared")
            self._expect_step(message)
            said = message.value if isinstance(message.value, dict) else {}
            if said.get("transcript") != self._wire.transcript(peer):
                raise PartyStoppedError(
                    f"what {self._plan.hub} and {peer} sent and received in step {step} is not the same; nobody "
                    "applies it"
                )
            for other, theirs in marks.items():
                self._same_rows(other, step, theirs, said.get("rows"), peer)
            marks[peer] = said.get("rows")
        for peer in self._wire.peers:
            self._wire.send(peer, "command", "commit")

    def _same_rows(self, one: str, step: int, mark: Any, other: Any, peer: str = "") -> None:
        if mark is not None and other is not None and mark != other:
            raise PartyStoppedError(
                f"the rows of step {step} are not the same at {one} and {peer or self._party.name}: their ids differ"
            )

    def _expect_step(self, message: Message) -> None:
        if message.step != self._wire.step:
            raise PartyStoppedError(
                f"{message.tensor} of step {message.step} came while {self._wire.step} is under way"
            )

    def _order(self, epoch: int) -> Array:
        """The order of the rows in an epoch, the hub's; others see that it has every row once."""
        if not self._leads:
            order = self._wire.receive(self._plan.hub, "command", "order").array
            if order is None or not np.array_equal(np.sort(order), np.arange(self._wire.rows)):
                raise PartyStoppedError(f"{self._plan.hub}'s order of epoch {epoch + 1} has not every row once")
            return order
        order = np.arange(self._wire.rows, dtype=np.int64)
        if self._plan.order_seed is not None:
            order = np.random.default_rng([self._plan.order_seed, epoch]).permutation(order)
        for peer in self._wire.peers:
            self._wire.send(peer, "command", "order", array=order)
        return order

    def _infer(self) -> None:
        judging = self._party.task == "evaluate"
        total, outputs = 0.0, []
        self._party.count_anew()
        for step, batch in enumerate(batches(self._wire.rows, self._plan, drop=False), 1):
            rows = np.arange(self._wire.rows)[batch]
            self._begin(step, rows)
            judged = self._step.forward(rows, training=False, judging=judging)
            total += (judged.loss or 0.0) * len(rows)
            if not judging:
                outputs.append(self._shared_outputs(judged.outputs))
        if judging:
            self._tell(0, total / self._wire.rows)
        elif seen := [one for one in outputs if one is not None]:
            if len({(one.dtype, one.shape[1:]) for one in seen}) > 1:
                raise PartyStoppedError(f"the predictions of {self._plan.judge.owner} have not one shape and dtype")
            self._result.predictions = np.concatenate(seen)
        self._held.put_back()  # of metrics

    def _tell(self, epoch: int, loss: float) -> None:
        """Let those who may see loss and metrics see them."""
        found = self._shared_logs(self._logs(loss))
        for name, value in found.items():
            self._result.history.setdefault(name, []).append(value)
        if found:
            figures = ", ".join(
                printable(f"{name} {value:.6g}" if isinstance(value, float) else f"{name} {value}")
                for name, value in found.items()
            )
            self._say(f"epoch {epoch + 1}/{self._plan.epochs if self._party.task == 'train' else 1}: {figures}")

    def _logs(self, loss: float) -> dict[str, dict[str, Any]] | None:
        if self._party.head is None:
            return None
        return {"loss": {"loss": loss}, "metrics": self._party.head.results()}

    def _shared_logs(self, mine: dict[str, dict[str, Any]] | None) -> dict[str, Any]:
        """Send loss and metrics, where they are granted, on their way through the hub; what this party may see."""
        plan, me, what = self._plan, self._party.name, ("loss", "metrics")
        for one in what:
            judge, seeing = plan.judge.owner, plan.sees(one)
            if me not in seeing:
                continue
            if me != judge:
                source = judge if judge in self._wire.peers else plan.hub
                value = self._wire.receive(source, "output", one).value
                mine = {**(mine or {}), one: value if isinstance(value, dict) else {}}
            targets = [
                peer for peer in self._wire.peers if peer in seeing and peer != judge and (me in (judge, plan.hub))
            ]
            for peer in targets:
                assert mine is not None
                self._wire.send(peer, "output", one, mine[one])
        found: dict[str, Any] = {}
        for one in what:
            found |= (mine or {}).get(one, {}) if me in plan.sees(one) else {}
        return found

    def _shared_outputs(self, outputs: Array | None) -> Array | None:
        """The same with predictions of a batch."""
        plan, me = self._plan, self._party.name
        seeing = plan.sees("outputs")
        judge = plan.judge.owner
        if me not in seeing:
            return None
        if me != judge:
            outputs = self._wire.receive(
                judge if judge in self._wire.peers else plan.hub, "output", "predictions"
            ).array
            if outputs is None or outputs.shape[:1] != (sum(self._wire.sizes),):
                raise PartyStoppedError(f"the predictions of batch {self._wire.step} have not one row each")
        for peer in self._wire.peers:
            if peer in seeing and peer != judge and me in (judge, plan.hub):
                self._wire.send(peer, "output", "predictions", array=outputs)
        return outputs


def batches(rows: int, plan: PartyPlan, drop: bool) -> list[slice]:
    """Where the batches lie in an order of rows; with `drop`, without a smaller last one if the plan says so."""
    found = [slice(begin, min(begin + plan.batch, rows)) for begin in range(0, rows, plan.batch)]
    smaller = found[-1].stop - found[-1].start < plan.batch
    return found[:-1] if drop and plan.drop_last and smaller else found


def _told(error: BaseException) -> str:
    """What others may know of an error: a sentence of the protocol; of another one, which may name paths, its class."""
    if isinstance(error, KeyboardInterrupt):
        return "it was interrupted by its user"
    if isinstance(error, PartyStoppedError | PartyLostError | PartySilentError):
        return str(error)
    return f"an error of its own ({type(error).__name__})"


__all__ = ["PartyResult", "PartySession", "batches"]
