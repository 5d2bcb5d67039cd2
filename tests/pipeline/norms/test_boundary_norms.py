"""Norms at the cuts are one natural tape's; what vanishes or explodes is flagged, and training does not notice."""

from __future__ import annotations

import math
from collections import Counter

import keras
import numpy as np
import pytest
import tensorflow as tf
from matplotlib.image import imread

from pipeline import BoundaryNorms, CompileError, Pipeline
from pipeline.norms.flags import EXPLODING, NOT_FINITE, VANISHING, Boundary, Crossing, FlagLimits, found, ratios
from stages.worker.observers import ACTIVATION, GRADIENT, NormObserver, Sight, sum_of_squares
from tests.levels import in_turn
from tests.pipeline.reference.twins import SEED, assert_same_arrays, assert_same_logs, classes, classifier
from transport.dtypes import DTYPES

layers = keras.layers
WIDTH, DEPTH, CUTS = 12, 9, ["d1", "d3", "d5"]
RANDOM = np.random.default_rng(0)
X = RANDOM.normal(size=(10, WIDTH)).astype("float32")
Y = RANDOM.normal(size=(10, 1)).astype("float32")


def chain(activation, initializer, **options):
    """Nine Dense layers, two to a stage and three in the last; as a model and as a running pipeline."""
    keras.utils.set_random_seed(SEED)
    dense = [
        layers.Dense(WIDTH, activation=activation, kernel_initializer=initializer(seed=k), name=f"d{k}")
        for k in range(DEPTH)
    ]
    model = keras.Sequential([keras.Input((WIDTH,)), *dense, layers.Dense(1, name="out")])
    return model, Pipeline.split(model, at=CUTS, microbatches=3, transport="inproc", **options)


def fitted(pipe, norms, optimizer=None, **arguments):
    pipe.compile(optimizer or keras.optimizers.SGD(1e-3), "mse", run_eagerly=True)
    pipe.fit(X, Y, batch_size=10, verbose=0, shuffle=False, callbacks=norms, **arguments)
    return norms


def by_hand(model):
    """{(what, layer): L2 norm} at the cuts, by one tape over the model on the whole batch."""
    at = {}
    with tf.GradientTape() as tape:
        out = tf.constant(X)
        for layer in model.layers:
            out = layer(out)
            tape.watch(out)
            at[layer.name] = out
        loss = tf.reduce_mean(tf.square(out - Y))
    gradients = tape.gradient(loss, at)
    size = {(ACTIVATION, name): np.linalg.norm(at[name].numpy().astype("float64")) for name in CUTS}
    return size | {(GRADIENT, name): np.linalg.norm(gradients[name].numpy().astype("float64")) for name in CUTS}


def kinds(norms):
    return Counter((flag.boundary.what, flag.kind) for flag in norms.flags)


HEALTHY = ("tanh", keras.initializers.GlorotUniform)
VANISHES = ("sigmoid", keras.initializers.GlorotUniform)
EXPLODES = ("linear", lambda seed: keras.initializers.RandomNormal(stddev=8.0, seed=seed))


@pytest.mark.parametrize(
    ("activation", "initializer", "flagged"),
    [
        pytest.param(*HEALTHY, {}, id="a healthy chain"),
        pytest.param(*VANISHES, {(GRADIENT, VANISHING): 1}, id="a deep sigmoid chain"),
        pytest.param(
            *EXPLODES, {(ACTIVATION, EXPLODING): 1, (GRADIENT, EXPLODING): 1}, id="a badly initialised linear chain"
        ),
    ],
)
def test_norms_are_those_of_one_tape_and_only_what_is_ill_is_flagged(activation, initializer, flagged):
    model, pipe = chain(activation, initializer)
    expected = by_hand(model)
    with pipe:
        norms = fitted(pipe, BoundaryNorms(every=1, warn=False))
    measured = {(boundary.what, boundary.tensor): values for boundary, values in norms.norms.items()}
    assert measured.keys() == expected.keys()
    for place, values in measured.items():
        assert values == [pytest.approx(expected[place], rel=1e-5)], place
    assert kinds(norms) == flagged
    for flag in norms.flags:  # where it began: furthest from where it comes
        assert flag.boundary.tensor == ("d5" if flag.boundary.what == ACTIVATION else "d1")


def test_the_sentence_names_both_stages_the_step_and_the_rule():
    _, pipe = chain(*VANISHES)
    with pipe, pytest.warns(RuntimeWarning, match="is vanishing at step 1") as warned:
        norms = fitted(pipe, BoundaryNorms(every=2), epochs=4)
    (flag,) = norms.flags
    assert flag.sentence.startswith("dL/dd1 from 'stage1' to 'stage0' is vanishing at step 1: ")
    assert "of what is next to the loss" in flag.sentence and "sqrt(eps) of float32" in flag.sentence
    assert (flag.step, flag.last, flag.count) == (1, 3, 2) and norms.steps == [1, 3]
    assert [str(one.message) for one in warned] == [flag.sentence]  # once, not every step
    table = str(norms).splitlines()
    assert table[0] == "norms at 3 cuts in 2 of 4 steps: 1 vanishing"
    assert flag.sentence in table[1] and "(2 of 2 measured)" in table[1]
    last = [line for line in table if "dL/dd1 " in line][-1]
    assert last.endswith("vanishing") and f"{norms.norms[flag.boundary][-1]:.3g}" in last
    assert f"{norms.ratio(flag.boundary):.3g}" in last


@pytest.mark.parametrize("eager", in_turn([True, False], 1, 2), ids=["eager", "compiled"])
def test_training_is_bit_for_bit_that_without_it(eager):
    x, y = classes(20)

    def trained(*callbacks):
        keras.utils.set_random_seed(SEED)
        with Pipeline.split(classifier(), at=["a", "drop"], microbatches=2, transport="inproc") as pipe:
            pipe.compile("adam", "sparse_categorical_crossentropy", metrics=["accuracy"], run_eagerly=eager)
            history = pipe.fit(x, y, batch_size=8, epochs=2, verbose=0, callbacks=[*callbacks]).history
            session = pipe.session
            values = [*session.values.read("model").values(), *session.values.read("optimizer").values()]
            return history, [array for part in values for array in part]

    norms = BoundaryNorms(every=1)
    (history, values), (watched, under_watch) = trained(), trained(norms)
    assert_same_logs(watched, history)
    assert_same_arrays(under_watch, values)
    assert len(norms.norms) == 4 and all(len(sizes) == 6 for sizes in norms.norms.values())


def test_gradients_are_told_without_the_loss_scale():
    model, pipe = chain(*HEALTHY)
    expected = by_hand(model)
    scaled = keras.optimizers.LossScaleOptimizer(keras.optimizers.SGD(1e-3), initial_scale=2.0**12)
    with pipe:
        norms = fitted(pipe, BoundaryNorms(every=1), scaled)
    for boundary, values in norms.norms.items():
        assert values == [pytest.approx(expected[boundary.what, boundary.tensor], rel=1e-5)]
    assert not norms.skipped


def test_a_step_that_loss_scaling_skips_is_no_fault():
    """Its gradients overflow because the scale is still too large; the next steps have a smaller one."""
    _, pipe = chain(*EXPLODES)
    scaled = keras.optimizers.LossScaleOptimizer(keras.optimizers.SGD(1e-30), initial_scale=2.0**127)
    with pipe:
        norms = fitted(pipe, BoundaryNorms(every=1, exploding=math.inf, warn=False), scaled, epochs=2)
    assert norms.skipped == [1, 2]
    assert not all(map(math.isfinite, [v for b, values in norms.norms.items() for v in values if b.what == GRADIENT]))
    assert norms.flags == () and "2 skipped by loss scaling: nothing flagged" in str(norms)


def test_divergence_is_flagged_before_and_when_it_is_not_finite():
    _, pipe = chain("linear", keras.initializers.GlorotUniform)
    with pipe:
        norms = fitted(pipe, BoundaryNorms(every=1, warn=False), keras.optimizers.SGD(3.0), epochs=12)
    by_kind = {kind: [flag for flag in norms.flags if flag.kind == kind] for kind in (EXPLODING, NOT_FINITE)}
    assert by_kind[NOT_FINITE] and by_kind[EXPLODING]
    assert min(flag.step for flag in by_kind[EXPLODING]) < min(flag.step for flag in by_kind[NOT_FINITE])
    assert any("of what it was at first" in flag.why for flag in by_kind[EXPLODING])
    assert "not finite" in str(norms)
    assert "-" in [line for line in str(norms).splitlines() if "dL/dd1 " in line][-1].split()  # no last norm


def test_the_limits_can_be_set():
    _, pipe = chain(*HEALTHY)
    with pipe:
        norms = fitted(pipe, BoundaryNorms(every=1, vanishing=0.9999, warn=False))
    assert kinds(norms)[GRADIENT, VANISHING] and "vanishing as given" in str(norms)


@pytest.mark.parametrize("options", [{"every": 0}, {"every": 1.5}, {"vanishing": 2.0}, {"exploding": 0.5}], ids=str)
def test_what_cannot_be_meant_is_refused(options):
    with pytest.raises(CompileError, match="expects"):
        BoundaryNorms(**options)


# -- the rules ---------------------------------------------------------------------------------------------------


def back(producer, tensor="h"):
    return Boundary(GRADIENT, producer, producer + 1, tensor)


def forth(producer, tensor="h"):
    return Boundary(ACTIVATION, producer, producer + 1, tensor)


LIMITS = FlagLimits.of("float32")


def flags(norms, first=None, dtype="float32", elements=None, scale=1.0, limits=LIMITS):
    crossings = {b: Crossing(dtype, (elements or {}).get(b, 1)) for b in norms}
    return dict(found(norms, first or {}, crossings, limits, scale).keys())


def test_the_limits_follow_the_dtype():
    assert LIMITS.vanishing == pytest.approx(2**-11.5) and LIMITS.exploding == pytest.approx(2**11.5)
    assert FlagLimits.of("bfloat16").vanishing == pytest.approx(2**-3.5)
    assert FlagLimits.of("float64").vanishing == pytest.approx(2**-26)


@pytest.mark.parametrize(
    ("norms", "expected"),
    [
        ({back(0): 3e-4, back(1): 1.0, back(2): 1.0}, {back(0): VANISHING}),
        ({back(0): 1e-2, back(1): 1.0}, {back(0): VANISHING}),  # one stage more: 1e-4
        ({back(0): 1e-2, back(1): 0.1, back(2): 1.0}, {}),  # one stage more: 1e-3
        ({back(0): 1.0, back(1): 1e-2, back(2): 1.0}, {}),  # it does not go on like that
        ({back(0): 3e3, back(1): 1.0}, {back(0): EXPLODING}),
        ({back(0): 2e3, back(1): 1.0}, {}),
        ({back(0): 0.0, back(1): 1.0}, {back(0): VANISHING}),
        ({back(0): 0.0, back(1): 0.0}, {back(0): VANISHING, back(1): VANISHING}),
        ({back(0): math.inf, back(1): math.nan}, {back(0): NOT_FINITE, back(1): NOT_FINITE}),
        ({back(0): 1.0}, {}),  # one cut has nothing to be compared with
        ({back(0): 1e-39}, {back(0): VANISHING}),  # below float32's normal numbers
        ({forth(0): 1.0, forth(1): 3e3}, {forth(1): EXPLODING}),
        ({forth(0): 1.0, forth(1): 3e-4}, {forth(1): VANISHING}),
        ({forth(0): 1.0, forth(1): 1e-2}, {}),  # an activation may be small
        ({forth(0): 0.0, forth(1): 0.0}, {}),
    ],
)
def test_what_is_flagged(norms, expected):
    assert flags(norms) == expected


def test_over_time_only_growth_is_flagged():
    assert flags({back(0): 3e3}, {back(0): 1.0}) == {back(0): EXPLODING}
    assert flags({forth(0): 3e3}, {forth(0): 1.0}) == {forth(0): EXPLODING}
    assert flags({back(0): 1e-6}, {back(0): 1.0}) == {}  # a loss that is nearly zero


def test_float16_that_underflows_is_flagged_by_what_crosses():
    assert flags({back(0): 1e-5}, dtype="float16") == {back(0): VANISHING}
    assert flags({back(0): 1e-5}, dtype="float16", scale=1024.0) == {}


def test_several_tensors_at_the_source_count_together():
    norms = {back(0): 4e-4, back(1, "a"): 1.0, Boundary(GRADIENT, 0, 2, "skip"): 1.0, back(2): 1.0}
    crossings = {boundary: Crossing() for boundary in norms}
    assert ratios(norms, crossings)[back(0)] == 4e-4
    norms = {back(0): 1.0, Boundary(GRADIENT, 0, 2, "skip"): 3.0, back(1): 4.0}
    assert ratios(norms, dict.fromkeys(norms, Crossing()))[back(0)] == pytest.approx(0.2)


def test_activations_are_compared_by_element():
    """A wide tensor beside a narrow one, every element 1: nothing vanishes."""
    norms = {forth(0): 1e4, forth(1): 1.0}
    assert flags(norms, elements={forth(0): 10**8}) == {}
    assert flags(norms) == {forth(1): VANISHING}


# -- what the workers add up -------------------------------------------------------------------------------------


def test_a_norm_adds_up_microbatches_and_windows_where_they_were_sent():
    norms = NormObserver()
    for number, sent in ((0, True), (0, False), (1, True), (1, False)):
        norms(Sight(GRADIENT, sent, 0, 1, "h", number, 0), np.float32([3.0, 4.0]))
    norms(Sight(GRADIENT, True, 0, 1, "h", 1, 1), None)  # "no gradient"
    norms(Sight(ACTIVATION, True, 0, 1, "ids", 0, 0), np.int32([7]))
    assert norms.squares == {(GRADIENT, 0, 1, "h"): 50.0}


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
def test_squares_of_large_tensors_are_summed_in_float64(dtype):
    values = np.random.default_rng(0).normal(size=(2, 300, 100)).astype(DTYPES[dtype]).transpose(2, 0, 1)
    assert sum_of_squares(values) == pytest.approx(float(np.sum(values.astype("float64") ** 2)), rel=1e-12)
    assert sum_of_squares(np.full(50_000, 200.0, DTYPES[dtype])) == 2e9  # beyond float16
    assert sum_of_squares(values[:0]) == 0.0


def test_squares_that_are_not_finite_say_so():
    assert sum_of_squares(np.float32([1.0, -np.inf, np.inf])) == math.inf
    assert math.isnan(sum_of_squares(np.float32([np.nan, np.inf])))
    assert sum_of_squares(np.float64([1e200])) == math.inf  # without a warning


# -- the picture -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def ill():
    """Vanishing, exploding and not finite over 60 steps, with skip edges: 14 boundaries."""
    norms = BoundaryNorms(every=2, warn=False)
    norms.names = tuple(f"a_stage_with_a_long_name_{k}$" for k in range(8))
    for step in range(1, 61, 2):
        norms.step = step
        sizes = {forth(k): 1.0 + k for k in range(7)} | {back(k): 0.1 ** (7 - k) for k in range(7)}
        if step > 40:
            sizes |= {forth(6): math.inf, back(3): 0.0, back(5): 1e5 * step}
        norms._crossings |= dict.fromkeys(sizes, Crossing())
        norms._add(sizes, skipped=False)
    return norms


def test_a_picture_has_a_line_for_each_boundary_and_marks_where_it_was_flagged(ill):
    figure = ill.figure()
    above, below = figure.axes
    for axes, what in ((above, ACTIVATION), (below, GRADIENT)):
        drawn = [line for line in axes.lines if line.get_linestyle() == "-"]
        assert len(drawn) == 7
        marks = [line for line in axes.lines if line.get_linestyle() == "None"]
        flagged = [flag for flag in ill.flags if flag.boundary.what == what]
        assert sorted(len(line.get_xdata()) for line in marks) == sorted(flag.count for flag in flagged) != []
        bottom, top = axes.get_ylim()
        assert all(bottom <= height <= top for line in marks for height in line.get_ydata())
    assert {text.get_text() for text in below.get_legend().get_texts()} >= {"vanishing", "exploding"}
    assert "not finite" in figure.texts[0].get_text()


def test_nothing_reaches_over_the_edge_of_the_picture(ill):
    figure = ill.figure()
    figure.canvas.draw()
    renderer = figure.canvas.get_renderer()
    parts = [*figure.texts, *(axes.get_legend() for axes in figure.axes)]
    for axes in figure.axes:
        bottom, top = axes.get_ylim()
        ticks = zip(axes.get_yticks(), axes.get_yticklabels(), strict=True)
        parts += [axes.xaxis.label, axes.yaxis.label, *(label for at, label in ticks if bottom <= at <= top)]
    for part in parts:
        box = part.get_window_extent(renderer)
        assert figure.bbox.x0 <= box.x0 and box.x1 <= figure.bbox.x1, part
        assert figure.bbox.y0 <= box.y0 and box.y1 <= figure.bbox.y1, part


def test_it_is_saved_as_its_suffix_says_the_same_each_time(ill, tmp_path):
    path = ill.save(tmp_path / "new" / "norms.png")
    assert imread(path).shape[1] == 1650
    one, two = (ill.save(tmp_path / name).read_bytes() for name in ("a.svg", "b.svg"))
    assert one == two and b"vanishing" in one


def test_nothing_measured_is_an_empty_picture_that_says_so(tmp_path):
    norms = BoundaryNorms()
    assert "no norms were measured in 0 steps" in str(norms)
    assert norms.save(tmp_path / "empty.png").stat().st_size > 0
