"""What a run over stored traces tells: a row for each call, and how far it is."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, fields
from datetime import datetime
from typing import TYPE_CHECKING

from tlm_tracing._data import Status

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True)
class ScoredCall:
    """One call of a stored trace.

    Attributes:
        trace_id: Its trace.
        span_id: The call's span, which has the assessment; None if the trace has no call.
        timestamp: When the call began, in UTC.
        prompt: The whole prompt as one text, as the scorer got it; None if there is nothing to
            be scored.
        response: The answer likewise.
        trust_score: Trustworthiness in [0, 1]; None unless ``status`` is ``"scored"``.
        explanation: Why the scorer thinks so, if it said.
        status: ``"scored"``, ``"unscored"``, or ``"pending"``: the trace or the score of its
            call is not finished yet, or this is a dry run and it would be sent.
        reason: Why it is unscored, one of the words of ``Trust.reason``.
    """

    trace_id: str
    span_id: str | None
    timestamp: datetime
    prompt: str | None
    response: str | None
    trust_score: float | None
    explanation: str | None
    status: Status
    reason: str | None


@dataclass(frozen=True)
class Progress:
    """How far a run over stored traces is.

    Attributes:
        traces: Traces that are done with.
        scored: Calls that have got a score, or would be sent in a dry run.
        unscored: Calls, or traces without any, that have got none.
        total: Traces that the filter finds; None as long as they are still being counted.
        characters: Of the prompts and answers that were sent to the scorer, or would be.
        seconds: Time since the start.
    """

    traces: int = 0
    scored: int = 0
    unscored: int = 0
    total: int | None = None
    characters: int = 0
    seconds: float = 0.0

    @property
    def rate(self) -> float:
        """Traces a second."""
        return self.traces / self.seconds if self.seconds else 0.0

    @property
    def seconds_left(self) -> float | None:
        """How much longer it will take; None if that can't be told yet."""
        if self.total is None or not self.rate:
            return None
        return max(0, self.total - self.traces) / self.rate


def frame(rows: Iterable[ScoredCall]) -> pd.DataFrame:
    """The rows as a frame, the least trustworthy first, those without a score last."""
    import pandas as pd

    names = [field.name for field in fields(ScoredCall)]
    data = [[getattr(row, name) for name in names] for row in rows]
    found = pd.DataFrame(data, columns=names)
    found["timestamp"] = pd.to_datetime(found["timestamp"], utc=True)
    found["trust_score"] = found["trust_score"].astype(float)
    return found.sort_values("trust_score", kind="stable", ignore_index=True)
