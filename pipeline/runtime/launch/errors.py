"""Errors before a worker runs its entry.

What goes wrong after that is not an exception here: it is the worker's `exit_reason()`, and the driver decides.
"""

from __future__ import annotations

from pipeline.errors import PipelineError
from transport.errors import PeerError

__all__ = ["LaunchError", "ServerGoneError"]


class LaunchError(PipelineError, PeerError, RuntimeError):
    """A worker could not be started."""


class ServerGoneError(LaunchError):
    """The fork server ended; a new one may do better if this one had been ready."""
