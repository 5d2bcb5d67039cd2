"""docs/is-my-hand-off-right.md shows what its code prints, and what it says of the checks is what they do."""

from __future__ import annotations

import math
import re

import keras
import numpy as np
import pytest
import tensorflow as tf

from pipeline import Pipeline
from pipeline.compare.rows import CHECKS
from tests.hand_off_page import PAGE, folder, ran

TIME = re.compile(r"\d+\.\d+ s\b|\d+\.\d+% of training")
NUMBER = re.compile(r"\d+(?:\.\d+)?(?:e[+-]\d+)?")


def words(text: str) -> str:
    """What is said, without figures and the width of columns."""
    return re.sub(r"[\s─]+", " ", NUMBER.sub("#", TIME.sub("<time>", text))).strip()


def figures(text: str) -> list[float]:
    """All numbers but times; another processor may differ in the last digits of a sum."""
    return [float(number) for number in NUMBER.findall(TIME.sub("", text))]


def assert_same(printed: str, shown: str) -> None:
    assert words(printed) == words(shown)
    assert figures(printed) == pytest.approx(figures(shown), rel=0.02)


@pytest.mark.gate
def test_every_block_prints_what_stands_below_it(tmp_path):
    shown = 0
    with folder(tmp_path):
        for block, printed in ran(PAGE.read_text()):
            assert_same(printed, block["text"])
            shown += 1
    assert shown >= 9
    assert {"report.html", "report.png", "report.json", "norms.png"} <= {path.name for path in tmp_path.iterdir()}


@pytest.mark.parametrize(
    ("printed", "shown"),
    [("12 of 12 agree", "12 of 13 agree"), ("norm 3.2", "norm 3.4"), ("equal bits", "wrong"), ("0 s", "1.5 s")],
)
def test_another_output_is_seen(printed, shown):
    with pytest.raises(AssertionError):
        assert_same(printed, shown)
    assert_same("took 0.37 s,  1.00e-3", "took 14.20 s, 1.001e-3")


def test_the_page_tells_of_every_check_and_of_the_rules():
    page = PAGE.read_text()
    assert re.findall(r"^\| `([a-z]+)` \|", page, re.MULTILINE) == list(CHECKS)
    assert f"{8 * float(np.finfo('float32').eps):.1e}".replace("e-0", "e-") in page
    assert math.isclose(1 / math.sqrt(np.finfo("float32").eps), 2.9e3, rel_tol=0.01)


@keras.saving.register_keras_serializable("tests.hand_off_page")
class TwiceTheGradient(keras.layers.Layer):
    """Gives its input, and twice its gradient: wrong, and the same in every tape."""

    def call(self, x):
        @tf.custom_gradient
        def wrong(x):
            return tf.identity(x), lambda dy: 2 * dy

        return wrong(x)


def test_a_wrong_gradient_in_a_layer_is_named_by_differences_only():
    """What the page says that no other check notices."""
    keras.utils.set_random_seed(0)
    dense = keras.layers.Dense
    model = keras.Sequential(
        [keras.Input((4,)), dense(5, name="a"), TwiceTheGradient(), dense(1, name="b")], name="net"
    )
    x = np.random.default_rng(0).normal(size=(6, 4)).astype("float32")
    with Pipeline.split(model, at=["a"], microbatches=2, transport="inproc") as pipe:
        pipe.compile("sgd", "mse", run_eagerly=True)
        report = pipe.verify(x, x[:, :1], checks="all")
    assert report.ok and all(check.ran for check in report.checks)
    named = "not checked: the model's own gradient is not its derivative"
    found = {(row.check, row.name) for row in report.rows if row.verdict.startswith(named)}
    assert found == {("differences", "stage0/net/a/kernel"), ("differences", "stage0/net/a/bias")}
    assert named.removeprefix("not checked: ") in " ".join(PAGE.read_text().split())
