"""The papers of the repository: locked dependencies, one gate, a changelog, a licence."""

import re
import tomllib

from packaging.requirements import Requirement
from packaging.version import Version

from tests.sources import ROOT

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def pins() -> dict[str, Version]:
    """Package name -> version of requirements.lock, every pin of it with a hash."""
    entries = re.split(r"\n(?=\S)", (ROOT / "requirements.lock").read_text())
    found: dict[str, Version] = {}
    for entry in entries:
        if entry.startswith("#"):
            continue
        pin = re.match(r"([\w.-]+)==([\w.]+)", entry)
        assert pin and "--hash=sha256:" in entry, f"neither pinned nor hashed: {entry.splitlines()[0]}"
        found[pin[1]] = Version(pin[2])
    return found


def test_the_lock_pins_every_declared_dependency() -> None:
    declared = [*PROJECT["dependencies"]]
    for extra in PROJECT["optional-dependencies"].values():
        declared += extra
    locked = pins()
    for requirement in map(Requirement, declared):
        version = locked.get(requirement.name)
        assert version is not None and version in requirement.specifier, f"{requirement}, locked: {version}"


def test_the_lock_is_one_for_every_python_and_names_no_index() -> None:
    text = (ROOT / "requirements.lock").read_text()
    assert "python_version" not in text and "python_full_version" not in text
    assert "://" not in text


def test_the_gate_is_one_script() -> None:
    commands = [
        line for line in (ROOT / ".ci" / "run").read_text().splitlines() if line.strip() and not line.startswith("#")
    ]
    assert commands[-1] == "exec make test </dev/null"
    assert (ROOT / ".ci" / "run").stat().st_mode & 0o100


def test_the_changelog_has_a_place_for_what_comes() -> None:
    assert "\n## [Unreleased]\n" in (ROOT / "CHANGELOG.md").read_text()


def test_the_licence_is_the_declared_one() -> None:
    assert PROJECT["license"] == "Apache-2.0"
    text = (ROOT / "LICENSE").read_text()
    assert "Apache License" in text and "END OF TERMS AND CONDITIONS" in text
