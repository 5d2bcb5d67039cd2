"""Attributes of `keras.Model` that a pipeline does not have: refused, read or set, with what to do instead.

A name that is set and read by nobody would be silently another training: ``pipe.trainable = False`` freezes nothing.
"""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Any, NoReturn

import keras

from pipeline.errors import NotInPipelineError

_ELSEWHERE = "ask your own model, which has the trained values after fit and close, or pipe.merge(), one Keras model"
_COMPILED = "it is what compile() was given, or its default, and your program has it"
_STEPS = "train_on_batch, test_on_batch and predict_on_batch are its steps"
_READ = {
    **dict.fromkeys(("loss", "loss_weights", "run_eagerly", "jit_compile", "steps_per_execution"), _COMPILED),
    **dict.fromkeys(("metrics", "compiled_metrics", "compiled_loss", "get_metrics_result"), "evaluate() gives them"),
    **dict.fromkeys(("train_function", "test_function", "predict_function"), _STEPS),
    **dict.fromkeys(("make_train_function", "make_test_function", "make_predict_function"), _STEPS),
    **dict.fromkeys(("train_step", "test_step", "predict_step"), _STEPS),
    "unrolled_steps_per_execution": _COMPILED,
    "stop_training": "a callback reads and sets self.model.stop_training",
    "compiled": "pipe.optimizer is None before compile()",
    "get_compile_config": "pipe.save(...) keeps what compile() was given",
    "compile_from_config": "call pipe.compile(...)",
    "export": "pipe.merge().export(...) exports the trained model",
    "to_json": "pipe.merge().to_json() tells the architecture",
    "compute_loss": "pipe.evaluate and pipe.test_on_batch give losses",
}
"""What to do instead of reading or calling; all others: ask another model."""
_ANOTHER = "change your own model, and make another pipeline of it"
_SET = {
    **dict.fromkeys(
        ("optimizer", "loss", "loss_weights", "metrics", "run_eagerly", "jit_compile", "steps_per_execution"),
        "it is what compile() is given; compile again",
    ),
    "trainable": "set it on the layers of your own model, or on the model, and compile again",
    "stop_training": "a callback sets self.model.stop_training = True",
    "compiled": "call compile()",
    "metrics_names": "it says what evaluate() gives",
}
"""What to do instead of setting."""
_MORE = (
    *("built", "compiled", "loss", "loss_weights", "name", "optimizer", "stop_training", "steps_per_execution"),
    *("predict_function", "test_function", "train_function", "unrolled_steps_per_execution", "supports_jit"),
    *("activity_regularizer", "autocast", "call_signature_parameters"),
)
"""Attributes that an instance of `keras.Model` has, and its class does not."""
_KEPT = ("segments", "wires", "schedule", "microbatches", "recompute", "transport", "threads")
"""Attributes of a pipeline that say what it was made with."""
_NOT_KEPT = ("outputs", "windows", "truncate", "keep_state", "check_first_batch", "recovery")
"""What else it was made with, which is no attribute of it."""


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
                instead = _READ.get(name, _ELSEWHERE)
                raise NotInPipelineError(f"a Pipeline has no {name!r}, since the model is in its workers: {instead}")
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}", name=name, obj=self)

        def __setattr__(self, name: str, value: Any) -> None:
            """Set an attribute that somebody reads.

            Raises:
                NotInPipelineError: It would change nothing: a name of Keras's models, or what this was made with.
            """
            if name in _NOT_KEPT or (name in _KEPT and name in self.__dict__):
                raise NotInPipelineError(
                    f"setting pipe.{name} would change nothing: it is settled where the pipeline is made; make another"
                )
            if not name.startswith("_") and name in _names_in_keras():
                raise NotInPipelineError(f"setting pipe.{name} would change nothing: {_SET.get(name, _ANOTHER)}")
            super().__setattr__(name, value)
