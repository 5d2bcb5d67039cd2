"""Attributes of `keras.Model` that a pipeline does not have: refused, read or set, with what to do instead.

A name that is set and read by nobody would be silently another training: ``pipe.trainable = False`` freezes nothing.
"""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Any, NoReturn

import keras

from pipeline.errors import NotInPipelineError

_ELSEWHERE = "ask your own model, which has the trained values after fit and close, or pipe.merge(), one Keras model"
_COMPILED = "it is what compile() is given; compile again"
_FROZEN = "set it on the layers of your own model, or on the model, and compile again"
_CALLBACK = "a callback sets self.model.stop_training = True"
_INSTEAD = {
    **dict.fromkeys(("trainable",), _FROZEN),
    **dict.fromkeys(("stop_training",), _CALLBACK),
    **dict.fromkeys(
        ("optimizer", "loss", "loss_weights", "metrics", "run_eagerly", "jit_compile", "steps_per_execution"), _COMPILED
    ),
    "metrics_names": "it says what evaluate() gives",
    "export": "pipe.merge().export(...) exports the trained model",
    "to_json": "pipe.merge().to_json() tells the architecture",
    "compute_loss": "pipe.evaluate and pipe.test_on_batch give losses",
}
_MORE = (
    *("built", "compiled", "loss", "loss_weights", "name", "optimizer", "stop_training", "steps_per_execution"),
    *("predict_function", "test_function", "train_function", "unrolled_steps_per_execution", "supports_jit"),
    *("activity_regularizer", "autocast", "call_signature_parameters"),
)
"""Attributes that an instance of `keras.Model` has, and its class does not."""
GIVEN = ("segments", "wires", "schedule", "microbatches", "recompute", "transport", "threads")
"""Attributes of a pipeline that say what it was made with."""


@cache
def _names_in_keras() -> frozenset[str]:
    """Public names of Keras's models."""
    found = {name for kind in (keras.Model, keras.Sequential) for name in dir(kind)}
    return frozenset(name for name in {*found, *_MORE} if not name.startswith("_"))


class WithoutModelNames:
    """An object that is used like a Keras model and refuses the attributes that it does not have."""

    if not TYPE_CHECKING:  # type checkers know what is there

        def __getattr__(self, name: str) -> NoReturn:
            """Refuse what is nowhere.

            Raises:
                NotInPipelineError: A Keras model has it.
                AttributeError: It is nothing.
            """
            if not name.startswith("_") and name in _names_in_keras():
                instead = _INSTEAD.get(name, _ELSEWHERE)
                raise NotInPipelineError(f"a Pipeline has no {name!r}, since the model is in its workers: {instead}")
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}", name=name, obj=self)

        def __setattr__(self, name: str, value: Any) -> None:
            """Set an attribute that somebody reads.

            Raises:
                NotInPipelineError: It would change nothing: a name of Keras's models, or what this was made with.
            """
            if name in GIVEN and name in self.__dict__:
                raise NotInPipelineError(
                    f"pipe.{name} says what the pipeline was made with; make another for another one"
                )
            if not name.startswith("_") and name in _names_in_keras():
                raise NotInPipelineError(f"setting pipe.{name} would change nothing: {_INSTEAD.get(name, _ELSEWHERE)}")
            super().__setattr__(name, value)
