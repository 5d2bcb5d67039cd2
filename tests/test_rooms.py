"""The rooms of the house: which room may import which, and that the page which leads to them tells the truth.

A room is a folder of a package, or a file beside its folders. Rooms stand in one order, lowest first; a room imports
only rooms before it, also inside functions and for type checkers. The circles that stay are listed with their reason.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator

import pytest

from tests.sources import ROOT, imported, modules

ORDER = {
    "stages": (
        *(
            "origin",
            "versions",
            "errors",
            "actions",
            "grid",
            "plain_text",
            "variable_names",
            "keras_internals",
            "keras_training_internals",
            "tensorflow_internals",
            "plain_attributes",
            "put_back",
            "masks",
        ),
        *(
            "recipe",
            "process",
            "layers",
            "loss",
            "tape",
            "flat_stage",
            "stage",
            "jacobian",
            "step_influence",
            "explanation",
            "worker",
        ),
    ),
    "pipeline": (
        *(
            "origin",
            "errors",
            "saying",
            "distance",
            "hosts",
            "plan",
            "model",
            "batch",
            "compiled",
            "compare",
            "cutting",
        ),
        *("runtime", "own", "report"),
        *(
            "reference",
            "verify",
            "saving",
            "norms",
            "training",
            "pipeline",
            "parties",
            "testing",
            "pytest_plugin",
            "commands",
        ),
        "__main__",
    ),
}
"""Rooms of each package, lowest first."""

CIRCLES: dict[tuple[str, str], str] = {
    ("saving.checkpoint", "pipeline"): "loading makes a Pipeline, which its caller hands in; named for types only",
    ("saving.keras_files", "pipeline"): "writes the files of a Pipeline that it is handed; named for types only",
    ("saving.files", "pipeline"): "saves a Pipeline that it is handed; named for types only",
    ("training.as_keras", "pipeline"): "its functions are methods of Pipeline; named for types only",
    ("verify.questions", "pipeline"): "its functions are methods of Pipeline; named for types only",
    ("training.trainer", "pipeline"): "trains a Pipeline that it is handed; named for types only",
}
"""{(module, higher room that it names): why}."""


def room_of(dotted: str) -> str:
    """The room of ``package.room.module``; "" of the package itself."""
    parts = dotted.split(".")
    return parts[1] if len(parts) > 1 else ""


def upward(source: str, module: str, package: str) -> Iterator[tuple[str, str]]:
    """The imports of a module that point to a room of its own package that does not stand before its own.

    Args:
        source: The module's text.
        module: Its dotted name, for example ``stages.tape.eager``.
        package: Its dotted folder, for relative imports.

    Yields:
        (line and name, room).
    """
    home = module.split(".")[0]
    order, mine = ORDER[home], room_of(module)
    for line, name in imported(ast.parse(source), package):
        theirs = room_of(name)
        if name.split(".")[0] != home or theirs in ("", mine) or theirs not in order:
            continue
        if order.index(theirs) >= order.index(mine):
            yield f"line {line}: {name}", theirs


def rooms_in(package: str) -> set[str]:
    """Names of all folders with sources and of all files of a package."""
    return {
        room_of(".".join(path.relative_to(ROOT).with_suffix("").parts))
        for path in modules(package)
        if path != ROOT / package / "__init__.py"
    }


@pytest.mark.parametrize("package", sorted(ORDER))
def test_every_room_has_its_place_in_the_order(package: str) -> None:
    assert rooms_in(package) <= set(ORDER[package])
    assert len(set(ORDER[package])) == len(ORDER[package])


def test_an_import_of_a_higher_room_is_seen() -> None:
    higher = (
        "from stages.worker.worker import main\ndef late():\n    import stages.stage\nfrom stages.masks import mask_of"
    )
    assert [room for _, room in upward(higher, "stages.tape.eager", "stages.tape")] == ["worker", "stage"]
    assert not list(upward("from stages.tape import accumulate", "stages.tape.eager", "stages.tape"))


@pytest.mark.parametrize("package", sorted(ORDER))
def test_a_room_imports_only_rooms_before_it(package: str) -> None:
    faults, met = [], set()
    for path in modules(package):
        if path == ROOT / package / "__init__.py":
            continue
        parts = path.relative_to(ROOT).with_suffix("").parts
        module = ".".join(parts)
        for what, room in upward(path.read_text(), module, ".".join(parts[:-1])):
            circle = (module.partition(".")[2], room)
            met.add(circle)
            if circle not in CIRCLES:
                faults.append(f"{module}, {what}")
    assert faults == []
    assert not {circle for circle in CIRCLES if (ROOT / package / f"{circle[0].replace('.', '/')}.py").exists()} - met


ARCHITECTURE = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")


def test_every_path_that_the_architecture_names_exists() -> None:
    paths = re.findall(r"`((?:pipeline|stages|transport|tests|docs|examples|benchmarks)/[\w./*-]*)`", ARCHITECTURE)
    assert len(paths) > 40
    assert [path for path in paths if not list(ROOT.glob(path.rstrip("/")))] == []


def test_the_architecture_tells_every_room() -> None:
    told = set(re.findall(r"`(\w+/\w+)/?(?:\.py)?`", ARCHITECTURE))
    folders = {
        f"{package}/{room}" for package in ORDER for room in rooms_in(package) if (ROOT / package / room).is_dir()
    }
    assert folders - told == set()
