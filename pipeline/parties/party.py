"""One organisation's part of a split training: models, rows, optimizer. Nothing of it is sent to anybody."""

from __future__ import annotations

import hmac
from collections.abc import Iterable, Mapping
from typing import Any

import keras
import numpy as np

from pipeline.errors import PartyPlanError
from pipeline.parties.row_ids import id_bytes


class Party:
    """The models and data of one party.

    Args:
        model: A built Keras model, for a party with one stage; else {stage's name: model}. Inputs are, in flat order,
            the party's own x and then the tensors that the plan's edges bring, in their order; outputs likewise.
        x: The party's own features, (rows, ...), in the nesting of the first stage's own inputs; None: it has none.
        y: The targets, (rows, ...), for the party whose stage has y.
        ids: One id a row, strings or whole numbers, each once. All parties with rows must have the same ids in the same
            order, which is compared before anything is trained, and again in every step.
        optimizer: What `keras.Model.compile` takes; updates all of the party's stages. None: nothing here is trained.
        loss: What `keras.Model.compile` takes for one output, for the party with y.
        metrics: Likewise.
    """

    def __init__(
        self,
        model: Any,
        x: Any = None,
        y: Any = None,
        ids: Any = None,
        optimizer: Any = None,
        loss: Any = None,
        metrics: Any = None,
    ) -> None:
        self.model, self.optimizer, self.loss, self.metrics = model, optimizer, loss, metrics
        self.x = [] if x is None else [_array(one, "x") for one in keras.tree.flatten(x)]
        self.y = None if y is None else _array(y, "y")
        self.ids = None if ids is None else _encoded(ids)

    @property
    def rows(self) -> int | None:
        """Rows of x, y or ids; None where there are none.

        Raises:
            PartyPlanError: They have different numbers.
        """
        found = {f"x[{place}]": len(one) for place, one in enumerate(self.x)}
        found |= {} if self.y is None else {"y": len(self.y)}
        found |= {} if self.ids is None else {"ids": len(self.ids)}
        if len(set(found.values())) > 1:
            numbers = ", ".join(f"{name} {number}" for name, number in found.items())
            raise PartyPlanError(f"x, y and ids must have the same number of rows, received {numbers}")
        return next(iter(found.values()), None)

    def models(self, stages: Iterable[str]) -> dict[str, Any]:
        """{stage's name: its model} for the stages that a plan gives this party.

        Raises:
            PartyPlanError: Others were given.
        """
        names = list(stages)
        given = self.model if isinstance(self.model, Mapping) else dict.fromkeys(names[:1], self.model)
        if set(given) != set(names):
            raise PartyPlanError(
                f"the plan gives this party the stages {', '.join(names) or 'none'}; received models for "
                f"{', '.join(map(str, given))}"
            )
        return {name: given[name] for name in names}


def ids_mark(key: bytes, ids: Iterable[bytes], purpose: bytes = b"tapeline rows") -> str:
    """A keyed hash of ids in their order, 64 hexadecimal digits: who has not the key learns nothing from it."""
    mark = hmac.new(key, purpose + b"\0", "sha256")
    for one in ids:
        mark.update(len(one).to_bytes(4, "little") + one)
    return mark.hexdigest()


def rows_key(key: bytes, ids: Iterable[bytes]) -> bytes:
    """The key of the marks of steps' rows, 32 bytes, never sent; it takes all ids in their order to make it."""
    return bytes.fromhex(ids_mark(key, ids, b"tapeline key of rows"))


def _array(given: Any, what: str) -> np.ndarray[Any, Any]:
    array = np.asarray(given)
    if array.dtype.kind not in "fiub" and array.dtype.name != "bfloat16":
        raise PartyPlanError(f"{what} must be numbers, received an array of {array.dtype}")
    if not array.ndim or not len(array):
        raise PartyPlanError(f"{what} must have at least one row, received the shape {array.shape}")
    return array.astype(keras.config.floatx()) if array.dtype.kind == "f" else array  # as Keras does


def _encoded(ids: Any) -> list[bytes]:
    """Each id as bytes that only it has: 1 and "1" are two ids."""
    found = []
    for one in ids.tolist() if isinstance(ids, np.ndarray) else list(ids):
        said = id_bytes(one)
        if said is None:
            raise PartyPlanError(f"ids are strings or whole numbers, received {one!r:.80}")
        found.append(said)
    if len(set(found)) != len(found):
        raise PartyPlanError(f"ids must be there once each; {len(found) - len(set(found))} are repeated")
    return found


__all__ = ["Party", "ids_mark", "rows_key"]
