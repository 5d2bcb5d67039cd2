"""A callback's `self.model` gives what a Keras model gives, or says where it is and what to do."""

import json
import re

import keras
import numpy as np
import pytest

from pipeline import CompileError, DataError, NotInPipelineError, Pipeline
from tests.pipeline.reference.twins import callback_model, numbers, regressor, squares, twins

XN, YN = numbers(20)


REFUSED = {
    "layers": lambda model: model.layers[0],
    "get_layer": lambda model: model.get_layer("a"),
    "weights": lambda model: model.weights,
    "trainable_variables": lambda model: model.trainable_variables,
    "trainable_weights": lambda model: model.trainable_weights,
    "inputs": lambda model: keras.Model(model.inputs, model.outputs),
    "output": lambda model: model.output,
    "compile": lambda model: model.compile("adam", "mae"),
    "compute_loss": lambda model: model.compute_loss(XN, YN, YN),
    "get_state_tree": lambda model: model.get_state_tree(),
    "optimizer": lambda model: setattr(model, "optimizer", keras.optimizers.SGD()),
    "loss": lambda model: setattr(model, "loss", "mae"),
    "trainable": lambda model: setattr(model, "trainable", False),
}


def test_a_callback_that_asks_for_what_is_elsewhere_is_told_so():
    """Keras would give it an empty list, take without effect what it sets, or build on a model that nobody trains."""
    with Pipeline.split(regressor(), stages=2, microbatches=1, transport="inproc") as pipe:
        pipe.compile(**squares(), run_eagerly=True)
        model, errors = callback_model(pipe), {}

        def ask_all(epoch, logs):
            for name, ask in REFUSED.items():
                with pytest.raises((CompileError, NotInPipelineError)) as error:
                    ask(model)
                errors[name] = str(error.value)
            with pytest.raises(AttributeError) as error:
                model.something.at_all()
            errors["something"] = str(error.value)
            for name in ("layers", "weights", "inputs", "outputs", "input", "output", "operations", "losses"):
                assert not hasattr(model, name) and getattr(model, name, None) is None, name

        pipe.fit(XN, YN, verbose=0, callbacks=[keras.callbacks.LambdaCallback(on_epoch_begin=ask_all)])
    with Pipeline([regressor()], microbatches=1, transport="inproc") as parts:
        parts.compile(**squares(), run_eagerly=True)
        assert getattr(callback_model(parts), "input_shape", None) is None
        with pytest.raises(NotInPipelineError) as shape:
            _ = callback_model(parts).input_shape
        errors["input_shape"] = str(shape.value)
        assert "put together from parts" in errors["input_shape"]
    for name, text in errors.items():
        assert re.match(rf"a callback (asks for|calls|sets) self\.model\.{name}\b.*pipe", text), text


def test_a_callback_is_given_what_keras_gives():
    """Names, shapes, settings, its own attributes; predictions and evaluations of a batch, called and by name."""

    def seen_by(twin):
        def look(batch, logs):
            model.mine = batch
            seen.append([model.name, model.input_shape, model.output_shape, model.mine, model.stop_training])
            seen.append([np.asarray(model(XN[:3])), model.predict_on_batch(XN[:3]), model.test_on_batch(XN, YN)])

        model, seen = twin if twin is pair.model else callback_model(twin), []
        twin.fit(XN, YN, batch_size=8, verbose=0, callbacks=[keras.callbacks.LambdaCallback(on_train_batch_end=look)])
        return seen

    with twins(lambda: regressor_named("mine"), squares) as pair:
        theirs, ours = pair.both(seen_by)
        assert len(ours) == 6 and ours[::2] == theirs[::2]
        for a, b in zip(keras.tree.flatten(ours[1::2]), keras.tree.flatten(theirs[1::2]), strict=True):
            np.testing.assert_array_equal(a, b)
        with pytest.raises(DataError, match="training=True"):
            callback_model(pair.pipe)(XN, training=True)


def regressor_named(name):
    model = regressor()
    return keras.Sequential([keras.Input((6,)), *model.layers], name=name)


def test_a_callback_asks_the_model_what_it_would_ask_in_keras():
    """Its loss and its numbers of parameters, the loss object, and the model as JSON."""
    loss = keras.losses.Huber()
    with Pipeline.split(regressor(), stages=2, microbatches=1, transport="inproc") as pipe:
        pipe.compile("sgd", loss, run_eagerly=True)
        seen = {}

        def look(**_):
            model = pipe._trainer
            lines = []
            model.summary(print_fn=lines.append)
            seen.update(
                count=model.count_params(),
                loss=model.loss,
                counted=float(model.metrics[0].result()),
                names=[layer["config"]["name"] for layer in json.loads(model.to_json())["config"]["layers"]],
                summary=lines,
            )

        history = pipe.fit(
            XN, YN, verbose=0, callbacks=[keras.callbacks.LambdaCallback(on_train_end=lambda logs: look())]
        )
        assert seen["count"] == regressor().count_params() and seen["loss"] is loss
        assert seen["counted"] == np.float32(history.history["loss"][0])
        assert seen["names"][-2:] == ["a", "b"] and "stage0" in seen["summary"][0]
