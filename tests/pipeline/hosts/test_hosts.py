"""A host's facts are its own, and every difference between hosts is told with what it may change."""

from __future__ import annotations

import json
import sys
from dataclasses import replace

import keras
import pytest
import tensorflow as tf

from pipeline.commands.cli import main
from pipeline.errors import UsageError
from pipeline.hosts.facts import BITS, RUNS, Host, HostFact, this_host
from pipeline.hosts.host_differences import host_differences, verdict


def with_(host, **values):
    """A host of another name with other values."""
    facts = (replace(fact, value=values.get(fact.name, fact.value)) for fact in host.facts)
    return Host("other", tuple(facts))


def test_what_a_host_says_is_so_and_travels_whole(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    monkeypatch.setenv("TF_SECRET_TOKEN", "mine")
    host = this_host()
    said = {fact.name: fact.value for fact in host.facts}
    assert said["tensorflow"] == tf.__version__ and said["keras"] == keras.__version__
    assert said["python"].split(".")[:2] == [str(part) for part in sys.version_info[:2]]
    assert said["OMP_NUM_THREADS"] == "3" and said["XLA_FLAGS"] == "not set"
    assert "mine" not in host.text() and Host.of(host.text(), "here") == host


def test_what_differs_is_told_the_gravest_first_and_judged():
    here = Host(
        "a", (HostFact("tensorflow", "2.21", RUNS), HostFact("cores", "2", BITS), HostFact("memory", "8", "speed"))
    )
    assert host_differences([here, with_(here)]) == [] and "should have equal bits" in verdict([])
    slow = host_differences([here, with_(here, memory="16")])
    assert [one.values for one in slow] == [("8", "16")] and "speed and room only" in verdict(slow)
    bits = host_differences([here, with_(here, memory="16", cores="4")])
    assert [one.name for one in bits] == ["cores", "memory"] and "up to rounding" in verdict(bits)
    other = host_differences([here, with_(here, memory="16", tensorflow="2.20"), Host("none", ())])
    assert [one.name for one in other] == ["tensorflow", "cores", "memory"]
    assert other[0].values == ("2.21", "2.20", "-") and "would not train the same" in verdict(other)


def test_another_line_in_our_sources_or_in_the_models_module_is_a_difference(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(tmp_path))
    module = tmp_path / "a_model_of_mine.py"
    module.write_text("WIDTH = 3\n")
    first = this_host("a_model_of_mine")
    module.write_bytes(b"WIDTH = 3\r\n")
    assert host_differences([first, this_host("a_model_of_mine")]) == []
    module.write_text("WIDTH = 4\n")
    assert [one.name for one in host_differences([first, this_host("a_model_of_mine")])] == ["module a_model_of_mine"]
    with pytest.raises(UsageError, match="no module 'nowhere_to_be_found'"):
        this_host("nowhere_to_be_found")


def test_the_command_writes_compares_and_says_it_by_its_status(tmp_path, capsys):
    mine = tmp_path / "mine.json"
    assert main(["doctor", "--json", str(mine)]) == 0
    assert "keras floatx" in capsys.readouterr().out
    assert main(["doctor", str(mine)]) == 0
    assert "should have equal bits" in capsys.readouterr().out
    read = json.loads(mine.read_text())
    read["host"], read["facts"][3]["value"] = "evil\x1b[31m", "2.0"
    mine.write_text(json.dumps(read))
    assert main(["doctor", str(mine)]) == 1
    told = capsys.readouterr().out
    assert "tensorflow" in told and "would not train the same" in told and "\x1b[31m" not in told
    for wrong in ("{", "[]", '{"host": "a", "facts": [3]}', "[" * 100_000):
        mine.write_text(wrong)
        assert main(["doctor", str(mine)]) == 2
        assert "is no file that `tapeline doctor --json` wrote" in capsys.readouterr().err
    assert main(["doctor", str(tmp_path / "absent.json")]) == 2
