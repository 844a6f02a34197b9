"""A stream's life cycle.

Chunks pass through untouched; per chunk nothing happens but keeping a reference. A stream ends
exactly once for the record, however it ends: exhausted, failed, closed, or dropped.
"""

from __future__ import annotations

import asyncio
import functools
import threading
import time
import weakref
from collections.abc import AsyncIterator, Iterator
from typing import Any, Protocol

from openai import AsyncStream, Stream
from openai.types.chat import ChatCompletion

from tlm_tracing._reducer import reduce


class Heard:
    """What has come of a stream so far.

    Attributes:
        chunks: Every chunk, in order.
        first_at: When the first one came, by ``time.monotonic``; None before.
    """

    __slots__ = ("chunks", "first_at")

    def __init__(self) -> None:
        self.chunks: list[Any] = []
        self.first_at: float | None = None

    def completion(self) -> ChatCompletion | None:
        """The answer so far; None before the first chunk."""
        return ChatCompletion.construct(**reduce(self.chunks)) if self.chunks else None

    @property
    def is_whole(self) -> bool:
        """Whether every choice was finished: a body can end early but cleanly."""
        reasons = [choice["finish_reason"] for choice in reduce(self.chunks)["choices"]]
        return bool(reasons) and all(reasons)


class Listener(Protocol):
    """Who is told of a stream: that it is there, and then once, how it ended."""

    def stream_opened(self, stream: Any) -> None:
        """It was handed to the caller."""

    def stream_ended(self, heard: Heard) -> None:
        """It was exhausted."""

    async def astream_ended(self, heard: Heard) -> None:
        """It was exhausted; the async twin."""

    def stream_left(
        self,
        heard: Heard,
        outcome: str,
        error: BaseException | None,
        *,
        elsewhere: bool,
    ) -> None:
        """It was left before its end.

        Args:
            heard: What had come.
            outcome: ``"abandoned"``, ``"cancelled"`` or ``"error"``.
            error: What ended it, if it was an exception.
            elsewhere: Whether this may be the garbage collector, in any thread and inside any
                lock, so that nothing may be done here.
        """


class _Watch:
    """Watches one stream for its listener."""

    def __init__(self, listener: Listener) -> None:
        self.heard = Heard()
        self.listener = listener
        self._ended = False
        self._lock = threading.Lock()

    def left(
        self,
        outcome: str,
        error: BaseException | None = None,
        *,
        elsewhere: bool = False,
    ) -> None:
        if self._is_first():
            self.listener.stream_left(self.heard, outcome, error, elsewhere=elsewhere)

    def interrupted(self, error: BaseException) -> None:
        stopped = isinstance(error, (asyncio.CancelledError, KeyboardInterrupt, SystemExit))
        self.left("cancelled" if stopped else "error", error)

    def dropped(self) -> None:
        self.left("abandoned", elsewhere=True)

    def exhausted(self) -> None:
        if self._is_first():
            self.listener.stream_ended(self.heard)

    async def aexhausted(self) -> None:
        if self._is_first():
            await self.listener.astream_ended(self.heard)

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


def listen(stream: Stream[Any] | AsyncStream[Any], listener: Listener) -> None:
    """Have a listener told how a stream ends.

    Args:
        stream: One that was made by a class from :func:`traced`.
        listener: Who is told.
    """
    _follow(stream, _watch(stream, listener))


@functools.lru_cache(maxsize=32)
def traced(stream_cls: Any) -> Any:
    """A class that makes streams of the given class whose chunks can be heard.

    The streams that it makes are of exactly the class that they would be without it.

    Args:
        stream_cls: ``Stream[ChatCompletionChunk]``, its async twin, or a subclass.
    """
    is_async = issubclass(getattr(stream_cls, "__origin__", stream_cls), AsyncStream)
    hear: Any = _aheard if is_async else _heard

    class Traced(stream_cls):  # type: ignore[misc]
        def __init__(self, **kwargs: Any) -> None:
            super().__init__(**kwargs)
            _made(self, stream_cls)

        def __stream__(self) -> Any:
            self._tlm_inner = super().__stream__()
            return hear(self, self._tlm_inner)

    return Traced


def listen_when_parsed(response: Any, listener: Listener) -> None:
    """Have a listener told of the stream that will be made of a raw response, if ever."""
    response._tlm_watch = _watch(response, listener)


def _watch(source: Any, listener: Listener) -> _Watch:
    """A watch that hears of it when its source is dropped."""
    watch = _Watch(listener)
    weakref.finalize(source, watch.dropped).atexit = False
    return watch


def _made(stream: Any, stream_cls: Any) -> None:
    """A new stream takes the class that it would have without us."""
    stream.__class__ = getattr(stream_cls, "__origin__", stream_cls)
    watch = stream.response.__dict__.pop("_tlm_watch", None)
    if watch is not None:
        _follow(stream, watch)


def _follow(stream: Any, watch: _Watch) -> None:
    stream._tlm_watch = watch
    tell = _tell_aclose if isinstance(stream, AsyncStream) else _tell_close
    tell(stream.response, watch, stream._tlm_inner)
    watch.listener.stream_opened(stream)


def _heard(stream: Any, inner: Iterator[Any]) -> Iterator[Any]:
    watch: _Watch | None = getattr(stream, "_tlm_watch", None)
    if watch is None:
        yield from inner
        return
    heard = watch.heard
    keep = heard.chunks.append
    try:
        for chunk in inner:
            if heard.first_at is None:
                heard.first_at = time.monotonic()
            keep(chunk)
            yield chunk
    except GeneratorExit:
        watch.dropped()
        raise
    except BaseException as error:
        watch.interrupted(error)
        raise
    watch.exhausted()


async def _aheard(stream: Any, inner: AsyncIterator[Any]) -> AsyncIterator[Any]:
    watch: _Watch | None = getattr(stream, "_tlm_watch", None)
    if watch is None:
        async for chunk in inner:
            yield chunk
        return
    heard = watch.heard
    keep = heard.chunks.append
    try:
        async for chunk in inner:
            if heard.first_at is None:
                heard.first_at = time.monotonic()
            keep(chunk)
            yield chunk
    except GeneratorExit:
        watch.dropped()
        raise
    except BaseException as error:
        watch.interrupted(error)
        raise
    await watch.aexhausted()


def _tell_close(response: Any, watch: _Watch, inner: Any) -> None:
    """The one place that every early exit passes: the response is closed."""
    original = response.close

    def close() -> Any:
        # At most once, so that no cycle outlives the stream.
        response.__dict__.pop("close", None)
        try:
            return original()
        finally:
            if not inner.gi_running:
                watch.left("abandoned")

    response.close = close


def _tell_aclose(response: Any, watch: _Watch, inner: Any) -> None:
    original = response.aclose

    async def aclose() -> Any:
        response.__dict__.pop("aclose", None)
        try:
            return await original()
        finally:
            if not inner.ag_running:
                watch.left("abandoned")

    response.aclose = aclose
