"""`tapeline explain`: explain the gradients of what a function of the user's makes; the exit status is the verdict.

The function returns one of

    (pipeline, x, y)            or (..., sample_weight): over all stages, with the pipeline's own gradients
    (model, x, y), (model, x)   a Keras model: its compiled loss, or every output
    a tensor, a dict of them    a target that the function itself computes: it is run again and recorded
"""

from __future__ import annotations

import argparse
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.commands.verify import imported
from pipeline.errors import PipelineError

if TYPE_CHECKING:
    from stages.explanation.rows import Explanation

FLOWS, BLOCKED, FAILED = 0, 1, 2
"""Exit statuses: every variable has a finite gradient that is not zero; some has not; nothing could be explained."""


def arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.add_argument(
        "what", metavar="module:function", help="a function that returns (pipeline, x, y), (model, x, y), or a target"
    )
    parser.add_argument(
        "--target", default="loss", metavar="NAME", help="of a pipeline: loss, a tensor, or stage/state (default loss)"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the explanation there")


def run(given: argparse.Namespace) -> int:
    """Explain, print, write.

    Returns:
        The exit status, one of `FLOWS`, `BLOCKED`, `FAILED`.

    Raises:
        PipelineError: What was named is not there.
    """
    function = imported(given.what)
    try:
        found = explanation_of(function, given.target)
    except PipelineError:
        raise
    except Exception:
        traceback.print_exc()
        print(f"tapeline explain: {given.what} could not be explained, see the error above", file=sys.stderr)
        return FAILED
    print(found)
    if given.json is not None:
        given.json.write_text(found.to_json(), encoding="utf-8")
    return FLOWS if found.ok else BLOCKED


def explanation_of(function: Callable[[], Any], target: str = "loss") -> Explanation:
    """Explain what a function makes or computes; see the module.

    Args:
        function: The user's.
        target: For a pipeline, what is differentiated.
    """
    import keras

    from stages import explain

    made = function()
    first, *rest = made if isinstance(made, tuple) and made else (made,)
    if hasattr(first, "explain"):
        with first:
            found: Explanation = first.explain(*rest, target=target)
        return found
    if isinstance(first, keras.Layer):
        return explain(first, *rest)
    return explain(function)


__all__ = ["arguments", "explanation_of", "run"]
