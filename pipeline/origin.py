"""The check that our three package names mean our packages, from where `stages` itself may be the one that is hidden.

There is one implementation, `stages/origin.py`; it is loaded here by its file because `import stages.origin` would ask
the very module that hides ours.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

__all__ = ["check_origins"]


def check_origins() -> None:
    """Check that `pipeline`, `stages` and `transport` all come from the folder that holds this file's package.

    Raises:
        ImportError: another module has one of the names; tells both files and what to rename. Or this file is inside
            of a zip file, where workers could not read theirs.
    """
    root = Path(__file__).resolve().parent.parent
    if not root.is_dir():
        raise ImportError(f"Tapeline needs its files in a folder, and {root} is none: unpack it, or pip install it")
    spec = importlib.util.spec_from_file_location("_tapeline_origin", root / "stages" / "origin.py")
    if spec is None or spec.loader is None:
        raise ImportError(f"{root / 'stages' / 'origin.py'} is missing; install Tapeline again")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.check_origins(root)
