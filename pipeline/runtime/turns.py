"""Turns of threads with one pipeline: one call at a time, in the process that made it.

    step of fit │ predict │ step of fit │ get_weights │ ...     each waits for the one before it

Steps, predictions and looks at values of several threads come one after the other, as with a Keras model. What counts
losses and metrics over several batches (`fit`, `evaluate`) would count those of others too, so it is refused by name
while another thread does so.
"""

from __future__ import annotations

import functools
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Self, TypeVar, cast

from pipeline.errors import UsageError

Method = TypeVar("Method", bound=Callable[..., Any])


class Turns:
    """The turns of one pipeline; as a context manager, one turn. A thread may take one inside of another."""

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._owner = os.getpid()
        self._counting: tuple[threading.Thread, str] | None = None

    def __enter__(self) -> Self:
        self.check_process()
        self._lock.acquire()
        return self

    def __exit__(self, *_: object) -> None:
        self._lock.release()

    @property
    def ours(self) -> bool:
        """Whether this is the process that made the pipeline."""
        return self._owner == os.getpid()

    def check_process(self) -> None:
        """Refuse a forked copy of the process at once: the workers answer to one process, TensorFlow hangs in a copy.

        Raises:
            UsageError: It is one.
        """
        if not self.ours:
            raise UsageError(
                f"this pipeline belongs to process {self._owner} and is used in process {os.getpid()}, a forked copy "
                "of it, where TensorFlow cannot run either. Use it where it was made, or start the process with "
                "multiprocessing.get_context('spawn') and make or load a pipeline there"
            )

    @contextmanager
    def counting(self, name: str, *, whole: bool = False) -> Iterator[None]:
        """A call that counts losses and metrics: in turn, or, `whole`, over many turns.

        Args:
            name: The method's.
            whole: Whether other calls may come between its steps.

        Raises:
            UsageError: Another thread is in the middle of counting.
        """
        me = threading.current_thread()
        with self:
            other = self._counting
            if other is not None and other[0] is not me:
                raise UsageError(
                    f"{other[1]}() of this pipeline is running in the thread {other[0].name!r} and counts losses and "
                    f"metrics as it goes; {name}() in the thread {me.name!r} would mix them up. Wait for it, or use "
                    "another pipeline; predict() may run beside it"
                )
            if not whole:
                yield
                return
            self._counting = other or (me, name)
        try:
            yield
        finally:
            self._counting = other


def one_turn(method: Method) -> Method:
    """A method of `Pipeline` that is carried out in one turn, so that no other thread's step comes in between."""

    @functools.wraps(method)
    def in_one_turn(pipe: Any, /, *args: Any, **kwargs: Any) -> Any:
        with pipe.session.workers.turns:
            return method(pipe, *args, **kwargs)

    return cast(Method, in_one_turn)


def counting(*, whole: bool = False) -> Callable[[Method], Method]:
    """For methods of `Pipeline` that count losses and metrics, as `Turns.counting` takes them."""

    def decorated(method: Method) -> Method:
        @functools.wraps(method)
        def counted(pipe: Any, /, *args: Any, **kwargs: Any) -> Any:
            with pipe.session.workers.turns.counting(method.__name__, whole=whole):
                return method(pipe, *args, **kwargs)

        return cast(Method, counted)

    return decorated


def no_copy(pipe: Any, protocol: Any = None) -> Any:
    """The method by which `copy` and `pickle` begin.

    Raises:
        UsageError: Always.
    """
    raise UsageError(
        f"a {type(pipe).__name__} has processes, so it can be neither copied nor pickled; its model can: "
        "pipe.merge() makes one ordinary Keras model, and pipe.save(...) with Pipeline.load(...) another pipeline"
    )


__all__ = ["Turns", "counting", "no_copy", "one_turn"]
