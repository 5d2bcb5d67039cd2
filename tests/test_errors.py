"""Every error of ours: one ground class, one family, importable from the root, listed on the page."""

from __future__ import annotations

import subprocess
import sys

import pytest

import pipeline
import stages
import transport
from stages.errors import StageError
from tests.errors_page import FAMILIES, PAGE, exception_classes, families_of, page
from tests.levels import in_turn
from tests.sources import ROOT
from transport.errors import TapelineError, TransportError

GROUNDS = {TapelineError, pipeline.PipelineError, StageError, TransportError}
"""Bases to catch by, of no one family, that nothing raises."""

SIGNALS = {
    "Watched": "what a receiver also waits for became readable; the driver turns it into what it means",
    "Abandoned": "the driver takes back what a worker was ordered",
    "Stopped": "the driver ends a worker's run",
    "NotPlainError": "a value is no plain data; becomes a sentence about the callback that keeps it",
    "WitnessRefusedError": "a witness cannot be made; becomes a line of the report",
    "CannotJudgeError": "the user's own objects cannot say what is right; becomes a line of the report",
    "UnrepeatableError": "they give other numbers each time; becomes a line of the report",
    "CopyRefusedError": "an object cannot be copied; `pack` makes a RecipeError of it that says where it is",
    "PreloadError": "inside the fork server; reaches the driver as the text of a LaunchError",
    "_DriverGoneError": "inside the fork server, which ends",
}
"""Exceptions that never leave the packages, and why."""


def test_every_error_is_of_one_family_and_of_its_package() -> None:
    package_grounds = {"pipeline": pipeline.PipelineError, "stages": StageError, "transport": TransportError}
    faults = []
    for kind in exception_classes() - GROUNDS - set(FAMILIES):
        if kind.__name__ in SIGNALS:
            continue
        if len(families_of(kind)) != 1:
            faults.append(f"{kind.__name__} is of {len(families_of(kind))} families")
        if not issubclass(kind, package_grounds[kind.__module__.split(".")[0]]):
            faults.append(f"{kind.__name__} is no error of its package")
    assert faults == []
    assert set(SIGNALS) <= {kind.__name__ for kind in exception_classes()}


def test_every_error_is_exported_at_the_root() -> None:
    kinds = {kind for kind in exception_classes() if kind.__name__ not in SIGNALS}
    assert len(kinds) > 35
    assert {kind.__name__ for kind in kinds if getattr(pipeline, kind.__name__, None) is not kind} == set()
    assert all(issubclass(kind, TapelineError) for kind in kinds)


def test_the_page_lists_the_classes_as_they_are() -> None:
    text = PAGE.read_text(encoding="utf-8")
    assert text == page(text), "run python -m tests.errors_page"


BROKEN = """
import sys, types
broken = types.ModuleType("{module}")
def missing(name):
    raise {error}("the dependency is broken: " + name)
broken.__getattr__ = missing
sys.modules["{module}"] = broken
from {package} import {name}
"""


@pytest.mark.parametrize("error", in_turn(["ImportError", "AttributeError"], 1, 1))
@pytest.mark.parametrize(
    ("package", "name", "module"),
    in_turn(
        [("transport", "open_transport", "msgpack"), ("pipeline", "Pipeline", "keras"), ("stages", "Stage", "keras")],
        1,
        3,
        several=True,
    ),
)
def test_an_import_that_fails_inside_shows_its_cause(package: str, name: str, module: str, error: str) -> None:
    code = BROKEN.format(package=package, name=name, module=module, error=error)
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    last = done.stderr.strip().splitlines()[-1]
    assert done.returncode == 1
    assert last.startswith("ImportError:") and "the dependency is broken" in last
    assert f"cannot import name '{name}'" not in done.stderr


@pytest.mark.parametrize("package", [pipeline, stages, transport])
def test_a_name_that_is_not_there_is_an_import_error_of_python(package: object) -> None:
    with pytest.raises(ImportError, match="cannot import name 'Nope'"):
        exec(f"from {package.__name__} import Nope")  # type: ignore[attr-defined]
