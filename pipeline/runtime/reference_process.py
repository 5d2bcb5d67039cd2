"""The process that all stages are joined in, for questions about the pipeline: started for the first, kept for more."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from pipeline.errors import VerificationError, WorkerError
from pipeline.runtime.driver import Driver
from stages.worker.hosted_stage import StageSpec


class ReferenceProcess:
    """A process that runs `pipeline.reference`, or none as yet."""

    def __init__(self) -> None:
        self.driver: Driver | None = None

    def running(self, placement: Callable[[], Sequence[Sequence[StageSpec]]], threads: int, scheme: str) -> Driver:
        """The process, started if there is none, or if the last one is gone.

        Args:
            placement: Says which stages it hosts.
            threads: TensorFlow's, as many as a worker of the pipeline has.
            scheme: The transport's.
        """
        if self.driver is None or self.driver.closed:
            drawn = random.getstate()  # as a thread of this process it would draw Keras's default seeds
            try:
                self.driver = Driver(
                    placement(), threads=threads, transport=scheme, entry="pipeline.reference.worker:main"
                )
            finally:
                random.setstate(drawn)
        return self.driver

    def close(self, why: str) -> None:
        """End it. Idempotent."""
        driver, self.driver = self.driver, None
        if driver is not None:
            driver.close(why)

    @contextmanager
    def telling(self, goes_on: Callable[[], bool]) -> Iterator[None]:
        """Say so when it was this process that failed.

        Args:
            goes_on: Whether the pipeline's own workers are there.

        Raises:
            VerificationError: The process was lost, or failed, and the pipeline goes on.
        """
        try:
            yield
        except WorkerError as error:
            if self.driver is None or not self.driver.closed or not goes_on():
                raise
            raise VerificationError(
                f"the reference process, which has all stages joined, failed: {error}\n"
                "The pipeline itself is as it was and goes on; the next question starts another reference."
            ) from error
