"""What every test may rely on: quiet TensorFlow, fixed thread counts, one Hypothesis profile a level.

The environment is set here, before any test module imports TensorFlow, and child processes inherit it.
"""

import gc
import os
import re
import signal

import pytest
from hypothesis import settings

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
os.environ.setdefault("KERAS_BACKEND", "tensorflow")
os.environ.setdefault("MPLBACKEND", "agg")

# A shell's background jobs ignore Ctrl-C, and so would all their children: the tests of it need Python's own handler.
signal.signal(signal.SIGINT, signal.default_int_handler)

# How many examples a level draws (`--hypothesis-profile`). Check and gate draw the same ones every time, so that they
# fail only for a change; the soak draws new ones.
settings.register_profile("check", deadline=None, derandomize=True, database=None, max_examples=25)
settings.register_profile("gate", deadline=None, derandomize=True, database=None)
settings.register_profile("soak", deadline=None, max_examples=2_000, print_blob=True)
settings.load_profile("gate")


def pytest_collection_finish() -> None:
    """What was imported stays; a garbage collection need not walk TensorFlow's half a million objects every time."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def warm_interpreter():
    """Plays users' programs without importing TensorFlow for each."""
    from tests.warm import WarmInterpreter

    interpreter = WarmInterpreter()
    yield interpreter
    interpreter.close()


def pytest_make_parametrize_id(val: object) -> str | None:
    """An id without an address: parallel test processes must collect the same names."""
    text = repr(val)
    return re.sub(r" at 0x[0-9a-f]+", "", text) if " at 0x" in text else None
