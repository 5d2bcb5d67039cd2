"""The gradients of one batch by the names of their variables."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from pipeline.batch.step import Batch
    from pipeline.runtime.session import Session


def named_gradients(session: Session, batch: Batch) -> dict[str, np.ndarray[Any, Any] | None]:
    """{"<stage>/<variable path>": dL/dvariable of its shape and dtype, or None}; nothing is applied.

    A variable that several stages have is there once, under the first of them.
    """
    _, gradients = session.steps.differentiate(batch, session.workers.driver())
    owned = {place: name for place, (name, owner) in session.values.variable_names().items() if owner}
    return {name: gradients[i][k] for (i, k), name in owned.items()}
