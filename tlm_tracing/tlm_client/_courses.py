"""How each pair of a call fared, as far as anything was seen of it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from tlm_tracing.tlm_client._seams import Rounds, Timing
from tlm_tracing.tlm_client._told import has_answer


class Course(NamedTuple):
    """How a pair fared, from its turn to its end. Times are in nanoseconds since 1970.

    Attributes:
        began: When its turn had come.
        ended: When it was over, or was given up.
        queued: How long it had waited for its turn; None if nobody knows.
        is_own: Whether these are its own times, not those of the whole batch.
        result: What came of it, if that is known.
        error: What was raised, if that is known.
    """

    began: int
    ended: int
    queued: int | None = None
    is_own: bool = True
    result: Any = None
    error: BaseException | None = None

    @property
    def is_over(self) -> bool:
        """Whether anything is known to have come of it."""
        return self.result is not None or self.error is not None

    @property
    def seconds(self) -> float:
        """How long it took."""
        return (self.ended - self.began) / 1e9


def courses(rounds: Rounds, count: int, until: int) -> list[Course | None]:
    """How each pair of a call fared.

    Args:
        rounds: What was seen.
        count: How many pairs there are.
        until: When the call was over.

    Returns:
        One for each pair, in their order; None for those of which nothing was seen.
    """
    first, *later = list(rounds) or [[]]
    if len(first) != count:
        return [None] * count
    ways = [[timing] for timing in first]
    for timings in later:  # answers are asked for first, then the scores of those that came
        answered = [way for way in ways if has_answer(way[-1].result)]
        if len(answered) == len(timings):
            for way, timing in zip(answered, timings, strict=True):
                way.append(timing)
    return [course_of(way, until) for way in ways]


def course_of(way: Sequence[Timing], until: int | None = None) -> Course | None:
    """How a pair fared; None if it was not begun, or nobody knows when it was over.

    Args:
        way: What was asked for it, one after the other.
        until: When it was over, unless the last of these tells.
    """
    first, last = way[0], way[-1]
    ended = until if last.ended is None else last.ended
    if first.begun is None or ended is None:
        return None
    began = first.begun if first.sent is None else first.sent
    queued = None if first.sent is None else first.sent - first.begun
    return Course(began, ended, queued, result=last.result, error=last.error)
