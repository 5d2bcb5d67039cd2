"""`python -m tests.planted [WORD ...]`: plant the faults whose text has one of the words, and print the page."""

from __future__ import annotations

import argparse
import multiprocessing
import os
import sys
from collections.abc import Iterable, Iterator
from typing import Any

from pipeline.runtime.launch.forkserver import DEFAULTS
from tests.planted.catalogue import FAULTS
from tests.planted.page import NOT_RUN, PATH, update
from tests.planted.planting import Found, Planted, copied, failing, look


def main(arguments: list[str] | None = None) -> int:
    """Plant, look, print; 1 if the gate missed one or a fault could not be planted."""
    parser = argparse.ArgumentParser(prog="python -m tests.planted", description=__doc__)
    parser.add_argument("words", nargs="*", help="only faults with one of these in their text or path")
    parser.add_argument("--jobs", type=int, default=2, help="how many faults at once")
    parser.add_argument("--near", action="store_true", help="let only the tests look that mirror a fault's place")
    given = parser.parse_args(arguments)
    faults = [fault for room in FAULTS.values() for fault in room]
    if given.words:
        faults = [fault for fault in faults if any(word in str(fault) for word in given.words)]
    found: dict[str, Found] = {}
    for fault, one in looked(faults, given.jobs, not given.near):
        said = one if isinstance(one, str) else f"check: {one.check}" if one.check else f"gate: {one.gate or 'MISSED'}"
        print(f"{fault}: {said}", file=sys.stderr, flush=True)
        if isinstance(one, Found) and (one.gate or not given.near):
            found[fault.breaks] = one
            update({fault.breaks: one})  # one by one: a run that is ended has lost nothing
    if ill := unsound(found.values()):
        print(f"{ill} fails with no fault planted: what it found means nothing", file=sys.stderr)
    return int(bool(ill) or sum(bool(one.gate) for one in found.values()) < len(faults))


def looked(faults: list[Planted], jobs: int, everywhere: bool) -> Iterator[tuple[Planted, Found | str]]:
    """What became of each fault, as soon as it is known; in words where it could not be planted."""
    for name, value in DEFAULTS.items():
        os.environ.setdefault(name, value)
    import keras  # noqa: F401 - once for all processes that look

    context = multiprocessing.get_context("fork")
    answers: Any = context.SimpleQueue()
    waiting, running = list(reversed(faults)), 0
    while waiting or running:
        while waiting and running < jobs:
            context.Process(target=tried, args=(waiting.pop(), everywhere, answers)).start()
            running += 1
        breaks, one = answers.get()
        running -= 1
        yield next(fault for fault in faults if fault.breaks == breaks), one


def tried(fault: Planted, everywhere: bool, answers: Any) -> None:
    """Plant one, in a process of its own, and say what became of it."""
    try:
        answers.put((fault.breaks, look(fault, everywhere)))
    except BaseException as error:
        answers.put((fault.breaks, f"{NOT_RUN}: {type(error).__name__}: {error}"))


def unsound(found: Iterable[Found]) -> str:
    """A test among those that found something which fails where nothing is planted; "" if there is none."""
    tests = sorted({test for one in found for test in (one.check, one.gate) if test})
    if not tests:
        return ""
    with copied() as tree:
        return failing(tree, "gate", tests)


if __name__ == "__main__":
    status = main()
    print(f"see {PATH}", file=sys.stderr)
    sys.exit(status)
