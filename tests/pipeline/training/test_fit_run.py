"""What one `fit` of a resumed training brings back, beside what a run leaves of itself, and what it refuses."""

import keras
import numpy as np
import pytest

from pipeline import CheckpointError, Pipeline, PipelineCheckpoint, VerifyEvery
from tests.pipeline.training import resumable
from tests.pipeline.training.resumable import Noting, Stopping, begin, callbacks, fit

pytestmark = [
    pytest.mark.gate,
    # Keras 3.15 itself reads variables in a way that NumPy 2 warns about.
    pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy:DeprecationWarning"),
]


CHANGES = {
    "a training step": lambda pipe: pipe.train_on_batch(resumable.X[:16], resumable.Y[:16]),
    "other weights": lambda pipe: pipe.set_weights([weight + 1 for weight in pipe.get_weights()]),
    "another rate": lambda pipe: setattr(pipe.optimizer, "learning_rate", 0.5),
}


def test_what_is_changed_between_resume_and_fit_is_refused(tmp_path):
    with begin() as pipe, pytest.raises(KeyboardInterrupt):
        fit(pipe, callbacks(), [Stopping(2), PipelineCheckpoint(tmp_path, 1)])
    for change in CHANGES.values():
        with Pipeline.resume(tmp_path, transport="inproc") as pipe:
            change(pipe)
            with pytest.raises(CheckpointError, match=r"changed between Pipeline.resume and fit"):
                fit(pipe, callbacks(), [Stopping(-1), PipelineCheckpoint(tmp_path, 1)])


def kept_states_trained(pipe, folder, behind=-1):
    x = resumable.X[:48].reshape(12, 4, 6)
    saving = [] if folder is None else [PipelineCheckpoint(folder, every=1)]
    options = {"batch_size": 4, "epochs": 2, "shuffle": False, "verbose": 0}
    pipe.fit(x, x[:, :, :1], callbacks=[Stopping(behind), *saving], **options)
    return [weight.tobytes() for weight in pipe.get_weights()]


def test_predictions_between_resume_and_fit_leave_no_trace_in_kept_states(tmp_path):
    def start():
        keras.utils.set_random_seed(5)
        layers = [keras.Input((4, 6)), keras.layers.GRU(3, return_sequences=True), keras.layers.Dense(1)]
        options = {"windows": 2, "keep_state": True, "microbatches": 1, "transport": "inproc"}
        pipe = Pipeline.split(keras.Sequential(layers), stages=2, **options)
        pipe.compile("sgd", "mean_squared_error", run_eagerly=True)
        return pipe

    with start() as pipe:
        whole = kept_states_trained(pipe, None)
    with start() as pipe, pytest.raises(KeyboardInterrupt):
        kept_states_trained(pipe, tmp_path, behind=3)
    with Pipeline.resume(tmp_path, transport="inproc") as pipe:
        pipe.predict(np.ones((4, 4, 6), "float32"), batch_size=4, verbose=0)
        assert kept_states_trained(pipe, tmp_path) == whole


class Halving(keras.callbacks.Callback):
    """Halves variables of the user's own behind every epoch."""

    def __init__(self, variables):
        super().__init__()
        self.halve = lambda: [variable.assign(variable * 0.5) for variable in variables]

    def on_epoch_end(self, epoch, logs=None):
        self.halve()


class Scaled(keras.losses.Loss):
    def __init__(self, factor):
        super().__init__()
        self.factor = factor

    def call(self, y_true, y_pred):
        return keras.ops.mean(keras.ops.square(y_true - y_pred), -1) * self.factor


def test_variables_of_losses_and_loss_weights_go_on_in_the_program_too(tmp_path):
    def trained_by_own(start, folder, behind=-1):
        weight, factor = keras.Variable(1.0, trainable=False), keras.Variable(1.0, trainable=False)
        with start({"loss": [Scaled(factor)], "loss_weights": [weight]}) as pipe:
            saving = [] if folder is None else [PipelineCheckpoint(folder, every=1)]
            given = [Halving([weight, factor]), Stopping(behind), *saving]
            try:
                pipe.fit(resumable.X, resumable.Y[:, None], batch_size=30, epochs=3, verbose=0, callbacks=given)
            except KeyboardInterrupt:
                return None
            told = pipe.evaluate(resumable.X, resumable.Y[:, None], verbose=0)
            return [one.tobytes() for one in pipe.get_weights()], told, float(weight), float(factor)

    def start(own):
        keras.utils.set_random_seed(5)
        layers = [keras.Input((6,)), keras.layers.Dense(4), keras.layers.Dense(1)]
        pipe = Pipeline.split(keras.Sequential(layers), stages=2, microbatches=1, transport="inproc")
        pipe.compile("sgd", run_eagerly=True, **own)
        return pipe

    whole = trained_by_own(start, None)
    assert whole[2:] == (0.125, 0.125)
    trained_by_own(start, tmp_path, behind=4)
    assert trained_by_own(lambda own: Pipeline.resume(tmp_path, transport="inproc", **own), tmp_path) == whole


def test_a_training_that_had_ended_is_there_again_callbacks_rates_and_random_numbers_too(tmp_path):
    def end(pipe):
        with pipe:
            noting, plateau = Noting(), keras.callbacks.ReduceLROnPlateau("loss", patience=1, min_delta=99, factor=0.1)
            saving = [PipelineCheckpoint(tmp_path, every=9)]
            fit(pipe, [noting, plateau], saving, batch_size=60, epochs=4, validation_split=0.0)
            drawn = (float(np.random.rand()), float(keras.random.uniform(())))
            left_behind = (noting.heard, plateau.best, plateau.wait, float(pipe.optimizer.learning_rate), drawn)
            pipe.train_on_batch(resumable.X[:16], resumable.Y[:16])
            return left_behind, [one.tobytes() for one in pipe.get_weights()]

    whole = end(begin())
    assert whole[0][3] < 0.01, "the rate was lowered"
    assert end(Pipeline.resume(tmp_path, transport="inproc")) == whole


def test_moving_averages_and_verification_go_on(tmp_path):
    def end(pipe, verifying, folder, behind=-1):
        saving = [] if folder is None else [PipelineCheckpoint(folder, every=1)]
        with pipe:
            try:
                fit(pipe, [], [Stopping(behind), *saving], batch_size=30, verify_every=verifying)
            except KeyboardInterrupt:
                return None
            return [one.tobytes() for one in pipe.get_weights()]

    def averaged():
        return begin(optimizer=keras.optimizers.Adam(0.01, use_ema=True, ema_momentum=0.5))

    def verifying():
        return VerifyEvery(None, at=[1])

    whole = end(averaged(), None, None)
    end(averaged(), verifying(), tmp_path, behind=4)
    going_on = verifying()
    assert end(Pipeline.resume(tmp_path, transport="inproc"), going_on, tmp_path) == whole
    assert going_on.step == 6 and set(going_on.seconds) == {1}, "steps are counted on, and none verified twice"


class OneBatch(keras.utils.PyDataset):
    """Shuffles itself behind every epoch with NumPy's numbers."""

    def __init__(self):
        super().__init__()
        self.order = np.arange(60)

    def __len__(self):
        return 1

    def __getitem__(self, batch):
        return resumable.X[self.order[:20]], resumable.Y[self.order[:20]]

    def on_epoch_end(self):
        np.random.shuffle(self.order)


def test_a_long_training_is_no_larger_where_it_is_saved_and_what_could_not_be_read_is_not_written(
    tmp_path, monkeypatch
):
    def end(pipe, folder, behind=-1):
        saving = [] if folder is None else [PipelineCheckpoint(folder, every=1, keep=9)]
        options = {"data": (OneBatch(),), "batch_size": None, "validation_split": 0.0, "epochs": 8}
        options |= {"shuffle": False, "validation_data": (resumable.X, resumable.Y)}
        with pipe:
            try:
                fit(pipe, [], [Stopping(behind), *saving], **options)
            except KeyboardInterrupt:
                return None
            return [one.tobytes() for one in pipe.get_weights()], np.random.rand()

    whole = end(begin(), None)
    end(begin(), tmp_path, behind=8)
    sizes = [(one / "manifest.json").stat().st_size for one in sorted(tmp_path.iterdir())]
    assert sizes[-1] - sizes[2] < 4 * 2000, "bytes an epoch; states of all generators as numbers are 20 times as many"
    assert end(Pipeline.resume(tmp_path, transport="inproc"), tmp_path) == whole
    monkeypatch.setattr("pipeline.saving.checkpoint.MANIFEST_BYTES", 1 << 10)
    with begin() as pipe, pytest.raises(CheckpointError, match=r"was not saved: its manifest.json would have"):
        pipe.save(tmp_path / "large")
    assert not (tmp_path / "large").exists()
