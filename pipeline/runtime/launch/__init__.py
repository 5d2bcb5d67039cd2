"""Starting workers: as forks of a warm server on this machine, or as threads of this process.

Nothing here imports TensorFlow.
"""

from __future__ import annotations

from pipeline.runtime.launch.base import Launcher, WorkerHandle
from pipeline.runtime.launch.errors import LaunchError
from pipeline.runtime.launch.local import LocalLauncher
from pipeline.runtime.launch.shared import prestart, shutdown
from pipeline.runtime.launch.threads import ThreadLauncher

__all__ = [
    "LaunchError",
    "Launcher",
    "LocalLauncher",
    "ThreadLauncher",
    "WorkerHandle",
    "prestart",
    "shutdown",
]
