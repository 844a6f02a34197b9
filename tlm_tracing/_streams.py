"""A stream's life cycle, and the answer that its chunks add up to.

Chunks pass through untouched; per chunk nothing happens but keeping a reference. A stream ends
exactly once for the record, however it ends: exhausted, failed, closed, or dropped.
"""

from __future__ import annotations

import asyncio
import functools
import threading
import time
import weakref
from collections.abc import AsyncIterator, Iterable, Iterator, Mapping
from typing import Any, Protocol

from openai import AsyncStream, Stream
from openai.types.chat import ChatCompletion

_JOINED = frozenset({"content", "refusal", "reasoning_content", "reasoning", "arguments", "input"})
_AUDIO = frozenset({"data", "transcript"})


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
        self._listener = listener
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
            self._listener.stream_left(self.heard, outcome, error, elsewhere=elsewhere)

    def interrupted(self, error: BaseException) -> None:
        stopped = isinstance(error, (asyncio.CancelledError, KeyboardInterrupt, SystemExit))
        self.left("cancelled" if stopped else "error", error)

    def dropped(self) -> None:
        self.left("abandoned", elsewhere=True)

    def exhausted(self) -> None:
        if self._is_first():
            self._listener.stream_ended(self.heard)

    async def aexhausted(self) -> None:
        if self._is_first():
            await self._listener.astream_ended(self.heard)

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
    watch = _Watch(listener)
    stream._tlm_watch = watch  # type: ignore[union-attr]
    inner = stream._tlm_inner  # type: ignore[union-attr]
    if isinstance(stream, AsyncStream):
        _tell_aclose(stream.response, watch, inner)
    else:
        _tell_close(stream.response, watch, inner)
    weakref.finalize(stream, watch.dropped).atexit = False
    listener.stream_opened(stream)


@functools.lru_cache(maxsize=32)
def traced(stream_cls: Any) -> Any:
    """A class that makes streams of the given class whose chunks can be heard.

    The streams that it makes are of exactly the class that they would be without it.

    Args:
        stream_cls: ``Stream[ChatCompletionChunk]``, its async twin, or a subclass.
    """
    is_async = issubclass(getattr(stream_cls, "__origin__", stream_cls), AsyncStream)
    return _traced_async(stream_cls) if is_async else _traced_sync(stream_cls)


def listen_when_parsed(response: Any, listener: Listener) -> None:
    """Have a listener told of the stream that will be made of a raw response."""
    response._tlm_listener = listener


def _made(stream: Any, stream_cls: Any) -> None:
    """A new stream takes the class that it would have without us."""
    stream.__class__ = getattr(stream_cls, "__origin__", stream_cls)
    listener = stream.response.__dict__.pop("_tlm_listener", None)
    if listener is not None:
        listen(stream, listener)


def _traced_sync(stream_cls: Any) -> Any:
    class Traced(stream_cls):  # type: ignore[misc]
        def __init__(self, **kwargs: Any) -> None:
            super().__init__(**kwargs)
            _made(self, stream_cls)

        def __stream__(self) -> Iterator[Any]:
            self._tlm_inner = super().__stream__()
            return _heard(self, self._tlm_inner)

    return Traced


def _traced_async(stream_cls: Any) -> Any:
    class Traced(stream_cls):  # type: ignore[misc]
        def __init__(self, **kwargs: Any) -> None:
            super().__init__(**kwargs)
            _made(self, stream_cls)

        def __stream__(self) -> AsyncIterator[Any]:
            self._tlm_inner = super().__stream__()
            return _aheard(self, self._tlm_inner)

    return Traced


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


def reduce(chunks: Iterable[Any]) -> dict[str, Any]:
    """Put a chat completion together from its chunks.

    OpenAI's own ``ChatCompletionStreamState`` raises on ``finish_reason="length"`` and on
    several orders of chunks that servers do send.

    Args:
        chunks: ``ChatCompletionChunk`` objects, or the same as plain data.

    Returns:
        The completion as plain data, ``choices`` in the order of their indexes.
    """
    answer: dict[str, Any] = {}
    choices: dict[int, dict[str, Any]] = {}
    for chunk in chunks:
        data = chunk if isinstance(chunk, Mapping) else _dump(chunk)
        for choice in data.get("choices") or []:
            _add_choice(choices, choice)
        answer.update(
            (key, value)
            for key, value in data.items()
            if key not in ("choices", "object") and value is not None
        )
    answer["object"] = "chat.completion"
    answer["choices"] = [_finished(choices[index]) for index in sorted(choices)]
    return answer


def _dump(chunk: Any) -> dict[str, Any]:
    data: dict[str, Any] = chunk.model_dump(mode="json", exclude_unset=True, warnings=False)
    return data


def _add_choice(choices: dict[int, dict[str, Any]], new: Mapping[str, Any]) -> None:
    index = new.get("index") or 0
    choice = choices.setdefault(
        index, {"index": index, "message": {}, "logprobs": None, "finish_reason": None}
    )
    for key, value in new.items():
        if value is None or key == "index":
            continue
        if key == "delta":
            _add_delta(choice["message"], value)
        elif key == "logprobs":
            choice["logprobs"] = _add(choice["logprobs"], value)
        else:
            choice[key] = value


def _add_delta(message: dict[str, Any], delta: Mapping[str, Any]) -> None:
    for key, value in delta.items():
        if value is None:
            continue
        if key == "tool_calls":
            calls = message.setdefault("tool_calls", {})
            for call in value:
                _add_tool_call(calls, call)
        elif key == "audio":
            message[key] = _add(message.get(key), value, joined=_AUDIO)
        else:
            message[key] = _add(message.get(key), value, joined=_JOINED, key=key)


def _add_tool_call(calls: dict[int, dict[str, Any]], new: Mapping[str, Any]) -> None:
    """Servers that leave the index out begin a call with its id."""
    index = new.get("index")
    if index is None:
        index = len(calls) if new.get("id") or not calls else max(calls)
    call = calls.setdefault(index, {})
    for key, value in new.items():
        if value and key != "index":
            call[key] = _add(call.get(key), value, joined=_JOINED, key=key)


def _add(
    old: Any, new: Any, *, joined: frozenset[str] = frozenset(), key: str | None = None
) -> Any:
    """Texts that come in pieces are joined, lists grow, and of all else the last word counts."""
    if isinstance(new, Mapping):
        merged = dict(old) if isinstance(old, Mapping) else {}
        for name, value in new.items():
            if value is not None:
                merged[name] = _add(merged.get(name), value, joined=joined, key=name)
        return merged
    if isinstance(new, list):
        return [*old, *new] if isinstance(old, list) else list(new)
    if isinstance(new, str) and isinstance(old, str) and key in joined:
        return old + new
    return new


def _finished(choice: dict[str, Any]) -> dict[str, Any]:
    message = choice["message"]
    calls = message.get("tool_calls")
    if calls is not None:
        message["tool_calls"] = [calls[index] for index in sorted(calls)]
    message.setdefault("role", "assistant")
    message.setdefault("content", None)
    return choice
