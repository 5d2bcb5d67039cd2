"""scikit-learn, and SciPy which comes with it, for the measures that train an attacker, and only them."""

from __future__ import annotations

import importlib
from types import SimpleNamespace
from typing import Any

from pipeline.errors import DataError


def scikit_learn(*modules: str) -> Any:
    """Modules of scikit-learn by their names, as attributes.

    Raises:
        DataError: It is not installed.
    """
    return SimpleNamespace(**{name: _module(f"sklearn.{name}") for name in modules})


def scipy(module: str) -> Any:
    """A module of SciPy by its name.

    Raises:
        DataError: It is not installed.
    """
    return _module(f"scipy.{module}")


def _module(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise DataError(
            "measuring what an attacker can learn takes scikit-learn: pip install 'tapeline[leakage]'"
        ) from error
