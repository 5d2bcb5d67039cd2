"""Ids of rows as bytes: what a hash of ids is taken of, wherever parties compare rows."""

from __future__ import annotations

from typing import Any

import numpy as np


def id_bytes(one: Any) -> bytes | None:
    """Bytes that only this id has, 1 and "1" being two ids; None: it is neither text nor a whole number."""
    if isinstance(one, str):
        return b"s" + one.encode("utf-8", "surrogatepass")
    if isinstance(one, int | np.integer) and not isinstance(one, bool):
        return b"i" + str(int(one)).encode()
    return None
