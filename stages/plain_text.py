"""Terminal output as plain lines without colours, and words of others without power over a terminal."""

from __future__ import annotations

from html import escape
from io import StringIO
from typing import Any

from rich.console import Console
from rich.text import Text

WIDTH = 120
"""Characters in a line where no terminal says how many fit."""


def plain_text(*shown: Any, width: int = WIDTH) -> str:
    """What a terminal of a width would show, as lines without colours and without spaces at their ends.

    Args:
        *shown: Texts, tables or anything else that `rich` prints, one below the other.
        width: Characters in a line.
    """
    written = StringIO()
    console = Console(file=written, width=width, color_system=None, highlight=False, legacy_windows=False)
    for one in shown:
        console.print(one)
    return "\n".join(line.rstrip() for line in written.getvalue().rstrip().splitlines())


def harmless(words: Any, style: str = "", *, breaks: bool = False) -> Text:
    """What others wrote, without its power over the terminal: no markup and no escapes.

    Args:
        words: Anything that has a text.
        style: As `rich` takes it.
        breaks: Whether line breaks stay; else they are shown as ``\\\\n``.
    """
    return Text(printable(words, breaks=breaks), style=style)


def printable(words: Any, *, breaks: bool = False) -> str:
    """The same as a string: what cannot be printed, control characters above all, as Python writes it."""
    return "".join(c if c.isprintable() or (breaks and c == "\n") else repr(c)[1:-1] for c in str(words))


def escaped(words: Any) -> str:
    """The same for HTML and SVG, where control characters make a file that no reader opens."""
    return escape(printable(words, breaks=True))


__all__ = ["WIDTH", "escaped", "harmless", "plain_text", "printable"]
