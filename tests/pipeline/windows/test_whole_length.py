"""windows= means the whole length: what would be something else in windows is refused, what is the same is taken."""

from contextlib import nullcontext

import keras
import numpy as np
import pytest

from pipeline import Pipeline, ScheduleError, SplitError
from pipeline.model import stateful
from tests.levels import in_turn
from tests.pipeline.windows.whole_length import (
    ASKED,
    REFUSED,
    STEPS,
    TAKEN,
    KeepsTheLast,
    behind,
    masked,
    without_the_mask,
)

layers = keras.layers
pytestmark = pytest.mark.filterwarnings("ignore:.*does not support masking")


@pytest.mark.parametrize("case", REFUSED)
def test_what_windows_would_change_is_refused_by_name(case):
    build, message = REFUSED[case]
    model = build()
    before = [v.numpy() for v in model.variables]
    with pytest.raises(SplitError, match=message):
        stateful.refuse_what_mixes_time(stateful.read_graph(model))
    assert all(map(np.array_equal, before, (v.numpy() for v in model.variables)))  # the trial leaves no trace


@pytest.mark.parametrize("case", TAKEN)
def test_what_is_the_same_in_windows_is_taken(case):
    model = TAKEN[case]()
    before = [v.numpy() for v in model.variables]
    stateful.refuse_what_mixes_time(stateful.read_graph(model))
    assert all(map(np.array_equal, before, (v.numpy() for v in model.variables)))


@pytest.mark.parametrize("case", in_turn(list(ASKED), 0, 4))
def test_what_people_ask_for_is_keras_over_the_whole_length(case):
    """Predictions, loss and one update."""
    keras.utils.set_random_seed(1)
    model = ASKED[case]()
    x = np.random.default_rng(0).normal(size=(4, *model.input_shape[1:])).astype("float32")
    before = model.get_weights()
    y = np.random.default_rng(1).normal(size=model.predict(x, verbose=0).shape).astype("float32")
    with Pipeline.split(model, stages=2, windows=3, microbatches=2, transport="inproc") as pipe:
        pipe.compile(keras.optimizers.SGD(0.1), "mse", metrics=[], run_eagerly=True)
        ours = [pipe.train_on_batch(x, y), pipe.predict(x, verbose=0)]
    model.set_weights(before)
    model.compile(keras.optimizers.SGD(0.1), "mse", run_eagerly=True)
    theirs = [model.train_on_batch(x, y), model.predict(x, verbose=0)]
    for a, b in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


def test_a_state_in_a_variable_has_the_values_and_not_the_gradients():
    with pytest.raises(SplitError, match=r"the gradient of .* would be another.*a variable, which no gradient passes"):
        stateful.refuse_what_mixes_time(stateful.read_graph(behind(KeepsTheLast(), samples=4)))


def test_split_and_stateful_refuse():
    for cut in (lambda model: Pipeline.split(model, stages=1, windows=2), stateful.stateful):
        with pytest.raises(SplitError, match=r"'over' .Softmax. cannot be run window by window"):
            cut(behind(layers.Softmax(axis=1, name="over")))


class BeginsWithOnes(layers.GRUCell):
    """A cell with a state of its own to begin with."""

    def get_initial_state(self, batch_size=None):
        return [keras.ops.ones((batch_size, self.units))]


def test_a_begin_that_is_not_zeros_is_refused_with_the_way_to_give_it():
    model = keras.Sequential([keras.Input((STEPS, 3)), layers.RNN(BeginsWithOnes(2), name="ones")])
    with pytest.raises(SplitError, match=r"'ones' begins with a state of its own that is not zeros.*initial_state="):
        Pipeline.split(model, stages=1, windows=2)


def test_half_precision_is_rounding_and_no_other_gradient():
    """A state in a variable is still found, though the dtype leaves eight bits."""
    policy = keras.config.dtype_policy()
    keras.config.set_dtype_policy("mixed_bfloat16")
    try:
        plain = behind(layers.LSTM(4, return_sequences=True), layers.Dense(2, name="out"))
        keeps = behind(KeepsTheLast(), samples=4)
    finally:
        keras.config.set_dtype_policy(policy)
    stateful.refuse_what_mixes_time(stateful.read_graph(plain))
    with pytest.raises(SplitError, match=r"the gradient of .* would be another"):
        stateful.refuse_what_mixes_time(stateful.read_graph(keeps))


@pytest.mark.gate
def test_a_metric_over_windows_of_unequal_lengths_is_named_once():
    """The loss is Keras's, and the metric is where the lengths are equal."""
    model = behind(layers.Dense(1))
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(4, STEPS, 3)).astype("float32"), rng.normal(size=(4, STEPS, 1)).astype("float32")
    model.compile("sgd", "mse", metrics=["mae"])
    loss, error = model.evaluate(x, y, verbose=0)
    for windows, told in ((3, False), (4, True)):
        with Pipeline.split(model, stages=2, windows=windows, transport="inproc") as pipe:
            pipe.compile("sgd", "mse", metrics=["mae"])
            with pytest.warns(UserWarning, match="count every window alike") if told else nullcontext() as found:
                ours = [pipe.evaluate(x, y, verbose=0) for _ in range(2)][-1]
        assert ours[0] == pytest.approx(loss, rel=1e-5)
        assert (ours[1] == pytest.approx(error, rel=1e-5)) != told
        assert not told or len(found) == 1


@pytest.mark.gate
def test_masked_steps_at_the_begin_of_a_window_repeat_the_output_before_them():
    """As Keras over the whole length, also where the mask is dropped behind them, or a whole window is masked."""
    words = np.array([[1, 2, 0, 0, 3, 4], [1, 2, 3, 0, 0, 0], [0, 0, 0, 1, 0, 2], [1, 0, 2, 3, 0, 4]])
    assert words.shape[1] == STEPS
    for more in ([], [layers.Lambda(without_the_mask), layers.LSTM(2, return_sequences=True)]):
        model = masked(*more)
        expected = model.predict(words, verbose=0)
        with Pipeline.split(model, stages=2, windows=3, microbatches=2, transport="inproc") as pipe:
            np.testing.assert_allclose(pipe.predict(words, verbose=0), expected, rtol=1e-5, atol=1e-6)
            pipe.compile("sgd", "mse", run_eagerly=True)
            pipe.verify(words, np.ones(expected.shape)).raise_if_failed()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"truncate": 2}, r"truncate=2 .* windows=1"),
        ({"windows": 2, "truncate": 3}, r"truncate=3 .* windows=2"),
        ({"windows": 2, "truncate": 1}, "truncate=.*no segment hands a state"),
        ({"keep_state": True}, "keep_state=.*no segment hands a state"),
    ],
)
def test_options_of_states_that_mean_nothing_are_refused(options, message):
    recurrent = options.get("truncate", 0) > 1
    model = behind() if recurrent else layers_without_states()
    with pytest.raises(ScheduleError, match=message):
        Pipeline.split(model, stages=1, transport="inproc", **options)


def layers_without_states():
    return keras.Sequential([keras.Input((STEPS, 3)), layers.Dense(2)])
