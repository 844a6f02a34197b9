"""Streams that OpenAI's client hands to the caller.

Chunks pass through untouched; per chunk nothing happens but keeping a reference. Those at the
end may be held back until the score is in.
"""

from __future__ import annotations

import contextlib
import functools
import weakref
from collections.abc import AsyncIterator, Awaitable, Iterator
from typing import Any

from openai import AsyncStream, Stream

from tlm_tracing import _bodies
from tlm_tracing._watching import Heard, Listener, Watch


def listen(
    stream: Stream[Any] | AsyncStream[Any], listener: Listener, *, hides_usage: bool = False
) -> None:
    """Have a listener told how a stream ends.

    Args:
        stream: One that was made by a class from :func:`traced`.
        listener: Who is told.
        hides_usage: Whether the caller did not ask for the chunk that tells the usage.
    """
    stream._tlm_hides_usage = hides_usage  # type: ignore[union-attr]
    _follow(stream, Watch(listener, _nothing_yet(listener)))


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
            if type(self) is Traced:  # and not a class that another tool has made of it
                self.__class__ = getattr(stream_cls, "__origin__", stream_cls)
            _made(self)

        def __stream__(self) -> Any:
            self._tlm_inner = super().__stream__()
            return hear(self)

    return Traced


def _made(stream: Any) -> None:
    """A new stream is followed at once, if its raw response was."""
    watch = _bodies.hand_over(stream.response)
    if watch is not None:
        watch.heard = _nothing_yet(watch.listener)
        _follow(stream, watch)


def _nothing_yet(listener: Listener) -> Heard:
    return Heard(listener.endpoint.is_token, listener.endpoint.kept)


def _follow(stream: Any, watch: Watch) -> None:
    stream._tlm_watch = watch
    weakref.finalize(stream, watch.dropped).atexit = False
    tell = _tell_aclose if isinstance(stream, AsyncStream) else _tell_close
    tell(stream.response, watch)
    watch.listener.stream_opened(stream)


def _heard(stream: Any) -> Iterator[Any]:
    watch: Watch | None = getattr(stream, "_tlm_watch", None)
    if watch is None:
        yield from stream._tlm_inner
        return
    watch.reading = weakref.ref(stream._tlm_inner)
    add = watch.heard.add
    hides_usage = getattr(stream, "_tlm_hides_usage", False)
    holds = watch.listener.holds_last_chunk
    try:
        for chunk in stream._tlm_inner:
            add(chunk)
            if hides_usage and _tells_usage_alone(chunk):
                continue
            if holds:
                yield from _let_through(watch, chunk)
            else:
                yield chunk
    except GeneratorExit:
        watch.dropped()
        raise
    except Exception as error:
        watch.interrupted(error)
        yield from watch.heard.held
        raise
    except BaseException as error:
        watch.interrupted(error)
        raise
    try:
        watch.exhausted()
    except Exception:
        yield from watch.heard.held
        raise
    yield from watch.heard.held


async def _aheard(stream: Any) -> AsyncIterator[Any]:
    watch: Watch | None = getattr(stream, "_tlm_watch", None)
    if watch is None:
        async for chunk in stream._tlm_inner:
            yield chunk
        return
    watch.reading = weakref.ref(stream._tlm_inner)
    add = watch.heard.add
    hides_usage = getattr(stream, "_tlm_hides_usage", False)
    holds = watch.listener.holds_last_chunk
    try:
        async for chunk in stream._tlm_inner:
            add(chunk)
            if hides_usage and _tells_usage_alone(chunk):
                continue
            if not holds:
                yield chunk
                continue
            for through in _let_through(watch, chunk):
                yield through
    except GeneratorExit:
        watch.dropped()
        raise
    except Exception as error:
        watch.interrupted(error)
        for held in watch.heard.held:
            yield held
        raise
    except BaseException as error:
        watch.interrupted(error)
        raise
    try:
        await watch.aexhausted()
    except Exception:
        for held in watch.heard.held:
            yield held
        raise
    for held in watch.heard.held:
        yield held


def _let_through(watch: Watch, chunk: Any) -> list[Any]:
    """The chunks that the caller may have now: none while the answer is whole."""
    held = watch.heard.held
    if (held or _may_complete(chunk)) and _is_whole(watch):
        held.append(chunk)
        return []
    through = [*held, chunk]
    held.clear()
    return through


def _may_complete(chunk: Any) -> bool:
    """Whether the answer can be whole with this chunk: asked of each, so it has to be cheap."""
    choices = getattr(chunk, "choices", None) or ()
    finished = any(getattr(choice, "finish_reason", None) for choice in choices)
    return finished or getattr(chunk, "response", None) is not None


def _is_whole(watch: Watch) -> bool:
    endpoint = watch.listener.endpoint
    with contextlib.suppress(Exception):  # an odd shape is met again when the stream has ended
        answer = watch.heard.answer(endpoint)
        return answer is not None and endpoint.is_whole(answer)
    return False


class _Chunks:
    """A stream's chunks, by themselves or in loops; tells when a loop over them is left."""

    def __init__(self, stream: Any) -> None:
        self._stream = weakref.ref(stream)  # which holds this
        self._chunks = _heard(stream)

    def __next__(self) -> Any:
        return next(self._chunks)

    def __iter__(self) -> Iterator[Any]:
        return _Loop(self._chunks, getattr(self._stream(), "_tlm_watch", None))


class _AsyncChunks:
    """The async twin."""

    def __init__(self, stream: Any) -> None:
        self._stream = weakref.ref(stream)
        self._chunks = _aheard(stream)

    def __anext__(self) -> Awaitable[Any]:
        return self._chunks.__anext__()

    def __aiter__(self) -> AsyncIterator[Any]:
        return _AsyncLoop(self._chunks, getattr(self._stream(), "_tlm_watch", None))


class _LoopEnd:
    """What a loop holds for as long as it runs."""

    __slots__ = ("_chunks", "_watch")

    def __init__(self, chunks: Any, watch: Watch | None) -> None:
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


def _tell_close(response: Any, watch: Watch) -> None:
    """The one place that every early exit passes: the response is closed."""
    original = response.close

    def close() -> Any:
        # At most once, so that no cycle outlives the stream.
        response.__dict__.pop("close", None)
        error = watch.in_flight()
        try:
            return original()
        finally:
            if not watch.is_read():
                watch.closed(error)

    response.close = close


def _tell_aclose(response: Any, watch: Watch) -> None:
    original = response.aclose

    async def aclose() -> Any:
        response.__dict__.pop("aclose", None)
        error = watch.in_flight()
        try:
            return await original()
        finally:
            if not watch.is_read():
                await watch.aclosed(error)

    response.aclose = aclose
