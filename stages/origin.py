"""Notice a module of the user's that has the name of one of our packages, before it is used for ours.

Our packages have short names. A user's `pipeline.py` beside their script comes first on `sys.path`, and what follows
is an AttributeError far from the cause. This module imports nothing but the standard library and is itself loaded by
file where `stages` may be the package that is shadowed (`pipeline.origin`).
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

__all__ = ["PACKAGES", "ROOT", "check_origins"]

PACKAGES = ("pipeline", "stages", "transport")
ROOT = Path(__file__).resolve().parent.parent
"""The folder that holds our three packages."""


def check_origins(root: str | os.PathLike[str] = ROOT) -> None:
    """Check that our three package names mean our packages in this process.

    A package that is loaded is judged by its file; one that is not, by what an import would find now. Costs about
    0.1 ms.

    Args:
        root: the folder that the three packages must come from.

    Raises:
        ImportError: something else has one of the names; tells both files and what to rename.
    """
    faults = []
    for name in PACKAGES:
        ours = Path(root) / name / "__init__.py"
        found = _file_of(name)
        if found is not None and not _same(found, ours):
            faults.append((name, found, ours))
    if not faults:
        return
    lines = [f"  {found}\n    hides {ours}" for _, found, ours in faults]
    names = " and ".join(repr(name) for name, _, _ in faults)
    raise ImportError(
        f"another module has the name {names}, which Tapeline needs for its own package:\n"
        + "\n".join(lines)
        + "\nRename that file or folder, or take its folder off sys.path.",
        name=faults[0][0],
        path=faults[0][1],
    )


def _file_of(name: str) -> str | None:
    """Return the file that `import name` gives or would give; None if nothing, or only a folder without code."""
    module = sys.modules.get(name)
    if module is not None:
        return getattr(module, "__file__", None)
    for finder in sys.meta_path:
        find_spec = getattr(finder, "find_spec", None)
        spec = find_spec(name, None, None) if find_spec is not None else None
        if spec is not None:
            return spec.origin if spec.has_location else None
    return None


def _same(found: str, ours: Path) -> bool:
    if found == str(ours):
        return True
    try:
        return Path(found).samefile(ours)
    except OSError:
        return False
