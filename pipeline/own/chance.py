"""Layers that draw random numbers which are not Keras's: from TensorFlow's own generators, one in every process.

A layer of Keras draws from a `keras.random.SeedGenerator`, whose state is a variable: two processes with equal states
draw equal numbers. `tf.random.normal` and its like draw from a generator of the process, which nobody can set back.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from stages.keras_internals import layer_call
from stages.tensorflow_internals import replaced, seen_operations

DRAWS = (
    "RandomUniform",
    "RandomUniformInt",
    "RandomStandardNormal",
    "TruncatedNormal",
    "ParameterizedTruncatedNormal",
    "RandomGamma",
    "RandomPoisson",
    "RandomPoissonV2",
    "RandomShuffle",
    "Multinomial",
)
"""Operations that draw from a state of their own; those whose names begin with "Stateful" do too."""
CALLS_PYTHON = ("PyFunc", "PyFuncStateless", "EagerPyFunc")


def layers_that_draw(run: Callable[[], Any]) -> dict[str, str]:
    """The layers that draw numbers of TensorFlow's own while something runs eagerly, in the order of their draws.

    Returns:
        {layer name: the operation that draws, or that calls Python, which may}. Draws outside of layers are "".
    """
    within: list[str] = [""]
    found: dict[str, str] = {}

    def look(kind: Any, *_: Any, **__: Any) -> None:
        name = kind.decode() if isinstance(kind, bytes) else str(kind)
        if name in DRAWS or name in CALLS_PYTHON or name.startswith("Stateful"):
            found.setdefault(within[-1], name)

    def noted(call: Callable[..., Any]) -> Callable[..., Any]:
        def called(layer: Any, *given: Any, **named: Any) -> Any:
            within.append(layer.name)
            try:
                return call(layer, *given, **named)
            finally:
                within.pop()

        return called

    with replaced(*layer_call(), noted), seen_operations(look):
        run()
    return found


def told(found: dict[str, str], threads: bool) -> str:
    """What draws, in words; "" if nothing does.

    Args:
        found: As `layers_that_draw` gives it.
        threads: Whether stages are threads of one process.
    """
    drawing = {layer: kind for layer, kind in found.items() if kind not in CALLS_PYTHON} or found
    words = [f"layer {layer!r} ({kind})" if layer else f"the model ({kind})" for layer, kind in drawing.items()]
    if not words:
        return ""
    verb = "draws" if len(words) == 1 else "draw"
    where = "come in turns, to whichever thread asks first" if threads else "differ from process to process"
    return f"{', '.join(words)} {verb} random numbers that are not Keras's and {where}"


__all__ = ["layers_that_draw", "told"]
