"""What runs beside the application: the scoring loop, and chores that must not be done in place.

The only room that starts threads.
"""

from __future__ import annotations

import asyncio
import contextlib
import queue
import threading
import time
from collections.abc import Callable, Coroutine
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar

_RETRY_EVERY = 0.25
_KEEP_TRYING = 60.0

T = TypeVar("T")


def start(name: str, target: Callable[[], Any], *, daemon: bool = True) -> threading.Thread:
    """Run something in a thread of its own.

    Args:
        name: What it is for; shown as ``tlm-tracing-<name>``.
        target: What to run.
        daemon: Whether the process may end without it.
    """
    thread = threading.Thread(target=target, name=f"tlm-tracing-{name}", daemon=daemon)
    thread.start()
    return thread


def run_beside(name: str, job: Callable[[], Any]) -> None:
    """Run a short job in a daemon thread, or here and now if it is too late for threads."""
    try:
        start(name, job)
    except RuntimeError:  # Python 3.12 starts no thread once the process is about to end
        job()


def start_loop() -> asyncio.AbstractEventLoop:
    """An event loop that runs in a daemon thread until the process ends."""
    loop = asyncio.new_event_loop()
    loop.set_default_executor(_DaemonThreads())

    def run() -> None:
        asyncio.set_event_loop(loop)
        loop.run_forever()

    start("loop", run)
    return loop


def run(job: Coroutine[Any, Any, T]) -> T:
    """Run a job on an event loop of its own, here, until it is over."""

    async def with_daemon_threads() -> T:
        asyncio.get_running_loop().set_default_executor(_DaemonThreads())
        return await job

    return asyncio.run(with_daemon_threads())


async def result(future: Future[T]) -> T:
    """Wait for what another thread gives; who is cancelled meanwhile does not cancel it.

    What is there already is given at once: other tasks get no turn in between.
    """
    if future.done():
        return future.result()
    return await asyncio.shield(asyncio.wrap_future(future))


class Chores:
    """Things to be done soon, one after the other, each again and again until it succeeds.

    Safe from any thread and inside any lock: a finalizer may be run by the garbage collector.
    """

    def __init__(self, on_drop: Callable[[Exception | None], None]) -> None:
        """Nothing is started yet.

        Args:
            on_drop: Told when a chore could not be done within 60 seconds, with the last
                exception that it raised, if any.
        """
        self._on_drop = on_drop
        self._new: queue.SimpleQueue[_Chore | threading.Event] = queue.SimpleQueue()
        self._starting = threading.Lock()
        self._thread: threading.Thread | None = None

    def add(self, do: Callable[[], bool]) -> None:
        """Do something soon.

        Args:
            do: Gives False if it could not be done yet.
        """
        self._new.put(_Chore(do, time.monotonic() + _KEEP_TRYING))
        self.start()

    def wait(self, timeout: float | None) -> bool:
        """Wait until all that was added is done or dropped.

        Args:
            timeout: Seconds to wait at most; None waits for as long as it takes.
        """
        if self._thread is None:
            return True
        reached = threading.Event()
        self._new.put(reached)
        return reached.wait(timeout)

    def start(self) -> None:
        """Start the thread, unless it runs. Once the process ends, it may be too late."""
        # A finalizer may have interrupted the holder of the lock, who then starts the thread.
        if self._starting.acquire(blocking=False):
            try:
                if self._thread is None:
                    self._thread = start("chores", self._run)
            finally:
                self._starting.release()

    def _run(self) -> None:
        unfinished: list[_Chore] = []
        waiting: list[threading.Event] = []
        while True:
            with contextlib.suppress(queue.Empty):
                item = self._new.get(timeout=_RETRY_EVERY if unfinished else None)
                if isinstance(item, _Chore):
                    unfinished.append(item)
                else:
                    waiting.append(item)
            unfinished = [chore for chore in unfinished if not self._is_over(chore)]
            if not unfinished and self._new.empty():  # a chore may have left another
                for reached in waiting:
                    reached.set()
                waiting.clear()

    def _is_over(self, chore: _Chore) -> bool:
        try:
            if chore.do():
                return True
        except Exception as error:
            chore.error = error
        if time.monotonic() < chore.until:
            return False
        self._on_drop(chore.error)
        return True


@dataclass
class _Chore:
    """Something to be done until it succeeds, or until it is too late."""

    do: Callable[[], bool]
    until: float
    error: Exception | None = None


class _DaemonThreads(ThreadPoolExecutor):
    """A daemon thread for each job of the loop, such as to look up an address.

    A pool takes no job once the process is about to end, when the last scores are still being
    asked for, and a job that hangs would hold up the exit.
    """

    def submit(self, function: Any, /, *args: Any, **kwargs: Any) -> Future[Any]:
        job: Future[Any] = Future()

        def run() -> None:
            if not job.set_running_or_notify_cancel():
                return
            try:
                result = function(*args, **kwargs)
            except BaseException as error:
                job.set_exception(error)
            else:
                job.set_result(result)

        run_beside("job", run)
        return job
