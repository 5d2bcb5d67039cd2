"""Workers killed at random while a pipeline trains: ``python -m tests.random_kills --kills 200``.

A thread kills or stops a worker, or now and then the fork server, at a random moment, again and again, until training
is over; then all bits are compared with those of a run in which nobody died, and it begins anew. The table that it
prints is that of docs/faults.md. Its status is 1 where a bit differs, or anything is left behind.
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
import random
import re
import signal
import statistics
import sys
import threading
import time
import warnings
from collections import Counter, defaultdict

from pipeline.runtime.launch.shared import shared_server
from tests.pipeline.runtime.launch.processes import children, open_files
from tests.pipeline.runtime.recovery.mortal import pipeline, train

WAYS = {"SIGKILL": signal.SIGKILL, "SIGSTOP": signal.SIGSTOP, "SIGSEGV": signal.SIGSEGV, "SIGTERM": signal.SIGTERM}
BATCHES = 40
PAUSE = 0.4
"""Seconds of undisturbed training between two kills, at most."""


class RandomKiller(threading.Thread):
    """Kills workers of a pipeline until it is told to stop; each kill waits for the repair of the one before it.

    Args:
        pipe: The pipeline, which trains meanwhile.
        draw: Where chance comes from.
        most: So many kills.

    Attributes:
        kills: (how, when) of each.
    """

    def __init__(self, pipe, draw, most):
        super().__init__(name="random-killer", daemon=True)
        self.pipe, self.draw, self.most = pipe, draw, most
        self.kills = []
        self.over = threading.Event()

    def run(self):
        """See the class."""
        while len(self.kills) < self.most:
            if self.over.wait(self.draw.uniform(0, PAUSE)):
                return
            way = self.draw.choice([*WAYS, *WAYS, "fork server"])
            pids = [pid for pid in self.pipe.session.workers.driver().pids if pid]
            with contextlib.suppress(ProcessLookupError):
                if way == "fork server":
                    os.kill(shared_server().pid, signal.SIGKILL)
                else:
                    os.kill(self.draw.choice(pids), WAYS[way])
                self.kills.append((way, time.time()))
            while len(self.pipe.repairs) < len(self.kills) and not self.over.wait(0.005):
                pass


def held():
    """What this process has open, by kind."""
    return Counter(re.sub(r"\d+", "n", target) for target in open_files().values() if not target.startswith("/dev/"))


def main(arguments=None):
    """Run the command; its exit status."""
    parser = argparse.ArgumentParser(prog="python -m tests.random_kills", description=__doc__.partition("\n")[0])
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--compiled", action="store_true", help="compiled stages; each new worker traces them anew")
    given = parser.parse_args(arguments)
    warnings.simplefilter("ignore")
    logging.getLogger("tapeline").setLevel(logging.ERROR)
    draw, seconds, done, wrong = random.Random(given.seed), defaultdict(list), 0, []
    with pipeline(eager=not given.compiled) as pipe:
        undisturbed, _ = train(pipe, BATCHES)
    before = held()
    while done < given.kills:
        pipe = pipeline(eager=not given.compiled, recovery=True)
        pipe.session.workers.driver()
        killer = RandomKiller(pipe, draw, given.kills - done)
        with pipe:
            killer.start()
            found, _ = train(pipe, BATCHES)
            killer.over.set()
            killer.join()
        done += len(killer.kills)
        for (way, when), repair in zip(killer.kills, pipe.repairs, strict=False):
            seconds[way].append((repair.time - when, repair.time + repair.seconds - when))
        if found != undisturbed:
            wrong.append("other bits")
        if children(shared_server().pid):
            wrong.append("workers left behind")
        if held() - before:
            wrong.append(f"left open: {held() - before}")
        print(f"{done} kills, {len(wrong)} faults", file=sys.stderr, flush=True)
        if not killer.kills:
            wrong.append("nobody was killed")
            break
    print(table(seconds))
    print(f"\n{done} kills, seed {given.seed}: " + (", ".join(wrong) if wrong else "the same bits, and nothing left"))
    return 1 if wrong else 0


def table(seconds):
    """Times by how workers ended, as Markdown."""
    lines = ["| what | how often | noticed: median, worst (s) | trains again: median, worst (s) |", "|---|---|---|---|"]
    for way, times in sorted(seconds.items()):
        columns = [f"{statistics.median(some):.2f}, {max(some):.2f}" for some in zip(*times, strict=True)]
        lines.append(f"| {way} | {len(times)} | {columns[0]} | {columns[1]} |")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
