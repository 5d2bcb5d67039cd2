"""Back-propagation through time over windows: cut in depth and in time, equal to one tape and to the full length."""

import keras
import numpy as np
import pytest
import tensorflow as tf

from pipeline import CompileError, DataError, Pipeline, ScheduleError, SplitError
from pipeline.model import stateful
from stages.layers.initial_states import LearnedState
from tests.levels import in_turn
from tests.pipeline.reference.twins import SEED, assert_same_arrays

layers = keras.layers
STEPS = 8


def tagger(steps=STEPS):
    """An output for every time step; two layers with states, random numbers and a regulariser between them."""
    return keras.Sequential(
        [
            keras.Input((steps, 3), name="x"),
            layers.LSTM(5, return_sequences=True, name="low"),
            layers.Dense(4, activation="tanh", name="between"),
            layers.GRU(4, return_sequences=True, kernel_regularizer="l2", name="high"),
            layers.Dense(2, name="out"),
        ]
    )


def classifier():
    """An output for the whole sequence, of word numbers."""
    return keras.Sequential(
        [
            keras.Input((STEPS,), dtype="int32", name="words"),
            layers.Embedding(7, 3, mask_zero=True, name="embed"),
            layers.SimpleRNN(4, return_sequences=True, name="low"),
            layers.RNN([layers.GRUCell(3), layers.LSTMCell(4)], name="high"),
            layers.Dense(3, activation="softmax", name="out"),
        ]
    )


def tags(samples=7, steps=STEPS):
    random = np.random.default_rng(0)
    return random.normal(size=(samples, steps, 3)).astype("float32"), random.normal(size=(samples, steps, 2))


def classes(samples=7):
    random = np.random.default_rng(0)
    words = random.integers(1, 7, (samples, STEPS))
    for row, length in zip(words, random.integers(3, STEPS + 1, samples), strict=True):
        row[length:] = 0  # padding, masked
    return words, random.integers(0, 3, samples)


CASES = {"tagger": (tagger, tags, "mse"), "classifier": (classifier, classes, "sparse_categorical_crossentropy")}
# All of four ways to cut time with one to three stages; the first ones are those of `make check` and of the gate.
CUTS = [
    (5, 3, 2),
    (5, None, 3),
    (6, 2, 1),
    (2, None, 2),
    (5, None, 1),
    (6, 2, 3),
    (5, 3, 3),
    (2, None, 1),
    (6, 2, 2),
    (5, 3, 1),
    (5, None, 2),
    (2, None, 3),
]
COMPILED = [
    (3, 5, 2, True, "tagger"),
    (2, 3, None, False, "classifier"),
    (2, 3, None, True, "classifier"),
    (3, 5, 2, False, "tagger"),
    (2, 3, None, True, "tagger"),
    (3, 5, 2, False, "classifier"),
    (3, 5, 2, True, "classifier"),
    (2, 3, None, False, "tagger"),
]


def split(build, **options):
    keras.utils.set_random_seed(SEED)
    return Pipeline.split(build(), **{"microbatches": 2, "transport": "inproc", **options})


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(
    ("windows", "truncate", "stages"),
    in_turn(CUTS, 2, 4, several=True),
)
def test_eager_windows_are_one_tape_bit_for_bit(case, stages, windows, truncate):
    build, data, loss = CASES[case]
    schedule = "gpipe" if stages == 2 else "1f1b"
    with split(build, stages=stages, windows=windows, truncate=truncate, schedule=schedule) as pipe:
        pipe.compile("sgd", loss, run_eagerly=True)
        report = pipe.verify(*data())
        assert report.ok and report.tolerance.relative == 0.0, report
        assert f"{windows} windows" in report.headline


@pytest.mark.gate
@pytest.mark.parametrize(
    ("stages", "windows", "truncate", "recompute", "case"),
    in_turn(COMPILED, 1, 2, several=True),
)
def test_compiled_windows_are_one_tape(case, stages, windows, truncate, recompute):
    build, data, loss = CASES[case]
    with split(build, stages=stages, windows=windows, truncate=truncate, recompute=recompute) as pipe:
        pipe.compile("sgd", loss)
        pipe.verify(*data()).raise_if_failed()


@pytest.mark.parametrize(
    ("case", "run_eagerly"),
    in_turn([("tagger", False), ("classifier", True), ("tagger", True), ("classifier", False)], 0, 2, several=True),
)
def test_windows_are_the_full_length_of_the_uncut_model(case, run_eagerly):
    """Loss, metrics, gradients, predictions and an update are those of Keras on the whole sequences, within 1e-6."""
    build, data, loss = CASES[case]
    x, y = data()
    with split(build, stages=3, windows=4) as pipe:
        metrics = ["mae"] if case == "tagger" else ["accuracy"]
        pipe.compile(keras.optimizers.SGD(0.1), loss, metrics=metrics, run_eagerly=run_eagerly)
        model = pipe.merge()
        model.compile(keras.optimizers.SGD(0.1), loss, metrics=metrics)
        np.testing.assert_allclose(pipe.predict(x, verbose=0), model.predict(x, verbose=0), rtol=1e-5, atol=1e-6)
        for ours, theirs in zip(pipe.evaluate(x, y, verbose=0), model.evaluate(x, y, verbose=0), strict=True):
            assert ours == pytest.approx(theirs, rel=1e-5)
        with tf.GradientTape() as tape:
            value = model.compute_loss(y=tf.constant(y), y_pred=model(tf.constant(x), training=True))
        expected = tape.gradient(value, [v.value for v in model.trainable_variables])
        found = list(pipe.gradients(x, y).values())
        largest = max(float(tf.reduce_max(tf.abs(tf.convert_to_tensor(g)))) for g in expected)
        for ours, theirs in zip(found, expected, strict=True):
            assert np.abs(ours - tf.convert_to_tensor(theirs)).max() <= 1e-6 * largest
        assert pipe.train_on_batch(x, y)[0] == pytest.approx(model.train_on_batch(x, y)[0], rel=1e-5)
        for ours, theirs in zip(pipe.get_weights(), model.get_weights(), strict=True):
            np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-6)


@pytest.mark.gate
def test_truncation_changes_the_gradient_and_not_the_loss():
    x, y = tags()
    losses, gradients = [], []
    for truncate in (None, 2, 1):
        with split(tagger, stages=2, windows=4, truncate=truncate) as pipe:
            pipe.compile("sgd", "mse", run_eagerly=True)
            losses.append(pipe.test_on_batch(x, y))
            found = pipe.gradients(x, y)
            gradients.append(next(g for name, g in found.items() if name.endswith("low/lstm_cell/recurrent_kernel")))
    assert losses[0] == losses[1] == losses[2]
    assert not np.allclose(gradients[0], gradients[1], rtol=1e-3)
    assert not np.allclose(gradients[1], gradients[2], rtol=1e-3)


@pytest.mark.gate
def test_training_over_windows_with_fit_and_another_length():
    """The time axis is free: sequences of another length, and one window of unequal length, need nothing new."""
    x, y = tags(16)
    with split(tagger, stages=2, windows=5) as pipe:
        pipe.compile(keras.optimizers.Adam(0.02), "mse")
        history = pipe.fit(x, y, batch_size=8, epochs=8, verbose=0).history["loss"]
        assert history[-1] < 0.95 * history[0]
        longer, target = tags(4, steps=11)
        assert pipe.predict(longer, verbose=0).shape == (4, 11, 2)
        pipe.verify(longer, target).raise_if_failed()


def test_sample_weights_per_time_step():
    x, y = tags()
    weight = np.random.default_rng(2).random((7, STEPS))
    with split(tagger, stages=2, windows=5) as pipe:
        pipe.compile("sgd", keras.losses.MeanSquaredError(reduction="mean_with_sample_weight"), run_eagerly=True)
        pipe.verify(x, y, weight).raise_if_failed()
        model = pipe.merge()
        model.compile("sgd", keras.losses.MeanSquaredError(reduction="mean_with_sample_weight"))
        ours, theirs = (twin.test_on_batch(x, y, sample_weight=weight) for twin in (pipe, model))
        assert ours == pytest.approx(theirs, rel=1e-5)


def test_states_kept_over_batches_are_values_only():
    """The second half of a sequence as a batch of its own begins where the first ended; resetting begins anew."""
    x, y = tags(4)
    with split(tagger, stages=2, windows=2, keep_state=True, microbatches=2) as pipe:
        pipe.compile("sgd", "mse", run_eagerly=True)
        whole = pipe.merge().predict(x, verbose=0)
        half = STEPS // 2
        first, second = pipe.predict_on_batch(x[:, :half]), pipe.predict_on_batch(x[:, half:])
        np.testing.assert_allclose(np.concatenate([first, second], axis=1), whole, rtol=1e-5, atol=1e-6)
        pipe.verify(x[:, :half], y[:, :half]).raise_if_failed()  # from the kept states, which it leaves as they are
        again = pipe.predict_on_batch(x[:, half:])
        assert not np.allclose(again, second)
        pipe.reset_state()
        assert_same_arrays([pipe.predict_on_batch(x[:, :half])], [first])
        pipe.compile(keras.optimizers.SGD(0.0), "mse", run_eagerly=True)
        pipe.reset_state()
        pipe.train_on_batch(x[:, :half], y[:, :half])  # training leaves its states, too
        assert_same_arrays([pipe.predict_on_batch(x[:, half:])], [second])


@pytest.mark.gate
def test_checkpoints_keep_windows_and_go_on_in_other_cuts(tmp_path):
    x, y = tags()
    with split(tagger, stages=3, windows=5, truncate=2) as pipe:
        pipe.compile(keras.optimizers.Adam(0.02), "mse", run_eagerly=True)
        pipe.train_on_batch(x, y)
        pipe.save(tmp_path / "here")
        last = [pipe.train_on_batch(x, y) for _ in range(2)]
        expected = pipe.get_weights()
    for options in ({}, {"stages": 1}):
        with Pipeline.load(tmp_path / "here", transport="inproc", **options) as again:
            assert [again.train_on_batch(x, y) for _ in range(2)] == last
            assert_same_arrays(again.get_weights(), expected)


@pytest.mark.gate
def test_windows_over_processes():
    x, y = tags()
    with split(tagger, stages=2, windows=3, transport="auto") as pipe:
        pipe.compile("sgd", "mse", run_eagerly=True)
        pipe.verify(x, y).raise_if_failed()
        steps = [str(span.action) for span in pipe.timeline(x, y, repeats=1).spans if span.worker == 1]
        assert steps[:6] == ["F1.0", "F1.0/1", "F1.0/2", "B1.0/2", "B1.0/1", "B1.0"]


@pytest.mark.parametrize(
    ("x", "y", "message"),
    [
        (np.zeros((4, 3, 3)), np.zeros((4, 3, 2)), r"3 time step\(s\) cannot be cut into 5 windows; ask for at most 3"),
        (np.zeros((4, 12, 3)), np.zeros((4, 11, 2)), r"y \('out'\) must have one entry per time step.*\(n, 12, ...\)"),
        (np.zeros((4, 12, 3)), np.zeros(4), "one entry per time step"),
    ],
)
def test_batches_that_do_not_fit_the_windows_are_refused(x, y, message):
    with split(tagger, stages=2, windows=5) as pipe:
        pipe.compile("sgd", "mse")
        with pytest.raises(DataError, match=message):
            pipe.train_on_batch(x, y)


def bidirectional():
    return keras.Sequential([keras.Input((6, 3)), layers.Bidirectional(layers.GRU(2), name="both")])


def backwards():
    return keras.Sequential([keras.Input((6, 3)), layers.GRU(2, go_backwards=True, name="back")])


def attention():
    x = keras.Input((6, 3))
    return keras.Model(x, layers.MultiHeadAttention(1, 2, name="look")(x, x))


def convolution():
    return keras.Sequential([keras.Input((6, 3)), layers.Conv1D(2, 3, name="wide"), layers.GRU(2)])


def called_twice():
    a, b = keras.Input((6, 3)), keras.Input((6, 3))
    rnn = layers.GRU(2, name="twice")
    return keras.Model([a, b], layers.Add()([rnn(a), rnn(b)]))


def encoder_and_decoder():
    x = keras.Input((6, 3))
    _, state = layers.GRU(2, return_state=True, name="encoder")(x)
    return keras.Model(x, layers.GRU(2, name="decoder")(x, initial_state=layers.Dense(2)(state)))


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (bidirectional, "'both' .Bidirectional. cannot be run window by window: it reads the sequence from its end"),
        (backwards, "'back' goes backward in time"),
        (attention, "'look' .MultiHeadAttention. cannot be run window by window: it reads several time steps"),
        (convolution, "'wide' .Conv1D. cannot be run window by window"),
        (called_twice, "'twice' is called several times"),
        (encoder_and_decoder, "'decoder' begins with a state of 'encoder', which is there only behind its last window"),
    ],
)
def test_what_windows_would_change_is_refused(build, message):
    with pytest.raises(SplitError, match=message):
        Pipeline.split(build(), stages=1, windows=2)


def test_a_loss_that_couples_samples_is_refused():
    with split(tagger, stages=2, windows=2, schedule="gpipe") as pipe, pytest.raises(CompileError, match="by window"):
        pipe.compile("sgd", "dice")


def test_a_stateful_keras_layer_is_handed_over_and_says_so():
    model = keras.Sequential([keras.Input((6, 3), batch_size=2), layers.GRU(2, stateful=True, name="keeps")])
    with pytest.warns(UserWarning, match="'keeps' is stateful: its state is a variable, which no gradient passes"):
        part = stateful.stateful(model)
    assert part.states == ("keeps",)
    assert [v is w for v, w in zip(part.model.trainable_variables, model.trainable_variables, strict=True)] == [
        True
    ] * 3
    with pytest.warns(UserWarning, match=r"'keeps' is stateful: it keeps.*gradients do not.*windows="):
        Pipeline([model], microbatches=1, transport="inproc").close()
    with pytest.raises(SplitError, match="no recurrent layer"):
        stateful.stateful(keras.Sequential([keras.Input((6, 3)), layers.Dense(2)]))


def test_states_kept_for_some_layers_only_or_for_none_are_refused():
    keeps = layers.GRU(2, stateful=True, return_sequences=True, name="keeps")
    mixed = keras.Sequential([keras.Input((6, 3), batch_size=2), keeps, layers.GRU(2, name="plain")])
    with (
        pytest.warns(UserWarning, match="from batch to batch with keep_state=True only"),
        pytest.raises(SplitError, match="'plain' is not stateful while 'keeps' is"),
    ):
        Pipeline.split(mixed, stages=1, keep_state=True)
    with pytest.raises(ScheduleError, match="no recurrent layer"):
        Pipeline.split(keras.Sequential([keras.Input((3,)), layers.Dense(2)]), stages=1, keep_state=True)


def test_dropout_which_is_drawn_once_a_window_does_not_stop_the_first_batch():
    x, y = np.ones((2, 4, 3), "float32"), np.ones((2, 4, 2), "float32")
    rows = [keras.Input((4, 3)), layers.Dropout(0.5, seed=1), layers.GRU(2, return_sequences=True)]
    with Pipeline.split(keras.Sequential(rows), stages=1, windows=2, microbatches=1, transport="inproc") as pipe:
        pipe.compile("sgd", "mse", run_eagerly=True)
        assert np.isfinite(pipe.train_on_batch(x, y))


def given_start():
    """The LSTM's two initial states are inputs, the GRU's is learned."""
    x, h, c = keras.Input((STEPS, 3), name="x"), keras.Input((5,), name="h"), keras.Input((5,), name="c")
    y = layers.LSTM(5, return_sequences=True, name="low")(x, initial_state=[h, c])
    y = layers.GRU(4, return_sequences=True, name="high")(y, initial_state=LearnedState(4, "normal", name="start")(y))
    return keras.Model([x, h, c], layers.Dense(2, name="out")(y))


@pytest.mark.gate
@pytest.mark.parametrize(
    ("stages", "run_eagerly"), in_turn([(3, True), (1, False), (1, True), (3, False)], 1, 2, several=True)
)
def test_given_and_learned_initial_states(stages, run_eagerly):
    """They count in window 0 only, and the learned one is trained: as over the full length."""
    x, y = tags()
    random = np.random.default_rng(4)
    data = [x, *(random.normal(size=(7, 5)).astype("float32") for _ in range(2))]
    with split(given_start, stages=stages, windows=4) as pipe:
        pipe.compile(keras.optimizers.SGD(0.5), "mse", run_eagerly=run_eagerly)
        pipe.verify(data, y).raise_if_failed()
        model = pipe.merge()
        model.compile(keras.optimizers.SGD(0.5), "mse", run_eagerly=True)
        np.testing.assert_allclose(pipe.predict(data, verbose=0), model.predict(data, verbose=0), rtol=1e-5, atol=1e-6)
        before = model.get_layer("start").state.numpy()
        for twin in (pipe, model):
            twin.train_on_batch(data, y)
        for ours, theirs in zip(pipe.get_weights(), model.get_weights(), strict=True):
            np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-6)
        assert np.abs(pipe.merge().get_layer("start").state.numpy() - before).max() > 1e-4
