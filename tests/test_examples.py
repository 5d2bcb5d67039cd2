"""Every example runs from an empty folder and ends by checking itself; one that is not listed here fails."""

from __future__ import annotations

import pytest

from tests.sources import ROOT

ARGUMENTS = {
    "two_tapes.py": (),
    "jacobian_memory.py": (),
    "classifier.py": (),
    "character_model.py": ("--steps", "160"),
    "rnn_by_hand.py": (),
    "vanilla_rnn.py": (),
    "ragged_series.py": (),
    "influence.py": (),
    "several_passes.py": (),
    "state_gradients.py": (),
    "character_windows.py": ("--sequence", "64", "--units", "32", "--steps", "20", "--timed", "2", "--rounds", "1"),
    "applications.py": ("--epochs", "2", "--accuracy", "0.3"),
    "fine_tuning.py": (),
    "parties.py": (),
}
# Half a minute each; what they show is tested elsewhere too.
LONG = {
    "character_model.py",
    "several_passes.py",
    "applications.py",
    "state_gradients.py",
    "character_windows.py",
    "parties.py",
}


@pytest.mark.timeout(420)
@pytest.mark.parametrize(
    "name",
    [
        pytest.param(path.name, marks=pytest.mark.soak if path.name in LONG else pytest.mark.gate)
        for path in sorted((ROOT / "examples").glob("*.py"))
    ],
)
def test_example_passes_its_own_check(name, tmp_path, warm_interpreter):
    run = warm_interpreter.run(ROOT / "examples" / name, ARGUMENTS[name], folder=tmp_path, seconds=400)
    assert run.returncode == 0, run.stdout[-6000:]


@pytest.mark.gate
@pytest.mark.parametrize(
    ("last", "status", "says"),
    [("", 0, "__main__ []"), ("sys.exit(3)", 3, "__main__"), ("assert keras is None", 1, "AssertionError")],
)
def test_a_program_ends_as_in_an_interpreter_of_its_own(last, status, says, tmp_path, warm_interpreter):
    script = tmp_path / "program.py"
    script.write_text(f"import sys\nimport keras\nprint(__name__, sys.argv[1:])\n{last}\n")
    run = warm_interpreter.run(script, folder=tmp_path, seconds=60)
    assert run.returncode == status and says in run.stdout
