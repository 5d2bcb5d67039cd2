"""The reader of plan files: TOML in, a `PartyPlan` out, or one error with everything that is wrong.

hub = "lab"

[parties.hospital]                      # key: of `tapeline keys new hospital`; left out, a plan can be rehearsed only
key = "..."
[parties.lab]

[stages.bottom]
owner = "hospital"
x = true                                # takes the hospital's own x
[stages.top]
owner = "lab"
y = true                                # judged by the lab's own y

[[edges]]
tensor = "z"
from = "bottom"
to = "top"
shape = [8]
dtype = "float32"

[training]
batch = 32
microbatches = 4
epochs = 5
order_seed = 7
"""

from __future__ import annotations

import tomllib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final

from pipeline.errors import PartyPlanError
from pipeline.parties.party_plan import GRANTS, PLAN_FORMAT, PartyEdge, PartyPlan, PartyStage, edge_bytes
from pipeline.saying import did_you_mean, is_whole
from transport.errors import KeyFileError
from transport.key_files import checked_key, checked_name
from transport.limits import MAX_FRAME

_LARGEST: Final = 1 << 20
_FLOATS: Final = ("float16", "bfloat16", "float32", "float64")
_TOP: Final = ("format", "hub", "parties", "stages", "edges", "training", "grants", "limits")
_TRAINING: Final = ("batch", "microbatches", "epochs", "order_seed", "drop_last")
_LIMITS: Final = ("patience", "silence")


def read_plan(path: str | Path) -> PartyPlan:
    """The plan in a file.

    Raises:
        PartyPlanError: The file is not there, is no TOML, or says what cannot be; a line for each fault.
    """
    try:
        with Path(path).open("rb") as file:
            text = file.read(_LARGEST + 1)
        if len(text) > _LARGEST:
            raise PartyPlanError(f"{path} has more than {_LARGEST} bytes; a plan is a page or two")
        found = tomllib.loads(text.decode())
    except OSError as error:
        raise PartyPlanError(f"cannot read the plan {path}: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise PartyPlanError(f"the plan {path} is no TOML: {error}") from error
    return plan_of(found, str(path))


def plan_of(found: Mapping[str, Any], where: str = "the plan") -> PartyPlan:
    """The plan that a mapping (as read from TOML) says.

    Raises:
        PartyPlanError: It says what cannot be; a line for each fault.
    """
    reader = _Reader(found)
    plan = reader.read()
    if reader.faults or plan is None:
        lines = [f"  {number}. {fault}" for number, fault in enumerate(reader.faults, 1)]
        raise PartyPlanError("\n".join([f"{where} cannot be:", *lines]))
    return plan


class _Reader:
    """One reading; collects the faults."""

    def __init__(self, found: Mapping[str, Any]) -> None:
        self._found = found
        self.faults: list[str] = []

    def read(self) -> PartyPlan | None:
        top = self._found
        self._known(top, _TOP, "")
        if top.get("format", PLAN_FORMAT) != PLAN_FORMAT:
            self.faults.append(f"format: this tapeline reads {PLAN_FORMAT}, received {top['format']!r}")
        parties = {
            name: self._key(name, entry)
            for name, entry in self._tables("parties").items()
            if self._name(name, "parties")
        }
        if len(parties) < 2:
            self.faults.append(f"parties: expected at least two, received {', '.join(parties) or 'none'}")
        hub = self._one_of("hub", top.get("hub"), parties, "a party")
        stages = tuple(self._stage(name, entry, parties) for name, entry in self._tables("stages").items())
        edges = tuple(self._edges(stages))
        training = self._table("training")
        self._known(training, _TRAINING, "training.")
        limits = self._table("limits")
        self._known(limits, _LIMITS, "limits.")
        numbers = {name: self._whole(f"training.{name}", training.get(name, 1)) for name in _TRAINING[1:3]}
        batch = self._whole("training.batch", training.get("batch"))
        seed = training.get("order_seed")
        if seed is not None:
            seed = self._whole("training.order_seed", seed, 0)
        drop_last = self._bool("training.drop_last", training.get("drop_last", False))
        seconds: dict[str, Any] = {
            name: self._seconds(f"limits.{name}", limits[name]) for name in _LIMITS if name in limits
        }
        grants = self._grants(parties)
        if self.faults:
            return None
        plan = PartyPlan(
            parties,
            hub,
            stages,
            edges,
            batch,
            order_seed=seed,
            drop_last=drop_last,
            grants=grants,
            **numbers,
            **seconds,
        )
        self._whole_plan(plan)
        return plan

    def _whole_plan(self, plan: PartyPlan) -> None:
        """Faults of the parts together."""
        judges = [stage.name for stage in plan.stages if stage.y]
        if len(judges) != 1:
            self.faults.append(f"stages: expected one stage with y = true, received {', '.join(judges) or 'none'}")
            return
        if plan.out_of(judges[0]):
            self.faults.append(f"stages.{judges[0]}: what y judges is the model's output, and no edge leads on from it")
        for stage in plan.stages:
            if not stage.x and not plan.into(stage.name):
                self.faults.append(f"stages.{stage.name}: it takes nothing; say x = true, or let an edge lead to it")
            if not stage.y and not plan.out_of(stage.name):
                self.faults.append(f"stages.{stage.name}: it gives nothing; let an edge lead on from it")
        if len(plan.order()) != len(plan.stages):
            left = [stage.name for stage in plan.stages if stage.name not in plan.order()]
            self.faults.append(f"edges: they lead in a circle through {', '.join(left)}")
        for edge in plan.edges:
            ends = {plan.owner(edge.source), plan.owner(edge.target)}
            if len(ends) == 2 and plan.hub not in ends:
                self.faults.append(
                    f"edges.{edge.tensor}: it leads from {plan.owner(edge.source)} to {plan.owner(edge.target)}, and "
                    f"the only connections are those with the hub {plan.hub}"
                )
            if plan.batch * edge_bytes(edge) > MAX_FRAME:
                self.faults.append(f"edges.{edge.tensor}: a batch of it has more than {MAX_FRAME} bytes")
        for name in plan.parties:
            if not plan.stages_of(name):
                self.faults.append(f"parties.{name}: it owns no stage")
        for what in GRANTS:
            seen = plan.sees(what)
            if len(seen) > 1 and plan.hub not in seen:
                self.faults.append(f"grants.{what}: it goes through the hub {plan.hub}, which must be granted it too")
        if plan.microbatches > plan.batch:
            self.faults.append(f"training.microbatches: {plan.microbatches} are more than a batch has rows")
        keys = [key for key in plan.parties.values() if key]
        if len(keys) != len(set(keys)):
            self.faults.append("parties: two have one key")

    def _key(self, name: str, entry: Any) -> str:
        self._known(entry, ("key",), f"parties.{name}.")
        key = entry.get("key", "")
        try:
            return checked_key(key, f"parties.{name}.key") if key != "" else ""
        except KeyFileError as error:
            self.faults.append(str(error))
            return ""

    def _stage(self, name: str, entry: Any, parties: Mapping[str, str]) -> PartyStage:
        self._name(name, "stages")
        self._known(entry, ("owner", "x", "y"), f"stages.{name}.")
        owner = self._one_of(f"stages.{name}.owner", entry.get("owner"), parties, "a party")
        x, y = (self._bool(f"stages.{name}.{end}", entry.get(end, False)) for end in ("x", "y"))
        return PartyStage(name, owner, x, y)

    def _edges(self, stages: tuple[PartyStage, ...]) -> list[PartyEdge]:
        given = self._found.get("edges", [])
        if not isinstance(given, list) or not all(isinstance(one, dict) for one in given):
            self.faults.append("edges: expected [[edges]] tables")
            return []
        names = [stage.name for stage in stages]
        found: list[PartyEdge] = []
        for place, entry in enumerate(given):
            tensor = entry.get("tensor")
            where = f"edges.{tensor if isinstance(tensor, str) else place}"
            self._name(tensor, where)
            self._known(entry, ("tensor", "from", "to", "shape", "dtype"), f"{where}.")
            ends = [self._one_of(f"{where}.{end}", entry.get(end), names, "a stage") for end in ("from", "to")]
            shape = entry.get("shape")
            if not isinstance(shape, list) or len(shape) > 8 or not all(is_whole(one) for one in shape):
                self.faults.append(
                    f"{where}.shape: expected a list of whole numbers without the batch, received {shape!r}"
                )
                shape = []
            dtype = self._one_of(f"{where}.dtype", entry.get("dtype"), _FLOATS, "a float type")
            if any(edge.tensor == tensor for edge in found):
                self.faults.append(f"{where}: two edges have this name")
            found.append(PartyEdge(str(tensor), ends[0], ends[1], tuple(shape), dtype))
        return found

    def _grants(self, parties: Mapping[str, str]) -> dict[str, tuple[str, ...]]:
        table = self._table("grants")
        found: dict[str, tuple[str, ...]] = {}
        self._known(table, GRANTS, "grants.")
        for what in GRANTS:
            given = table.get(what, [])
            if not isinstance(given, list):
                self.faults.append(f"grants.{what}: expected a list of parties, received {given!r}")
                continue
            found[what] = tuple(self._one_of(f"grants.{what}", name, parties, "a party") for name in given)
        return found

    def _tables(self, name: str) -> dict[str, Any]:
        """{name: table} of the tables below one."""
        table = self._table(name)
        for key, entry in table.items():
            if not isinstance(entry, dict):
                self.faults.append(f"{name}.{key}: expected a table, received {entry!r}")
        return {key: entry for key, entry in table.items() if isinstance(entry, dict)}

    def _table(self, name: str) -> dict[str, Any]:
        table = self._found.get(name, {})
        if isinstance(table, dict):
            return table
        self.faults.append(f"{name}: expected a table, received {table!r}")
        return {}

    def _known(self, table: Mapping[str, Any], names: tuple[str, ...], prefix: str) -> None:
        for name in table:
            if name not in names:
                self.faults.append(f"{prefix}{name}: there is no such field{did_you_mean(name, names)}")

    def _name(self, name: Any, where: str) -> bool:
        try:
            checked_name(name)
            return True
        except KeyFileError:
            self.faults.append(
                f"{where}: a name is a letter, then up to 63 letters, digits, - and _; received {name!r}"
            )
            return False

    def _one_of(self, where: str, value: Any, names: Any, what: str) -> str:
        if isinstance(value, str) and value in names:
            return value
        near = did_you_mean(value, names) if isinstance(value, str) else ""
        self.faults.append(f"{where}: expected {what} ({', '.join(names)}), received {value!r}{near}")
        return ""

    def _whole(self, where: str, value: Any, least: int = 1) -> int:
        def fits(one: Any) -> bool:
            return is_whole(one, least) and one < 2**53

        return int(self._checked(where, value, fits, f"a whole number of at least {least}", least))

    def _bool(self, where: str, value: Any) -> bool:
        return bool(self._checked(where, value, lambda one: isinstance(one, bool), "true or false", False))

    def _seconds(self, where: str, value: Any) -> float:
        def fits(one: Any) -> bool:
            return isinstance(one, int | float) and not isinstance(one, bool) and 0.1 <= one <= 86_400

        return float(self._checked(where, value, fits, "seconds, 0.1 to 86400", 1.0))

    def _checked(self, where: str, value: Any, fits: Callable[[Any], bool], what: str, otherwise: Any) -> Any:
        if fits(value):
            return value
        self.faults.append(f"{where}: expected {what}, received {value!r}")
        return otherwise


__all__ = ["plan_of", "read_plan"]
