"""`tapeline doctor`: what a host has, and in what several hosts differ, before anything starts on them."""

from __future__ import annotations

import argparse
from pathlib import Path

from rich.console import Console
from rich.table import Table

from pipeline.errors import UsageError
from stages.plain_text import plain_text

SAME, DIFFERENT = 0, 1
"""Exit statuses: hosts should have equal bits; they need not, or would not train the same."""


def arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.add_argument(
        "files", nargs="*", type=Path, metavar="FILE", help="what --json wrote on other hosts, to compare"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write what this host has there, to carry elsewhere")
    parser.add_argument("--model", metavar="MODULE", help="a module whose source must be equal on all hosts")


def run(given: argparse.Namespace) -> int:
    """Look, print, write, compare.

    Returns:
        The exit status, one of `SAME`, `DIFFERENT`.

    Raises:
        UsageError: A file is not there or is none of ours; there is no such module.
    """
    from pipeline.hosts.facts import Host, this_host
    from pipeline.hosts.host_differences import difference_table, fact_table, host_differences, verdict

    others = [Host.of(_read(path), path.name) for path in given.files]
    hosts = [this_host(given.model), *others]
    if given.json is not None:
        try:
            given.json.write_text(hosts[0].text())
        except OSError as error:
            raise UsageError(f"{given.json} cannot be written: {error.strerror}") from None
    if not others:
        _show(fact_table(hosts[0]))
        return SAME
    found = host_differences(hosts)
    if found:
        _show(difference_table(hosts, found))
    print(verdict(found))
    return DIFFERENT if any(one.changes != "speed" for one in found) else SAME


def _show(table: Table) -> None:
    """As wide as the terminal; without colours and spaces at the ends of lines where it goes elsewhere."""
    console = Console(highlight=False)
    if console.is_terminal:
        console.print(table)
    else:
        print(plain_text(table))


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{path.name} cannot be read: {error}") from None
