"""Names with control characters reach neither a terminal nor a picture or page as what they are."""

import xml.etree.ElementTree as ElementTree

import keras
import numpy as np
import pytest

from pipeline import BoundaryNorms, Pipeline, Segment, save_timeline
from pipeline.cutting.cut_table import CutRow, CutTable
from pipeline.cutting.prediction import Comparison, ComparisonRow
from pipeline.errors import DataError
from stages.errors import SegmentError
from stages.explanation.rows import NOT_CONNECTED, ExplanationRow
from stages.step_influence.map import InfluenceMap

X = np.ones((4, 3), "float32")
HARMFUL = "a\x1b[31m\x07<b>\x9b"


def raw(text):
    return [character for character in text if not character.isprintable() and character not in "\n\t"]


@pytest.mark.filterwarnings("ignore:Glyph:UserWarning")
def test_control_characters_in_names_are_shown_as_words(tmp_path):
    layers = [keras.layers.Dense(2, name=HARMFUL), keras.layers.Dense(1, name="z\x00\x1b]0;title\x07")]
    model = keras.Sequential([keras.Input((3,), name="i" + HARMFUL), *layers], name="m\x1b[2J")
    with Pipeline.split(model, at=[HARMFUL], microbatches=2, transport="inproc") as pipe:
        pipe.compile("sgd", "mse", run_eagerly=True)
        norms, summary = BoundaryNorms(every=1), []
        pipe.fit(X, X[:, :1], verbose=0, callbacks=[norms])
        report = pipe.verify(X, X[:, :1])
        pipe.summary(print_fn=summary.append)
        timeline = pipe.timeline(X, X[:, :1], repeats=1)
        with pytest.raises(DataError, match=r"takes 1 input\(s\)") as refused:
            pipe.predict({"other": X}, verbose=0)
        shown = [str(report), str(norms), str(pipe.explain(X, X[:, :1])), *summary]
        shown += [str(timeline), str(timeline.bottleneck), str(refused.value)]
        assert [raw(text) for text in shown] == [[]] * 7
        assert all("\\x1b[31m" in text for text in (str(report), summary[0]))
        for ending in ("html", "svg", "txt"):
            file = report.save(tmp_path / f"report.{ending}")
            assert raw(file.read_text()) == [], ending
        norms.save(tmp_path / "norms.svg")
        assert raw(timeline.save(tmp_path / "trace.json").read_text()) == []
        save_timeline(timeline, tmp_path / "timeline.svg")
    for picture in tmp_path.glob("*.svg"):
        ElementTree.parse(picture)


@pytest.mark.filterwarnings("ignore:Glyph:UserWarning")
def test_tables_of_cuts_influence_and_explanations_show_such_names_as_words(tmp_path):
    row = CutRow(1, (HARMFUL,), (HARMFUL, "[b]x"), 4.0, 4.0, (1, 2), (1.0, 1.0), (1.0, 1.0), ())
    influence = InfluenceMap((HARMFUL,), (HARMFUL + "[b]",), np.ones((1, 1)), np.ones((1, 1), bool))
    prediction = ComparisonRow("[b]stage", 1.0, 1.0)
    shown = [
        str(CutTable((row,), "m\x1b[2J", 1)),
        str(influence),
        influence.explain(HARMFUL, HARMFUL + "[b]"),
        str(ExplanationRow(HARMFUL, HARMFUL, NOT_CONNECTED, reason=HARMFUL)),
        str(Comparison((prediction,), prediction, prediction, "plan", 1)),
    ]
    assert [raw(text) for text in shown] == [[]] * 5
    assert all("\\x1b[31m" in text for text in shown[:4])
    assert all("[b]" in shown[k] for k in (0, 1, 2, 4))  # no markup that is taken out
    ElementTree.parse(influence.save(tmp_path / "influence.svg"))


def test_a_stage_cannot_be_called_so():
    with pytest.raises(SegmentError, match="what cannot be printed, received 's\\\\x1b'"):
        Segment("parts:build", name="s\x1b")
