"""The values of variables held cheaply, to see later which were given others.

A tensor that was read shares its memory with the variable until the variable is assigned, and then keeps the old
memory. So a read that lies elsewhere than the held one says that somebody assigned; only then are values compared.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import keras
import numpy as np

from stages.put_back import quick_read

Array = np.ndarray[Any, Any]


class Held:
    """The values of some variables at one moment.

    Args:
        variables: Keras's or TensorFlow's.
    """

    def __init__(self, variables: Sequence[Any]) -> None:
        self.variables = tuple(variables)
        self._raw = [v.value if isinstance(v, keras.Variable) else v for v in self.variables]
        self._read = [quick_read(raw) for raw in self._raw]
        self._places = [_place(tensor) for tensor in self._read]

    @property
    def tensors(self) -> list[Any]:
        """The values that are held."""
        return self._read

    def assigned(self) -> list[int]:
        """Which variables (by place) were assigned, also their own value, since they were held; these are held now."""
        before = list(self._places)
        changed = self.changed()
        pairs = enumerate(zip(before, self._places, strict=True))
        return [k for k, (then, now) in pairs if k in changed or (then is not None and now != then)]

    def changed(self) -> list[int]:
        """Which variables (by place) have another value than when they were held; from now on these are held."""
        found = []
        for k, (raw, place) in enumerate(zip(self._raw, self._places, strict=True)):
            now = quick_read(raw)
            where = _place(now)
            if where is not None and where == place:
                continue
            if np.asarray(now).tobytes() != np.asarray(self._read[k]).tobytes():
                found.append(k)
            self._read[k], self._places[k] = now, where
        return found


def _place(tensor: Any) -> int | None:
    """Where a tensor's values lie; None where that cannot be told (bfloat16 has no buffer, a GPU is elsewhere)."""
    try:
        return int(np.asarray(memoryview(tensor)).__array_interface__["data"][0])
    except (ValueError, TypeError):
        return None


__all__ = ["Held"]
