"""The vanilla RNN of case C with every time step in a process of its own: formulas, δ(t) and published figures."""

from __future__ import annotations

from collections.abc import Iterator

import keras
import numpy as np
import pytest

from pipeline import Pipeline
from tests.levels import in_turn
from tests.test_rnn_by_hand import SIZES, assert_all_close, module, problem


@pytest.fixture
def dtype(request: pytest.FixtureRequest) -> Iterator[str]:
    """A parameter that is Keras's default dtype too, which float64 arrays become.

    Keras keeps the policy that it made of the first float type it was asked for, so both are set and put back.
    """
    before = keras.config.floatx(), keras.config.dtype_policy()
    keras.config.set_floatx(request.param)
    keras.config.set_dtype_policy(request.param)
    yield request.param
    keras.config.set_floatx(before[0])
    keras.config.set_dtype_policy(before[1])


@pytest.mark.gate
def test_the_published_figures_come_out_of_one_process_a_time_step(monkeypatch: pytest.MonkeyPatch) -> None:
    given, known = module.outside_check()
    processes = []
    split = Pipeline.split

    def spy(*arguments, **options):
        assert "transport" not in options
        processes.append(pipe := split(*arguments, **options))
        return pipe

    monkeypatch.setattr(Pipeline, "split", spy)
    found = module.by_processes(*given)
    for name, value in known.items():
        assert found[name].dtype == np.float32
        assert float(np.abs(found[name] - value).max()) <= 1e-6, name
    assert_all_close(found, module.by_formulas(*given), "float32")
    for t, segment in enumerate(processes[0].segments, 1):
        names = {layer.name for layer in segment.model.layers}
        assert {name for name in names if name.startswith("tanh")} == {f"tanh{t}"}
        assert {"from_input", "from_state", "readout"} <= names


@pytest.mark.parametrize("dtype", in_turn(["float32", "float64"], 1, 2), indirect=True)
@pytest.mark.parametrize("sizes", SIZES)
def test_every_formula_is_what_is_handed_over(sizes: str, dtype: str) -> None:
    given = problem(sizes, dtype)
    assert_all_close(module.by_processes(*given, transport="inproc"), module.by_formulas(*given), dtype)


@pytest.mark.parametrize("dtype", ["float64"], indirect=True)
@pytest.mark.parametrize("schedule", ["gpipe", "1f1b"])
def test_microbatches_travel_through_time_independently(schedule: str, dtype: str) -> None:
    """Each sample is a microbatch: δ(t) of each sample arrives in its own row."""
    given = problem("batch", dtype)
    found = module.by_processes(*given, transport="inproc", microbatches=5, schedule=schedule)
    assert_all_close(found, module.by_formulas(*given), dtype)


def test_the_example_passes(capsys: pytest.CaptureFixture[str]) -> None:
    assert module.main() == 0
    shown = capsys.readouterr().out
    assert "OK" in shown and "FAILED" not in shown and "δ(2)" in shown


@pytest.mark.parametrize("way", list(module.WAYS))
@pytest.mark.parametrize("name", ["ŷ(2)", "δ(2)", "dh(0)", "dW", "db"])
def test_the_example_fails_if_a_way_is_off(way: str, name: str) -> None:
    """By two millionths, published or not."""
    given, known = module.outside_check()
    found = {each: module.by_formulas(*given) for each in module.WAYS}
    assert module.faults(found, known) == []
    found[way] = {**found[way], name: found[way][name] + np.float32(2e-6)}
    wrong = module.faults(found, known)
    assert wrong and all(name in fault for fault in wrong)


@pytest.mark.parametrize("dtype", ["float64"], indirect=True)
def test_processes_keep_every_digit(dtype: str) -> None:
    given = problem("published sizes", dtype)
    assert_all_close(module.by_processes(*given), module.by_formulas(*given), dtype)
