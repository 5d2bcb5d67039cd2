"""The statement that `tapeline party check` prints: what a session protects, and what it does not."""

from __future__ import annotations

from typing import Any

import keras

from pipeline.parties.party_plan import PartyPlan

PROTECTED = (
    "who is connected: pinned keys, both ways; a key that is revoked ends the session before its next step",
    "what is on the network: encrypted and unchanged, and not to be played again",
    "rows, labels, weights and optimizers: they are not sent; what is sent is named in the plan",
    "this process: no code and no pickle is taken from anybody; messages are bounded in size and number",
)
NOT_PROTECTED = (
    "what activations say about x: whoever receives them may learn much of it",
    "what gradients say about y: whoever receives them may learn much of it",
    "that the ids in common are the same ones, how many rows there are, timing and sizes of messages",
    "a list of ids against a hub that has none and guesses the whole of it in its order; single ids it cannot test",
    "against a party that lies (poisoned gradients, feature-space hijacking), several that collude, a host broken into",
    "against a pinned party that wants to fill memory with one message of endless parts",
    "against a pinned party that fills the queue and dies while this one computes: libzmq may end this process",
    "against whoever has a stolen secret key, from then on; and CURVE is not post-quantum",
)
_BINARY = ("binary_crossentropy", "binary_focal_crossentropy", "hinge", "squared_hinge")


def trust_statement(plan: PartyPlan, loss: Any = None) -> str:
    """The statement for a plan, in lines of text.

    Args:
        plan: The plan.
        loss: What the party with y gives as its loss, where it is known here.
    """
    judge = plan.judge.owner
    others = [plan.owner(edge.source) for edge in plan.into(plan.judge.name)]
    lines = [
        "protected:",
        *(f"  + {line}" for line in PROTECTED),
        "NOT protected:",
        *(f"  - {line}" for line in NOT_PROTECTED),
    ]
    away = sorted({name for name in others if name != judge})
    if away:
        binary = " - and yours is one" if _is_binary(loss) else ""
        lines.append(
            f"  - the labels of {judge} from {', '.join(away)}: at a binary loss behind a linear layer the gradients "
            "of positive and negative rows point in opposite directions, so that who receives them and knows one "
            f"label knows them all (the cosine attack succeeds with exactly 1){binary}"
        )
    return "\n".join(lines)


def _is_binary(loss: Any) -> bool:
    try:
        found = keras.losses.get(loss) if loss is not None else None
    except (ValueError, TypeError):  # none that Keras knows, as is said where the party is looked at
        return False
    name = getattr(found, "name", None) or getattr(found, "__name__", "")
    return str(name) in _BINARY


__all__ = ["NOT_PROTECTED", "PROTECTED", "trust_statement"]
