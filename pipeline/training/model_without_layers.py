"""A Keras model without layers, which refuses in words the attributes that a callback would look for in vain.

`self.model` in a callback is a Keras model without layers: they and their variables are in the workers. Keras would
answer with empty lists, take what is set on it without effect, or say that there is no such attribute. An attribute
that is not here is an AttributeError, so that ``hasattr`` says False, and ``getattr`` takes another value instead.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any, NoReturn

import keras

from pipeline.errors import CompileError, NotInPipelineError

_INSTEAD = (
    "the layers and their variables are in the workers. To read, take self.model.get_weights(), or pipe.merge(), a "
    "model with the present weights; to write, self.model.set_weights(...)"
)
_ELSEWHERE = {
    "optimizer": "compile the pipeline with another optimizer; numbers of this one, as its learning_rate, may be set",
    "loss": "compile the pipeline with another loss; variables of this one may be assigned",
    "trainable": "set trainable of your own model's layers, which takes effect with the next pipe.compile(...)",
}
"""What a callback cannot set, and what to do in its place."""


_IN_THE_WORKERS = (
    *("layers", "weights", "variables", "trainable_weights", "trainable_variables", "non_trainable_weights"),
    *("non_trainable_variables", "losses", "input", "inputs", "output", "outputs", "operations"),
)
_OF_ONE_MODEL = ("input_shape", "output_shape")


def in_words(name: str) -> str:
    """Why `self.model` has no attribute of this name, and what to do."""
    asked = f"a callback asks for self.model.{name}"
    if name in _IN_THE_WORKERS:
        return f"{asked}, and a pipeline has none here: {_INSTEAD}"
    if name in _OF_ONE_MODEL:
        return f"{asked}, and this pipeline was put together from parts; ask the first or last of them"
    return (
        f"{asked}: a pipeline shows callbacks a Keras model without layers, which has none; what you set on your own "
        "model is there, and pipe.merge() is a model with the present weights"
    )


def _asked_by_keras() -> bool:
    """Whether the caller's caller is Keras: its own `fit` asks what to finalise, which the workers do."""
    return str(sys._getframe(2).f_globals.get("__name__", "")).startswith("keras.")


def _in_the_workers(name: str) -> property:
    """A property that says where this is."""

    def refuse(_: Any) -> list[Any]:
        if _asked_by_keras():
            return []
        raise NotInPipelineError(in_words(name))

    return property(refuse)


def _of_one_model(name: str, instead: str) -> Callable[..., NoReturn]:
    """A method that only a model with layers can have."""

    def refuse(*_: Any, **__: Any) -> NoReturn:
        raise CompileError(f"a callback calls self.model.{name}(...), and a pipeline cannot do that; {instead}")

    return refuse


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
    input = _in_the_workers("input")
    inputs = _in_the_workers("inputs")
    output = _in_the_workers("output")
    outputs = _in_the_workers("outputs")
    operations = _in_the_workers("operations")

    compute_loss = _of_one_model("compute_loss", "self.model.evaluate(...) gives the loss, logs have that of training")
    compute_metrics = _of_one_model("compute_metrics", "self.model.evaluate(...) gives the metrics")
    get_state_tree = _of_one_model("get_state_tree", "self.model.get_weights() has the weights, pipe.merge() all")
    set_state_tree = _of_one_model("set_state_tree", "self.model.set_weights(...) sets the weights")
    stateless_call = _of_one_model("stateless_call", "pipe.merge() is a model with the present weights")
    quantize = _of_one_model("quantize", "pipe.merge() is a model with the present weights, which can")
    get_compile_config = _of_one_model("get_compile_config", "pipe.save(...) keeps what compile was given")

    def compile(self, *_: Any, **__: Any) -> NoReturn:
        """Refuse.

        Raises:
            CompileError: Always.
        """
        raise CompileError(
            "a callback calls self.model.compile(...), which the workers would not hear of; call pipe.compile(...) "
            "between two calls of fit, which keeps all weights"
        )

    def get_layer(self, name: Any = None, index: Any = None) -> NoReturn:
        """Refuse.

        Raises:
            CompileError: Always.
        """
        asked = repr(name) if index is None else index
        raise CompileError(
            f"a callback asks for self.model.get_layer({asked}), and a pipeline has none here: {_INSTEAD}"
        )

    def __setattr__(self, name: str, value: Any) -> None:
        if name in _ELSEWHERE and not _set_by_us() and getattr(self, name) is not value:
            raise CompileError(
                f"a callback sets self.model.{name}, which the workers would not hear of; {_ELSEWHERE[name]}"
            )
        super().__setattr__(name, value)

    def __getattr__(self, name: str) -> Any:
        """Say where this is; Python asks here too where a property has raised an AttributeError."""
        if name.startswith("_"):
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        raise NotInPipelineError(in_words(name))


def _set_by_us() -> bool:
    """Whether the caller's caller is Keras or this package."""
    return str(sys._getframe(2).f_globals.get("__name__", "")).startswith(("keras.", "pipeline."))
