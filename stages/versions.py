"""The versions of TensorFlow and Keras that this project runs with, and Keras's backend; others are refused in words.

An older one lacks what is used here and would fail somewhere in the middle, with an AttributeError. A newer one may
behave otherwise where private names are relied on (`stages.keras_internals`, `stages.tensorflow_internals`). On
another backend, variables are no TensorFlow variables.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import sys
import warnings
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

SUPPORTED = {"tensorflow": ((2, 18), (2, 22)), "keras": ((3, 8), (3, 16))}
"""{distribution: (the first release that will do, the first that was not tried)}; `pyproject.toml` says the same."""

OTHER_NAMES = {"tensorflow": ("tensorflow-cpu", "tensorflow-gpu", "tf-nightly")}
"""{distribution: others that hold the same package}."""


def check_versions() -> None:
    """Look at the installed releases, without importing them; one that is not found is not judged.

    Raises:
        ImportError: One is too old.

    Warns:
        UserWarning: One is newer than any that was tried.
    """
    for name, (first, beyond) in SUPPORTED.items():
        found = _installed(name)
        if found is None:
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


def _installed(name: str) -> str | None:
    """The release of a distribution, or of another one with the same package; None: there is none."""
    for one in (name, *OTHER_NAMES.get(name, ())):
        with contextlib.suppress(PackageNotFoundError):
            return version(one)
    return None


def check_backend() -> None:
    """Look at the backend that Keras has, or will have when it is imported.

    Raises:
        ImportError: It is not TensorFlow; says where that was chosen.
    """
    backend, where = _backend()
    if backend != "tensorflow":
        raise ImportError(
            f"tapeline trains with TensorFlow, and Keras's backend is {backend!r} ({where}): set "
            "KERAS_BACKEND=tensorflow in the environment before keras is imported"
        )


def received(thing: Any) -> str:
    """The end of a sentence about something that is no object of Keras's: its class, and where that is of Keras 2.

    `tf.keras` is Keras 2, another library with the same names, where TF_USE_LEGACY_KERAS is set.
    """
    home, name = type(thing).__module__.partition(".")[0], type(thing).__name__
    if home != "tf_keras":
        return f"received {name}"
    return (
        f"received {name} of tf_keras, which is Keras 2 (and so is tf.keras where TF_USE_LEGACY_KERAS=1 is set); make "
        "it with Keras 3: import keras"
    )


def _backend() -> tuple[str, str]:
    """Keras's backend, and who chose it, by Keras's own rules: an import, the environment, its file of settings."""
    ask = getattr(getattr(sys.modules.get("keras"), "config", None), "backend", None)
    if ask is not None:
        return ask(), "keras is imported already"
    if chosen := os.environ.get("KERAS_BACKEND"):
        return chosen, "by the environment variable KERAS_BACKEND"
    folder = os.environ.get("KERAS_HOME") or Path("~", ".keras").expanduser()
    file, found = Path(folder, "keras.json"), None
    with contextlib.suppress(OSError, ValueError, AttributeError):
        found = json.loads(file.read_text()).get("backend")
    return (found, f"by {file}") if found else ("tensorflow", "by default")


def _dotted(release: tuple[int, int]) -> str:
    return ".".join(map(str, release))
