"""A plain function as a scorer."""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import functools
import inspect
import threading
from concurrent.futures import Future, InvalidStateError
from typing import Any

from tlm_tracing._data import Exchange, ScoreFunction, ScoreResult


class FunctionScorer:
    """Scores with a sync or async function ``(request, completion) -> float, Trust or dict``."""

    def __init__(self, function: ScoreFunction) -> None:
        self._function = function
        self.name = getattr(function, "__name__", type(function).__name__)

    async def score(self, exchange: Exchange) -> ScoreResult:
        """Call the function; a sync one in a thread of its own, so that it may block."""
        call = functools.partial(self._function, exchange.request, exchange.completion)
        if _is_async(self._function):
            result = await call()
        else:
            result = await _in_a_thread(call)
            if inspect.isawaitable(result):
                result = await result
        return result  # type: ignore[no-any-return]

    async def aclose(self) -> None:
        """Nothing is held open."""


def _is_async(function: Any) -> bool:
    return inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(
        getattr(function, "__call__", None)  # noqa: B004 - a callable object's method is meant
    )


async def _in_a_thread(call: Any) -> Any:
    """Run in a daemon thread: one that hangs can neither fill a pool nor hold up the exit."""
    result: Future[Any] = Future()
    context = contextvars.copy_context()

    def run() -> None:
        try:
            outcome = context.run(call)
        except BaseException as error:
            _settle(result.set_exception, error)
        else:
            _settle(result.set_result, outcome)

    threading.Thread(target=run, name="tlm-tracing-scorer", daemon=True).start()
    return await asyncio.wrap_future(result)


def _settle(settle: Any, value: Any) -> None:
    # Nobody waits any more after the deadline, or after the loop has ended.
    with contextlib.suppress(InvalidStateError, RuntimeError):
        settle(value)
