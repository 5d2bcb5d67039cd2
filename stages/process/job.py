"""A job as it lies in the memory that a driver shares with one worker: JSON, and behind it what is bytes.

    length of the JSON (8 bytes, little-endian) | JSON | bytes | bytes ...

In the JSON an object ``{"bytes": [offset, length]}`` stands in the place of bytes. That memory has no name, and only
the driver, its fork server and the worker ever have it open: a job may carry code (`stages.recipe.by_value`).
"""

from __future__ import annotations

import json
from typing import Any

__all__ = ["job_of_bytes", "job_to_bytes"]

_LENGTH = 8


def job_to_bytes(job: dict[str, Any]) -> bytes:
    """A job for a worker.

    Args:
        job: What JSON can hold, and bytes.

    Raises:
        TypeError: Something else is in it.
        ValueError: It holds itself, or a number that is none.
    """
    pieces: list[bytes] = []

    def beside(value: Any) -> dict[str, list[int]]:
        if not isinstance(value, bytes):
            raise TypeError(f"Object of type {type(value).__name__} is not JSON serializable")
        pieces.append(value)
        return {"bytes": [sum(map(len, pieces[:-1])), len(value)]}

    text = json.dumps(job, default=beside).encode()
    return b"".join([len(text).to_bytes(_LENGTH, "little"), text, *pieces])


def job_of_bytes(data: bytes) -> dict[str, Any]:
    """The job that `job_to_bytes` wrote."""
    begin = _LENGTH + int.from_bytes(data[:_LENGTH], "little")

    def bytes_again(value: dict[str, Any]) -> Any:
        if value.keys() != {"bytes"}:
            return value
        offset, length = value["bytes"]
        return data[begin + offset : begin + offset + length]

    job: dict[str, Any] = json.loads(data[_LENGTH:begin], object_hook=bytes_again)
    return job
