"""Planning needs no TensorFlow, and the packages import their names only when they are used."""

import ast
import importlib
import subprocess
import sys
from pathlib import Path

import pytest

import pipeline
import stages
import transport

WITHOUT_TENSORFLOW = """
import sys
from importlib.abc import MetaPathFinder

class Refuse(MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("tensorflow", "keras", "zmq", "msgpack"):
            raise AssertionError(f"planning imported {name}")

sys.meta_path.insert(0, Refuse())
"""

EVERYTHING = """
import pipeline, stages
from pipeline import SCHEDULES, Cost, Plan, build_plan, microbatch_sizes, save_timeline, simulate, validate
from pipeline.plan.schedules import forward_only
from stages import Action, Kind, Wiring, chain, dependencies
from stages.actions import actions_from_array, actions_to_array
for name in SCHEDULES:
    plan = build_plan(name, 4, 4, windows=2 if name in ("gpipe", "1f1b") else 1)
    assert actions_from_array(actions_to_array(plan.programs[0])) == plan.programs[0]
    print(plan.text(), simulate(plan, Cost(1, 1)))
save_timeline(simulate(validate(forward_only(2, 2)), Cost(1, 1)), sys.argv[1])
assert not {"tensorflow", "keras"} & set(sys.modules)
dir(pipeline), dir(stages)
"""


def run(code, *arguments):
    return subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True)


def test_planning_simulating_and_drawing_import_no_tensorflow(tmp_path):
    done = run(WITHOUT_TENSORFLOW + EVERYTHING, str(tmp_path / "plan.png"))
    assert done.returncode == 0, done.stderr


def test_the_guard_of_the_test_above_works():
    done = run(WITHOUT_TENSORFLOW + "import keras")
    assert "planning imported keras" in done.stderr


def test_planning_imports_not_even_numpy():
    done = run(
        "import sys; from pipeline import build_plan; build_plan('1f1b', 3, 4).text();assert 'numpy' not in sys.modules"
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("package", [pipeline, stages, transport])
def test_every_exported_name_is_what_its_module_calls_so(package):
    assert set(package.__all__) <= set(dir(package))
    for name, home in package._HOME.items():
        assert getattr(package, name) is getattr(importlib.import_module(home), name)


@pytest.mark.parametrize("package", [pipeline, stages, transport])
def test_type_checkers_see_the_same_names_from_the_same_modules(package):
    tree = ast.parse(Path(package.__file__).read_text())
    [block] = [node for node in tree.body if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"]
    seen = {alias.asname: statement.module for statement in block.body for alias in statement.names}
    assert seen == package._HOME


@pytest.mark.parametrize("package", [pipeline, stages, transport])
def test_an_unknown_name_is_an_attribute_error_that_lists_the_known(package):
    with pytest.raises(AttributeError, match=rf"module '{package.__name__}' has no attribute 'Nope'; it has "):
        package.Nope  # noqa: B018
