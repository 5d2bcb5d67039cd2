"""The sentence about a tensor that is too large for a message: which one, how large, and what helps."""

from __future__ import annotations

from transport.errors import MessageTooLarge
from transport.message import DRIVER, Message

_OF_THE_BATCH = {"activation": "input", "target": "target", "sample_weight": "sample weights of output"}
_OF_A_STAGE = {
    "activation": "output",
    "output": "output",
    "gradient": "gradient of",
    "mask": "mask of",
    "shared_gradient": "gradient of the shared variable",
}
_SMALLER_BATCHES = "a batch goes whole to every stage that takes some of it: give smaller batches (batch_size=)"
_MORE_MICROBATCHES = "take more microbatches (microbatches=), or cut the model where its tensors are smaller"
_NO_SHARING = "cut the model so that the layers that share it are in one stage"


def in_users_words(error: MessageTooLarge, message: Message) -> MessageTooLarge:
    """The error to raise in place of the transport's; the same one for what is no tensor of a step.

    Args:
        error: The transport's.
        message: What could not be sent.
    """
    array, from_driver = message.array, message.source == DRIVER
    noun = (_OF_THE_BATCH if from_driver else _OF_A_STAGE).get(message.kind)
    if noun is None or array is None or error.limit is None:
        return error
    of_a_stage = _NO_SHARING if message.kind == "shared_gradient" else _MORE_MICROBATCHES
    return MessageTooLarge(
        f"{noun} {message.tensor!r} has shape {array.shape} of {array.dtype.name}, {array.nbytes} bytes, which is "
        f"above the limit of {error.limit} bytes a message; {_SMALLER_BATCHES if from_driver else of_a_stage}",
        error.limit,
    )


__all__ = ["in_users_words"]
