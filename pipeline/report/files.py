"""A report as a file: the suffix says in which form, so that one method and one flag serve all of them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.errors import VerificationError

if TYPE_CHECKING:
    from pipeline.report.report import Report


def save_report(report: Report, path: Path) -> Path:
    """Write a report; missing folders are made, a file that is there is replaced.

    Args:
        report: What to write.
        path: Where to; ``.html`` a page, ``.json`` data, ``.txt`` every row as text, ``.png`` and ``.svg`` a picture.

    Returns:
        The path.

    Raises:
        VerificationError: Another suffix.
    """
    write = _FORMS.get(path.suffix.lower())
    if write is None:
        raise VerificationError(
            f"cannot write the report as {path.name!r}: expected a name that ends with one of {', '.join(_FORMS)}, "
            f"received {path.suffix or 'none'!r}"
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    write(report, path)
    return path


def _picture(report: Report, path: Path) -> None:
    from pipeline.report.figure import save_figure

    save_figure(report, path)


def _text(made: Callable[[Report], str]) -> Callable[[Report, Path], None]:
    def write(report: Report, path: Path) -> None:
        path.write_text(made(report) + "\n", encoding="utf-8")

    return write


_FORMS: dict[str, Callable[[Report, Path], None]] = {
    ".html": _text(lambda report: report.to_html()),
    ".json": _text(lambda report: report.to_json()),
    ".txt": _text(lambda report: report.text(every=True)),
    ".png": _picture,
    ".svg": _picture,
}
