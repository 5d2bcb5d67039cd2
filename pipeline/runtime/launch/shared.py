"""The one warm fork server of this process: started when first needed, kept for the next pipeline, gone at exit.

A forked copy of the user's process (a data loader's worker, say) must not use its parent's server: it forgets it, and
would start its own.
"""

from __future__ import annotations

import atexit
import os
import threading

from pipeline.runtime.launch.forkserver import ForkServer

__all__ = ["prestart", "shared_server", "shutdown"]

_lock = threading.Lock()
_server: ForkServer | None = None


def shared_server() -> ForkServer:
    """Return this process's fork server, started if there is none or the last one died; its imports may still run.

    Raises:
        LaunchError: the server could not be started.
    """
    global _server
    with _lock:
        if _server is not None and not _server.alive():
            _server.close()
            _server = None
        if _server is None:
            server = ForkServer()
            server.start()
            _server = server
        return _server


def prestart() -> None:
    """Begin to start this process's fork server and return at once.

    Its imports take seconds; who calls this early has them done when the first pipeline starts. Idempotent.

    Raises:
        LaunchError: the server could not be started. Failing imports are reported by the first launch.
    """
    shared_server()


def shutdown() -> None:
    """End the fork server and every worker of it. The next launch starts a new one. Idempotent; called at exit."""
    global _server
    with _lock:
        server, _server = _server, None
    if server is not None:
        server.close()


def _forget_in_child() -> None:
    global _lock, _server
    _lock = threading.Lock()
    if _server is not None:
        _server.abandon()
        _server = None


atexit.register(shutdown)
os.register_at_fork(after_in_child=_forget_in_child)
