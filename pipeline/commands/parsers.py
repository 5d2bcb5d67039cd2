"""The parser of a command, or of one of its deeds: the same help everywhere, which ends with an example."""

from __future__ import annotations

import argparse
from typing import Any


def parser_of(commands: Any, name: str, about: str, example: str) -> argparse.ArgumentParser:
    """A parser for one more of these commands.

    Args:
        commands: What `argparse` gave for all of them together.
        name: Its name.
        about: What it does; begins small.
        example: A line that can be typed.
    """
    parser: argparse.ArgumentParser = commands.add_parser(
        name,
        help=about,
        description=about[0].upper() + about[1:] + ".",
        epilog=f"example:\n  {example}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    return parser
