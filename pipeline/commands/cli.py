"""The command line: `tapeline demo`, `verify`, `explain`, `plan`, `doctor`, `bench`, `keys`, `psi`, `party`.

Every command imports what it needs when it runs, so that `--help` and `plan` never load TensorFlow.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from pipeline.commands import doctor as doctor_command
from pipeline.commands import explain as explain_command
from pipeline.commands import keys as keys_command
from pipeline.commands import party as party_command
from pipeline.commands import psi as psi_command
from pipeline.commands import verify as verify_command
from pipeline.commands.parsers import parser_of
from pipeline.commands.quiet import import_quietly

_ABOUT = "Train one Keras model across several processes, with every gradient explicit, exact and provable."


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command.

    Args:
        arguments: Without the program's name; default: those of the process.

    Returns:
        The exit status: 0 if all is well, 1 if something was found wrong, 2 for a wrong call.
    """
    parser = _parser()
    given = parser.parse_args(arguments)
    if given.command is None:
        parser.print_help()
        return 2
    from transport.errors import TapelineError

    if given.run not in WITHOUT_TENSORFLOW:
        import_quietly()
    try:
        run: Callable[[argparse.Namespace], int] = given.run
        return run(given)
    except TapelineError as error:
        print("\n".join([f"tapeline {given.command}: {error}", *getattr(error, "__notes__", ())]), file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="tapeline",
        description=_ABOUT,
        epilog="example:\n  tapeline demo\n\nTF_CPP_MIN_LOG_LEVEL=0 in the environment shows TensorFlow's own lines.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", metavar="command")
    demo = _command(
        commands, "demo", _demo, "train a CNN on handwritten digits in three processes, verify it, draw a step",
        "tapeline demo --epochs 5 --output digits",
    )  # fmt: skip
    demo.add_argument("--epochs", type=_positive, default=10, help="passes over the training digits (default 10)")
    demo.add_argument("--seed", type=int, default=0, help="for weights, dropout and shuffling (default 0)")
    demo.add_argument("--output", type=Path, default=Path("artifacts/demo"), help="folder for report and picture")
    verify = _command(
        commands, "verify", verify_command.run, "compare a pipeline with one tape (status 0: equal, 1: not)",
        "tapeline verify my_model:make --checks all --html report.html    # make() returns (pipeline, x, y)",
    )  # fmt: skip
    verify_command.arguments(verify)
    explain = _command(
        commands, "explain", explain_command.run, "say why gradients are None, zero or not finite (status 0: none is)",
        "tapeline explain my_model:make    # make() returns (pipeline, x, y), (model, x, y), or a loss",
    )  # fmt: skip
    explain_command.arguments(explain)
    plan = _command(
        commands, "plan", _plan, "draw the plan of a schedule", "tapeline plan --stages 4 --microbatches 8"
    )  # fmt: skip
    plan.add_argument("--schedule", default="1f1b", help="gpipe, 1f1b (default), interleaved, zb-h1, zb-h2 or zb-v")
    plan.add_argument("--stages", type=_positive, default=3)
    plan.add_argument("--microbatches", type=_positive, default=8)
    doctor = _command(
        commands, "doctor", doctor_command.run, "say what this host has, and in what others differ (status 0: little)",
        "tapeline doctor --json here.json    # then, on the other host: tapeline doctor here.json",
    )  # fmt: skip
    doctor_command.arguments(doctor)
    psi = _command(
        commands, "psi", psi_command.run, "find the rows that two parties both have, in private",
        "tapeline psi join ids.txt --as hospital --with lab --at tcp://lab.example:7444 --output rows.txt",
    )  # fmt: skip
    psi_command.arguments(psi)
    bench = _command(
        commands, "bench", _bench, "measure step times on this machine, against one process",
        "tapeline bench --width 512 --microbatch 64",
    )  # fmt: skip
    bench.add_argument("--width", type=_positive, action="append", help="width N of 6 x Dense(N); may be repeated")
    bench.add_argument("--microbatch", type=_positive, action="append", help="samples a microbatch; one per width")
    bench.add_argument("--stages", type=_positive, default=2)
    bench.add_argument("--steps", type=_positive, default=20, help="timed steps (default 20)")
    bench.add_argument("--json", type=Path, help="write the figures there")
    keys = _command(
        commands, "keys", keys_command.run, "make this organisation's key, and pin those of others",
        "tapeline keys new hospital    # then give hospital.pub away, and read the fingerprint out by telephone",
    )  # fmt: skip
    keys_command.arguments(keys)
    party = _command(
        commands, "party", party_command.run, "train one model with other organisations: check, rehearse, serve, join",
        "tapeline party rehearse plan.toml    # `tapeline party serve --help` and so on have examples of their own",
    )  # fmt: skip
    party_command.arguments(party)
    return parser


def _command(commands: Any, name: str, run: Callable[..., int], about: str, example: str) -> argparse.ArgumentParser:
    parser = parser_of(commands, name, about, example)
    parser.set_defaults(run=run)
    return parser


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number of at least 1, received {text}")
    return value


def _demo(given: argparse.Namespace) -> int:
    from pipeline.commands.demo import run

    return run(given.output, given.epochs, given.seed)


def _plan(given: argparse.Namespace) -> int:
    from pipeline.plan.schedules import build_plan

    print(build_plan(given.schedule, given.stages, given.microbatches).text())
    return 0


WITHOUT_TENSORFLOW = (_plan, keys_command.run, psi_command.run)
"""Commands that are answered at once."""


def _bench(given: argparse.Namespace) -> int:
    from pipeline.commands.bench import run

    widths = given.width or [64, 512, 1024]
    sizes = given.microbatch or [{64: 32, 512: 64}.get(width, 128) for width in widths]
    return run(list(zip(widths, sizes, strict=True)), given.stages, given.steps, given.json)
