"""What has to be written to the MLflow store, kept until it is written.

Daemon threads write it, so that a store that is slow, locked or gone holds up neither a caller
nor the end of the process. While the store is away, one write at a time finds out whether it is
back; the others wait, up to a bound.
"""

from __future__ import annotations

import contextlib
import heapq
import itertools
import logging
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, field

from tlm_tracing import _threads

_logger = logging.getLogger("tlm_tracing")

_MOST = 10_000
_WRITERS = 4
_FIRST_PAUSE = 0.1
_LONGEST_PAUSE = 5.0
_KEEP_TRYING = 60.0
_MOST_FAILURES = 10
_FLUSH = 30.0
# Who has waited in vain for a store that does not answer does not wait again for a while.
_PATIENCE = 5.0
_IMPATIENT = 60.0
# A write during which the process forks would leave the child's database locked, an import
# the module.
_BEFORE_FORK = 2.0
# At the end of the process: for all of it, and with a store that is away.
_LAST_FLUSH = 10.0
_LAST_WORD = 3.0

Write = Callable[[], bool]
"""Writes something; gives False if it can't be written yet. Exceptions are the store's."""


class Refused(Exception):  # noqa: N818 - it tells what the store did
    """The store will never take this: to try again would be in vain."""


@dataclass
class Parcel:
    """Something to be written.

    Attributes:
        written: Set when it is written, or given up.
    """

    write: Write
    failures: int = 0
    pause: float = _FIRST_PAUSE
    last_failure: float = 0.0
    waiting_since: float | None = None
    written: threading.Event = field(default_factory=threading.Event)


class _Outbox:
    """The parcels of one process."""

    def __init__(self) -> None:
        lock = threading.RLock()
        self.work = threading.Condition(lock)
        self.progress = threading.Condition(lock)
        self.dropped = 0
        self.unwritten = 0
        self.until: float | None = None
        self.last_error: Exception | None = None
        self.is_away = False
        self._due: deque[Parcel] = deque()
        self._later: list[tuple[float, int, Parcel]] = []
        self._numbers = itertools.count()
        self._writers = 0
        self._idle = 0
        self._writing = 0
        self._forks = 0
        self._probing = False
        self._away_until = 0.0
        self._pause = _FIRST_PAUSE
        self._last_success = 0.0
        self._back_since = 0.0
        self._ended = 0.0
        self._slow_until = 0.0
        self._said: set[str] = set()

    def post(self, write: Write) -> Parcel:
        parcel = Parcel(write)
        with self.work:
            if self.unwritten >= _MOST:
                self.lose(f"{_MOST} others wait already")
                parcel.written.set()
                return parcel
            self.unwritten += 1
            self._due.append(parcel)
            self.work.notify()
            self._start_another()
        return parcel

    def start(self) -> None:
        with self.work:
            if not self._writers:
                self._start_writer()

    def wait_for(self, parcel: Parcel) -> None:
        if self.is_away or time.monotonic() < self._slow_until:
            return
        if not parcel.written.wait(_PATIENCE):
            self._slow_until = time.monotonic() + _IMPATIENT

    def _start_another(self) -> None:
        if self._due and not self._idle and self._writers < _WRITERS:
            self._start_writer()

    def _start_writer(self) -> None:
        # Python 3.12 starts no thread once the process is about to end.
        with contextlib.suppress(RuntimeError):
            _threads.start("outbox", self._write_all)
            self._writers += 1

    def _write_all(self) -> None:
        while True:
            parcel = self._next()
            try:
                done = parcel.write()
            except Exception as error:
                self._failed(parcel, error)
            else:
                self._succeeded(parcel, done)
            self._rest()

    def _next(self) -> Parcel:
        with self.work:
            while True:
                now = time.monotonic()
                while self._later and self._later[0][0] <= now:
                    self._due.append(heapq.heappop(self._later)[2])
                may_probe = not self._probing and now >= self._away_until
                if self._due and not self._forks and (may_probe or not self.is_away):
                    self._probing = self.is_away
                    self._writing += 1
                    parcel = self._due.popleft()
                    self._start_another()
                    return parcel
                self._idle += 1
                self.work.wait(self._time_to_next(now))
                self._idle -= 1

    def _time_to_next(self, now: float) -> float | None:
        times = [self._later[0][0]] if self._later else []
        if self.is_away and self._due and not self._probing:
            times.append(self._away_until)
        return max(0.0, min(times) - now) if times else None

    def _succeeded(self, parcel: Parcel, done: bool) -> None:
        with self.work:
            self._last_success = now = time.monotonic()
            was_away, self.is_away = self.is_away, False
            self._probing = False
            self._pause = _FIRST_PAUSE
            if was_away:
                self._back_since = now
            if done:
                self._finish(parcel)
            elif self._is_too_late(parcel, now):
                self._drop(parcel, "the store has no such trace")
            else:
                self._postpone(parcel, now)
            if was_away:
                self.work.notify_all()
        if was_away and "away" in self._said:
            self._said.discard("away")
            _logger.warning("MLflow's store can be written again; what was kept is being written.")

    def _is_too_late(self, parcel: Parcel, now: float) -> bool:
        if parcel.waiting_since is None:
            parcel.waiting_since = now
        # What it waits for may itself be kept still, or have been until lately.
        tried = now - max(parcel.waiting_since, self._back_since)
        return tried > _KEEP_TRYING and not self._due

    def _postpone(self, parcel: Parcel, now: float) -> None:
        heapq.heappush(self._later, (now + parcel.pause, next(self._numbers), parcel))
        parcel.pause = min(2 * parcel.pause, _LONGEST_PAUSE)
        self.work.notify()

    def _failed(self, parcel: Parcel, error: Exception) -> None:
        with self.work:
            now = time.monotonic()
            self.last_error = error
            # What fails again and again while others are written is not the store's fault.
            if self._last_success > parcel.last_failure:
                parcel.failures += 1
            parcel.last_failure = now
            self._probing = False
            if isinstance(error, Refused) or parcel.failures > _MOST_FAILURES:
                self._drop(parcel, str(error))
                self.work.notify()
                return
            self.is_away = True
            self._away_until = now + self._pause
            self._pause = min(2 * self._pause, _LONGEST_PAUSE)
            self._due.append(parcel)
            self.work.notify()
        self._say_once(
            "away",
            f"MLflow's store can't be written: {error}. Traces and scores are kept, at most "
            f"{_MOST}, and written when it is back.",
        )

    def _finish(self, parcel: Parcel) -> None:
        self.unwritten -= 1
        parcel.written.set()
        self.progress.notify_all()

    def _drop(self, parcel: Parcel, why: str) -> None:
        self.lose(why)
        self._finish(parcel)

    def lose(self, why: str) -> None:
        with self.work:
            self.dropped += 1
        self._say_once("dropped", f"A trace or score could not be written: {why}.")

    def _say_once(self, key: str, message: str) -> None:
        if key not in self._said:
            self._said.add(key)
            _logger.warning(message)

    @contextlib.contextmanager
    def busy(self) -> Iterator[None]:
        with self.work:
            self.work.wait_for(lambda: not self._forks, _BEFORE_FORK)
            self._writing += 1
        try:
            yield
        finally:
            self._rest()

    def _rest(self) -> None:
        with self.work:
            self._writing -= 1
            self.progress.notify_all()

    def fork(self) -> None:
        with self.work:
            self._forks += 1
            self.progress.wait_for(lambda: not self._writing, _BEFORE_FORK)

    def forked(self) -> None:
        with self.work:
            self._forks -= 1
            self.work.notify_all()

    def flush(self, timeout: float | None) -> bool:
        until = None if timeout is None else time.monotonic() + timeout
        with self.work:
            while self.unwritten:
                left = 1.0 if until is None else min(1.0, until - time.monotonic())
                if left <= 0 or (self.until is not None and self._is_in_vain()):
                    return False
                self.progress.wait(left)
        return True

    def _is_in_vain(self) -> bool:
        now = time.monotonic()
        over = self.until is not None and now >= self.until
        return over or (self.is_away and now - max(self._last_success, self._ended) > _LAST_WORD)

    def end(self) -> None:
        with self.work:
            if self.until is None:
                self._ended = time.monotonic()
                self.until = self._ended + _LAST_FLUSH


def post(write: Write) -> Parcel:
    """Have something written soon, again and again until it is.

    Dropped, counted and logged when the store refuses it, when it can't be written within 60
    seconds although the store works, or when 10,000 others wait already.
    """
    return _outbox.post(write)


def busy() -> AbstractContextManager[None]:
    """Enter to do something during which the process must not fork."""
    return _outbox.busy()


def lose(why: str) -> None:
    """Count something that can't be kept, and say so the first time."""
    _outbox.lose(why)


def wait_for(parcel: Parcel) -> None:
    """Wait a few seconds for something to be written, but not for a store that is away."""
    _outbox.wait_for(parcel)


def start() -> None:
    """Have a thread that writes while threads can be started."""
    _outbox.start()


def flush(timeout: float | None = _FLUSH) -> bool:
    """Wait until all that was posted is written or dropped.

    Args:
        timeout: Seconds to wait at most; None waits for as long as it takes. At the end of the
            process it is less: see :func:`end`.

    Returns:
        Whether nothing is left.
    """
    return _outbox.flush(timeout)


def end() -> None:
    """The process is about to end: from now on all flushes together take 10 seconds at most.

    If the store is away, they take 3.
    """
    _outbox.end()


def dropped() -> int:
    """How much was given up."""
    return _outbox.dropped


def report(unready: int = 0, error: Exception | None = None) -> None:
    """Say what is left unwritten, if anything is, in one line.

    Args:
        unready: How much has not even come here.
        error: Why not.
    """
    if left := _outbox.unwritten + unready:
        _logger.warning(
            "%d writes of traces or scores could not be delivered to MLflow before the process "
            "ended: %s.",
            left,
            _outbox.last_error or error or "there was no time left",
        )


def _after_fork() -> None:
    """A forked child has none of its parent's threads, and its parent writes what is left."""
    global _outbox
    _outbox = _Outbox()


_outbox = _Outbox()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(
        before=lambda: _outbox.fork(),
        after_in_parent=lambda: _outbox.forked(),
        after_in_child=_after_fork,
    )
