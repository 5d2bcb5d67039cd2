"""The versions of TensorFlow and Keras that this project runs with; another one is refused in words.

An older one lacks what is used here and would fail somewhere in the middle, with an AttributeError. A newer one may
behave otherwise where private names are relied on (`stages.keras_internals`, `stages.tensorflow_internals`).
"""

from __future__ import annotations

import re
import warnings
from importlib.metadata import PackageNotFoundError, version

SUPPORTED = {"tensorflow": ((2, 18), (2, 22)), "keras": ((3, 8), (3, 16))}
"""{distribution: (the first release that will do, the first that was not tried)}; `pyproject.toml` says the same."""


def check_versions() -> None:
    """Look at the installed releases, without importing them; one that is not found is not judged.

    Raises:
        ImportError: One is too old.

    Warns:
        UserWarning: One is newer than any that was tried.
    """
    for name, (first, beyond) in SUPPORTED.items():
        try:
            found = version(name)
        except PackageNotFoundError:
            continue
        release = tuple(map(int, re.findall(r"\d+", found)[:2]))
        if release < first:
            raise ImportError(
                f"tapeline runs with {name} from {_dotted(first)}, and {found} is installed: "
                f"pip install '{name}>={_dotted(first)},<{_dotted(beyond)}'"
            )
        if release >= beyond:
            warnings.warn(
                f"tapeline was tried with {name} before {_dotted(beyond)}, and {found} is installed: it may behave "
                f"otherwise; pip install '{name}>={_dotted(first)},<{_dotted(beyond)}', or verify what you train",
                stacklevel=2,
            )


def _dotted(release: tuple[int, int]) -> str:
    return ".".join(map(str, release))
