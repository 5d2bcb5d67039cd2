"""`tapeline party`: check a plan, rehearse it, serve it as its hub, join the hub."""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

from pipeline.commands.parsers import parser_of
from pipeline.commands.verify import imported

_DEEDS = {
    "check": (
        "look at plan, model and data without any other party, and print what is protected and what is not",
        "tapeline party check plan.toml images:make --as hospital    # make() returns a Party",
    ),
    "rehearse": (
        "run all parties here on synthetic rows, and compare with one tape (status 0: equal, 1: not)",
        "tapeline party rehearse plan.toml hospital=images:make    # who is not named gets models from the plan",
    ),
    "serve": (
        "run a session as the plan's hub, which has the one open port",
        "tapeline party serve plan.toml labels:make --as lab --listen tcp://0.0.0.0:7443",
    ),
    "join": (
        "run a session as a party that dials the hub",
        "tapeline party join plan.toml images:make --as hospital --at tcp://lab.example:7443",
    ),
}


def arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    deeds = parser.add_subparsers(dest="deed", metavar="deed", required=True)
    for name, (about, example) in _DEEDS.items():
        deed = parser_of(deeds, name, about, example)
        deed.add_argument("plan", type=Path, help="the plan, a TOML file")
        if name == "rehearse":
            deed.add_argument(
                "parties", nargs="*", metavar="NAME=module:function", help="functions that return a Party"
            )
            continue
        deed.add_argument("what", metavar="module:function", help="a function that returns a Party")
        deed.add_argument("--as", dest="name", required=True, metavar="NAME", help="which party of the plan this is")
        if name == "check":
            continue
        end = ("--listen", "tcp://0.0.0.0:7443") if name == "serve" else ("--at", "tcp://host:7443")
        deed.add_argument(end[0], dest="address", required=True, metavar="ADDRESS", help=end[1])
        deed.add_argument("--task", choices=("train", "evaluate", "predict"), default="train", help="default train")
        deed.add_argument("--keys", type=Path, metavar="FOLDER", help="default: $TAPELINE_KEYS, else ~/.tapeline")
        deed.add_argument("--checkpoints", type=Path, metavar="FOLDER", help="write one there after each epoch")
        deed.add_argument("--resume", action="store_true", help="go on after the last epoch that all parties have")
        deed.add_argument("--load", type=Path, metavar="FOLDER", help="take weights from there first")
        deed.add_argument(
            "--save", type=Path, metavar="FOLDER", help="write weights (and predictions) there afterwards"
        )


def run(given: argparse.Namespace) -> int:
    """Do it.

    Returns:
        0; 1 if a rehearsal differs from one tape.

    Raises:
        PartyPlanError: The plan or a party cannot be.
        TapelineError: As `pipeline.parties.meet` says.
    """
    from pipeline.parties.read_plan import read_plan

    plan = read_plan(given.plan)
    if given.deed == "rehearse":
        return _rehearse(given, plan)
    party = _party(given.what)
    if given.deed == "check":
        return _check(given, plan, party)
    from pipeline.parties.meet import join_party, serve_party
    from transport.errors import TapelineError

    stages = [stage.name for stage in plan.stages_of(given.name)] if given.name in plan.parties else []
    models = party.models(stages) if stages else {}
    if given.load is not None:
        for name, model in models.items():
            _weights(model, given.load / f"{name}.weights.h5", "load")
    if given.save is not None:
        _writable(given.save)
    session = serve_party if given.deed == "serve" else join_party
    trained = models if given.task == "train" else {}
    try:
        result = session(
            plan,
            party,
            given.name,
            given.address,
            task=given.task,
            keys=given.keys,
            checkpoints=given.checkpoints,
            resume=given.resume,
        )
    except TapelineError as error:
        if given.save is not None and trained and hasattr(error, "__notes__"):  # some steps were committed
            _save(given.save, trained, None)
        raise
    if given.save is not None:
        _save(given.save, trained, result.predictions)
    if result.history and given.task == "evaluate":
        from stages.plain_text import printable

        print(printable(", ".join(f"{name} {values[-1]}" for name, values in result.history.items())))
    print(f"done: {result.steps} steps, {result.sent} bytes of tensors sent, {result.received} received")
    return 0


def _party(what: str) -> Any:
    from pipeline.errors import PartyPlanError
    from pipeline.parties.party import Party

    party = imported(what)()
    if not isinstance(party, Party):
        raise PartyPlanError(f"{what}() must return a pipeline.Party, received {type(party).__name__}")
    return party


def _rehearse(given: argparse.Namespace, plan: Any) -> int:
    from pipeline.errors import PartyPlanError
    from pipeline.parties.rehearsal import rehearse

    parties = {}
    for entry in given.parties:
        name, equals, what = entry.partition("=")
        if not equals:
            raise PartyPlanError(f"expected NAME=module:function, received {entry!r}")
        parties[name] = _party(what)
    report = rehearse(plan, parties)
    print(report)
    return 0 if report.ok else 1


def _check(given: argparse.Namespace, plan: Any, party: Any) -> int:
    from pipeline.parties.bound_party import BoundParty
    from pipeline.parties.trust_statement import trust_statement
    from transport.key_files import fingerprint

    bound = BoundParty(plan, given.name, party)
    print(f"plan {plan.digest()}: compare it with the other parties")
    for name, key in plan.parties.items():
        owns = ", ".join(stage.name for stage in plan.stages_of(name))
        hub = " (hub: the one open port)" if name == plan.hub else ""
        print(f"  {name}{hub}: stages {owns}; key {fingerprint(key) if key else 'none yet, so only a rehearsal'}")
    for edge in plan.edges:
        print(f"  {edge.tensor}: {plan.owner(edge.source)} -> {plan.owner(edge.target)}, {edge.dtype} {edge.shape}")
    for peer in plan.peers(given.name):
        print(
            f"  a batch of {plan.batch} rows: {plan.bytes_per_step(given.name, peer)} bytes to {peer} and as many back"
        )
    values = sum(int(variable.value.shape.num_elements()) for variable in bound.trainable)
    print(f"{given.name} fits: {bound.rows or 'no'} rows, {values} values to train here")
    print(trust_statement(plan, party.loss))
    return 0


def _save(folder: Path, models: dict[str, Any], predictions: Any) -> None:
    import numpy as np

    _writable(folder)
    for name, model in models.items():
        _weights(model, folder / f"{name}.weights.h5", "save")
    if predictions is not None:
        try:
            np.save(folder / "predictions.npy", predictions)
        except OSError as error:
            raise _no_place(folder, error) from error


def _writable(folder: Path) -> None:
    """Make a folder, and see that a file can be written into it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise _no_place(folder, error) from error


def _no_place(folder: Path, error: OSError) -> Exception:
    from pipeline.errors import UsageError

    return UsageError(f"cannot write into --save {folder}: {error.strerror}; choose another folder")


def _weights(model: Any, path: Path, deed: str) -> None:
    from pipeline.errors import PartyPlanError

    try:
        getattr(model, f"{deed}_weights")(path)
    except (OSError, ValueError) as error:
        raise PartyPlanError(f"cannot {deed} the weights {path}: {error}") from error
