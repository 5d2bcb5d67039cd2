"""A Keras model without layers, which refuses in words the attributes that a callback would look for in vain.

`self.model` in a callback is a Keras model without layers: they and their variables are in the workers. Keras would
answer with empty lists.
"""

from __future__ import annotations

import sys
from typing import Any, NoReturn

import keras

from pipeline.errors import CompileError

_INSTEAD = (
    "the layers and their variables are in the workers. To read, take self.model.get_weights(), or pipe.merge(), a "
    "model with the present weights; to write, self.model.set_weights(...)"
)


def _in_the_workers(name: str) -> property:
    """A property that says where this is."""

    def refuse(_: Any) -> list[Any]:
        if sys._getframe(1).f_globals.get("__name__", "").startswith("keras."):
            return []  # Keras's own `fit` asks what the optimizer should finalise, which the workers do
        raise CompileError(f"a callback asks for self.model.{name}, and a pipeline has none here: {_INSTEAD}")

    return property(refuse)


class ModelWithoutLayers(keras.Model):  # type: ignore[misc]
    """A Keras model whose layers and variables are elsewhere."""

    layers = _in_the_workers("layers")
    weights = _in_the_workers("weights")
    variables = _in_the_workers("variables")
    trainable_weights = _in_the_workers("trainable_weights")
    trainable_variables = _in_the_workers("trainable_variables")
    non_trainable_weights = _in_the_workers("non_trainable_weights")
    non_trainable_variables = _in_the_workers("non_trainable_variables")
    losses = _in_the_workers("losses")

    def __setattr__(self, name: str, value: Any) -> None:
        """Refuse what the workers would not hear of.

        Raises:
            CompileError: A callback freezes, or thaws, the model.
        """
        if name == "trainable" and self.built:
            raise CompileError(
                "a callback sets self.model.trainable, which the workers would not hear of: set it on the layers of "
                "your own model between two fits, and compile the pipeline again"
            )
        super().__setattr__(name, value)

    def compile(self, *args: Any, **kwargs: Any) -> None:
        """Compile once, for Keras's loop.

        Raises:
            CompileError: A callback compiles anew.
        """
        if self.compiled:
            raise CompileError(
                "a callback calls self.model.compile(), which the workers would not hear of: end the fit, call "
                "compile of the pipeline, and fit again"
            )
        super().compile(*args, **kwargs)

    def get_layer(self, name: Any = None, index: Any = None) -> NoReturn:
        """Refuse.

        Raises:
            CompileError: Always.
        """
        asked = repr(name) if index is None else index
        raise CompileError(
            f"a callback asks for self.model.get_layer({asked}), and a pipeline has none here: {_INSTEAD}"
        )
