"""Parts are called as models of Keras are."""

import keras
import numpy as np

from stages.tape.model_call import packer


def test_flat_tensors_are_given_in_the_nesting_of_the_call():
    """Keras warns of another one, which is an error here; before Keras 3.9 also of a tensor for a list of one."""
    a, b = keras.Input((2,), name="a"), keras.Input((2,), name="b")
    x, y = np.ones((1, 2), "float32"), np.zeros((1, 2), "float32")
    for model, tensors, expected in [
        (keras.Model([a], a + 1), [x], [x]),
        (keras.Model(a, a + 1), [x], x),
        (keras.Model({"b": b, "a": a}, a - b), [x, y], {"a": x, "b": y}),
        (keras.Sequential([keras.Input((2,)), keras.layers.Dense(2)]), [x], x),
        (keras.layers.Add(), [x, y], [x, y]),
    ]:
        given = packer(model)(tensors)
        assert keras.tree.map_structure(id, given) == keras.tree.map_structure(id, expected)
        assert model(given).shape == (1, 2)
