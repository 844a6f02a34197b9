"""A scorer that gives what it is told."""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import threading
from collections import deque
from typing import Any

from tlm_tracing._data import Exchange, ScoreResult


class FakeScorer:
    """A scripted scorer.

    Attributes:
        name: Its name in spans and assessments.
        exchanges: What it was asked to score, in order.
        closed: Whether it was closed.
    """

    def __init__(self, *results: Any, name: str = "fake", default: Any = 0.9) -> None:
        """Say what it gives.

        Args:
            *results: One for each of the first exchanges: a score in [0, 1], a ``Trust``,
                Cleanlab's dict, an exception to be raised, or a sync or async callable on the
                exchange that gives one of these.
            name: Its name in spans and assessments.
            default: What it gives to all further exchanges.
        """
        self.name = name
        self.exchanges: list[Exchange] = []
        self.closed = False
        self._results: deque[Any] = deque(results)
        self._default = default
        self._changed = threading.Condition()
        self._held: list[tuple[asyncio.AbstractEventLoop, asyncio.Event]] | None = None

    async def score(self, exchange: Exchange) -> ScoreResult:
        """Give the next result."""
        with self._changed:
            self.exchanges.append(exchange)
            result = self._results.popleft() if self._results else self._default
            released = asyncio.Event()
            if self._held is None:
                released.set()
            else:
                self._held.append((asyncio.get_running_loop(), released))
            self._changed.notify_all()
        await released.wait()
        if callable(result):
            result = result(exchange)
        if inspect.isawaitable(result):
            result = await result
        if isinstance(result, BaseException):
            raise result
        return result  # type: ignore[no-any-return]

    async def aclose(self) -> None:
        """Note that it was closed."""
        self.closed = True

    def hold(self) -> None:
        """Keep every following score back until :meth:`release`."""
        with self._changed:
            self._held = self._held or []

    def release(self) -> None:
        """Give the scores that are held back."""
        with self._changed:
            held, self._held = self._held or [], None
        for loop, released in held:
            with contextlib.suppress(RuntimeError):  # whoever waited has closed their loop
                loop.call_soon_threadsafe(released.set)

    def wait_for(self, count: int, timeout: float = 10.0) -> None:
        """Wait until it was asked so many times.

        Raises:
            TimeoutError: If it was not after ``timeout`` seconds.
        """
        with self._changed:
            if not self._changed.wait_for(lambda: len(self.exchanges) >= count, timeout):
                raise TimeoutError(f"{len(self.exchanges)} of {count} scores were asked for.")
