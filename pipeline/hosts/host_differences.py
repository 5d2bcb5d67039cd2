"""The differences of hosts: every fact that is not the same on all of them, the gravest first."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from rich.box import SIMPLE_HEAD
from rich.table import Table

from pipeline.hosts.facts import BITS, RUNS, SPEED, Host
from stages.plain_text import harmless

_MEANS = {
    RUNS: "another program, or another meaning",
    BITS: "other last bits",
    SPEED: "time and room only",
}


@dataclass(frozen=True)
class HostDifference:
    """A fact that differs.

    Attributes:
        name: What it is about.
        changes: What it may change: `RUNS`, `BITS` or `SPEED`.
        values: One for each host; "-" where it does not say.
    """

    name: str
    changes: str
    values: tuple[str, ...]


def host_differences(hosts: Sequence[Host]) -> list[HostDifference]:
    """All facts that are not the same on all hosts, by what they may change, then in their own order."""
    names = dict.fromkeys((fact.name, fact.changes) for host in hosts for fact in host.facts)
    found = []
    for name, changes in names:
        values = tuple(next((fact.value for fact in host.facts if fact.name == name), "-") for host in hosts)
        if len(set(values)) > 1:
            found.append(HostDifference(name, changes, values))
    return sorted(found, key=lambda one: list(_MEANS).index(one.changes) if one.changes in _MEANS else 0)


def verdict(found: Sequence[HostDifference]) -> str:
    """What the differences mean, in one sentence."""
    kinds = {one.changes for one in found}
    if RUNS in kinds or kinds - set(_MEANS):
        return "these hosts would not train the same: make what stands on top equal first"
    if BITS in kinds:
        return "these hosts train the same up to rounding: gradients across them need not have equal bits"
    return "these hosts should have equal bits" + ("; they differ in speed and room only" if kinds else "")


def difference_table(hosts: Sequence[Host], found: Sequence[HostDifference]) -> Table:
    """A row for each difference, a column for each host."""
    table = Table(box=SIMPLE_HEAD, pad_edge=False, padding=(0, 1), collapse_padding=True, show_edge=False)
    names = [host.name for host in hosts]
    numbered = [name if names.count(name) == 1 else f"{name} ({k})" for k, name in enumerate(names, 1)]
    for name in ("what differs", "may change", *numbered):
        table.add_column(harmless(name), overflow="fold")
    for one in found:
        table.add_row(harmless(one.name), harmless(_MEANS.get(one.changes, one.changes)), *map(harmless, one.values))
    return table


def fact_table(host: Host) -> Table:
    """All that was found on one host."""
    table = Table(box=SIMPLE_HEAD, pad_edge=False, padding=(0, 1), collapse_padding=True, show_edge=False)
    for name in ("what", host.name, "another value may change"):
        table.add_column(harmless(name), overflow="fold")
    for fact in host.facts:
        table.add_row(harmless(fact.name), harmless(fact.value), harmless(_MEANS.get(fact.changes, fact.changes)))
    return table
