"""Starting workers: as forks of a warm server on this machine, or as threads of this process.

Nothing here imports TensorFlow.
"""

from __future__ import annotations

from pipeline.launch.base import Launcher, WorkerHandle
from pipeline.launch.errors import LaunchError
from pipeline.launch.local import LocalLauncher
from pipeline.launch.shared import prestart, shutdown
from pipeline.launch.threads import ThreadLauncher

__all__ = [
    "LaunchError",
    "Launcher",
    "LocalLauncher",
    "ThreadLauncher",
    "WorkerHandle",
    "prestart",
    "shutdown",
]
