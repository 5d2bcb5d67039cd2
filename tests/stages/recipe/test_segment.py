"""A segment is frozen data: a builder that runs in its worker only, or a built model of which a copy travels."""

import dataclasses
import json
import os

import keras
import numpy as np
import pytest

from pipeline import Pipeline
from stages.errors import RecipeError, SegmentError
from stages.recipe.describe import create
from stages.recipe.segment import Segment, build_part, names_of
from stages.recipe.stage_objects import Built
from tests.pipeline import parts

PARTS = "tests.pipeline.parts"


def test_a_builder_is_kept_by_name():
    segment = Segment(parts.bottom, kwargs={"units": 7}, name="low", inputs=["x"], outputs=["h"])
    assert segment.build == "tests.pipeline.parts:bottom"
    assert (segment.inputs, segment.outputs) == (("x",), ("h",))
    assert json.loads(json.dumps(segment.recipe())) == {"build": segment.build, "kwargs": {"units": 7}}
    assert segment.create().output_shape == (None, 7)
    assert segment == Segment(
        "tests.pipeline.parts:bottom", kwargs={"units": 7}, name="low", inputs=("x",), outputs=("h",)
    )
    with pytest.raises(dataclasses.FrozenInstanceError):
        segment.name = "other"


def test_a_built_model_is_kept():
    model = parts.bottom()
    segment = Segment.of(model, name="low")
    assert segment.model is model and segment.create() is model and segment.build is None
    assert Segment.of(segment) is segment
    again = create(json.loads(json.dumps(segment.recipe()))["model"])
    assert again is not model and json.dumps(again.get_config()) == json.dumps(model.get_config())


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: Segment(), "either a builder function or a built model"),
        (lambda: Segment(parts.bottom, model=parts.bottom()), "either a builder function or a built model"),
        (lambda: Segment(7), "expects a function, received int"),
        (lambda: Segment("bottom"), "'module:function', received 'bottom'"),
        (lambda: Segment(parts.bottom, inputs="x"), "expects a tuple of names, received 'x'"),
        (lambda: Segment(parts.bottom, outputs=("x", "")), "expects a tuple of names"),
        (lambda: Segment(parts.bottom, name="a/b"), "must not be empty or contain '/'"),
        (lambda: Segment(parts.bottom, name=""), "must not be empty"),
        (lambda: Segment.of(keras.layers.Dense(3)), "a layer becomes one as keras.Sequential.*received Dense"),
        (lambda: Segment.of(parts.not_built()), "has no defined input"),
        (lambda: Segment.of(3), "received int"),
        (lambda: build_part(Built(f"{PARTS}:not_built", {}), "low"), "Sequential, which is not built"),
        (lambda: build_part(Built(f"{PARTS}:not_a_model", {}), "low"), "it returned int"),
        (lambda: names_of([Segment(parts.top, name="stage1"), Segment(parts.top)]), "two stages .* 'stage1'"),
    ],
)  # fmt: skip
def test_what_is_no_segment(make, match):
    with pytest.raises(SegmentError, match=match):
        make()


def test_a_builder_without_a_name_runs_in_a_worker_and_has_no_recipe():
    units, kept = 5, Segment(lambda: parts.bottom(units=units), name="low")
    with pytest.raises(
        RecipeError, match=r"a Segment's builder must be a function that another process can import.*lambda"
    ):
        kept.recipe()
    with Pipeline([kept, Segment(parts.top)]) as pipe:
        assert pipe.get_weights()[1].shape == (5,) and pipe.session.workers.driver().pids[0] != os.getpid()


def test_names():
    assert names_of([Segment(parts.bottom), Segment(parts.top, name="t"), Segment(parts.top)]) == (
        "stage0",
        "t",
        "stage2",
    )


def test_builders_run_in_the_worker_only(monkeypatch):
    """The model tells which process built it; in this one, the builder would fail."""
    segments = [Segment(parts.pid_layer), Segment(parts.top, kwargs={"units": 5})]
    monkeypatch.setattr(parts, "pid_layer", None)
    monkeypatch.setattr(parts, "top", None)
    with Pipeline(segments, microbatches=2) as pipe:
        pipe.compile("sgd", "mse")
        built_in = pipe.get_weights()[1]
        assert set(built_in) == {np.float32(pipe.session.workers.driver().pids[0])}
        assert int(built_in[0]) != os.getpid()
        assert np.isfinite(pipe.train_on_batch(np.ones((4, 6), "float32"), np.ones((4, 1), "float32")))


def test_builders_of_two_pipelines_draw_what_the_users_seed_says():
    def weights(seed):
        keras.utils.set_random_seed(seed)
        with Pipeline([Segment(parts.bottom), Segment(parts.top)], transport="ipc") as pipe:
            return np.concatenate([array.ravel() for array in pipe.get_weights()])

    first, again, other = weights(3), weights(3), weights(4)
    np.testing.assert_array_equal(first, again)
    assert not np.array_equal(first, other)
