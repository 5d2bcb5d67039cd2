"""Key files are whole, secret, never replaced, never read where others can write or read, and pinned by key."""

from __future__ import annotations

import os
import stat

import pytest
from zmq.utils import z85

from pipeline.commands.cli import main
from transport import key_files
from transport.errors import KeyFileError
from transport.key_files import KeyFolder, PartyKeys, checked_key, fingerprint


@pytest.mark.parametrize("umask", [0, 0o177])
def test_a_secret_file_is_for_its_owner_only_whatever_the_umask(tmp_path, umask):
    (tmp_path / "keys").mkdir(mode=0o700)
    before = os.umask(umask)
    try:
        folder = KeyFolder(tmp_path / "keys")
        keys = folder.new("lab")
    finally:
        os.umask(before)
    secret = folder.path / "lab.key"
    assert stat.S_IMODE(secret.stat().st_mode) == 0o600
    assert stat.S_IMODE((folder.path / "lab.pub").stat().st_mode) == 0o644
    assert folder.own("lab") == keys
    assert keys.secret not in (folder.path / "lab.pub").read_text() and keys.secret not in repr(keys)
    assert sorted(path.name for path in folder.path.iterdir()) == ["lab.key", "lab.pub"]  # and no draft


def test_a_key_is_never_overwritten_and_no_link_is_followed(tmp_path):
    folder = KeyFolder(tmp_path)
    keys = folder.new("lab")
    with pytest.raises(KeyFileError, match="never overwritten"):
        folder.new("lab")
    assert folder.own("lab") == keys
    target = tmp_path / "elsewhere"
    (tmp_path / "clinic.key").symlink_to(target)
    with pytest.raises(KeyFileError, match="never overwritten"):
        folder.new("clinic")
    assert not target.exists() and not (tmp_path / "clinic.pub").exists()
    (tmp_path / "other.key").symlink_to(tmp_path / "lab.key")
    with pytest.raises(KeyFileError, match="cannot read"):
        folder.own("other")


@pytest.mark.parametrize("mode", [0o644, 0o640, 0o604, 0o660])
def test_a_secret_that_others_can_open_is_refused(tmp_path, mode):
    folder = KeyFolder(tmp_path)
    folder.new("lab")
    (tmp_path / "lab.key").chmod(mode)
    with pytest.raises(KeyFileError, match="chmod 600"):
        folder.own("lab")


def test_what_is_no_key_file_is_refused_in_one_sentence(tmp_path):
    folder = KeyFolder(tmp_path)
    keys, other = folder.new("lab"), PartyKeys.new("x")
    text = (tmp_path / "lab.key").read_text()
    for damaged in (
        "",
        "not toml",
        "\xff",
        text.replace(keys.secret, other.secret),
        text.replace(keys.public, keys.public[:-1]),
        text.replace('name = "lab"', 'name = "hub"'),
        text + "more = 1\n",
        text + "#" * 5000,
    ):
        (tmp_path / "lab.key").write_bytes(damaged.encode("latin-1"))
        with pytest.raises(KeyFileError):
            folder.own("lab")
    os.mkfifo(tmp_path / "pipe.pub")
    with pytest.raises(KeyFileError, match="plain file"):
        folder.trust(tmp_path / "pipe.pub")
    for name in ("../x", "", "a/b", "1a", "a" * 65, "ä"):
        with pytest.raises(KeyFileError, match="a party's name"):
            folder.new(name)


def test_a_name_is_pinned_to_one_key_until_it_is_revoked(tmp_path):
    here, there, forged = KeyFolder(tmp_path / "a"), KeyFolder(tmp_path / "b"), KeyFolder(tmp_path / "c")
    here.new("clinic")
    lab, other = there.new("lab"), forged.new("lab")
    assert here.trust(there.path / "lab.pub") == ("lab", lab.public)
    assert here.trust(there.path / "lab.pub") == ("lab", lab.public)
    with pytest.raises(KeyFileError, match=r"pinned to another key .*keys revoke lab"):
        here.trust(forged.path / "lab.pub")
    with pytest.raises(KeyFileError, match="SECRET"):
        here.trust(there.path / "lab.key")
    assert here.trusted() == {"lab": lab.public}
    here.revoke("lab")
    assert here.trusted() == {}
    assert here.trust(forged.path / "lab.pub") == ("lab", other.public)
    pinned, look = here.path / "trusted" / "lab.pub", key_files._not_written_by_others
    with pytest.MonkeyPatch.context() as patch:  # revoked by another process, between a look at the files and reading
        patch.setattr(key_files, "_not_written_by_others", lambda path: (look(path), pinned.unlink(missing_ok=True)))
        assert here.trusted() == {}
    with pytest.raises(KeyFileError, match="no key is pinned"):
        here.revoke("lab")
    assert here.trust(forged.path / "lab.pub") == ("lab", other.public)


@pytest.mark.parametrize("where", ["", "trusted", "trusted/lab.pub"])
def test_pinned_keys_that_others_can_write_are_not_trusted(tmp_path, where):
    here, there = KeyFolder(tmp_path / "a"), KeyFolder(tmp_path / "b")
    lab = there.new("lab")
    here.trust(there.path / "lab.pub")
    path = here.path / where
    honest = stat.S_IMODE(path.stat().st_mode)
    for mode in (0o002, 0o020):
        path.chmod(honest | mode)
        with pytest.raises(KeyFileError, match=r"can be written by others .*chmod go-w"):
            here.trusted()
    path.chmod(honest)
    assert here.trusted() == {"lab": lab.public}


def test_a_fingerprint_tells_keys_apart_and_is_always_the_same():
    key = z85.encode(bytes(range(32))).decode()
    assert fingerprint(key) == fingerprint(key) != fingerprint(PartyKeys.new("a").public)
    assert [len(group) for group in fingerprint(key).split()] == [4] * 8
    assert checked_key(key, "here") == key


def test_the_command_makes_pins_lists_and_revokes(tmp_path, capsys):
    for name in ("hospital", "lab"):
        assert main(["keys", "new", name, "--keys", str(tmp_path / name)]) == 0
    assert main(["keys", "trust", str(tmp_path / "lab" / "lab.pub"), "--keys", str(tmp_path / "hospital")]) == 0
    capsys.readouterr()
    assert main(["keys", "list", "--keys", str(tmp_path / "hospital")]) == 0
    listed = capsys.readouterr().out.splitlines()
    shown = [fingerprint(KeyFolder(tmp_path / name).own(name).public) for name in ("hospital", "lab")]
    assert [line.split(maxsplit=2) for line in listed] == [["own", "hospital", shown[0]], ["trusted", "lab", shown[1]]]
    assert main(["keys", "revoke", "lab", "--keys", str(tmp_path / "hospital")]) == 0
    assert main(["keys", "revoke", "lab", "--keys", str(tmp_path / "hospital")]) == 2
    assert "no key is pinned" in capsys.readouterr().err
