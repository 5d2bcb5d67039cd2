"""Several inputs and outputs, their losses and metrics in different stages, against Keras on the unsplit model."""

import keras
import numpy as np
import pytest

from pipeline import CompileError, DataError, Pipeline
from tests.levels import in_turn
from tests.pipeline.reference.twins import SEED, assert_same_arrays, twins

layers = keras.layers
SAMPLES = 12


def tower():
    """An early output that later layers read too, one in the middle that nobody reads, and one at the end."""
    first, words = keras.Input((5,), name="first"), keras.Input((3,), dtype="int32", name="words")
    a = layers.Dense(6, activation="tanh", name="a")(first)
    early = layers.Dense(4, name="early")(a)
    e = layers.Flatten()(layers.Embedding(7, 2, name="embed")(words))
    b = layers.Concatenate(name="b")([early, e])
    middle = layers.Dense(1, name="middle")(b)
    c = layers.Dense(6, activation="relu", name="c")(b)
    c = layers.Add(name="add")([c, a])
    end = layers.Dense(3, activation="softmax", name="end")(c)
    return keras.Model([first, words], [end, early, middle])


def named():
    """The same with inputs and outputs in dicts."""
    inner = tower()
    end, early, middle = inner.outputs
    first, words = inner.inputs
    return keras.Model({"first": first, "words": words}, {"class": end, "code": early, "size": middle})


def data(samples=SAMPLES):
    random = np.random.default_rng(3)
    x = [random.normal(size=(samples, 5)).astype("float32"), random.integers(0, 7, (samples, 3)).astype("int32")]
    y = [
        random.integers(0, 3, samples),
        random.normal(size=(samples, 4)).astype("float32"),
        random.normal(size=(samples, 1)).astype("float32"),
    ]
    return x, y


def compiled():
    return {
        "optimizer": keras.optimizers.Adam(0.01),
        "loss": ["sparse_categorical_crossentropy", "mse", "mae"],
        "loss_weights": [1.0, 0.3, 0.7],
        "metrics": [["accuracy"], None, ["mse", keras.metrics.RootMeanSquaredError(name="rms")]],
        "weighted_metrics": [None, ["mae"], None],
    }


CUTS = {
    "one stage": [],
    "heads apart": ["early", "c"],
    "behind an output": ["early"],
    "every layer": [["a", "embed"], "early", "b", "middle", "c", "add"],
}


@pytest.mark.parametrize("cuts", in_turn(list(CUTS), 2, len(CUTS)))
def test_training_is_keras_bit_for_bit(cuts):
    """Weights, all losses, metrics and predictions after some steps; one microbatch a batch, eagerly."""
    x, y = data()
    with twins(tower, compiled, at=CUTS[cuts]) as pair:
        pair.assert_fit_alike(x, y, batch_size=5, epochs=2)
        theirs, ours = pair.both(lambda twin: twin.evaluate(x, y, batch_size=5, verbose=0))
        assert ours == theirs
        theirs, ours = pair.both(lambda twin: twin.evaluate(x, y, batch_size=5, verbose=0, return_dict=True))
        assert ours == theirs
        theirs, ours = pair.both(lambda twin: twin.predict(x, verbose=0))
        assert isinstance(ours, list) and len(ours) == 3
        assert_same_arrays(ours, theirs)


@pytest.mark.parametrize("schedule", in_turn(["gpipe", "1f1b"], 1, 1))
@pytest.mark.parametrize("run_eagerly", in_turn([True, False], 1, 2))
@pytest.mark.parametrize("recompute", in_turn([False, True], 1, 2))
def test_microbatches_are_one_tape(schedule, run_eagerly, recompute):
    x, y = data()
    weights = [np.linspace(0.5, 2, SAMPLES), None, np.linspace(1, 0, SAMPLES)]
    options = {"microbatches": 5, "schedule": schedule, "transport": "inproc", "recompute": recompute}
    with Pipeline.split(tower(), at=["early", "c"], **options) as pipe:
        pipe.compile(**{**compiled(), "run_eagerly": run_eagerly})
        pipe.verify(x, y, weights).raise_if_failed()
        pipe.train_on_batch(x, y, sample_weight=weights)
        pipe.verify(x, y, weights).raise_if_failed()


class Samples(keras.metrics.Metric):
    """How many samples it was shown: a pass that is made again must not be shown again."""

    def __init__(self, name="samples"):
        super().__init__(name=name)
        self.count = self.add_weight(name="count", initializer="zeros")

    def update_state(self, y_true, y_pred, sample_weight=None):
        self.count.assign_add(keras.ops.cast(keras.ops.shape(y_true)[0], "float32"))

    def result(self):
        return self.count


@pytest.mark.parametrize("run_eagerly", [True, False])
def test_metrics_are_shown_no_pass_that_is_made_again(run_eagerly):
    """Also in a stage whose output has a loss and goes on to other stages."""
    x, y = data()
    with Pipeline.split(tower(), at=["early", "c"], microbatches=5, transport="inproc", recompute=True) as pipe:
        pipe.compile(**{**compiled(), "metrics": [[Samples()], [Samples()], None], "run_eagerly": run_eagerly})
        found = pipe.train_on_batch(x, y, return_dict=True)
        assert {name: value for name, value in found.items() if "samples" in name} == {
            "end_samples": SAMPLES,
            "early_samples": SAMPLES,
        }


def test_the_whole_batch_under_keras(one_step_of_keras):
    """Any microbatches give the update of the whole batch, of all losses by their weights."""
    x, y = data()
    expected, loss = one_step_of_keras(tower, compiled, x, y)
    keras.utils.set_random_seed(SEED)
    with Pipeline.split(tower(), at=["early", "c"], microbatches=5, transport="inproc") as pipe:
        pipe.compile(**{**compiled(), "optimizer": keras.optimizers.SGD(0.1)})
        assert pipe.train_on_batch(x, y)[0] == pytest.approx(loss, rel=1e-6)
        for ours, theirs in zip(pipe.get_weights(), expected, strict=True):
            np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-6)


@pytest.fixture
def one_step_of_keras():
    def step(build, arguments, x, y):
        keras.utils.set_random_seed(SEED)
        model = build()
        model.compile(**{**arguments(), "optimizer": keras.optimizers.SGD(0.1)})
        loss = model.train_on_batch(x, y)[0]
        return model.get_weights(), loss

    return step


def test_dicts_of_inputs_and_outputs():
    (first, words), (end, early, middle) = data()
    x, y = {"first": first, "words": words}, {"class": end, "code": early, "size": middle}

    def arguments():
        return {
            "optimizer": "sgd",
            "loss": {"class": "sparse_categorical_crossentropy", "code": "mse", "size": "mae"},
            "loss_weights": {"class": 1.0, "code": 0.5, "size": 0.25},
            "metrics": {"class": ["accuracy"], "size": "mse"},
        }

    with twins(named, arguments, at=["early", "c"]) as pair:
        pair.assert_fit_alike(x, y, batch_size=5, epochs=2)
        theirs, ours = pair.both(lambda twin: twin.predict(x, verbose=0))
        assert sorted(ours) == sorted(theirs) == ["class", "code", "size"]
        assert_same_arrays([ours[k] for k in theirs], list(theirs.values()))


def test_an_output_without_a_loss_has_no_part_in_the_gradients():
    """What only it reaches has no gradient and is not updated, as in Keras."""
    x, (end, _, middle) = data()
    arguments = {"optimizer": "sgd", "loss": ["sparse_categorical_crossentropy", None, None]}
    keras.utils.set_random_seed(SEED)
    with Pipeline.split(tower(), at=["early", "middle"], microbatches=3, transport="inproc") as pipe:
        for run_eagerly in (True, False):
            pipe.compile(**arguments, run_eagerly=run_eagerly)
            found = pipe.gradients(x, [end, None, middle])
            without = {name.split("/")[-2] for name, gradient in found.items() if gradient is None}
            assert without == {"middle"}
            report = pipe.verify(x, [end])
            assert report.ok, report
            assert pipe.gradients(x, end).keys() == found.keys()


def test_predictions_need_no_compile_and_keep_their_nesting():
    x, _ = data()
    keras.utils.set_random_seed(SEED)
    model = named()
    with Pipeline.split(model, stages=3, transport="inproc", microbatches=4) as pipe:
        ours = pipe.predict_on_batch({"first": x[0], "words": x[1]})
        theirs = model({"first": x[0], "words": x[1]})
        assert sorted(ours) == sorted(theirs)
        for name in ours:
            np.testing.assert_allclose(ours[name], theirs[name], rtol=1e-5, atol=1e-6)


def test_segments_by_hand_say_which_tensors_are_outputs():
    x = keras.Input((4,))
    bottom = keras.Model(x, layers.Dense(3, name="low")(x))
    h = keras.Input((3,))
    top = keras.Model(h, layers.Dense(2, name="high")(h))
    random = np.random.default_rng(0)
    given, y = random.normal(size=(6, 4)), [random.normal(size=(6, 2)), random.normal(size=(6, 3))]
    from pipeline import Segment

    parts = [Segment(model=bottom, outputs=("h",)), Segment(model=top, inputs=("h",), outputs=("y",))]
    with Pipeline(parts, microbatches=2, transport="inproc", outputs=["y", "h"]) as pipe:
        pipe.compile("sgd", {"y": "mse", "h": "mae"}, run_eagerly=True)
        pipe.verify(given, y).raise_if_failed()
        assert [a.shape for a in pipe.predict_on_batch(given)] == [(6, 2), (6, 3)]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"loss": ["mse", "mse"]}, "3 outputs.*received 2 entries"),
        ({"loss": {"end": "mse", "erly": "mse", "middle": None}}, "names 'erly'; did you mean 'early'"),
        ({"loss": {"end": "mse"}}, "says nothing of 'early', 'middle'; give None"),
        ({"loss": ["mse"] * 3, "loss_weights": [1.0]}, "loss_weights.*received 1 entries"),
        ({"loss": ["mse"] * 3, "loss_weights": ["a", 1, 1]}, "loss weight of 'end' must be a number, received 'a'"),
        ({"loss": ["mse"] * 3, "metrics": ["mse"]}, "metrics.*received 1 entries"),
        ({"loss": ["mse", "mse", "meen"]}, "no loss called 'meen'"),
    ],
)
def test_what_does_not_fit_the_outputs_is_refused(arguments, message):
    with (
        Pipeline.split(tower(), stages=2, transport="inproc") as pipe,
        pytest.raises(CompileError, match=f"(?s){message}"),
    ):
        pipe.compile("sgd", **arguments)


@pytest.mark.parametrize(
    ("y", "weight", "message"),
    [
        (lambda y: y[:2], None, "3 outputs.*received 2 entries"),
        (lambda y: {"end": y[0], "early": y[1]}, None, r"received the keys \['early', 'end'\]"),
        (lambda y: y[0], None, "3 outputs.*received ndarray"),
        (
            lambda y: [y[0], y[1][:5], y[2]],
            None,
            r"y \('early'\) must have one target per sample: expected 12, received 5",
        ),
        (lambda y: y, {"edn": np.ones(12)}, r"sample_weight must be a list.*received the keys \['edn'\]"),
        (lambda y: y, [np.ones(12), np.ones(3), None], r"sample_weight \('early'\).*expected 12, received 3"),
    ],
)
def test_targets_that_do_not_fit_the_outputs_are_refused(y, weight, message):
    x, targets = data()
    with Pipeline.split(tower(), stages=2, transport="inproc") as pipe:
        pipe.compile(**compiled())
        with pytest.raises(DataError, match=f"(?s){message}"):
            pipe.train_on_batch(x, y(targets), sample_weight=weight)


@pytest.mark.parametrize("run_eagerly", [True, False])
def test_losses_that_couple_samples_beside_others(run_eagerly):
    """Dice over the whole batch at an early output that later stages read, a mean at the end."""
    x, (end, early, middle) = data()
    early = (early > 0).astype("float32")
    options = {"microbatches": 3, "schedule": "gpipe", "transport": "inproc"}
    with Pipeline.split(tower(), at=["early", "c"], **options) as pipe:
        loss = {"end": "sparse_categorical_crossentropy", "early": "dice", "middle": "mse"}
        pipe.compile("sgd", loss, loss_weights={"end": 1.0, "early": 0.5, "middle": 1.0}, run_eagerly=run_eagerly)
        pipe.verify(x, [end, early, middle]).raise_if_failed()


@pytest.mark.gate
def test_checkpoints_keep_losses_by_output(tmp_path):
    x, y = data()
    keras.utils.set_random_seed(SEED)
    with Pipeline.split(tower(), at=["early", "c"], microbatches=2, transport="inproc") as pipe:
        pipe.compile(**{**compiled(), "run_eagerly": True})
        pipe.train_on_batch(x, y)
        pipe.save(tmp_path / "here")
        for _ in range(2):
            last = pipe.train_on_batch(x, y)
        expected = pipe.get_weights()
    for options in ({}, {"stages": 1}, {"at": ["a", "add"]}):
        with Pipeline.load(tmp_path / "here", transport="inproc", **options) as again:
            for _ in range(2):
                found = again.train_on_batch(x, y)
            assert found == last
            assert_same_arrays(again.get_weights(), expected)


def test_an_untouched_input_is_no_output():
    x = keras.Input((3,), name="x")
    with pytest.raises(Exception, match=r"'x'.*one of its inputs, untouched.*Identity"):
        Pipeline.split(keras.Model(x, [layers.Dense(2)(x), x]), stages=1)


@pytest.mark.parametrize("weights", in_turn([None, 0.5], 1, 2))
@pytest.mark.parametrize("loss", ["mse", keras.losses.MeanAbsoluteError])
def test_one_loss_is_that_of_every_output(loss, weights):
    """Named and logged for each of them, as in Keras."""

    def two():
        inputs = keras.Input((5,))
        first = layers.Dense(3, activation="tanh", name="first")(inputs)
        return keras.Model(inputs, [layers.Dense(1, name="a")(first), layers.Dense(1, name="b")(first)])

    (x, _), (_, _, y) = data()
    given = loss if isinstance(loss, str) else loss()
    arguments = {"optimizer": "sgd", "loss": given, "loss_weights": weights}
    with twins(two, lambda: arguments, at=["first"]) as pair:
        history = pair.assert_fit_alike(x[0] if isinstance(x, list) else x, [y, 2 * y], batch_size=5, epochs=2)
    assert sorted(history) == ["a_loss", "b_loss", "loss"]
