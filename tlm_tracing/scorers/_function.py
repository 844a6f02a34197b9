"""A plain function as a scorer."""

from __future__ import annotations

import asyncio
import contextvars
import functools
import inspect
from typing import Any

from tlm_tracing._data import Exchange, ScoreFunction, ScoreResult


class FunctionScorer:
    """Scores with a sync or async function ``(request, completion) -> float, Trust or dict``."""

    def __init__(self, function: ScoreFunction) -> None:
        self._function = function
        self.name = getattr(function, "__name__", type(function).__name__)

    async def score(self, exchange: Exchange) -> ScoreResult:
        """Call the function; a sync one in another thread, so that it may block."""
        call = functools.partial(self._function, exchange.request, exchange.completion)
        if _is_async(self._function):
            result = await call()
        else:
            run = functools.partial(contextvars.copy_context().run, call)
            result = await asyncio.get_running_loop().run_in_executor(None, run)
            if inspect.isawaitable(result):
                result = await result
        return result  # type: ignore[no-any-return]

    async def aclose(self) -> None:
        """Nothing is held open."""


def _is_async(function: Any) -> bool:
    return inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(
        getattr(function, "__call__", None)  # noqa: B004 - a callable object's method is meant
    )
