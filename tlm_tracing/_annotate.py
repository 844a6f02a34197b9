"""Annotate: the only place where tags and assessments are written; it owns their names."""

from __future__ import annotations

import hashlib
import threading
import unicodedata
from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Any, NamedTuple

from mlflow.entities import AssessmentSource, Feedback, TraceInfo
from mlflow.exceptions import MlflowException
from mlflow.tracing.client import TracingClient

from tlm_tracing import _exporter, _live, _tracking
from tlm_tracing._data import Trust

SCORE_TAG = "trust_score"
EXPLANATION_TAG = "explanation"
STATUS_TAG = "trust_status"
ASSESSMENT = "trustworthiness"

# MLflow cuts longer tag values silently, or refuses the trace, depending on the store.
_TAG_LIMIT = 4096

# One trace's tags sum up several calls: reading and writing them must not interleave.
_stored_lock = threading.Lock()


class Notes(NamedTuple):
    """What an assessment tells beside the trust.

    Attributes:
        model: The LLM that the scorer used, if it said.
        preset: The scorer's quality preset, if it has one.
        llm_model: The LLM whose answer it is.
    """

    model: str | None = None
    preset: str | None = None
    llm_model: str | None = None


def annotate_live(trust: Trust, notes: Notes) -> bool:
    """Write a trust on its trace while that is in memory, open or ended.

    Args:
        trust: A settled trust with its trace and span ids.
        notes: What is told beside it.

    Returns:
        False if the trace is in the store, or on its way; then :func:`annotate_stored` is the way.
    """
    if trust.trace_id is None:
        return True
    # MLflow's public calls either need the trace to be active in this very context, or write
    # to a store that does not know it yet (a foreign key fails, the tag is lost).
    for place in (_live.held, _exporter.kept):
        with place(trust.trace_id) as trace:
            if trace is None:
                continue
            changes = _changes(trace.info.tags, trust)
            _apply(trace.info.tags, changes)
            for feedback in assessments(trust, notes):
                trace.info.assessments = _with(trace.info.assessments, feedback)
            return True
    return False


def annotate_stored(trust: Trust, notes: Notes) -> bool:
    """Write a trust on a trace in the store.

    Scoring the same call again updates its assessment and never duplicates it.

    Args:
        trust: A settled trust with its trace and span ids.
        notes: What is told beside it.

    Returns:
        False while the store does not have the whole trace yet; try again later.

    Raises:
        MlflowException: If the store refuses.
    """
    if trust.trace_id is None:
        return True
    client = TracingClient()
    with _tracking.at_store(client), _stored_lock:
        info = _tracking.stored(client, trust.trace_id)
        if info is None:
            return False
        for feedback in assessments(trust, notes):
            _store_assessment(client, info, feedback)
        for key, value in _changes(info.tags, trust).items():
            if value is not None:
                client.set_trace_tag(trust.trace_id, key, value)
            elif key in info.tags:
                client.delete_trace_tag(trust.trace_id, key)
    return True


def tags(trusts: Iterable[Trust]) -> dict[str, str | None]:
    """A trace's tags, by the trust in each of its calls.

    Args:
        trusts: Settled ones.

    Returns:
        The tags; None for one that it must not have.
    """
    found: dict[str, str | None] = {SCORE_TAG: None, EXPLANATION_TAG: None}
    for trust in trusts:
        found |= _changes({key: tag for key, tag in found.items() if tag is not None}, trust)
    return found


def assessments(trust: Trust, notes: Notes) -> list[Feedback]:
    """The assessments that tell a trust: its own first, then one for each of its evals.

    Args:
        trust: A settled one with its trace and span ids; one without a score has none.
        notes: What is told beside it.
    """
    if trust.score is None:
        return []
    evals = (trust.evals or {}).items()
    return [
        assessment(trust, notes),
        *(
            assessment(replace(trust, score=one, explanation=None), notes, name)
            for name, one in evals
        ),
    ]


def assessment(trust: Trust, notes: Notes, name: str = ASSESSMENT) -> Feedback:
    """The assessment that tells a trust; the same call and scorer always give it the same id.

    Args:
        trust: A scored one with its trace and span ids.
        notes: What is told beside it.
        name: What the score is called.
    """
    source = trust.scorer or "unknown"
    metadata = {
        "mlflow.scorer.framework": "cleanlab-tlm" if notes.preset else "tlm-tracing",
        "model": notes.model,
        "preset": notes.preset,
        "seconds": None if trust.seconds is None else f"{trust.seconds:.3f}",
        "llm_model": notes.llm_model,
    }
    feedback = Feedback(
        name=name,
        value=trust.score,
        rationale=None if trust.explanation is None else fit(trust.explanation, 1 << 20),
        source=AssessmentSource(source_type="LLM_JUDGE", source_id=source),
        metadata={key: value for key, value in metadata.items() if value is not None},
        trace_id=trust.trace_id,
        span_id=trust.span_id,
    )
    feedback.assessment_id = _assessment_id(str(trust.trace_id), str(trust.span_id), source, name)
    return feedback


def assessed(info: TraceInfo, span_id: str) -> Trust | None:
    """What the newest assessment of ours says of a call; None if there is none.

    Args:
        info: The trace.
        span_id: The call's span.
    """
    found = list(_ours(info, span_id))
    if not found:
        return None
    newest = max(found, key=lambda item: item.last_update_time_ms or 0)
    seconds = (newest.metadata or {}).get("seconds")
    return Trust(
        score=float(newest.value),
        explanation=newest.rationale or None,
        trace_id=info.trace_id,
        span_id=span_id,
        scorer=newest.source.source_id,
        seconds=None if seconds is None else float(seconds),
    )


def _ours(info: TraceInfo, span_id: str) -> Iterator[Any]:
    """A call's assessments that tell a score of ours; the id tells whose it is."""
    for item in info.assessments or ():
        if isinstance(item, Feedback) and isinstance(item.value, (int, float)) and item.source:
            source = str(item.source.source_id)
            if item.assessment_id == _assessment_id(info.trace_id, span_id, source):
                yield item


def read_trust(trace_id: str) -> Trust | None:
    """The trust that a trace's tags tell; None if they tell nothing.

    Args:
        trace_id: An MLflow trace id, of a trace in memory or in the store.
    """
    tags = None
    for place in (_live.held, _exporter.kept):
        with place(trace_id) as trace:
            tags = dict(trace.info.tags) if trace is not None else tags
    if tags is None:
        try:
            tags = TracingClient().get_trace_info(trace_id).tags
        except MlflowException:
            return None
    if (status := tags.get(STATUS_TAG)) is None:
        return None
    if SCORE_TAG not in tags:
        return Trust(status="unscored", trace_id=trace_id) if status == "unscored" else None
    return Trust(
        score=float(tags[SCORE_TAG]),
        explanation=tags.get(EXPLANATION_TAG),
        trace_id=trace_id,
    )


def fit(text: str, limit: int = _TAG_LIMIT) -> str:
    """Cut a text to a tag's length, between two characters as a reader sees them."""
    # PostgreSQL takes no NUL, and nothing takes half a surrogate pair.
    text = text.replace("\x00", "").encode("utf-8", "replace").decode("utf-8")
    if len(text) <= limit:
        return text
    end = limit - 1
    while end > 0 and (unicodedata.combining(text[end]) or "\u200d" in text[end - 1 : end + 1]):
        end -= 1
    return text[:end] + "…"


def _changes(present: dict[str, str], trust: Trust) -> dict[str, str | None]:
    """What this call changes in its trace's tags: the lowest score wins; None deletes."""
    changes: dict[str, str | None] = {
        STATUS_TAG: _status(present.get(STATUS_TAG), trust.status),
    }
    before = present.get(SCORE_TAG)
    if trust.score is not None and (before is None or trust.score < float(before)):
        changes[SCORE_TAG] = f"{trust.score:.4f}"
        changes[EXPLANATION_TAG] = fit(trust.explanation) if trust.explanation else None
    return changes


def _status(before: str | None, new: str) -> str:
    return new if before in (None, new) else "partial"


def _apply(tags: dict[str, str], changes: dict[str, str | None]) -> None:
    for key, value in changes.items():
        if value is None:
            tags.pop(key, None)
        else:
            tags[key] = value


def _assessment_id(trace_id: str, span_id: str, source: str, name: str = ASSESSMENT) -> str:
    """The same for the same call and scorer, so that a second score replaces the first."""
    key = "\x1f".join((trace_id, span_id, name, source))
    return "a-" + hashlib.sha256(key.encode()).hexdigest()[:32]


def _with(assessments: list[Any] | None, new: Feedback) -> list[Any]:
    others = [item for item in assessments or [] if item.assessment_id != new.assessment_id]
    return [*others, new]


def _store_assessment(client: TracingClient, info: TraceInfo, feedback: Feedback) -> None:
    known = {item.assessment_id for item in info.assessments or []}
    if feedback.assessment_id in known:
        # Asked first: creating the same id twice is an error that a server's client retries
        # for minutes.
        client.update_assessment(info.trace_id, str(feedback.assessment_id), feedback)
    else:
        client.log_assessment(info.trace_id, feedback)
