"""What Keras's callbacks write for a pipeline is what they write for the unsplit model."""

import csv
from importlib.util import find_spec

import keras
import numpy as np
import pytest
import tensorflow as tf

from pipeline import CompileError, Pipeline, PipelineCheckpoint
from tests.pipeline.reference.twins import (
    SEED,
    assert_same_arrays,
    callback_model,
    classes,
    classifier,
    crossentropy,
    numbers,
    regressor,
    twins,
)

# Keras 3.15 itself reads variables in a way that NumPy 2 warns about, in its callbacks and when it saves.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy:DeprecationWarning")
TENSORBOARD = find_spec("tensorboard") is not None

X, Y = classes(20)
XN, YN = numbers(20)


@pytest.mark.gate
def test_csv_logger_writes_the_same_file(tmp_path):
    with twins(classifier, crossentropy) as pair:
        paths = iter([tmp_path / "theirs.csv", tmp_path / "ours.csv"])
        pair.fit(
            X, Y, batch_size=8, epochs=2, validation_split=0.2,
            callbacks=lambda: [keras.callbacks.CSVLogger(next(paths))],
        )  # fmt: skip
        theirs, ours = ((tmp_path / name).read_text() for name in ("theirs.csv", "ours.csv"))
        assert ours == theirs
        assert len(list(csv.DictReader(ours.splitlines()))) == 2


def scalars(folder):
    found = []
    for file in sorted(folder.rglob("events*")):
        for record in tf.data.TFRecordDataset(str(file)):
            event = tf.compat.v1.Event.FromString(record.numpy())
            found += [
                (file.parent.name, v.tag, event.step, float(tf.make_ndarray(v.tensor))) for v in event.summary.value
            ]
    return sorted(found)


@pytest.mark.gate
@pytest.mark.skipif(not TENSORBOARD, reason="tensorboard is not installed")
def test_tensorboard_writes_the_same_scalars(tmp_path):
    with twins(classifier, crossentropy) as pair:
        paths = iter([tmp_path / "theirs", tmp_path / "ours"])
        pair.fit(
            X, Y, batch_size=8, epochs=2, validation_split=0.2,
            callbacks=lambda: [keras.callbacks.TensorBoard(next(paths), write_graph=False, update_freq=1)],
        )  # fmt: skip
        ours = scalars(tmp_path / "ours")
        assert ours == scalars(tmp_path / "theirs")
        assert {tag for _, tag, *_ in ours} >= {"epoch_loss", "epoch_accuracy", "batch_loss", "epoch_learning_rate"}


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda path: keras.callbacks.TensorBoard(path, write_graph=False, histogram_freq=1), "histogram_freq"),
        (lambda path: keras.callbacks.TensorBoard(path, write_graph=False, embeddings_freq=1), "embeddings_freq"),
        (lambda path: keras.callbacks.TensorBoard(path, write_graph=False, profile_batch=2), "profile_batch"),
        (lambda path: keras.callbacks.SwapEMAWeights(), "use_ema"),
    ],
    ids=["histograms", "embeddings", "profile", "swap"],
)
def test_a_callback_that_cannot_work_is_refused_before_the_first_step(make, match, tmp_path, monkeypatch):
    monkeypatch.setattr("pipeline.training.callbacks.find_spec", lambda name: name)
    with Pipeline.split(regressor(), stages=2, transport="inproc") as pipe:
        pipe.compile("sgd", "mse", run_eagerly=True)
        before = pipe.get_weights()
        with pytest.raises(CompileError, match=match):
            pipe.fit(XN, YN, verbose=0, callbacks=[[make(tmp_path)]])
        with pytest.raises(CompileError, match=match):
            pipe.evaluate(XN, YN, verbose=0, callbacks=make(tmp_path))
        assert_same_arrays(pipe.get_weights(), before)


def test_tensorboard_that_is_not_installed_is_said_at_the_start(tmp_path, monkeypatch):
    monkeypatch.setattr("pipeline.training.callbacks.find_spec", lambda name: None)
    with Pipeline.split(regressor(), stages=2, transport="inproc") as pipe:
        pipe.compile("sgd", "mse", run_eagerly=True)
        with pytest.raises(CompileError, match="pip install tensorboard"):
            pipe.fit(XN, YN, verbose=0, callbacks=keras.callbacks.TensorBoard(tmp_path, write_graph=False))


def test_model_checkpoint_writes_keras_files_that_go_on_in_keras(tmp_path):
    """The file has the optimizer's state: training it further equals training the pipeline further."""
    with twins(regressor, lambda: {"optimizer": keras.optimizers.Adam(0.02), "loss": "mse"}) as pair:
        slower = keras.callbacks.LambdaCallback(
            on_epoch_end=lambda *_: setattr(pair.pipe.optimizer, "learning_rate", 0.01)
        )
        saver = keras.callbacks.ModelCheckpoint(tmp_path / "{epoch}.keras")
        pair.pipe.fit(XN, YN, batch_size=10, epochs=2, verbose=0, shuffle=False, callbacks=[slower, saver])
        assert sorted(path.name for path in tmp_path.iterdir()) == ["1.keras", "2.keras"]
        model = keras.models.load_model(tmp_path / "2.keras")
        assert [layer.name for layer in model.layers] == ["a", "b"]
        assert_same_arrays(model.get_weights(), pair.pipe.get_weights())
        assert float(model.optimizer.learning_rate) == np.float32(0.01)
        model.run_eagerly = True
        theirs = model.fit(XN, YN, batch_size=10, verbose=0, shuffle=False).history
        ours = pair.pipe.fit(XN, YN, batch_size=10, verbose=0, shuffle=False).history
        assert ours == theirs
        assert_same_arrays(pair.pipe.get_weights(), model.get_weights())


@pytest.mark.gate
def test_model_checkpoint_keeps_the_best(tmp_path):
    with twins(regressor, lambda: {"optimizer": keras.optimizers.SGD(0.9), "loss": "mse", "metrics": ["mae"]}) as pair:
        paths = iter([tmp_path / "theirs.weights.h5", tmp_path / "ours.weights.h5"])
        pair.fit(
            XN, YN, batch_size=4, epochs=4,
            callbacks=lambda: [
                keras.callbacks.ModelCheckpoint(
                    next(paths), monitor="mae", save_best_only=True, save_weights_only=True
                )
            ],
        )  # fmt: skip
        weights = []
        for name in ("theirs", "ours"):
            model = regressor()
            model.load_weights(tmp_path / f"{name}.weights.h5", skip_mismatch=False)
            weights.append(model.get_weights())
        assert_same_arrays(weights[1], weights[0])


def test_weights_files_of_keras_load_into_the_stages(tmp_path):
    with twins(classifier, crossentropy) as pair:
        pair.model.fit(X, Y, batch_size=10, verbose=0)
        pair.model.save_weights(tmp_path / "w.weights.h5")
        callback_model(pair.pipe).load_weights(tmp_path / "w.weights.h5")
        pair.assert_weights_alike()


@pytest.mark.gate
def test_pipeline_checkpoint_writes_checkpoints_of_the_pipeline(tmp_path):
    keras.utils.set_random_seed(SEED)
    with Pipeline.split(regressor(), stages=2, transport="inproc") as pipe:
        pipe.compile(keras.optimizers.SGD(0.9), "mse", run_eagerly=True)
        best = PipelineCheckpoint(tmp_path / "best", monitor="loss", save_best_only=True)
        every = PipelineCheckpoint(tmp_path / "{epoch:02d}")
        history = pipe.fit(XN, YN, batch_size=4, epochs=4, verbose=0, callbacks=[best, every]).history
    assert sorted(path.name for path in tmp_path.iterdir()) == ["01", "02", "03", "04", "best"]
    number = int(np.argmin(history["loss"])) + 1
    loaded = []
    for name in ("best", f"{number:02d}"):
        with Pipeline.load(tmp_path / name, transport="inproc") as again:
            loaded.append(again.get_weights())
    assert_same_arrays(*loaded)
    with pytest.raises(CompileError, match="holds everything"):
        PipelineCheckpoint(tmp_path / "w", save_weights_only=True)


@pytest.mark.gate
def test_backup_and_restore_goes_on_where_it_was_interrupted(tmp_path):
    """An interrupted pipeline, restored in a new one, gives the bits of a run without interruption."""

    class PowerCut(Exception):
        pass

    def cut(epoch, logs):
        if epoch == 1:
            raise PowerCut

    def made():
        keras.utils.set_random_seed(SEED)
        pipe = Pipeline.split(regressor(), stages=2, microbatches=2, transport="inproc")
        pipe.compile(keras.optimizers.Adam(0.02), "mse", run_eagerly=True)
        return pipe

    arguments = {"batch_size": 10, "epochs": 3, "verbose": 0, "shuffle": False}
    halved = keras.callbacks.LearningRateScheduler(lambda epoch, rate: rate * 0.5)
    with made() as straight:
        straight.fit(XN, YN, callbacks=[halved], **arguments)
        expected = straight.get_weights()
    backup = keras.callbacks.BackupAndRestore(tmp_path / "backup", delete_checkpoint=False)
    with made() as first, pytest.raises(PowerCut):
        first.fit(XN, YN, callbacks=[halved, backup, keras.callbacks.LambdaCallback(on_epoch_end=cut)], **arguments)
    with made() as second:
        again = keras.callbacks.BackupAndRestore(tmp_path / "backup")
        history = second.fit(XN, YN, callbacks=[halved, again], **arguments)
        assert history.epoch == [2]
        assert int(second.optimizer.iterations) == 6
        assert_same_arrays(second.get_weights(), expected)
