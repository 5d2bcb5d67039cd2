"""What an influence map says, in a table, in words, as JSON and as a picture; and the example that reads one."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
from matplotlib.image import imread

from stages import InfluenceMap, influence
from tests.stages.jacobian.test_jacobian_examples import example
from tests.stages.step_influence.test_influence import recurrent


@pytest.fixture
def small() -> InfluenceMap:
    connected = np.array([[True, False, True], [True, True, True]])
    return InfluenceMap(("a[0]", "a[1]"), ("x", "y", "z"), np.array([[1.5, 0, 0], [0.001, 20, 1e-9]]), connected)


def test_the_table_is_plain_text(small: InfluenceMap) -> None:
    lines = str(small).splitlines()
    assert (
        lines[0].startswith("Influence")
        and lines[-1] == "0: connected, but the derivative is zero    none: not connected"
    )
    rows = [[cell.strip() for cell in line.strip("│").split("│")] for line in lines if line.startswith("│")]
    assert rows == [["a[0]", "1.5", "none", "0"], ["a[1]", "0.001", "20", "1e-09"]]
    wide = InfluenceMap(("o",), tuple(f"a long label {i}" for i in range(40)), np.ones((1, 40)), np.ones((1, 40), bool))
    assert "a long label 39" in str(wide) and len(str(wide).splitlines()) == 7  # nothing is cut or wrapped


def test_json_round_trip(small: InfluenceMap) -> None:
    for found in (small, influence(recurrent(), np.ones((1, 3, 2), "float32"))):
        again = InfluenceMap.from_json(found.to_json())
        assert (again.outputs, again.sources) == (found.outputs, found.sources)
        np.testing.assert_array_equal(again.matrix, found.matrix)
        np.testing.assert_array_equal(again.connected, found.connected)
    assert json.loads(small.to_json())["sizes"] == [[1.5, None, 0.0], [0.001, 20.0, 1e-9]]
    odd = InfluenceMap(("a",), ("x", "y"), np.array([[np.nan, np.inf]]), np.ones((1, 2), bool))
    assert "NaN" not in odd.to_json()
    np.testing.assert_array_equal(InfluenceMap.from_json(odd.to_json()).matrix, odd.matrix)


@pytest.mark.parametrize(
    "text", ["", "[]", '{"outputs": ["a"], "sources": ["x"], "sizes": [[1, 2]]}', '{"outputs": []}']
)
def test_other_json_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"expected what InfluenceMap.to_json wrote"):
        InfluenceMap.from_json(text)


def test_a_map_that_contradicts_itself_is_refused(small: InfluenceMap) -> None:
    with pytest.raises(ValueError, match="shape"):
        InfluenceMap(small.outputs, small.sources[:2], small.matrix, small.connected)
    with pytest.raises(ValueError, match="size 0 wherever"):
        InfluenceMap(small.outputs, small.sources, small.matrix, np.zeros((2, 3), bool))
    with pytest.raises(KeyError, match=r"'b' is none of the outputs of this map: a\[0\], a\[1\]"):
        small.size("b", "x")
    with pytest.raises(KeyError, match="none of the sources"):
        small.explain("a[0]", "b")


def test_the_picture_shows_sizes_zeros_and_gaps(small: InfluenceMap, tmp_path: Any) -> None:
    figure = small.figure(title="What flows")
    axes = figure.axes[0]
    assert [text.get_text() for text in axes.texts] == ["1.5", "0", "0.001", "20", "1e-09"]
    hatched = [patch for patch in axes.patches if patch.get_hatch()]
    assert [patch.get_xy() for patch in hatched] == [(0.5, -0.5)]
    assert [label.get_text() for label in axes.get_xticklabels()] == ["x", "y", "z"]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["a[0]", "a[1]"]
    path = small.save(tmp_path / "made" / "map.png")
    picture = imread(path)
    assert picture.shape[0] > 200 and picture.shape[1] > 400
    assert len(np.unique(picture.reshape(-1, picture.shape[-1]), axis=0)) > 20
    shown = axes.images[0]
    colours = shown.cmap(shown.norm(np.array([20.0, 1.5, 0.001, 1e-9])))[:, :3].sum(axis=1)
    assert (np.diff(colours) > 0).all() and colours[-1] < 3  # the larger the darker, and the smallest not white


@pytest.mark.parametrize("shape", [(1, 1), (1, 60), (70, 3)])
@pytest.mark.parametrize("value", [0.0, 1.0, np.nan])
def test_any_map_can_be_drawn(shape: tuple[int, int], value: float, tmp_path: Any) -> None:
    labels = [tuple(f"{name}[{i}]" for i in range(count)) for name, count in zip(("out", "x"), shape, strict=True)]
    found = InfluenceMap(*labels, np.full(shape, value), np.ones(shape, bool))
    assert found.save(tmp_path / "map.png").stat().st_size > 1000
    assert bool(found.figure().axes[0].texts) is (max(shape) <= 24)


def test_a_map_is_read_and_drawn_without_tensorflow(small: InfluenceMap, tmp_path: Any) -> None:
    (tmp_path / "map.json").write_text(small.to_json())
    code = (
        "import sys; from pathlib import Path; from stages import InfluenceMap; folder = Path(sys.argv[1]); "
        "InfluenceMap.from_json((folder / 'map.json').read_text()).save(folder / 'map.png'); "
        "sys.exit('tensorflow' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True, timeout=60)
    assert (tmp_path / "map.png").exists()


@pytest.mark.gate
def test_the_example_answers_in_both_settings(
    capsys: pytest.CaptureFixture[str], tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert example("influence").main() == 0
    shown = capsys.readouterr().out
    assert "A gradient flows from Out[2][0] to Out[0][1]: the norm of the derivative is" in shown
    assert "Out[2][0] is not connected to Out[0][1]: no differentiable operations lead" in shown
    assert "OK" in shown and "FAILED" not in shown
    assert len(list(tmp_path.glob("influence_*.png"))) == 3


@pytest.mark.gate
@pytest.mark.parametrize("runs_on", [True, False])
def test_the_example_fails_if_the_state_is_not_as_said(
    runs_on: bool, capsys: pytest.CaptureFixture[str], tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    module = example("influence")
    real = module.two_levels
    monkeypatch.setattr(module, "two_levels", lambda a, b, x, _: real(a, b, x, runs_on))
    assert module.main() == 1
    assert "FAILED Out[2][0] must depend on Out[0][1] only if the state runs on" in capsys.readouterr().out
