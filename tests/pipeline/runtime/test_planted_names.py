"""Names that somebody planted where we put ours stop nothing, and are not removed."""

from __future__ import annotations

import secrets
import tempfile

from pipeline.runtime.socket_directory import SocketDirectory


def test_a_planted_folder_name_does_not_stop_a_start(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    (tmp_path / "tapeline-aaaa").mkdir()
    (tmp_path / "tapeline-aaaa" / "theirs").write_text("theirs")
    (tmp_path / "tapeline-bbbb").symlink_to(tmp_path / "nowhere")
    names = iter(["aaaa", "bbbb", "cccc"])
    monkeypatch.setattr(secrets, "token_hex", lambda size: next(names))
    directory = SocketDirectory()
    assert directory.path == str(tmp_path / "tapeline-cccc")
    directory.remove()
    assert (tmp_path / "tapeline-aaaa" / "theirs").read_text() == "theirs"
    assert (tmp_path / "tapeline-bbbb").is_symlink()
    assert not (tmp_path / "tapeline-cccc").exists()
