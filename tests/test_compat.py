"""README.md says of versions what `make compat` runs, and the oldest environment is the oldest that is allowed."""

from __future__ import annotations

import re
import tomllib

from packaging.requirements import Requirement
from packaging.version import Version

from tests.sources import ROOT

ENVIRONMENTS = ("oldest", "middle", "newest")
COLUMNS = ("tensorflow", "keras", "numpy")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def pinned(name: str) -> dict[str, str]:
    """{distribution: version} of an environment, of the files that its own includes as well."""
    folder, found = ROOT / "tests" / "compat", {}
    waiting = [folder / f"{name}.txt"]
    while waiting:
        text = waiting.pop().read_text()
        waiting += [(folder / other).resolve() for other in re.findall(r"^-r (\S+)", text, re.MULTILINE)]
        found |= dict(re.findall(r"^([\w.-]+)==([\w.]+)", text, re.MULTILINE))
    return found


def test_the_table_is_what_make_compat_builds() -> None:
    makefile = (ROOT / "Makefile").read_text()
    assert re.findall(r"^COMPAT \?= (.*)$", makefile, re.MULTILINE) == [" ".join(ENVIRONMENTS)]
    pythons = dict(re.findall(r"^PYTHON_(\w+) := (\S+)$", makefile, re.MULTILINE))
    section = (ROOT / "README.md").read_text().partition("\n## Versions\n")[2].partition("\n## ")[0]
    rows = re.findall(r"^\| \[(\w+)\]\(\S+\) \| (.*) \| (?:\d+ of \d+ passed[^|]*) \|$", section, re.MULTILINE)
    expected = [(n, " | ".join([pythons[n], *(pinned(n)[column] for column in COLUMNS)])) for n in ENVIRONMENTS]
    assert rows == expected


def test_the_oldest_environment_has_the_oldest_of_every_dependency() -> None:
    pins = pinned("oldest")
    for requirement in map(Requirement, PROJECT["dependencies"]):
        (lowest,) = [Version(one.version) for one in requirement.specifier if one.operator == ">="]
        found = Version(pins[requirement.name])
        assert found.release[: len(lowest.release)] == lowest.release, f"{requirement}: {found}"


def test_every_environment_is_one_that_is_allowed() -> None:
    for name in ENVIRONMENTS:
        pins = pinned(name)
        for requirement in map(Requirement, PROJECT["dependencies"]):
            assert pins[requirement.name] in requirement.specifier, f"{name}: {requirement}"


def test_the_core_tests_exist() -> None:
    names = (ROOT / "tests" / "compat" / "core.txt").read_text().split()
    assert len(names) > 10 and [name for name in names if not (ROOT / name).is_file()] == []
