"""`tapeline psi`: find the rows that two parties both have, without showing each other the rest."""

from __future__ import annotations

import argparse
import csv
from pathlib import Path

from pipeline.commands.parsers import parser_of

_DEEDS = {
    "serve": (
        "wait for the other party and find the rows that both have",
        "tapeline psi serve patients.csv:id --as lab --with hospital --listen tcp://0.0.0.0:7444 --output rows.txt",
    ),
    "join": (
        "dial the other party and find the rows that both have",
        "tapeline psi join ids.txt --as hospital --with lab --at tcp://lab.example:7444 --output rows.txt",
    ),
}


def arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    deeds = parser.add_subparsers(dest="deed", metavar="deed", required=True)
    for name, (about, example) in _DEEDS.items():
        deed = parser_of(deeds, name, about, example)
        deed.add_argument("ids", help="a text file with an id in each line, or FILE.csv:COLUMN")
        deed.add_argument("--as", dest="name", required=True, metavar="NAME", help="which party this is")
        deed.add_argument("--with", dest="peer", required=True, metavar="NAME", help="the other party")
        end = ("--listen", "tcp://0.0.0.0:7444") if name == "serve" else ("--at", "tcp://host:7444")
        deed.add_argument(end[0], dest="address", required=True, metavar="ADDRESS", help=end[1])
        deed.add_argument("--output", type=Path, required=True, metavar="FILE", help="row numbers, from 0, one a line")
        deed.add_argument("--keys", type=Path, metavar="FOLDER", help="default: $TAPELINE_KEYS, else ~/.tapeline")
        deed.add_argument("--most", type=int, default=1_000_000, metavar="N", help="most ids of the other party")


def run(given: argparse.Namespace) -> int:
    """Do it, and write the rows.

    Returns:
        0.

    Raises:
        UsageError: The file or the column is not there, an id is empty, or the rows cannot be written.
        TapelineError: As `pipeline.parties.alignment.align` says; nothing is written.
    """
    from pipeline.errors import UsageError
    from pipeline.parties.alignment.align import join_alignment, serve_alignment

    align = serve_alignment if given.deed == "serve" else join_alignment
    ids = read_ids(given.ids)
    try:
        with given.output.open("a", encoding="utf-8"):
            pass  # not after the exchange, when the other party has its rows already
    except OSError as error:
        raise UsageError(f"{given.output} cannot be written: {error.strerror}") from None
    rows = align(ids, given.name, given.peer, given.address, keys=given.keys, most=given.most)
    given.output.write_text("".join(f"{row}\n" for row in rows))
    print(f"the rows are in {given.output}, in an order that is the same at both parties")
    return 0


def read_ids(what: str) -> list[str]:
    """The ids of a text file, one a line, or of a column of a CSV file with a head.

    Raises:
        UsageError: The file or the column is not there.
    """
    from pipeline.errors import UsageError

    name, _, column = what.rpartition(":") if not Path(what).exists() else (what, "", "")
    path = Path(name or what)
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            ids = _column(csv.DictReader(file), column, path.name) if column else file.read().split("\n")
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UsageError(f"{path.name} cannot be read: {error}") from None
    ids = [one.removesuffix("\r") for one in ids]
    if not column and ids and not ids[-1]:
        ids.pop()  # behind the last line's end
    empty = [str(number) for number, one in enumerate(ids, 1) if not one.strip()]
    if empty:
        raise UsageError(f"{path.name} has no id in row {', '.join(empty[:5])}: rows without one would meet each other")
    return ids


def _column(rows: csv.DictReader[str], column: str, name: str) -> list[str]:
    from pipeline.errors import UsageError

    if column not in (rows.fieldnames or ()):
        raise UsageError(f"{name} has no column {column!r}; it has {', '.join(rows.fieldnames or ())}")
    return [row[column] or "" for row in rows]
