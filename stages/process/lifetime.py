"""The means by which a process never outlives its parent, whatever it is doing when the parent dies.

The kernel does it (`PR_SET_PDEATHSIG`): it needs no thread of ours, no GIL and no poll, so it also ends a process that
is inside a long TensorFlow call, is stopped, or is just importing. Two rules make it safe:

1. The parent may die before the call. Then the process has another parent already, so that is checked after.
2. The kernel watches the parent *thread* that forked. So that thread must live as long as the parent process: it is
   the fork server's only thread, and in the driver a thread that exists for nothing else
   (`pipeline.runtime.launch.keeper`).
"""

from __future__ import annotations

import ctypes
import os
import signal

__all__ = ["die_with_parent", "name_process"]

_PR_SET_PDEATHSIG = 1
_PR_SET_NAME = 15

_libc = ctypes.CDLL(None, use_errno=True)


def die_with_parent(parent: int) -> None:
    """Have the kernel kill this process when the thread that forked it ends.

    Args:
        parent: process id of the parent. If it is gone already, this process ends here.

    Raises:
        OSError: the kernel refused (it is not Linux, or a sandbox forbids it).
    """
    if _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0) != 0:
        code = ctypes.get_errno()
        raise OSError(code, f"prctl(PR_SET_PDEATHSIG): {os.strerror(code)}")
    if os.getppid() != parent:
        os.kill(os.getpid(), signal.SIGKILL)


def name_process(name: str) -> None:
    """Set the name that `ps` and `top` show for this process, cut to 15 bytes."""
    _libc.prctl(_PR_SET_NAME, ctypes.c_char_p(name.encode("utf-8", "replace")[:15]), 0, 0, 0)
