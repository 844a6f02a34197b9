"""What has to be written to the MLflow store, kept until it is written.

Daemon threads write it, so that a store that is slow, locked or gone holds up neither a caller
nor the end of the process. While the store is away, one write at a time finds out whether it is
back; the others wait, up to a bound. While the application makes calls, little is written at a
time, so that the calls are not held up; the longer something waits, the more is.
"""

from __future__ import annotations

import contextlib
import heapq
import itertools
import logging
import math
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

from tlm_tracing import _threads

_logger = logging.getLogger("tlm_tracing")

_MOST = 10_000
# Threads that write: to a database of our own, where they wait for each other, and to a server,
# where they wait for the network more than they work. Some connections are left to others, or
# urllib3 would warn of each that is one too many.
_WRITERS = 4
_WRITERS_TO_A_SERVER = 16
_CONNECTIONS_LEFT = 2
# While the application calls: it waits for Python's interpreter lock behind each that works.
_WRITERS_BESIDE_CALLS = 2
# Enough to share what a request costs, few enough for a fork or the end to wait for.
_TOGETHER = 20
_FEW = 5
# What waits longer, or is more, is written as fast as it goes. Until then a writer rests up to
# so many times as long as it has written.
_PATIENT_FOR = 20.0
_PATIENT_UP_TO = 8_000
_REST = 3.0
_LONGEST_REST = 1.0
# A call so long ago means that the application makes some.
_BUSY_FOR = 0.25
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
# At the end of the process: for all of it, for all of it if the process is told to end, while
# nothing is written, and with a store that is away.
_LAST_FLUSH = 30.0
_LAST_FLUSH_IF_KILLED = 10.0
_LONGEST_SILENCE = 10.0
_LAST_WORD = 3.0
_SAY_SO = 5.0

Write = Callable[[], bool]
"""Writes something; gives False if it can't be written yet. Exceptions are the store's."""

WriteAll = Callable[[list[Any]], None]
"""Writes several things of a kind at once; they can be written, and it does no harm to write them
again. Exceptions are the store's."""


class Refused(Exception):  # noqa: N818 - it tells what the store did
    """The store will never take this: to try again would be in vain."""


@dataclass(eq=False)
class Parcel:
    """Something to be written.

    Attributes:
        item: What it is, if it is written together with others.
        written: Set when it is written, or given up.
    """

    write: Write | None = None
    write_all: WriteAll | None = None
    item: Any = None
    posted: float = field(default_factory=time.monotonic)
    is_held: bool = False
    is_taken: bool = False
    is_alone: bool = False
    failures: int = 0
    pause: float = _FIRST_PAUSE
    last_failure: float = 0.0
    waiting_since: float | None = None
    written: threading.Event = field(default_factory=threading.Event)

    def goes_with(self, other: Parcel) -> bool:
        """Whether both can be written at once."""
        is_one_kind = self.write_all is not None and self.write_all == other.write_all
        return is_one_kind and not self.is_alone and not other.is_alone


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
        self._most_writers = _WRITERS
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
        self._flushes = 0
        self._rest_until = 0.0
        self.last_call = 0.0
        self._said: set[str] = set()

    def post(self, parcel: Parcel, hold: float = 0.0) -> Parcel:
        with self.work:
            if self.unwritten >= _MOST:
                self.lose(f"{_MOST} others wait already")
                parcel.written.set()
                return parcel
            self.unwritten += 1
            if hold and not self._flushes:
                parcel.is_held = True
                self._push(parcel, parcel.posted + hold)
            else:
                self._due.append(parcel)
            self.work.notify()
            self._start_another()
        return parcel

    def take_back(self, parcel: Parcel) -> Any:
        with self.work:
            if not parcel.is_held:
                return None
            # It stays where it is until it would have been due.
            parcel.is_held = False
            item, parcel.item = parcel.item, None
            self._finish(parcel)
            return item

    @contextlib.contextmanager
    def waiting(self, parcel: Parcel) -> Iterator[Any]:
        with self.work:
            is_waiting = not parcel.is_taken and not parcel.written.is_set()
            yield parcel.item if is_waiting else None

    def _push(self, parcel: Parcel, due: float) -> None:
        heapq.heappush(self._later, (due, next(self._numbers), parcel))

    def start(self, connections: int | None) -> None:
        with self.work:
            self._most_writers = _WRITERS
            if connections is not None:
                usable = max(1, connections - _CONNECTIONS_LEFT)
                self._most_writers = min(_WRITERS_TO_A_SERVER, usable)
            if not self._writers:
                self._start_writer()

    def wait_for(self, parcel: Parcel, patience: float | None) -> None:
        if patience is None and (self.is_away or time.monotonic() < self._slow_until):
            return
        with self._hurrying():
            is_written = parcel.written.wait(_PATIENCE if patience is None else patience)
        if not is_written:
            self._slow_until = time.monotonic() + _IMPATIENT

    def _start_another(self) -> None:
        if self._due and not self._idle and self._writers < self._most_writers:
            self._start_writer()

    def _start_writer(self) -> None:
        # Python 3.12 starts no thread once the process is about to end.
        with contextlib.suppress(RuntimeError):
            _threads.start("outbox", self._write_all)
            self._writers += 1

    def _write_all(self) -> None:
        while True:
            parcels = self._next()
            started = time.monotonic()
            try:
                done = _written(parcels)
            except Exception as error:
                self._failed(parcels, error)
            else:
                self._succeeded(parcels, done)
            self._rest(time.monotonic() - started)

    def _next(self) -> list[Parcel]:
        with self.work:
            while True:
                now = time.monotonic()
                while self._later and self._later[0][0] <= now:
                    self._fall_due(heapq.heappop(self._later)[2])
                if self._due and not self._forks and self._may_write(now):
                    self._probing = self.is_away
                    self._writing += 1
                    parcels = self._taken()
                    self._start_another()
                    return parcels
                self._idle += 1
                self.work.wait(self._time_to_next(now))
                self._idle -= 1

    def _fall_due(self, parcel: Parcel) -> None:
        if not parcel.written.is_set():  # it was taken back otherwise
            parcel.is_held = False
            self._due.append(parcel)

    def _may_write(self, now: float) -> bool:
        if self.is_away:
            return not self._probing and now >= self._away_until
        urgency = self._urgency(now)
        if urgency >= 1:
            return self._writing < self._most_writers
        at_once = max(1.0, urgency * _WRITERS_BESIDE_CALLS)
        return self._writing < at_once and now >= self._rest_until

    def _urgency(self, now: float) -> float:
        """How much is to be written at a time, as a share of what could be."""
        if self._flushes or self.until is not None or now - self.last_call > _BUSY_FOR:
            return 1.0
        waited = (now - self._due[0].posted) / _PATIENT_FOR if self._due else 0.0
        pressing = max(waited, self.unwritten / _PATIENT_UP_TO)
        return min(1.0, pressing**2)

    def _taken(self) -> list[Parcel]:
        """The first that is due, and others that can be written with it."""
        # Of little no writer takes so much that the others have nothing to do.
        share = math.ceil(len(self._due) / self._most_writers)
        most = min(_TOGETHER, max(_FEW, share))
        first = self._due.popleft()
        taken = [first]
        if first.write_all is not None:
            rest: list[Parcel] = []
            while self._due and len(taken) < most:
                parcel = self._due.popleft()
                (taken if parcel.goes_with(first) else rest).append(parcel)
            self._due.extendleft(reversed(rest))
        for parcel in taken:
            parcel.is_taken = True
        return taken

    def _time_to_next(self, now: float) -> float | None:
        times = [self._later[0][0]] if self._later else []
        if self._due and not self._forks:
            if not self.is_away:
                times.append(max(self._rest_until, now + _BUSY_FOR))
            elif not self._probing:
                times.append(self._away_until)
        return max(0.0, min(times) - now) if times else None

    def _succeeded(self, parcels: list[Parcel], done: bool) -> None:
        with self.work:
            self._last_success = now = time.monotonic()
            was_away, self.is_away = self.is_away, False
            self._probing = False
            self._pause = _FIRST_PAUSE
            if was_away:
                self._back_since = now
            for parcel in parcels:
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
        self._push(parcel, now + parcel.pause)
        parcel.pause = min(2 * parcel.pause, _LONGEST_PAUSE)
        self.work.notify()

    def _failed(self, parcels: list[Parcel], error: Exception) -> None:
        parcel, *others = parcels
        with self.work:
            now = time.monotonic()
            self.last_error = error
            for one in parcels:
                one.is_taken = False
            self._due.extendleft(reversed(others))
            # One of them may be what the store does not take; each is tried by itself then.
            for one in parcels if others and not isinstance(error, OSError) else ():
                one.is_alone = True
            if others and isinstance(error, Refused):
                self._due.appendleft(parcel)
                self._probing = False
                self.work.notify()
                return
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

    def _rest(self, written_for: float = 0.0) -> None:
        with self.work:
            self._writing -= 1
            now = time.monotonic()
            rest = min(written_for * _REST * (1 - self._urgency(now)), _LONGEST_REST)
            self._rest_until = max(self._rest_until, now + rest)
            self.progress.notify_all()
            self.work.notify()

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
        with self.work, self._hurrying():
            self._let_go()
            while self.unwritten:
                left = 1.0 if until is None else min(1.0, until - time.monotonic())
                if left <= 0 or (self.until is not None and self._is_in_vain()):
                    return False
                self.progress.wait(left)
        return True

    @contextlib.contextmanager
    def _hurrying(self) -> Iterator[None]:
        """Somebody waits: all is written as fast as it goes."""
        with self.work:
            self._flushes += 1
            self.work.notify_all()
        try:
            yield
        finally:
            with self.work:
                self._flushes -= 1

    def _let_go(self) -> None:
        """Whatever is held is due now."""
        for entry in [entry for entry in self._later if entry[2].is_held]:
            self._later.remove(entry)
            self._fall_due(entry[2])
        heapq.heapify(self._later)

    def _is_in_vain(self) -> bool:
        now = time.monotonic()
        if self.until is not None and now - self._ended > _SAY_SO:
            self._say_once(
                "ending",
                f"{self.unwritten} traces and scores are still to be written; the process waits "
                f"for that up to {max(0.0, self.until - now):.0f} more seconds.",
            )
        over = self.until is not None and now >= self.until
        silence = now - max(self._last_success, self._ended)
        return over or silence > (_LAST_WORD if self.is_away else _LONGEST_SILENCE)

    def end(self, *, is_killed: bool) -> None:
        with self.work:
            if self.until is None:
                self._ended = time.monotonic()
                self.until = self._ended + _LAST_FLUSH
            if is_killed:
                self.until = min(self.until, time.monotonic() + _LAST_FLUSH_IF_KILLED)


def _written(parcels: list[Parcel]) -> bool:
    write, write_all = parcels[0].write, parcels[0].write_all
    if write is not None:
        return write()
    if write_all is not None:
        write_all([parcel.item for parcel in parcels])
    return True


def post(write: Write) -> Parcel:
    """Have something written soon, again and again until it is.

    Dropped, counted and logged when the store refuses it, when it can't be written within 60
    seconds although the store works, or when 10,000 others wait already.
    """
    return _outbox.post(Parcel(write))


def post_together(write_all: WriteAll, item: Any, hold: float = 0.0) -> Parcel:
    """The same for something that may be written together with others of its kind.

    Args:
        write_all: Writes them.
        item: What is to be written.
        hold: Seconds in which it may be taken back, and is not written but by a flush.
    """
    return _outbox.post(Parcel(write_all=write_all, item=item), hold)


def take_back(parcel: Parcel) -> Any:
    """Have a parcel that is still held not be written; gives its item, None if it is too late."""
    return _outbox.take_back(parcel)


def waiting(parcel: Parcel) -> AbstractContextManager[Any]:
    """Enter to have a parcel's item, to be changed before it is written; None if it is too late."""
    return _outbox.waiting(parcel)


def called() -> None:
    """The application makes a call, which is not to be held up."""
    _outbox.last_call = time.monotonic()


def is_called() -> bool:
    """Whether the application makes calls at present."""
    return time.monotonic() - _outbox.last_call <= _BUSY_FOR


def busy() -> AbstractContextManager[None]:
    """Enter to do something during which the process must not fork."""
    return _outbox.busy()


def lose(why: str) -> None:
    """Count something that can't be kept, and say so the first time."""
    _outbox.lose(why)


def wait_for(parcel: Parcel, patience: float | None = None) -> None:
    """Wait for something to be written.

    Args:
        parcel: What was posted.
        patience: Seconds to wait at most, also for a store that is away; None waits a few
            seconds, and not for such a store.
    """
    _outbox.wait_for(parcel, patience)


def start(connections: int | None) -> None:
    """Have a thread that writes while threads can be started.

    Args:
        connections: How many are kept to a server; None for a database of our own.
    """
    _outbox.start(connections)


def flush(timeout: float | None = _FLUSH) -> bool:
    """Wait until all that was posted is written or dropped.

    Args:
        timeout: Seconds to wait at most; None waits for as long as it takes. At the end of the
            process it is less: see :func:`end`.

    Returns:
        Whether nothing is left.
    """
    return _outbox.flush(timeout)


def end(*, is_killed: bool) -> None:
    """The process is about to end: from now on all flushes together take 30 seconds at most.

    They take 10 while nothing can be written, 3 if the store is away.

    Args:
        is_killed: Whether it is told to, by a signal; they take 10 seconds then.
    """
    _outbox.end(is_killed=is_killed)


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
    most_writers = _outbox._most_writers
    _outbox = _Outbox()
    _outbox._most_writers = most_writers


_outbox = _Outbox()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(
        before=lambda: _outbox.fork(),
        after_in_parent=lambda: _outbox.forked(),
        after_in_child=_after_fork,
    )
