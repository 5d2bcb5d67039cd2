"""`tapeline verify`: verify a pipeline that a function of the user's makes, and leave with the verdict as exit status.

A script or CI job must tell "the gradients are wrong" (1) from "nothing could be verified" (2), so that whatever the
user's function raises is told with its traceback and ends in 2 as well.
"""

from __future__ import annotations

import argparse
import importlib
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pipeline.errors import PipelineError, VerificationError

AGREES, DEVIATES, FAILED = 0, 1, 2
"""Exit statuses: all agrees; something deviates; nothing could be verified."""


def arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.add_argument(
        "what", metavar="module:function", help="a function that returns (pipeline, x, y) or (..., sample_weight)"
    )
    parser.add_argument(
        "--checks", type=_checks, default=("tape",), metavar="LIST",
        help="tape, chain, differences, batch, steps, own: several with commas between, or all (default tape; own is "
        "made in any case, where the models are this process's)",
    )  # fmt: skip
    parser.add_argument("--steps", type=int, default=1, metavar="K", help="steps of the check 'steps' (default 1)")
    parser.add_argument("--html", type=Path, metavar="FILE", help="write the report there as a page")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the report there as JSON")
    parser.add_argument("--figure", type=Path, metavar="FILE", help="write its picture there (.png or .svg)")
    parser.add_argument("--all", action="store_true", help="list every row, of long reports too")
    parser.add_argument("--quiet", action="store_true", help="print the verdict only, one line")


def run(given: argparse.Namespace) -> int:
    """Verify, print, write.

    Returns:
        The exit status, one of `AGREES`, `DEVIATES`, `FAILED`.

    Raises:
        PipelineError: What was named is not there or does not give a pipeline and a batch; a file's suffix is wrong.
    """
    files = _files(given)
    try:
        pipe, *batch = _made(given.what, imported(given.what)())
        with pipe:
            report = pipe.verify(*batch, checks=given.checks, steps=given.steps)
        if given.quiet:
            print(report.summary())
        else:
            _print(report.table(every=True if given.all else None))
        for path in files:
            report.save(path)
    except PipelineError:
        raise
    except Exception:
        traceback.print_exc()
        print(f"tapeline verify: {given.what} could not be verified, see the error above", file=sys.stderr)
        return FAILED
    if report.missed and not report.failed:
        return FAILED
    return AGREES if report.ok else DEVIATES


def imported(what: str) -> Callable[[], Any]:
    """The function that `module:function` names; modules of the current folder can be named.

    Raises:
        PipelineError: It is not there.
    """
    module, _, name = what.partition(":")
    if str(Path.cwd()) not in sys.path:
        sys.path.append(str(Path.cwd()))  # behind what is installed: it hides nothing
    try:
        found: Callable[[], Any] = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise PipelineError(
            f"cannot find {what!r}: expected module:function, such as my_model:make ({error})"
        ) from error
    return found


def _made(what: str, found: Any) -> tuple[Any, ...]:
    """What the user's function gave, checked before any worker waits for it."""
    if not isinstance(found, tuple | list) or len(found) not in (3, 4) or not hasattr(found[0], "verify"):
        received = f"{len(found)} values" if isinstance(found, tuple | list) else type(found).__name__
        if isinstance(found, tuple | list) and len(found) in (3, 4):
            received = f"a {type(found[0]).__name__} as the pipeline"
        raise VerificationError(
            f"{what}() must return (pipeline, x, y) or (pipeline, x, y, sample_weight), received {received}"
        )
    return tuple(found)


def _files(given: argparse.Namespace) -> list[Path]:
    """Where to write; a suffix that does not fit its flag is found before the work, not after it."""
    files = []
    for flag, suffixes in (("html", (".html",)), ("json", (".json",)), ("figure", (".png", ".svg"))):
        path = getattr(given, flag)
        if path is not None and path.suffix.lower() not in suffixes:
            raise VerificationError(f"--{flag} expects a name that ends with {' or '.join(suffixes)}, received {path}")
        files += [] if path is None else [path]
    return files


def _print(table: Any) -> None:
    from rich.console import Console

    from stages.plain_text import WIDTH

    console = Console()
    (console if console.is_terminal else Console(width=WIDTH)).print(table)


def _checks(text: str) -> str | tuple[str, ...]:
    from pipeline.compare.rows import CHECKS

    if text == "all":
        return text
    names = tuple(dict.fromkeys(name.strip() for name in text.split(",")))
    unknown = [name for name in names if name not in CHECKS]
    if unknown:
        raise argparse.ArgumentTypeError(f"expected all or some of {', '.join(CHECKS)}, received {unknown[0]!r}")
    return names
