"""The launcher of one incarnation of workers whose values outlive them."""

from __future__ import annotations

from typing import Any

from pipeline.runtime.launch import LocalLauncher, WorkerHandle
from pipeline.runtime.launch.descriptors import Descriptor
from pipeline.runtime.launch.shared import shared_server, shutdown
from pipeline.runtime.recovery.freezing import FreezeWatch, process_state
from stages.process.boundary_memory import BoundaryMemory
from stages.worker.written_values import ByGroup, read_boundary


class LastingLauncher:
    """Starts workers with a memory for their values, and looks whether they freeze; see `Launcher` for the contract.

    Args:
        hung_seconds: As for `FreezeWatch`.
    """

    def __init__(self, hung_seconds: float | None) -> None:
        self._local = LocalLauncher()
        self._watch = FreezeWatch(hung_seconds)
        self._memories: list[BoundaryMemory] = []

    def launch(self, name: str, entry: str, spec: dict[str, Any], threads: int) -> WorkerHandle:
        """Start a worker process; see `Launcher.launch`."""
        server = shared_server().pid
        if server is not None and process_state(server)[0] == "T":
            shutdown()  # a stopped fork server would be waited for; the next one is started in its place
        with Descriptor(BoundaryMemory.create()) as memory:
            self._memories.append(BoundaryMemory(memory.fileno()))
            handle = self._local.launch(name, entry, spec, threads, memory.fileno())
        self._watch.add(handle)
        return handle

    def close(self) -> None:
        """End the workers; what they wrote down can be read until `forget`."""
        self._watch.close()
        self._local.close()

    def forget(self) -> None:
        """Free the memories."""
        for memory in self._memories:
            memory.close()

    def why(self, stage: str) -> str:
        """Why the worker of a stage was ended here; "" if it was not."""
        return next((why for name, why in self._watch.reasons.items() if stage in name.split("+")), "")

    def all_wrote(self, number: int) -> bool:
        """Whether every worker has written down its values behind an order."""
        return all(number in memory.stamps(region=1) for memory in self._memories)

    def read(self, latest: int | None) -> tuple[ByGroup, dict[int, Any]]:
        """The values of all stages as they were behind an order, or the last ones, and what metrics were built from."""
        values: ByGroup = {}
        examples: dict[int, Any] = {}
        for memory in self._memories:
            found = read_boundary(memory, latest)
            if found is None:
                raise RuntimeError(f"a worker has not written down what was behind order {latest}: a fault of ours")
            for group, by_stage in found[0].items():
                values.setdefault(group, {}).update(by_stage)
            examples |= found[1]
        return values, examples


__all__ = ["LastingLauncher"]
