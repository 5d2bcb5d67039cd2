"""Find the files that belong to the repository, for the tests that read the sources."""

import ast
import subprocess
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("pipeline", "stages", "transport")


def repository_files() -> list[Path]:
    """Every file of the repository: what git tracks or would track, or all of a tree that came without git."""
    if (ROOT / ".git").exists():
        listing = subprocess.run(
            ["git", "-C", str(ROOT), "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
            check=True,
            capture_output=True,
            text=True,
        )
        paths = [ROOT / name for name in listing.stdout.split("\0") if name]
    else:
        paths = [path for path in ROOT.rglob("*") if not any(map(generated, path.relative_to(ROOT).parts))]
    return sorted(path for path in paths if path.is_file())


def generated(part: str) -> bool:
    """Whether a file or folder called ``part`` is one that tools make; near enough to what .gitignore says."""
    if part.startswith("."):
        return part not in {".ci", ".gitignore"}
    return part in {"__pycache__", "artifacts", "build", "dist"} or part.endswith(".egg-info")


def modules(*packages: str) -> list[Path]:
    """The Python files of ``packages``, those of their subpackages too."""
    return [path for package in packages for path in sorted((ROOT / package).rglob("*.py"))]


def name_of(path: Path) -> str:
    """``path`` as the repository spells it, for test ids and messages."""
    return path.relative_to(ROOT).as_posix()


def imported(tree: ast.Module, package: str) -> Iterator[tuple[int, str]]:
    """Every module that ``tree`` imports, anywhere in it, as (line, absolute name).

    ``package`` is the dotted name of the package that holds the module; relative imports start from it. The function
    forms, ``import_module("x")`` and ``__import__("x")``, count as well.
    """
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom):
            parts = package.split(".")
            base = parts[: len(parts) - node.level + 1] if node.level else []
            stem = ".".join([*base, *([node.module] if node.module else [])])
            for alias in node.names:
                yield node.lineno, f"{stem}.{alias.name}"
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            name = node.args[0].value
            called = getattr(node.func, "attr", None) or getattr(node.func, "id", None)
            if called in ("import_module", "__import__") and isinstance(name, str):
                yield node.lineno, f"{package}{name}" if name.startswith(".") else name
