"""Turns of an event loop, kept short where many tasks make calls at once.

When the answers of many tasks have come, the loop handles them all in one turn, and each task's
next request as well, up to where that has to wait. Nothing else goes on in such a turn, and what
it sends comes back at once again. So the calls that would make it long wait for the next one.
"""

from __future__ import annotations

import asyncio
import threading
import time

# In seconds; a call takes about a millisecond.
_LONG = 0.03
# With thousands of tasks, to wait over and over again would cost more than it is good for.
_MOST = 10


class _Turn(threading.local):
    """The turn that this thread's event loop is in, since its first call there."""

    loop: asyncio.AbstractEventLoop | None = None
    began = 0.0


_turn = _Turn()


async def share() -> None:
    """Let others go first, once calls have had this turn of the event loop for 30 ms."""
    try:
        loop = asyncio.get_running_loop()
    except RuntimeError:  # the loop of another library, such as trio's
        return
    for _ in range(_MOST):
        now = time.perf_counter()
        if _turn.loop is not loop:
            _turn.loop, _turn.began = loop, now
            loop.call_soon(_end)
            return
        if now - _turn.began < _LONG:
            return
        await asyncio.sleep(0)


def _end() -> None:
    _turn.loop = None
