"""What keeps scoring within bounds: a concurrency cap, a circuit breaker and a budget.

Pure bookkeeping: no threads, no clocks of their own.
"""

from __future__ import annotations

import asyncio
import math
from collections import OrderedDict, deque
from typing import Literal, TypeAlias

Admission: TypeAlias = Literal["yes", "no", "probe"]

_FIRST_COOLDOWN = 1.0
_LONGEST_COOLDOWN = 60.0
_BUDGET_WINDOW = 60.0
_MOST_BUDGETS = 256


class Gate:
    """A first-come-first-served cap on what is in flight; used on one event loop only."""

    def __init__(self) -> None:
        self._in_flight = 0
        self._waiting: deque[tuple[asyncio.Future[None], int]] = deque()

    def is_full(self, limit: int, queue_size: int) -> bool:
        """Whether a newcomer could neither start nor wait."""
        return self._in_flight >= limit and len(self._waiting) >= queue_size

    async def enter(self, limit: int) -> None:
        """Wait for a place among ``limit``."""
        if self._in_flight < limit and not self._waiting:
            self._in_flight += 1
            return
        turn = asyncio.get_running_loop().create_future()
        self._waiting.append((turn, limit))
        await turn

    def leave(self) -> None:
        """Give the place to whoever waits longest."""
        self._in_flight -= 1
        while self._waiting and self._in_flight < self._waiting[0][1]:
            turn, _ = self._waiting.popleft()
            if not turn.done():
                self._in_flight += 1
                turn.set_result(None)


class Breaker:
    """Stops asking a scorer that is unavailable, and finds out when it is back.

    An outage is a failure for want of a working back end while no other score has arrived
    since that attempt began: one slow answer among many good ones is not an outage.
    """

    def __init__(self) -> None:
        self._last_success = float("-inf")
        self._open_until: float | None = None
        self._cooldown = _FIRST_COOLDOWN
        self._probing = False

    def admit(self, now: float) -> Admission:
        """Whether to ask: yes, no, or with one attempt that shall find out."""
        if self._open_until is None:
            return "yes"
        if self._probing or now < self._open_until:
            return "no"
        self._probing = True
        return "probe"

    def succeeded(self, now: float) -> None:
        """The back end answered."""
        self._last_success = now
        self._open_until = None
        self._cooldown = _FIRST_COOLDOWN
        self._probing = False

    def failed(self, started: float, now: float, retry_after: float | None) -> None:
        """An attempt failed for want of a working back end.

        Args:
            started: When the attempt began.
            now: The time, by the same clock, in seconds.
            retry_after: Seconds for which the back end asked to be left alone.
        """
        self._probing = False
        if self._last_success > started:
            return
        self._open_until = now + max(self._cooldown, retry_after or 0.0)
        self._cooldown = min(2 * self._cooldown, _LONGEST_COOLDOWN)

    def inconclusive(self) -> None:
        """An attempt ended without telling whether the back end works."""
        self._probing = False


class Budget:
    """Counts the scores that each scorer, by its name, was asked for lately.

    Only those that have a limit: where there is none, the bill is not to be capped, and must
    not use up what others may spend.
    """

    def __init__(self) -> None:
        self._started: OrderedDict[str, deque[float]] = OrderedDict()
        self._longest = 0

    def take(self, limit: float | None, now: float, scorer: str, *, is_probe: bool = False) -> bool:
        """Whether one more score is within the limit; if so it is counted.

        Args:
            limit: Scores in 60 seconds; 0.5 is one in two minutes.
            now: The time, by a steady clock, in seconds.
            scorer: Whose budget.
            is_probe: Whether it finds out if the scorer is back. Counted and never refused, or a
                scorer would stay unavailable for as long as there is no budget left.
        """
        if limit is None:
            return True
        if limit == 0.0:
            return False
        most = math.ceil(limit)
        started = self._of(scorer)
        is_spent = len(started) >= most and now - started[-most] < _BUDGET_WINDOW * most / limit
        if is_spent and not is_probe:
            return False
        started.append(now)
        self._longest = max(self._longest, most)
        while len(started) > self._longest:
            started.popleft()
        return True

    def _of(self, scorer: str) -> deque[float]:
        started = self._started.setdefault(scorer, deque())
        self._started.move_to_end(scorer)
        if len(self._started) > _MOST_BUDGETS:
            self._started.popitem(last=False)
        return started
