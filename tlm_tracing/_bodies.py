"""Raw responses, whose body the caller reads: it is heard as they read it, and never before."""

from __future__ import annotations

import functools
import json
import weakref
from collections.abc import AsyncIterator, Iterator
from typing import Any

from openai import AsyncAPIResponse
from openai._streaming import SSEDecoder

from tlm_tracing import _patches
from tlm_tracing._endpoints import Endpoint
from tlm_tracing._watching import Heard, Listener, Watch


def is_event_stream(response: Any) -> bool:
    """Whether a response's body is a stream of events."""
    kind = response.headers.get("content-type")
    return isinstance(kind, str) and "event-stream" in kind


def listen(response: Any, listener: Listener) -> None:
    """Have a listener told what the caller reads of a raw response, if ever.

    Args:
        response: The HTTP response, its body not read yet.
        listener: Who is told.
    """
    watch = Watch(listener, _HeardBody(response))
    weakref.finalize(response, watch.dropped).atexit = False
    stream_cls: Any = type(response.stream)
    tap = _tapped(stream_cls)(response.stream, watch)
    response.stream, response._tlm_tap = tap, tap


def hand_over(response: Any) -> Watch | None:
    """From here on the chunks of a stream are heard that was made of a raw response.

    Args:
        response: The HTTP response.

    Returns:
        Who watched its body until now; None if nobody did.
    """
    tap: _Tap | None = response.__dict__.pop("_tlm_tap", None)
    if tap is None:
        return None
    tap.is_heard = False
    return tap.watch


def make_replaceable(raw: Any) -> None:
    """Have parsing give what the answer is replaced by, if it is when the body has been read.

    Args:
        raw: A raw response whose body is not read yet and no stream; others are left alone.
    """
    tap: _Tap | None = getattr(getattr(raw, "http_response", None), "_tlm_tap", None)
    if tap is not None and not tap.watch.heard.is_given:
        _let_parse_give(raw, tap.watch.heard.replacement)


def replaced(raw: Any, given: Any) -> Any:
    """The same raw response, headers and all, but parsing it gives something else.

    Args:
        raw: One whose body has been read.
        given: What it gives.
    """
    _let_parse_give(raw, [given])
    return raw


def _let_parse_give(raw: Any, replacement: list[Any]) -> None:
    kind: Any = type(raw)
    raw._tlm_replacement = replacement
    raw.__class__ = _replaceable(kind)


@functools.lru_cache(maxsize=32)
def _replaceable(kind: Any) -> Any:
    """The class of raw responses of a kind whose answer may be replaced."""

    def parse(self: Any, *, to: Any = None) -> Any:
        if not self._tlm_replacement:
            self.read()
        return self._tlm_replacement[0] if self._tlm_replacement else kind.parse(self, to=to)

    async def aparse(self: Any, *, to: Any = None) -> Any:
        if not self._tlm_replacement:
            await self.read()
        return self._tlm_replacement[0] if self._tlm_replacement else await kind.parse(self, to=to)

    members = {
        "__module__": kind.__module__,
        "__qualname__": kind.__qualname__,
        "__doc__": kind.__doc__,
        "parse": _patches.like(kind.parse)(aparse if issubclass(kind, AsyncAPIResponse) else parse),
    }
    return type(kind.__name__, (kind,), members)


class _HeardBody(Heard):
    """The same of a response's body, whose chunks are bytes as they came."""

    __slots__ = ("_headers", "_is_events", "_kind")

    def __init__(self, response: Any) -> None:
        super().__init__(bool)
        self._kind = type(response)
        self._headers = response.headers
        self._is_events = is_event_stream(response)

    @property
    def is_given(self) -> bool:
        """Of events, piece by piece; JSON is of use only when it is whole."""
        return self._is_events

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

    def __init__(self, stream: Any, watch: Watch) -> None:
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
