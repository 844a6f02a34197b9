"""A stream ends exactly once for the record.

However it ends: exhausted, failed, closed, dropped, left lying after a loop, or still open when
the process ends.
"""

from __future__ import annotations

import functools
import sys
import threading
import time
import weakref
from collections.abc import Callable
from typing import Any, Protocol

from tlm_tracing._endpoints import Endpoint

# How long a stream may lie between two loops over it, in seconds.
_MOMENT = 1.0

_open: weakref.WeakSet[Watch] = weakref.WeakSet()


class Heard:
    """What has come of a stream so far.

    Attributes:
        chunks: What is kept of every chunk, in order.
        first_at: When the first piece of the answer came, by ``time.monotonic``; None before.
        held: Those that the caller does not get until the score is in.
        replacement: What the caller gets instead of the answer, in a list of one; empty if it
            is not replaced.
    """

    __slots__ = ("_id", "_is_token", "_kept", "chunks", "first_at", "held", "replacement")

    def __init__(
        self, is_token: Callable[[Any], bool], kept: Callable[[Any], Any] | None = None
    ) -> None:
        self.chunks: list[Any] = []
        self.first_at: float | None = None
        self.held: list[Any] = []
        self.replacement: list[Any] = []
        self._is_token = is_token
        self._kept = kept
        self._id: str | None = None

    @property
    def is_given(self) -> bool:
        """Whether the caller has all of the answer before its score is in."""
        return not self.held

    def add(self, chunk: Any) -> None:
        """Keep a chunk."""
        if self.first_at is None and self._is_token(chunk):
            self.first_at = time.monotonic()
        if self._kept is not None:
            whole, chunk = chunk, self._kept(chunk)
            # The first with words is kept whole: it tells the id and the model, too.
            if type(chunk) is str and self._id != whole.id:
                self._id, chunk = whole.id, whole
        self.chunks.append(chunk)

    def answer(self, endpoint: Endpoint) -> dict[str, Any] | None:
        """The answer so far as plain data; None before the first chunk."""
        return endpoint.assemble(self.chunks) if self.chunks else None


class Listener(Protocol):
    """Who is told of a stream: that it is there, and then once, how it ended."""

    @property
    def endpoint(self) -> Endpoint:
        """Where it comes from."""

    @property
    def holds_last_chunk(self) -> bool:
        """Whether its end is held back until the score is in."""

    def stream_opened(self, stream: Any) -> None:
        """It was handed to the caller."""

    def stream_ended(self, heard: Heard, how: str, error: BaseException | None = None) -> None:
        """It has ended.

        Args:
            heard: What had come.
            how: ``"exhausted"``, ``"closed"`` or ``"interrupted"``.
            error: The exception that interrupted it, or because of which it was closed.
        """

    async def astream_ended(
        self, heard: Heard, how: str, error: BaseException | None = None
    ) -> None:
        """It was exhausted or closed; the async twin."""

    def stream_dropped(self, heard: Heard) -> None:
        """It was dropped.

        This may be the garbage collector, in any thread and inside any lock, so that nothing may
        be done here.
        """

    def soon(self, chore: Callable[[], bool]) -> None:
        """Do something soon elsewhere, again and again until it gives True."""


class Watch:
    """Watches one stream for its listener.

    Attributes:
        heard: What has come so far.
        listener: Who is told.
        reading: Gives the generator that reads the stream, if there is one.
    """

    def __init__(self, listener: Listener, heard: Heard) -> None:
        self.heard = heard
        self.listener = listener
        self.reading: Callable[[], Any] = bool
        self._opened_during = id(sys.exc_info()[1])
        self._ended = False
        self._lock = threading.Lock()
        _open.add(self)

    def exhausted(self) -> None:
        """Nothing more comes."""
        if self._is_first():
            self.listener.stream_ended(self.heard, "exhausted")

    async def aexhausted(self) -> None:
        """The async twin of :meth:`exhausted`."""
        if self._is_first():
            await self.listener.astream_ended(self.heard, "exhausted")

    def closed(self, error: BaseException | None) -> None:
        """It was closed, perhaps because of an exception in the caller's own code."""
        if self._is_first():
            self.listener.stream_ended(self.heard, "closed", error)

    async def aclosed(self, error: BaseException | None) -> None:
        """The async twin of :meth:`closed`."""
        if self._is_first():
            await self.listener.astream_ended(self.heard, "closed", error)

    def interrupted(self, error: BaseException) -> None:
        """It was read, and an exception came instead."""
        if self._is_first():
            self.listener.stream_ended(self.heard, "interrupted", error)

    def dropped(self) -> None:
        """It is garbage, or as good as that."""
        if self._is_first():
            self.listener.stream_dropped(self.heard)

    def left(self) -> None:
        """A loop over it was left; another one may go on, or not."""
        if not self._ended:
            until = time.monotonic() + _MOMENT
            self.listener.soon(functools.partial(self._is_settled, len(self.heard.chunks), until))

    def in_flight(self) -> BaseException | None:
        """The exception on its way through the caller's code, such as a ``with`` block's."""
        error = sys.exc_info()[1]
        if isinstance(error, GeneratorExit) or id(error) == self._opened_during:
            return None
        return error

    def _is_settled(self, read: int, until: float) -> bool:
        if self._ended or self.is_read() or len(self.heard.chunks) != read:
            return True
        if time.monotonic() < until:
            return False
        self.dropped()
        return True

    def is_read(self) -> bool:
        """Whether somebody waits for the next chunk at this very moment."""
        inner = self.reading()
        return bool(getattr(inner, "gi_running", False) or getattr(inner, "ag_running", False))

    def _is_first(self) -> bool:
        # A collector's finalizer may interrupt the holder of this lock in its own thread; it
        # has then nothing to report that the holder does not.
        if not self._lock.acquire(blocking=False):
            return False
        try:
            first, self._ended = not self._ended, True
            return first
        finally:
            self._lock.release()


def drop_all() -> None:
    """No stream is read any more: the process ends."""
    for watch in list(_open):
        watch.dropped()
