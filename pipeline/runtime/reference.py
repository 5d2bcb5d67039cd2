"""The process that all stages are joined in, for questions about the pipeline: started for the first, kept for more."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager

from pipeline.errors import VerificationError, WorkerError
from pipeline.runtime.driver import Driver
from pipeline.runtime.setup import Setup
from pipeline.runtime.values import Values
from pipeline.runtime.workers import Workers


class Reference:
    """A process that runs `pipeline.reference`, or none as yet.

    Args:
        setup: What the pipeline is made of.
        workers: The pipeline's own.
        values: Theirs.

    Attributes:
        driver: The process; None before the first question.
    """

    def __init__(self, setup: Setup, workers: Workers, values: Values) -> None:
        self._setup, self._workers, self._values = setup, workers, values
        self.driver: Driver | None = None

    def synchronised(self) -> Driver:
        """The process, started if it is not there, after all weights and states of the pipeline were sent to it.

        Raises:
            CompileError: layer.trainable was changed since `compile`.
        """
        self._workers.needs_the_trainable_set("verify")
        driver = self._running()
        driver.set("model", self._values.read("model"))
        driver.set("layer states", self._values.read("layer states"))
        if self._setup.options.keep_state:
            driver.set("kept states", self._values.read("kept states"))
        return driver

    def close(self, why: str) -> None:
        """End it. Idempotent."""
        driver, self.driver = self.driver, None
        if driver is not None:
            driver.close(why)

    @contextmanager
    def telling(self) -> Iterator[None]:
        """Say so when it was this process that failed, and not the pipeline, which goes on.

        Raises:
            VerificationError: The process was lost, or failed, and the pipeline goes on.
        """
        try:
            yield
        except WorkerError as error:
            if self.driver is None or not self.driver.closed or not self._workers.are_running:
                raise
            raise VerificationError(
                f"the reference process, which has all stages joined, failed: {error}\n"
                "The pipeline itself is as it was and goes on; the next question starts another reference."
            ) from error

    def _running(self) -> Driver:
        """The process, started if there is none, or if the last one is gone; with as many threads as one worker."""
        if self.driver is None or self.driver.closed:
            options = self._setup.options
            drawn = random.getstate()  # as a thread of this process it would draw Keras's default seeds
            try:
                self.driver = Driver(
                    [self._workers.specs(reference=True)],
                    threads=options.threads,
                    transport=options.scheme,
                    entry="pipeline.reference.worker:main",
                    turns=self._workers.turns,
                )
            finally:
                random.setstate(drawn)
        return self.driver


__all__ = ["Reference"]
