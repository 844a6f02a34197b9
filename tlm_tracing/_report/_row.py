"""Row: one call's answer and its trust, as a report tells of it."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import pandas
    from mlflow.entities import TraceInfo

    from tlm_tracing._report._truth import Verdict

# The status of a trace that nobody has tried to score.
UNSEEN = "unseen"
COLUMNS = (
    "trace_id",
    "span_id",
    "timestamp",
    "prompt",
    "response",
    "trust_score",
    "explanation",
    "status",
    "reason",
)


@dataclass(frozen=True)
class Row:
    """One call.

    Attributes:
        trace_id: Its trace.
        span_id: The span that its score is of, if that is known.
        seconds: When its trace began, in seconds since 1970.
        prompt: What was asked.
        response: What was answered.
        score: How far that can be trusted, in [0, 1]; None if it is unscored.
        explanation: The scorer's.
        status: ``"scored"``, ``"unscored"`` or ``"unseen"``.
        reason: Why it is unscored, if that is known.
        model: The LLM that answered, if that is known.
        experiment: The name of its trace's experiment, if that is known.
        experiment_id: The experiment's id, if that is known.
        verdict: Whether the answer is right, if somebody knows.
        info: What MLflow lists of its trace, if it was read from there.
    """

    trace_id: str
    span_id: str | None = None
    seconds: float | None = None
    prompt: str = ""
    response: str = ""
    score: float | None = None
    explanation: str | None = None
    status: str = "scored"
    reason: str | None = None
    model: str | None = None
    experiment: str | None = None
    experiment_id: str | None = None
    verdict: Verdict | None = None
    info: TraceInfo | None = field(default=None, repr=False)


def to_score(value: object) -> float | None:
    """A score in [0, 1] from what a store or a frame has; None if it is none."""
    if isinstance(value, bool):
        return None
    try:
        score = float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        return None
    return score if math.isfinite(score) else None


def frame(rows: Iterable[Row]) -> pandas.DataFrame:
    """Rows as a frame with the columns of ``score_traces``."""
    import pandas

    found = pandas.DataFrame(
        [
            (
                row.trace_id,
                row.span_id,
                row.seconds,
                row.prompt,
                row.response,
                row.score,
                row.explanation,
                row.status,
                row.reason,
            )
            for row in rows
        ],
        columns=list(COLUMNS),
    )
    times = found["timestamp"].astype("float64")
    found["timestamp"] = pandas.to_datetime(times, unit="s", utc=True)
    found["trust_score"] = found["trust_score"].astype("float64")
    return found
