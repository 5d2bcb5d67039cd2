"""What a first call of a built model would still build is built before a stage needs it; the rest stays as it is."""

import keras
import numpy as np
import pytest

from stages.errors import SegmentError
from stages.recipe.unbuilt import build_rest


class Block(keras.layers.Layer):
    """Holds a layer that it never calls, one for training only, and says that it is built."""

    def __init__(self):
        super().__init__()
        self.always, self.never = keras.layers.Dense(3), keras.layers.Dense(4)
        self.statistics, self.training_only = keras.layers.BatchNormalization(), keras.layers.Dense(3)

    def build(self, shape):
        self.built = True

    def compute_output_shape(self, shape):
        return (*shape[:-1], 3)

    def call(self, x, training=False):
        x = self.statistics(self.always(x), training=training)
        return self.training_only(x) if training else x


def model(block):
    inputs = keras.Input((5,))
    return keras.Model(inputs, block(inputs))


def test_layers_that_are_called_get_their_variables_and_no_value_changes():
    block = Block()
    made = model(block)
    made(np.ones((2, 5), "float32"))
    before = [variable.numpy() for variable in made.variables]
    build_rest(made)
    assert block.training_only.built and not block.never.built
    for variable, value in zip(made.variables, before, strict=False):
        np.testing.assert_array_equal(variable, value)
    assert {id(variable) for variable in block.training_only.variables} <= {id(v) for v in made.variables}


def test_a_call_that_fails_on_zeros_is_told_with_the_layer():
    class Failing(Block):
        def call(self, x, training=False):
            if not isinstance(x, keras.KerasTensor):
                raise RuntimeError
            return super().call(x, training)

    block = Failing()
    made = model(block)
    with pytest.raises(
        SegmentError, match=r"the layer 'dense\w*' \(Dense\) .* is not built yet.*RuntimeError on zeros"
    ):
        build_rest(made)
