"""SIGKILL of the user's process: a second later no worker, no server, no directory, whatever was going on."""

from __future__ import annotations

import pytest

from tests.failures import GONE_SECONDS

pytestmark = pytest.mark.gate

PROGRAM = """
import functools, os
import numpy as np
from pipeline.runtime import workers
from pipeline import Pipeline, Segment
from tests.failing_parts import part, say, waiting_builder
from tests.failures import X, Y, tripping

if moment == "starting the server":
    pipe = tripping({}, {})
    say(line)
    pipe.train_on_batch(X, Y)
elif moment == "connecting":
    late = functools.partial(workers.Driver, entry="tests.failing_parts:late")
    workers.Driver = late
    os.environ |= {"LINE": line, "GATE": gate}
    pipe = tripping({}, {}, transport="ipc")
elif moment == "building":
    builder = Segment(waiting_builder, kwargs={"line": line, "gate": gate})
    pipe = Pipeline([Segment(part), builder, Segment(part)])
    pipe.compile("sgd", "mse")
else:
    pipe = tripping({}, {"do": "wait", "call_number": 4, "line": line, "gate": gate}, {})
pipe.fit(np.tile(X, (9, 1)), np.tile(Y, (9, 1)), batch_size=8, verbose=0)
"""


@pytest.mark.timeout(120)
@pytest.mark.parametrize("moment", ["starting the server", "connecting", "building", "training"])
def test_nothing_outlives_a_killed_user(script, line, gate, moment):
    program = script(PROGRAM, line=line.path, gate=gate.path, moment=moment)
    line.hear()
    assert len(program.relatives()) >= {"starting the server": 1, "connecting": 3, "building": 4, "training": 4}[moment]
    if moment in ("connecting", "training"):
        assert bool(program.directories()) == (moment == "connecting"), "sockets need files only to be connected"
    assert program.kill_and_time() < GONE_SECONDS
    assert program.relatives() == []
    assert program.directories() == []
