"""`tapeline keys`: make a key pair, pin the keys of others, list them, trust one no longer."""

from __future__ import annotations

import argparse
from pathlib import Path

from pipeline.commands.parsers import parser_of

_DEEDS = {
    "new": ("make a key pair", "tapeline keys new hospital"),
    "trust": ("pin the public key of another party", "tapeline keys trust lab.pub"),
    "list": ("list own and pinned keys with their fingerprints", "tapeline keys list"),
    "revoke": ("trust a pinned key no longer", "tapeline keys revoke lab"),
}


def arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    deeds = parser.add_subparsers(dest="deed", metavar="deed", required=True)
    for name, (about, example) in _DEEDS.items():
        deed = parser_of(deeds, name, about, example)
        deed.add_argument("--keys", type=Path, metavar="FOLDER", help="default: $TAPELINE_KEYS, else ~/.tapeline")
        if name in ("new", "revoke"):
            deed.add_argument("name", help="the party's name: letters, digits, - and _")
        if name == "trust":
            deed.add_argument("file", type=Path, help="its .pub file")
            deed.add_argument("--as", dest="name", metavar="NAME", help="a local name (default: the one in the file)")


def run(given: argparse.Namespace) -> int:
    """Do it, and print names, files and fingerprints.

    Raises:
        KeyFileError: It cannot be done; nothing was changed.
    """
    from transport.key_files import KeyFolder, fingerprint

    folder = KeyFolder(given.keys)
    if given.deed == "new":
        keys = folder.new(given.name)
        print(f"secret key   {folder.path / f'{keys.name}.key'}   (mode 0600; give it to nobody)")
        print(f"public key   {folder.path / f'{keys.name}.pub'}   (give it to the other parties)")
        print(f'in the plan  key = "{keys.public}"')
        print(f"fingerprint  {fingerprint(keys.public)}   (read it out by telephone)")
    elif given.deed == "trust":
        name, public = folder.trust(given.file, given.name)
        print(f"{name} is trusted; its fingerprint is {fingerprint(public)}: compare it by telephone")
    elif given.deed == "revoke":
        public = folder.revoke(given.name)
        print(f"{given.name} ({fingerprint(public)}) is trusted no longer")
    else:
        rows = [("own", name, folder.own(name).public) for name in folder.names()]
        rows += [("trusted", name, public) for name, public in folder.trusted().items()]
        for kind, name, public in rows:
            print(f"{kind:<8} {name:<20} {fingerprint(public)}")
        if not rows:
            print(f"no keys in {folder.path}; tapeline keys new NAME makes one")
    return 0
