"""Into other threads: a trusted block that is open here is open there, too.

Context variables reach tasks and ``asyncio.to_thread`` by themselves, but no thread pool.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, ParamSpec, TypeVar

from tlm_tracing import _patches, _record, _scope

P = ParamSpec("P")
R = TypeVar("R")


def propagate(function: Callable[P, R]) -> Callable[P, R]:
    """Have a function run in another thread as inside the trusted block that is open here.

    ``ThreadPoolExecutor`` and ``loop.run_in_executor`` do it by themselves while a trusted block
    is open; a plain ``Thread`` does not:

        >>> with trusted_span():
        ...     Thread(target=propagate(answer_question)).start()

    Args:
        function: Any function that is no coroutine function.

    Returns:
        One with the same signature and result. Only the block and MLflow's active span go along,
        no other context variable.
    """
    scope = _scope.current()
    span = _record.active()
    quiet = _scope.suppressed()

    @_patches.like(function)
    def wrapper(*args: P.args, **kwargs: P.kwargs) -> R:
        with _scope.entered(scope), _record.activated(span), _scope.suppression(quiet):
            return function(*args, **kwargs)

    return wrapper


@contextlib.contextmanager
def suppress() -> Iterator[None]:
    """Record nothing and score nothing inside the block, whatever way in is active."""
    pools.install()
    try:
        with _scope.suppression(True):
            yield
    finally:
        pools.uninstall()


def _submit(wrapped: Any, _pool: Any, args: Any, kwargs: Any) -> Future[Any]:
    if args and (_scope.current() is not None or _scope.suppressed()):
        args = (propagate(args[0]), *args[1:])
    submitted: Future[Any] = wrapped(*args, **kwargs)
    return submitted


pools = _patches.Patches({(ThreadPoolExecutor, "submit"): _submit})
