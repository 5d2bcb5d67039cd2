"""The tables of docs/errors.md, made from the classes themselves.

``python -m tests.errors_page`` writes them anew.
"""

from __future__ import annotations

import importlib
import inspect

from tests.sources import PACKAGES, ROOT, modules
from transport.errors import ClosedError, MistakeError, PeerError, TapelineError, TimedOutError

PAGE = ROOT / "docs" / "errors.md"
BEGIN, END = "<!-- from the classes: begin -->", "<!-- end -->"
FAMILIES: dict[type[TapelineError], str] = {
    MistakeError: "Your mistake",
    PeerError: "The other side's fault",
    TimedOutError: "Time",
    ClosedError: "Closed",
}


def exception_classes() -> set[type[BaseException]]:
    """Every exception class that a module of the three packages defines."""
    found: set[type[BaseException]] = set()
    for path in modules(*PACKAGES):
        dotted = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        if dotted.endswith("__main__"):
            continue  # runs the command line
        for value in vars(importlib.import_module(dotted)).values():
            if isinstance(value, type) and issubclass(value, BaseException) and value.__module__ == dotted:
                found.add(value)
    return found


def families_of(kind: type[BaseException]) -> list[type[TapelineError]]:
    """The families that a class is of."""
    return [family for family in FAMILIES if issubclass(kind, family)]


def tables() -> str:
    """One table a family: the error, what it says, and which of Python's own it also is."""
    classes = sorted(exception_classes(), key=lambda kind: kind.__name__)
    lines = []
    for family, title in FAMILIES.items():
        lines += [f"### {title}: `{family.__name__}`", "", "| error | when | also caught by |", "|---|---|---|"]
        for kind in classes:
            if families_of(kind) == [family] and kind is not family:
                when = " ".join((inspect.getdoc(kind) or "").split("\n\n")[0].split())
                lines.append(f"| `{kind.__name__}` | {when} | {', '.join(_bases(kind, family))} |")
        lines.append("")
    return "\n".join(lines)


def _bases(kind: type[BaseException], family: type[BaseException]) -> list[str]:
    """The classes above, but for what all of the family have in common."""
    common = {kind, family, TapelineError, *TapelineError.__mro__, OSError}
    return [f"`{base.__name__}`" for base in kind.__mro__ if base not in common]


def page(text: str) -> str:
    """The page's text with the tables as they should be."""
    head, _, rest = text.partition(BEGIN)
    return f"{head}{BEGIN}\n\n{tables()}\n{END}{rest.partition(END)[2]}"


if __name__ == "__main__":
    PAGE.write_text(page(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
