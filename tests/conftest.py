"""What every test may rely on: quiet TensorFlow, fixed thread counts, one Hypothesis profile, the nightly switch.

The environment is set here, before any test module imports TensorFlow, and child processes inherit it.
"""

import os
import re
import signal

import pytest
from hypothesis import settings

NIGHTLY = os.environ.get("TAPELINE_NIGHTLY", "") not in ("", "0")

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
os.environ.setdefault("KERAS_BACKEND", "tensorflow")
os.environ.setdefault("MPLBACKEND", "agg")

# A shell's background jobs ignore Ctrl-C, and so would all their children: the tests of it need Python's own handler.
signal.signal(signal.SIGINT, signal.default_int_handler)

# The gate draws the same examples every time, so that it fails only for a change; the soak draws new ones.
settings.register_profile("gate", deadline=None, derandomize=True, database=None)
settings.register_profile("nightly", deadline=None, max_examples=2_000, print_blob=True)
settings.load_profile("nightly" if NIGHTLY else "gate")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave the tests marked ``nightly`` to `make soak`."""
    if NIGHTLY:
        return
    nightly = [item for item in items if item.get_closest_marker("nightly")]
    if nightly:
        config.hook.pytest_deselected(items=nightly)
        items[:] = [item for item in items if item not in nightly]


def pytest_make_parametrize_id(val: object) -> str | None:
    """An id without an address: parallel test processes must collect the same names."""
    text = repr(val)
    return re.sub(r" at 0x[0-9a-f]+", "", text) if " at 0x" in text else None
