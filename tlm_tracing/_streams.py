"""A stream's life cycle.

Chunks pass through untouched; per chunk nothing happens but keeping a reference. A stream ends
exactly once for the record, however it ends: exhausted, failed, closed, dropped, or left lying
after a loop. A raw
response is heard by its body, as its caller reads it, until a stream is made of it.
"""

from __future__ import annotations

import functools
import json
import sys
import threading
import time
import weakref
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from typing import Any, Protocol

from openai import AsyncStream, Stream
from openai._streaming import SSEDecoder

from tlm_tracing._endpoints import Endpoint

# How long a stream may lie between two loops over it, in seconds.
_MOMENT = 1.0

_open: weakref.WeakSet[_Watch] = weakref.WeakSet()


class Heard:
    """What has come of a stream so far.

    Attributes:
        chunks: Every chunk, in order.
        first_at: When the first piece of the answer came, by ``time.monotonic``; None before.
    """

    __slots__ = ("_is_token", "chunks", "first_at")

    def __init__(self, is_token: Callable[[Any], bool]) -> None:
        self.chunks: list[Any] = []
        self.first_at: float | None = None
        self._is_token = is_token

    def add(self, chunk: Any) -> None:
        """Keep a chunk."""
        if self.first_at is None and self._is_token(chunk):
            self.first_at = time.monotonic()
        self.chunks.append(chunk)

    def answer(self, endpoint: Endpoint) -> dict[str, Any] | None:
        """The answer so far as plain data; None before the first chunk."""
        return endpoint.assemble(self.chunks) if self.chunks else None


class _HeardBody(Heard):
    """The same of a response's body, whose chunks are bytes as they came."""

    __slots__ = ("_headers", "_is_events", "_kind")

    def __init__(self, response: Any) -> None:
        super().__init__(bool)
        self._kind = type(response)
        self._headers = response.headers
        self._is_events = is_event_stream(response)

    def answer(self, endpoint: Endpoint) -> dict[str, Any] | None:
        """The answer so far: of events, what has come; of JSON, all or nothing."""
        try:
            body = self._kind(200, headers=self._headers, content=b"".join(self.chunks))
            content = body.content  # decompressed
            if not self._is_events:
                whole = json.loads(content)
                return whole if isinstance(whole, dict) else None
            events = SSEDecoder().iter_bytes(iter([content]))
            chunks = [json.loads(event.data) for event in events if event.data[:1] == "{"]
        except Exception:  # cut off in the middle
            return None
        return endpoint.assemble(chunks) if chunks else None


class Listener(Protocol):
    """Who is told of a stream: that it is there, and then once, how it ended."""

    @property
    def endpoint(self) -> Endpoint:
        """Where it comes from."""

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


class _Watch:
    """Watches one stream for its listener."""

    def __init__(self, listener: Listener, heard: Heard, *, hides_usage: bool = False) -> None:
        self.heard = heard
        self.listener = listener
        self.hides_usage = hides_usage
        self.reading: Callable[[], Any] = bool
        self._opened_during = id(sys.exc_info()[1])
        self._ended = False
        self._lock = threading.Lock()
        _open.add(self)

    def exhausted(self) -> None:
        if self._is_first():
            self.listener.stream_ended(self.heard, "exhausted")

    async def aexhausted(self) -> None:
        if self._is_first():
            await self.listener.astream_ended(self.heard, "exhausted")

    def closed(self, error: BaseException | None) -> None:
        if self._is_first():
            self.listener.stream_ended(self.heard, "closed", error)

    async def aclosed(self, error: BaseException | None) -> None:
        if self._is_first():
            await self.listener.astream_ended(self.heard, "closed", error)

    def interrupted(self, error: BaseException) -> None:
        if self._is_first():
            self.listener.stream_ended(self.heard, "interrupted", error)

    def dropped(self) -> None:
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
        if self._ended or self._is_read() or len(self.heard.chunks) != read:
            return True
        if time.monotonic() < until:
            return False
        self.dropped()
        return True

    def _is_read(self) -> bool:
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


def is_event_stream(response: Any) -> bool:
    """Whether a response's body is a stream of events."""
    kind = response.headers.get("content-type")
    return isinstance(kind, str) and "event-stream" in kind


def drop_all() -> None:
    """No stream is read any more: the process ends."""
    for watch in list(_open):
        watch.dropped()


def listen(
    stream: Stream[Any] | AsyncStream[Any], listener: Listener, *, hides_usage: bool = False
) -> None:
    """Have a listener told how a stream ends.

    Args:
        stream: One that was made by a class from :func:`traced`.
        listener: Who is told.
        hides_usage: Whether the caller did not ask for the chunk that tells the usage.
    """
    watch = _Watch(listener, Heard(listener.endpoint.is_token), hides_usage=hides_usage)
    _follow(stream, watch)


def listen_to_body(response: Any, listener: Listener) -> None:
    """Have a listener told what the caller reads of a raw response, if ever.

    Args:
        response: The HTTP response, its body not read yet.
        listener: Who is told.
    """
    watch = _Watch(listener, _HeardBody(response))
    weakref.finalize(response, watch.dropped).atexit = False
    stream_cls: Any = type(response.stream)
    tap = _tapped(stream_cls)(response.stream, watch)
    response.stream, response._tlm_tap = tap, tap


@functools.lru_cache(maxsize=32)
def traced(stream_cls: Any) -> Any:
    """A class that makes streams of the given class whose chunks can be heard.

    The streams that it makes are of exactly the class that they would be without it.

    Args:
        stream_cls: ``Stream[ChatCompletionChunk]``, its async twin, or a subclass.
    """
    is_async = issubclass(getattr(stream_cls, "__origin__", stream_cls), AsyncStream)
    hear: Any = _AsyncChunks if is_async else _Chunks

    class Traced(stream_cls):  # type: ignore[misc]
        def __init__(self, **kwargs: Any) -> None:
            super().__init__(**kwargs)
            _made(self, stream_cls)

        def __stream__(self) -> Any:
            self._tlm_inner = super().__stream__()
            return hear(self)

    return Traced


def _made(stream: Any, stream_cls: Any) -> None:
    """A new stream takes the class that it would have without us."""
    stream.__class__ = getattr(stream_cls, "__origin__", stream_cls)
    tap: _Tap | None = stream.response.__dict__.pop("_tlm_tap", None)
    if tap is not None:
        # From here on its chunks are heard, and no more its bytes.
        tap.is_heard = False
        tap.watch.heard = Heard(tap.watch.listener.endpoint.is_token)
        _follow(stream, tap.watch)


def _follow(stream: Any, watch: _Watch) -> None:
    stream._tlm_watch = watch
    weakref.finalize(stream, watch.dropped).atexit = False
    tell = _tell_aclose if isinstance(stream, AsyncStream) else _tell_close
    tell(stream.response, watch, stream._tlm_inner)
    watch.listener.stream_opened(stream)


def _heard(stream: Any) -> Iterator[Any]:
    watch: _Watch | None = getattr(stream, "_tlm_watch", None)
    if watch is None:
        yield from stream._tlm_inner
        return
    add = watch.heard.add
    try:
        for chunk in stream._tlm_inner:
            add(chunk)
            if not (watch.hides_usage and _tells_usage_alone(chunk)):
                yield chunk
    except GeneratorExit:
        watch.dropped()
        raise
    except BaseException as error:
        watch.interrupted(error)
        raise
    watch.exhausted()


async def _aheard(stream: Any) -> AsyncIterator[Any]:
    watch: _Watch | None = getattr(stream, "_tlm_watch", None)
    if watch is None:
        async for chunk in stream._tlm_inner:
            yield chunk
        return
    add = watch.heard.add
    try:
        async for chunk in stream._tlm_inner:
            add(chunk)
            if not (watch.hides_usage and _tells_usage_alone(chunk)):
                yield chunk
    except GeneratorExit:
        watch.dropped()
        raise
    except BaseException as error:
        watch.interrupted(error)
        raise
    await watch.aexhausted()


class _Chunks:
    """A stream's chunks, by themselves or in loops; tells when a loop over them is left."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream
        self._chunks = _heard(stream)

    def __next__(self) -> Any:
        return next(self._chunks)

    def __iter__(self) -> Iterator[Any]:
        return _Loop(self._chunks, getattr(self._stream, "_tlm_watch", None))


class _AsyncChunks:
    """The async twin."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream
        self._chunks = _aheard(stream)

    def __anext__(self) -> Awaitable[Any]:
        return self._chunks.__anext__()

    def __aiter__(self) -> AsyncIterator[Any]:
        return _AsyncLoop(self._chunks, getattr(self._stream, "_tlm_watch", None))


class _LoopEnd:
    """What a loop holds for as long as it runs."""

    __slots__ = ("_chunks", "_watch")

    def __init__(self, chunks: Any, watch: _Watch | None) -> None:
        self._chunks = chunks
        self._watch = watch

    def __del__(self) -> None:
        if self._watch is not None:
            self._watch.left()


class _Loop(_LoopEnd):
    __slots__ = ()

    def __iter__(self) -> _Loop:
        return self

    def __next__(self) -> Any:
        return next(self._chunks)


class _AsyncLoop(_LoopEnd):
    __slots__ = ()

    def __aiter__(self) -> _AsyncLoop:
        return self

    def __anext__(self) -> Awaitable[Any]:
        awaitable: Awaitable[Any] = self._chunks.__anext__()
        return awaitable


def _tells_usage_alone(chunk: Any) -> bool:
    return not getattr(chunk, "choices", None) and getattr(chunk, "usage", None) is not None


def _tell_close(response: Any, watch: _Watch, inner: Any) -> None:
    """The one place that every early exit passes: the response is closed."""
    original = response.close
    watch.reading = weakref.ref(inner)

    def close() -> Any:
        # At most once, so that no cycle outlives the stream.
        response.__dict__.pop("close", None)
        error = watch.in_flight()
        try:
            return original()
        finally:
            if not inner.gi_running:
                watch.closed(error)

    response.close = close


def _tell_aclose(response: Any, watch: _Watch, inner: Any) -> None:
    original = response.aclose
    watch.reading = weakref.ref(inner)

    async def aclose() -> Any:
        response.__dict__.pop("aclose", None)
        error = watch.in_flight()
        try:
            return await original()
        finally:
            if not inner.ag_running:
                await watch.aclosed(error)

    response.aclose = aclose


@functools.lru_cache(maxsize=32)
def _tapped(stream_cls: Any) -> Any:
    """A class of byte streams that can be heard, of the HTTP library's own kind."""
    is_async = hasattr(stream_cls, "__aiter__")
    base = next(
        cls for cls in stream_cls.__mro__ if cls.__name__ in ("SyncByteStream", "AsyncByteStream")
    )
    return type(base.__name__, (_AsyncTap if is_async else _SyncTap, base), {})


class _Tap:
    """Hears the body of a response as its caller reads it.

    Attributes:
        watch: Who is told.
        is_heard: Whether it still does.
    """

    def __init__(self, stream: Any, watch: _Watch) -> None:
        self._stream = stream
        self.watch = watch
        self.is_heard = True

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)  # httpx2 keeps the response's elapsed time there


class _SyncTap(_Tap):
    def __iter__(self) -> Iterator[bytes]:
        try:
            for piece in self._stream:
                if self.is_heard:
                    self.watch.heard.add(piece)
                yield piece
        except GeneratorExit:
            raise  # whoever stops reading closes the response, or drops it
        except BaseException as error:
            if self.is_heard:
                self.watch.interrupted(error)
            raise
        if self.is_heard:
            self.watch.exhausted()

    def close(self) -> None:
        error = self.watch.in_flight()
        try:
            self._stream.close()
        finally:
            if self.is_heard:
                self.watch.closed(error)


class _AsyncTap(_Tap):
    async def __aiter__(self) -> AsyncIterator[bytes]:
        try:
            async for piece in self._stream:
                if self.is_heard:
                    self.watch.heard.add(piece)
                yield piece
        except GeneratorExit:
            raise
        except BaseException as error:
            if self.is_heard:
                self.watch.interrupted(error)
            raise
        if self.is_heard:
            await self.watch.aexhausted()

    async def aclose(self) -> None:
        error = self.watch.in_flight()
        try:
            await self._stream.aclose()
        finally:
            if self.is_heard:
                await self.watch.aclosed(error)
