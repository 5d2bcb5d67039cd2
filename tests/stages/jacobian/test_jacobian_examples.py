"""The examples of case A pass, and their own checks can fail."""

from __future__ import annotations

import importlib.util
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from tests.sources import ROOT

EXAMPLES = ROOT / "examples"


def example(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"example_{name}", EXAMPLES / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(EXAMPLES)  # where a script's own folder is
        spec.loader.exec_module(module)
    return module


def test_two_tapes_agree_and_the_naive_way_does_not(capsys: pytest.CaptureFixture[str]) -> None:
    assert example("two_tapes").main() == 0
    shown = capsys.readouterr().out
    assert "OK" in shown and "FAILED" not in shown
    for variable in ("bottom", "middle", "top"):
        assert f"{variable}/" in shown


@pytest.mark.parametrize("way", ["hand-off", "Jacobians", "naive"])
def test_two_tapes_fails_if_a_way_gives_other_numbers(way: str, capsys: pytest.CaptureFixture[str]) -> None:
    module = example("two_tapes")
    right = module.one_tape

    def disturbed(*given: Any) -> dict[str, np.ndarray]:
        # Two millionths of the largest gradient, in one variable; the naive way fails by being right.
        found = right(*given)
        largest = max(np.abs(g).max() for g in found.values())
        return found if way == "naive" else {**found, "top/dense/bias": found["top/dense/bias"] + 2e-6 * largest}

    module.WAYS[way] = disturbed
    assert module.main() == 1
    shown = capsys.readouterr().out
    assert f"FAILED {way}" in shown and "OK" not in shown


def test_jacobian_memory_is_said_refused_and_kept(capsys: pytest.CaptureFixture[str]) -> None:
    module = example("jacobian_memory")
    module.resident = lambda _: None  # the peak of this process belongs to other tests; see test_jacobian_memory.py
    assert module.main() == 0
    shown = capsys.readouterr().out
    assert "refused" in shown and "blocks" in shown and "OK" in shown


def test_jacobian_memory_fails_if_the_limit_is_not_kept(capsys: pytest.CaptureFixture[str]) -> None:
    module = example("jacobian_memory")
    module.resident = {"VmRSS": 0, "VmHWM": module.LIMIT + 1}.get
    assert module.main() == 1
    assert "FAILED the blocked evaluation took" in capsys.readouterr().out
