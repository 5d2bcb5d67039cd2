"""Compiled stages raise no false alarm on any family of `keras.applications`, wherever the model is cut.

The smallest member of each, in small and untrained: deep chains of normalisations over few numbers, which magnify
rounding more than trained models do. Judged by one compiled tape, and by the model as Keras made it.
"""

from __future__ import annotations

import random
from typing import Any

import keras
import numpy as np
import pytest

from pipeline import Pipeline
from pipeline.model.call_graph import read_graph

pytestmark = [pytest.mark.soak, pytest.mark.timeout(900)]
CLASSES = 4
FAMILIES: dict[str, tuple[int, dict[str, Any]]] = {
    "NASNetMobile": (64, {}),
    "MobileNet": (64, {"alpha": 0.25}),
    "MobileNetV2": (64, {"alpha": 0.35}),
    "MobileNetV3Small": (64, {"alpha": 0.75}),
    "DenseNet121": (32, {}),
    "EfficientNetB0": (64, {}),
    "EfficientNetV2B0": (64, {}),
    "ResNet50": (32, {}),
    "ResNet50V2": (32, {}),
    "InceptionV3": (75, {}),
    "InceptionResNetV2": (75, {}),
    "Xception": (71, {}),
    "VGG16": (32, {}),
    "ConvNeXtTiny": (32, {}),
}
"""{function in `keras.applications`: (height and width, what else it is built with)}."""


def split(name: str, seed: int) -> tuple[Pipeline, np.ndarray, np.ndarray]:
    """The model behind two random layers in three stages, with a batch of five."""
    size, options = FAMILIES[name]
    keras.utils.set_random_seed(3)
    make = getattr(keras.applications, name)
    model = make(weights=None, classes=CLASSES, input_shape=(size, size, 3), **options)
    draw = random.Random(f"{name}-{seed}")
    names = [call.name for call in read_graph(model).calls][:-1]
    at = None if seed == 0 else [names[i] for i in sorted(draw.sample(range(len(names)), 2))]
    rng = np.random.default_rng(4)
    x = rng.uniform(0, 255 if "ConvNeXt" in name or "MobileNetV3" in name else 1, (5, size, size, 3))
    where: dict[str, Any] = {"stages": 3} if at is None else {"at": at}
    pipe = Pipeline.split(model, microbatches=2, transport="inproc", threads=1, **where)
    pipe.compile("sgd", "sparse_categorical_crossentropy")
    return pipe, x.astype("float32"), rng.integers(0, CLASSES, 5)


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("name", FAMILIES)
def test_what_is_right_is_not_reported(name: str, seed: int) -> None:
    """Seed 0 is cut into equal stages, as users do; the others behind any two layers."""
    pipe, x, y = split(name, seed)
    with pipe:
        pipe.verify(x, y).raise_if_failed()
