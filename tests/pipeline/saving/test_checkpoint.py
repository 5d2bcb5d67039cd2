"""A loaded pipeline continues as if never stopped, over the same and over other cuts; damage is found, never loaded."""

import json

import keras
import numpy as np
import pytest

from pipeline import CheckpointError, CompileError, Pipeline, Segment, SplitError
from pipeline.errors import ScheduleError
from pipeline.plan.schedules import TunedSchedule
from pipeline.saving import checkpoint as module
from pipeline.saving import folder
from tests.levels import in_turn
from tests.pipeline import parts
from tests.pipeline.reference.twins import SEED, assert_same_arrays, classes, classifier, numbers, regressor

X, Y = classes(12)
XN, YN = numbers(12)
INPROC = {"transport": "inproc"}


def deep():
    """Several layers with state, so that other cuts move something."""
    return keras.Sequential(
        [
            keras.Input((6,)),
            keras.layers.Dense(7, activation="tanh", name="a"),
            keras.layers.BatchNormalization(name="norm"),
            keras.layers.Dropout(0.4, name="drop1"),
            keras.layers.Dense(5, activation="tanh", name="b"),
            keras.layers.Dropout(0.4, name="drop2"),
            keras.layers.Dense(3, activation="softmax", name="c"),
        ]
    )


def trained(model, steps=2, optimizer=None, loss="sparse_categorical_crossentropy", data=(X, Y), **options):
    pipe = Pipeline.split(model, **{"stages": 4, "microbatches": 3, **INPROC, **options})
    pipe.compile(optimizer or keras.optimizers.Adam(0.03), loss, metrics=["accuracy"], run_eagerly=True)
    for _ in range(steps):
        pipe.train_on_batch(*data)
    return pipe


def everything(pipe):
    """Losses of two more steps, then all weights."""
    return [np.float64(pipe.train_on_batch(X, Y)) for _ in range(2)] + pipe.get_weights()


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A checkpoint after two steps, and what the pipeline that was never stopped did next."""
    keras.utils.set_random_seed(SEED)
    path = tmp_path_factory.mktemp("run") / "step-2"
    with trained(deep()) as pipe:
        pipe.save(path)
        return path, pipe.get_weights(), everything(pipe)


@pytest.mark.parametrize(
    "where",
    [
        {},
        {"stages": 4},
        {"stages": 2},
        {"stages": 1},
        {"stages": 6},
        {"at": ["norm"]},
        {"at": ["a", "drop2"]},
        {"stages": 2, "schedule": "gpipe", "recompute": True},
        {"stages": 3, "transport": "ipc"},
    ],
    ids=str,
)
def test_loaded_over_any_cuts_continues_bit_for_bit(saved, where):
    """Adam's moments, dropout's generators and moving statistics among it."""
    path, weights, expected = saved
    with Pipeline.load(path, **{**INPROC, **where}) as pipe:
        assert len(pipe.names) == where.get("stages", 4 if "at" not in where else len(where["at"]) + 1)
        assert pipe.microbatches == 3
        assert_same_arrays(pipe.get_weights(), weights)
        assert int(pipe.optimizer.iterations) == 2
        assert_same_arrays(everything(pipe), expected)


def test_saved_loaded_and_saved_again_is_the_same(saved, tmp_path):
    path, _, expected = saved
    with Pipeline.load(path, stages=2, **INPROC) as pipe:
        pipe.save(tmp_path / "again")
    with Pipeline.load(tmp_path / "again", stages=3, **INPROC) as pipe:
        assert_same_arrays(everything(pipe), expected)


@pytest.mark.parametrize("stages", [2, 3, 5])
def test_the_same_cuts_through_branches(stages, tmp_path):
    """Where branches run side by side, a cut cannot be named by the layer before it: its position is kept."""
    x = keras.Input((6,))
    left = keras.layers.Dense(4, name="left2")(keras.layers.Dense(9, name="left1")(x))
    right = keras.layers.Dense(4, name="right")(keras.layers.ReLU()(x))
    model = keras.Model(x, keras.layers.Dense(3, activation="softmax")(keras.layers.Add()([right, left])))
    with trained(model, stages=stages) as pipe:
        pipe.save(tmp_path / "c")
        wires, expected = pipe.wires, everything(pipe)
    with Pipeline.load(tmp_path / "c", **INPROC) as pipe:
        assert pipe.wires == wires
        assert_same_arrays(everything(pipe), expected)


@pytest.mark.gate
@pytest.mark.parametrize(("schedule", "placement"), [("1f1b", (0, 0, 0, 1, 1, 1)), ("interleaved", (0, 1) * 3)])
def test_each_worker_has_as_many_stages_as_before(schedule, placement, tmp_path):
    with trained(deep(), steps=1, stages=6, schedule=TunedSchedule(schedule, chunks=3)) as pipe:
        assert pipe.session.workers.placement == placement
        pipe.save(tmp_path / "c")
        expected = everything(pipe)
    with Pipeline.load(tmp_path / "c", **INPROC) as pipe:
        assert pipe.session.workers.placement == placement
        assert_same_arrays(everything(pipe), expected)
    with Pipeline.load(tmp_path / "c", stages=4, schedule="1f1b", **INPROC) as pipe:
        assert pipe.session.workers.placement == (0, 1, 2, 3)
    with pytest.raises(ScheduleError, match=r"gives each worker 3 stages, and 4 stage\(s\) cannot be divided so"):
        Pipeline.load(tmp_path / "c", stages=4, **INPROC)


OPTIMIZERS = {
    "momentum": lambda: keras.optimizers.SGD(0.05, momentum=0.9),
    "schedule": lambda: keras.optimizers.Adam(keras.optimizers.schedules.ExponentialDecay(0.1, 1, 0.5)),
    "accumulation": lambda: keras.optimizers.SGD(0.1, gradient_accumulation_steps=3),
    "averages": lambda: keras.optimizers.AdamW(0.05, use_ema=True, ema_overwrite_frequency=3),
    "nadam": lambda: keras.optimizers.Nadam(0.05),
    "adafactor": lambda: keras.optimizers.Adafactor(0.05),
    "global norm": lambda: keras.optimizers.Adam(0.05, global_clipnorm=0.1),
}


@pytest.mark.parametrize("name", in_turn(list(OPTIMIZERS), 2, len(OPTIMIZERS)))
def test_every_kind_of_optimizer_state_moves_to_other_cuts(name, tmp_path):
    keras.utils.set_random_seed(SEED)
    with trained(deep(), optimizer=OPTIMIZERS[name](), stages=3, microbatches=1) as pipe:
        pipe.save(tmp_path / "c")
        expected = everything(pipe)
    # A norm over all stages is summed stage by stage: it keeps its bits only under the same cuts.
    with Pipeline.load(tmp_path / "c", stages=3 if name == "global norm" else 2, **INPROC) as pipe:
        assert type(pipe.optimizer) is type(OPTIMIZERS[name]())
        assert_same_arrays(everything(pipe), expected)


def test_a_learning_rate_that_was_set_is_kept(tmp_path):
    with trained(deep(), steps=1) as pipe:
        pipe.optimizer.learning_rate = 0.001
        pipe.save(tmp_path / "c")
        expected = everything(pipe)
    with Pipeline.load(tmp_path / "c", **INPROC) as pipe:
        assert float(pipe.optimizer.learning_rate) == np.float32(0.001)
        assert_same_arrays(everything(pipe), expected)


def test_what_compile_was_given_is_restored(saved):
    with Pipeline.load(saved[0], **INPROC) as pipe:
        theirs = pipe.evaluate(X, Y, verbose=0, return_dict=True)
        assert sorted(theirs) == ["accuracy", "loss"]
        assert pipe.verify(X, Y).ok


def test_a_loaded_pipeline_may_be_compiled_anew(saved):
    with Pipeline.load(saved[0], **INPROC) as pipe:
        pipe.compile("sgd", "mse", run_eagerly=True)
        assert int(pipe.optimizer.iterations) == 0
        assert_same_arrays(pipe.get_weights(), saved[1])
        assert pipe.train_on_batch(X, np.eye(3, dtype="float32")[Y])[0] > 0  # the metrics stay


def test_a_pipeline_that_was_never_compiled(tmp_path):
    with Pipeline.split(regressor(), stages=2, **INPROC) as pipe:
        pipe.save(tmp_path / "c")
        expected = pipe.predict(XN, verbose=0)
    with Pipeline.load(tmp_path / "c", stages=1, **INPROC) as pipe:
        with pytest.raises(CompileError, match="compile"):
            pipe.fit(XN, YN)
        np.testing.assert_allclose(pipe.predict(XN, verbose=0), expected, rtol=1e-6)
        pipe.compile("adam", "mse", run_eagerly=True)
        pipe.train_on_batch(XN, YN)


def test_bfloat16_variables_keep_their_bits(tmp_path):
    def model():
        return keras.Sequential(
            [keras.Input((6,)), keras.layers.Dense(4, dtype="bfloat16"), keras.layers.Dense(3, activation="softmax")]
        )

    with trained(model(), stages=2) as pipe:
        pipe.save(tmp_path / "c")
        weights, expected = pipe.get_weights(), everything(pipe)
    assert weights[0].dtype.name == "bfloat16"
    with Pipeline.load(tmp_path / "c", stages=1, **INPROC) as pipe:
        assert_same_arrays(pipe.get_weights(), weights)
        assert_same_arrays(everything(pipe), expected)


@pytest.mark.parametrize("built", in_turn([True, False], 1, 2), ids=["models", "builders"])
@pytest.mark.parametrize("where", [{}, {"stages": 2}, {"stages": 3}, {"at": ["b1"]}], ids=str)
def test_pipelines_put_together_by_hand_load_and_are_cut_again(built, where, tmp_path):
    keras.utils.set_random_seed(SEED)
    if built:
        segments = [parts.bottom(rate=0.4), parts.top()]
    else:
        segments = [Segment(parts.bottom, kwargs={"rate": 0.4}, name="low"), Segment("tests.pipeline.parts:top")]
    with Pipeline(segments, microbatches=2, **INPROC) as pipe:
        pipe.compile(keras.optimizers.Adam(0.05), "mse", run_eagerly=True)
        pipe.train_on_batch(XN, YN)
        pipe.save(tmp_path / "c")
        names = pipe.names
        expected = [np.float64(pipe.train_on_batch(XN, YN)) for _ in range(2)] + pipe.get_weights()
    trust = () if built else ["tests.pipeline.parts"]
    with Pipeline.load(tmp_path / "c", trust=trust, **where, **INPROC) as pipe:
        assert where or pipe.names == names
        again = [np.float64(pipe.train_on_batch(XN, YN)) for _ in range(2)] + pipe.get_weights()
        assert_same_arrays(again, expected)


def test_custom_classes_from_importable_modules(tmp_path):
    keras.utils.set_random_seed(SEED)
    model = keras.Sequential(
        [keras.Input((6,)), keras.layers.Dense(3), parts.Scale(3.0), parts.Shift(), keras.layers.Dense(1)]
    )
    with Pipeline.split(model, stages=2, **INPROC) as pipe:
        pipe.compile("adam", parts.Quartic(2.0), metrics=[parts.Largest()], run_eagerly=True)
        pipe.train_on_batch(XN, YN)
        pipe.save(tmp_path / "c")
        expected = pipe.train_on_batch(XN, YN)
    with Pipeline.load(tmp_path / "c", stages=3, **INPROC) as pipe:
        assert pipe.train_on_batch(XN, YN) == expected


@pytest.fixture
def small(tmp_path):
    path = tmp_path / "c"
    with trained(classifier(), stages=2) as pipe:
        pipe.save(path)
    return path


def edit(path, change):
    manifest = json.loads((path / "manifest.json").read_text())
    change(manifest)
    (path / "manifest.json").write_text(json.dumps(manifest))


def flip_a_byte(path):
    data = bytearray((path / "stage-1.npz").read_bytes())
    data[len(data) // 2] ^= 1
    (path / "stage-1.npz").write_bytes(data)


DAMAGE = {
    "no manifest": (lambda path: (path / "manifest.json").unlink(), "no checkpoint at"),
    "cut off manifest": (lambda path: (path / "manifest.json").write_text('{"format": '), "damaged"),
    "a list for a manifest": (lambda path: (path / "manifest.json").write_text("[]"), "not a checkpoint"),
    "another format": (lambda path: edit(path, lambda m: m.update(format="x")), "not a checkpoint"),
    "a later version": (lambda path: edit(path, lambda m: m.update(version=99)), "version 99"),
    "lacking entries": (lambda path: edit(path, lambda m: m.pop("stage_of")), "lacks stage_of"),
    "a file gone": (lambda path: (path / "stage-0.npz").unlink(), "stage-0.npz is missing"),
    "a flipped bit": (flip_a_byte, "stage-1.npz changed"),
    "a file cut off": (lambda path: (path / "stage-1.npz").write_bytes(b"PK"), "stage-1.npz changed"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damage_is_found(small, name):
    damage, match = DAMAGE[name]
    damage(small)
    with pytest.raises(CheckpointError, match=match):
        Pipeline.load(small, **INPROC)


def test_what_is_no_checkpoint_at_all(tmp_path):
    with pytest.raises(CheckpointError, match="no checkpoint at"):
        Pipeline.load(tmp_path / "nowhere")
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="no checkpoint at"):
        Pipeline.load(tmp_path / "file")


def test_cuts_that_cannot_be_are_refused_as_in_split(small):
    with pytest.raises(SplitError, match="at most"):
        Pipeline.load(small, stages=40, **INPROC)
    with pytest.raises(SplitError, match="'norm'"):
        Pipeline.load(small, at=["nrom"], **INPROC)


def test_overwriting(tmp_path):
    path = tmp_path / "deep" / "run"
    with trained(classifier(), stages=2, steps=0) as pipe:
        pipe.save(path)
        pipe.train_on_batch(X, Y)
        with pytest.raises(CheckpointError, match="overwrite=True"):
            pipe.save(path, overwrite=False)
        pipe.save(str(path))
        weights = pipe.get_weights()
        (tmp_path / "mine").mkdir()
        with pytest.raises(CheckpointError, match="is no checkpoint"):
            pipe.save(tmp_path / "mine")
    with Pipeline.load(path, **INPROC) as again:
        assert_same_arrays(again.get_weights(), weights)
    assert [entry.name for entry in path.parent.iterdir()] == ["run"]


@pytest.mark.parametrize("exchange", [True, False], ids=["exchange", "two renames"])
def test_a_checkpoint_is_replaced_whole(small, exchange, monkeypatch):
    if not exchange:
        monkeypatch.setattr(folder, "_exchange", lambda one, other: False)
    (small / "stage-7.npz").write_text("of an older one that had more stages")
    (small / "notes.txt").write_text("of the user")
    with Pipeline.load(small, **INPROC) as pipe:
        pipe.train_on_batch(X, Y)
        pipe.save(small)
        weights = pipe.get_weights()
    assert sorted(file.name for file in small.iterdir()) == [
        "manifest.json",
        "notes.txt",
        "stage-0.npz",
        "stage-1.npz",
    ]
    assert (small / "notes.txt").read_text() == "of the user"
    assert [entry.name for entry in small.parent.iterdir()] == [small.name]
    with Pipeline.load(small, **INPROC) as pipe:
        assert_same_arrays(pipe.get_weights(), weights)


def test_a_save_that_fails_leaves_the_older_checkpoint_and_nothing_else(small, monkeypatch):
    before = {file.name: file.read_bytes() for file in small.iterdir()}

    def full(path, text):
        raise OSError("no space left on device")

    with Pipeline.load(small, **INPROC) as pipe:
        pipe.train_on_batch(X, Y)
        monkeypatch.setattr(module, "_write_text", full)
        with pytest.raises(OSError, match="no space"):
            pipe.save(small)
        assert pipe.train_on_batch(X, Y)
    assert {file.name: file.read_bytes() for file in small.iterdir()} == before
    assert [entry.name for entry in small.parent.iterdir()] == [small.name]


def test_without_an_optimizer_it_is_cut_again_too(tmp_path):
    x, y = np.ones((4, 6), "float32"), np.ones((4, 1), "float32")
    with Pipeline.split(regressor(), stages=2, transport="inproc") as pipe:
        pipe.compile(optimizer=None, loss="mse", run_eagerly=True)
        expected = pipe.test_on_batch(x, y)
        pipe.save(tmp_path / "here")
    with Pipeline.load(tmp_path / "here", stages=1, transport="inproc") as again:
        assert again.test_on_batch(x, y) == expected
