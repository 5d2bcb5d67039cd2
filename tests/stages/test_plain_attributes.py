"""Attributes of the user's objects that are arrays of objects: compared by what they hold, not by addresses of it."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from stages.plain_attributes import Attributes


@pytest.mark.parametrize("many", [3, 9000])
def test_arrays_of_objects_are_compared_by_what_they_hold(many: int) -> None:
    """Equal text at another address is no change; another entry, object or type of entry is one."""
    records = np.dtype([("a", object), ("b", "i4")])

    def words(dtype: Any) -> Any:
        return np.array(["".join(["word ", str(n)]) for n in range(many)], dtype=dtype)

    for dtype in (object, np.dtypes.StringDType()):
        thing = SimpleNamespace(words=words(dtype), own=np.array([object()] * many), records=np.zeros(many, records))
        attributes = Attributes([("it", thing)])
        assert attributes.changed(None) is None
        thing.words = words(dtype)
        assert attributes.changed(None) is None and attributes.changed(3) is None
        for other in ("another", None):
            if other is not None or dtype is object:
                thing.words[-1] = other
                assert attributes.changed(None) == "it got words=other values in its array"
        thing.words = None
        assert attributes.changed(None) == "it got words=other values in its array"
        thing.words = words(dtype)
        thing.own[0] = object()
        assert attributes.changed(None) == "it got own=other values in its array"
