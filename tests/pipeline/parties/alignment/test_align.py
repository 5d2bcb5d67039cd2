"""Two parties align their rows over one encrypted connection: equal rows at both, or a sentence and none at all."""

from __future__ import annotations

import threading
from queue import Queue

import numpy as np
import pytest

from pipeline import DataError
from pipeline.commands.psi import read_ids
from pipeline.errors import PartyStoppedError, UsageError
from pipeline.parties.alignment import align
from pipeline.parties.alignment.align import join_alignment, serve_alignment
from tests.levels import in_turn
from transport.errors import NotAdmitted, TapelineError
from transport.key_files import KeyFolder

HERE = [f"p{k}" for k in range(12)]
THERE = ["p3", "p40", "p11", "p0", "p41"]


@pytest.fixture
def folders(tmp_path):
    """{party: its key folder}, each trusting the other."""
    found = {name: KeyFolder(tmp_path / name) for name in ("lab", "hospital")}
    for name, folder in found.items():
        folder.new(name)
    found["lab"].trust(tmp_path / "hospital" / "hospital.pub")
    found["hospital"].trust(tmp_path / "lab" / "lab.pub")
    return found


def aligned(folders, here=HERE, there=THERE, most=100):
    """{party: what it found, or the error that it raised}."""
    addresses, found = Queue(), {}

    def serving():
        options = {"keys": folders["lab"], "most": most, "patience": 20, "listening": addresses.put}
        with_errors("lab", lambda: serve_alignment(here, "lab", "hospital", "tcp://127.0.0.1:0", say=str, **options))

    def joining():
        address = addresses.get(timeout=20)
        options = {"keys": folders["hospital"], "most": most, "patience": 20}
        with_errors("hospital", lambda: join_alignment(there, "hospital", "lab", address, say=str, **options))

    def with_errors(name, deed):
        try:
            found[name] = deed()
        except TapelineError as error:
            found[name] = error

    threads = [threading.Thread(target=one) for one in (serving, joining)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(40)
        assert not thread.is_alive()
    return found


def test_both_find_the_same_ids_in_the_same_order(folders):
    found = aligned(folders)
    ids = [HERE[row] for row in found["lab"]]
    assert ids == [THERE[row] for row in found["hospital"]]
    assert set(ids) == {"p3", "p11", "p0"}
    table = np.arange(12) * 10
    assert sorted(table[found["lab"]]) == [0, 30, 110]


@pytest.mark.parametrize("fault", in_turn(["more than taken", "another answer", "other rows"], 1, 3))
def test_nothing_is_found_where_one_is_not_honest(folders, monkeypatch, fault):
    if fault == "more than taken":
        found = aligned(folders, most=4)
        assert "at most 4 of 32 bytes, received 160 bytes" in str(found["lab"])
        assert "lab says: expected the blinded ids of hospital" in str(found["hospital"])
    elif fault == "another answer":
        monkeypatch.setattr(align.PrivateSet, "answered", lambda self, theirs: self.blinded())
        found = aligned(folders, there=HERE)
        assert any("needs the other party's ids first" in str(error) for error in found.values())
    else:
        monkeypatch.setattr(align.PrivateSet, "mark", lambda self: self.blinded())
        found = aligned(folders)
        assert "found other rows than this party" in str(found["lab"])
    assert all(isinstance(error, TapelineError) for error in found.values())
    assert any(isinstance(error, PartyStoppedError) for error in found.values())


def test_who_is_not_trusted_is_not_let_in(folders, tmp_path):
    with pytest.raises(DataError, match="no key of 'clinic' is trusted here"):
        serve_alignment(HERE, "lab", "clinic", "tcp://127.0.0.1:0", keys=folders["lab"])
    stranger = KeyFolder(tmp_path / "stranger")
    stranger.new("hospital")
    stranger.trust(tmp_path / "lab" / "lab.pub")
    addresses = Queue()

    def serving():
        options = {"keys": folders["lab"], "patience": 1.5, "listening": addresses.put, "say": str}
        with pytest.raises(TapelineError, match="did not send its blinded ids within"):
            serve_alignment(HERE, "lab", "hospital", "tcp://127.0.0.1:0", **options)
        addresses.put("over")

    thread = threading.Thread(target=serving)
    thread.start()
    with pytest.raises(NotAdmitted):
        join_alignment(THERE, "hospital", "lab", addresses.get(timeout=20), keys=stranger, patience=10, say=str)
    assert addresses.get(timeout=20) == "over"
    thread.join(20)


def test_ids_are_read_from_lines_or_from_a_column(tmp_path):
    (tmp_path / "ids.txt").write_text("a\nb é\n7\n")
    (tmp_path / "table.csv").write_text('id,age\n"x, y",3\nz,4\n')
    assert read_ids(str(tmp_path / "ids.txt")) == ["a", "b é", "7"]
    assert read_ids(f"{tmp_path}/table.csv:id") == ["x, y", "z"]
    (tmp_path / "marked.csv").write_bytes(b"\xef\xbb\xbfid\r\na\r\nb\r\n")
    assert read_ids(f"{tmp_path}/marked.csv:id") == ["a", "b"]
    (tmp_path / "holes.csv").write_text("id,age\na,1\n,2\n")
    (tmp_path / "blank.txt").write_text("a\n\nb\n")
    for holes in (f"{tmp_path}/holes.csv:id", f"{tmp_path}/blank.txt"):
        with pytest.raises(UsageError, match="has no id in row 2: rows without one would meet"):
            read_ids(holes)
    with pytest.raises(UsageError, match="no column 'name'; it has id, age"):
        read_ids(f"{tmp_path}/table.csv:name")
    with pytest.raises(UsageError, match="cannot be read"):
        read_ids(str(tmp_path / "absent.txt"))
