"""Two commands of a session: `serve_party` at the hub, which has the one open port, `join_party` at every other party.

Both need the party's own key and the pinned keys of the others (`tapeline keys`), on loopback too.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from pipeline.errors import PartyPlanError
from pipeline.parties.bound_party import BoundParty
from pipeline.parties.party import Party
from pipeline.parties.party_checkpoints import PartyCheckpoints
from pipeline.parties.party_plan import PartyPlan
from pipeline.parties.read_plan import read_plan
from pipeline.parties.session import PartyResult, PartySession
from transport.errors import KeyFileError
from transport.key_files import KeyFolder, PartyKeys, fingerprint
from transport.party_ends import PartyDoor, PartyLine

Say = Callable[[str], None]


def serve_party(
    plan: PartyPlan | str | Path,
    party: Party,
    name: str,
    listen: str,
    *,
    task: str = "train",
    keys: KeyFolder | str | Path | None = None,
    checkpoints: str | Path | None = None,
    resume: bool = False,
    say: Say = print,
    listening: Callable[[str], None] | None = None,
) -> PartyResult:
    """Run a session as the hub: wait for all others, lead them, return when all is done.

    Args:
        plan: The plan, or its file.
        party: Models and data of this party.
        name: Which party of the plan this is.
        listen: ``tcp://0.0.0.0:7443``, or a loopback address; port 0 takes a free one.
        task: ``"train"``, ``"evaluate"`` or ``"predict"``.
        keys: The folder with the keys; default as for `tapeline keys`.
        checkpoints: A folder for this party's own checkpoints, one after each epoch; the last three are kept. A
            training that begins anew takes one without checkpoints.
        resume: Go on after the last epoch that all parties have a checkpoint of, with the same transcripts.
        say: Told, in sentences, what happens.
        listening: Called with the address once others can connect.

    Returns:
        What this party may see. Its models have the trained values.

    Raises:
        PartyPlanError: The plan or the party cannot be; nobody was asked.
        KeyFileError: This party's key is not there, or others can read it.
        CheckpointError: The folder has checkpoints already, and this training begins anew; or those of several runs.
        PartyMismatchError: The others do not mean the same; nothing was trained.
        PartyStoppedError: Something came or was made that must not be; the values are those of the last commit.
        PartyLostError: Another party is gone; likewise.
        PartySilentError: Another party sent nothing; likewise.
    """
    plan = _plan(plan)
    if name != plan.hub:
        raise PartyPlanError(f"the hub of the plan is {plan.hub!r}, which serves; {name!r} joins it")
    own, known = _keys(plan, name, keys)
    bound = BoundParty(plan, name, party, task)
    kept = _checkpoints(bound, checkpoints, resume)
    peers = {peer: plan.parties[peer] for peer in plan.peers(name)}

    def admits(key: str) -> bool:
        try:
            return key in known().values()
        except KeyFileError as error:
            say(f"{name} has turned a connection away: {error}")
            return False

    with PartyDoor(listen, own, peers, plan.bounds(), trusted=admits) as door:
        say(f"{name} listens at {door.address} for {', '.join(peers)}; its fingerprint is {fingerprint(own.public)}")
        if listening is not None:
            listening(door.address)
        trusted = _trust(plan, known)
        return PartySession(bound, door, trusted, say, kept, resume).run()


def join_party(
    plan: PartyPlan | str | Path,
    party: Party,
    name: str,
    at: str,
    *,
    task: str = "train",
    keys: KeyFolder | str | Path | None = None,
    checkpoints: str | Path | None = None,
    resume: bool = False,
    say: Say = print,
) -> PartyResult:
    """Run a session as a party that dials the hub.

    Args:
        plan: The plan, or its file.
        party: Models and data of this party.
        name: Which party of the plan this is.
        at: The hub's address, ``tcp://lab.example:7443``.
        task: As in `serve_party`.
        keys: As in `serve_party`.
        checkpoints: As in `serve_party`.
        resume: As in `serve_party`.
        say: As in `serve_party`.

    Returns:
        What this party may see. Its models have the trained values.

    Raises:
        NotAdmitted: The hub does not let this key in, or who answers has not the hub's key.
        TransportTimeout: Nobody answered for as long as the plan says.
        TapelineError: As in `serve_party`.
    """
    plan = _plan(plan)
    if name == plan.hub:
        raise PartyPlanError(f"{name!r} is the hub of the plan, so it serves; the others join")
    own, known = _keys(plan, name, keys)
    bound = BoundParty(plan, name, party, task)
    kept = _checkpoints(bound, checkpoints, resume)
    with PartyLine(at, own, plan.hub, plan.parties[plan.hub], plan.bounds(), plan.patience) as line:
        say(f"{name} is connected with {plan.hub} ({fingerprint(plan.parties[plan.hub])}) at {at}")
        trusted = _trust(plan, known)
        return PartySession(bound, line, trusted, say, kept, resume).run()


def _plan(plan: PartyPlan | str | Path) -> PartyPlan:
    return plan if isinstance(plan, PartyPlan) else read_plan(plan)


def _trust(plan: PartyPlan, known: Callable[[], Mapping[str, str]]) -> Callable[[str], bool]:
    return lambda peer: plan.parties[peer] in known().values()


def _checkpoints(party: BoundParty, folder: str | Path | None, resume: bool) -> PartyCheckpoints | None:
    """Where this party's checkpoints are.

    Raises:
        PartyPlanError: There is nothing to go on from.
        CheckpointError: The folder has checkpoints already, and this training begins anew; or those of several runs.
    """
    if resume and (folder is None or party.task != "train"):
        raise PartyPlanError("only a training with checkpoints can be resumed; say in which folder they are")
    if folder is None or party.task != "train":
        return None
    found = PartyCheckpoints(folder, party)
    found.refuse_other_runs(resume)
    return found


def _keys(
    plan: PartyPlan, name: str, folder: KeyFolder | str | Path | None
) -> tuple[PartyKeys, Callable[[], Mapping[str, str]]]:
    """This party's pair, and a question for the keys that are trusted now.

    Raises:
        PartyPlanError: The plan has no keys, another one for this party, or one that is not trusted here.
    """
    folder = folder if isinstance(folder, KeyFolder) else KeyFolder(folder)
    if name not in plan.parties:
        raise PartyPlanError(f"the plan has no party {name!r}; it has {', '.join(plan.parties)}")
    without = [party for party, key in plan.parties.items() if not key]
    if without:
        raise PartyPlanError(
            f"the plan has no key of {', '.join(without)}, so it can only be rehearsed; each party puts in what "
            "`tapeline keys new` printed"
        )
    own = folder.own(name)
    if own.public != plan.parties[name]:
        raise PartyPlanError(
            f"the plan's key of {name} ({fingerprint(plan.parties[name])}) is not the one in {folder.path} "
            f"({fingerprint(own.public)})"
        )
    pinned = set(folder.trusted().values())
    for peer in plan.peers(name):
        if plan.parties[peer] not in pinned:
            raise PartyPlanError(
                f"the plan's key of {peer} ({fingerprint(plan.parties[peer])}) is not trusted here; compare it by "
                f"telephone, then say: tapeline keys trust {peer}.pub"
            )
    return own, folder.trusted


__all__ = ["join_party", "serve_party"]
