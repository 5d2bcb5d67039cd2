"""docs/seeing.md runs as it stands, and its files are what it says."""

import json

import pytest

from tests import trace_events
from tests.hand_off_page import folder
from tests.sources import ROOT


@pytest.mark.gate
def test_every_block_runs_and_leaves_what_it_says(tmp_path, capsys):
    blocks = [block.split("```")[0] for block in (ROOT / "docs/seeing.md").read_text().split("```python\n")[1:]]
    names = {}
    with folder(tmp_path):
        for block in blocks:
            exec(compile(block, "docs/seeing.md", "exec"), names)
    said = capsys.readouterr().out
    assert said.count("held back by") == 2
    for name in ("step.json", "training.json"):
        assert trace_events.faults(trace_events.read(tmp_path / name)) == []
    assert json.loads((tmp_path / "training.json").read_text())["otherData"]["offsets_us"] == [[0.0, 0.0]] * 3
    assert list((tmp_path / "logs" / "pipeline").iterdir())
