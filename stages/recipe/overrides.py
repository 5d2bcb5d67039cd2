"""Methods of a model's own that a pipeline does not call: named, so that they are not silently left out.

A pipeline trains by the rules of `compile`, stage by stage, and never calls the model's own `train_step` or
`compute_loss`. What a model does there it would do in vain.
"""

from __future__ import annotations

from typing import Any

from stages.recipe.attributes import attributes_of

TRAINING = (
    "train_step",
    "test_step",
    "predict_step",
    "compute_loss",
    "compute_metrics",
    "make_train_function",
    "make_test_function",
    "make_predict_function",
    "fit",
    "evaluate",
    "predict",
    "train_on_batch",
    "test_on_batch",
    "predict_on_batch",
)
"""What Keras calls of a model that it trains."""

CALLING = ("call", "__call__", "compute_mask", "stateless_call")
"""What Keras calls of a model that is run: where one is the model's own, its graph is not all that it does."""


def overridden(model: Any, names: tuple[str, ...]) -> list[str]:
    """Which of these methods are a model's own: of its class, of a class between it and Keras's, or set on it."""
    return [
        name for name in names if name in attributes_of(model) or not _is_of_keras(getattr(type(model), name, None))
    ]


def _is_of_keras(method: Any) -> bool:
    return method is None or str(getattr(method, "__module__", "keras")).split(".")[0] in ("keras", "keras_hub")


def why_training_would_differ(model: Any) -> str | None:
    """Why a pipeline would not train a model as its own `fit` does, in one sentence; None: nothing is overridden."""
    found = overridden(model, TRAINING)
    if not found:
        return None
    names = " and ".join(f"{name}()" for name in found)
    kind = type(model).__name__
    return (
        f"the model {model.name!r} ({kind}) has {names} of its own, which a pipeline would ignore: stages train by "
        "what compile() is given; write it as a loss (keras.losses.Loss), a metric, a layer with add_loss, or an "
        "optimizer, and pass a keras.Model without it"
    )


__all__ = ["CALLING", "TRAINING", "overridden", "why_training_would_differ"]
