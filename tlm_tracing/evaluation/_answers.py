"""Answers: what of a row is to be scored, and what is known of it already."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from mlflow.entities import Feedback, Trace, TraceInfo
from mlflow.tracing.client import TracingClient

from tlm_tracing import _annotate, _asking
from tlm_tracing._annotate import Notes
from tlm_tracing._config import Config
from tlm_tracing._data import Trust
from tlm_tracing._messages import Unscorable
from tlm_tracing._scoring import Verdict
from tlm_tracing._stored._calls import StoredCall
from tlm_tracing._stored._judge import Judge, Wanted
from tlm_tracing._stored._late import Judged
from tlm_tracing._stored._plan import Plan
from tlm_tracing._stored._search import Query
from tlm_tracing.evaluation import _ask, _rows

_OF_A_RUN = "mlflow.assessment."


@dataclass(frozen=True)
class Answer:
    """An answer of a row: that of an LLM call in its trace, or what came out of the application.

    Attributes:
        trust: With the ids of trace and span, if there is a trace; pending while it is not known.
        asked: What leaves for the scorer; None if nothing is to.
        notes: What is told beside the trust.
        metadata: What the assessment tells that is there already; None if there is none.
        detail: What went wrong, when it is unscored.
    """

    trust: Trust
    asked: _asking.Asked | None = None
    notes: Notes = field(default_factory=Notes)
    metadata: Mapping[str, str] | None = None
    detail: str | None = None

    def judged(self, verdict: Verdict) -> Answer:
        """The same with its verdict."""
        notes = self.notes._replace(
            model=getattr(verdict.scorer, "model", None),
            preset=getattr(verdict.scorer, "preset", None),
        )
        trust = replace(verdict.trust, trace_id=self.trust.trace_id, span_id=self.trust.span_id)
        detail = None if verdict.error is None else str(verdict.error)
        return replace(self, trust=trust, asked=None, notes=notes, detail=detail)


def of_trace(trace: Trace, config: Config, *, rescore: bool) -> list[Answer]:
    """The LLM calls of a trace; read like those that are scored without an evaluation.

    Args:
        trace: A trace with its spans.
        config: The settings in force.
        rescore: Whether what this scorer has scored is scored again.
    """
    plan = Plan(
        client=TracingClient(),
        query=Query(()),
        given=(),
        config=config,
        limit=None,
        rescore=True,  # so that it tells of what can be scored, whoever has scored it
        dry_run=False,
        assessments=True,
        tell=None,
    )
    scorer = _ask.scorer_name(config)
    return [_of_call(trace.info, one, scorer, rescore) for one in Judge(plan).look(trace)]


def _of_call(info: TraceInfo, found: Judged | Wanted, scorer: str | None, rescore: bool) -> Answer:
    call = found.call
    if isinstance(found, Judged):
        return Answer(found.trust, notes=_notes(call))
    if not rescore:
        if (kept := _kept(info, call.span_id, scorer)) is not None:
            return replace(kept, notes=_notes(call))
        before = found.before
        if before is not None and (scorer is None or before.scorer in (None, scorer)):
            return Answer(before, notes=_notes(call))
    return Answer(_pending(info.trace_id, call.span_id), found.asked, _notes(call))


def of_row(
    inputs: Any, outputs: Any, trace: Trace | None, config: Config, *, rescore: bool
) -> Answer:
    """What a row says itself.

    Args:
        inputs: What went into the application.
        outputs: What came out of it.
        trace: Where it is told, if anywhere.
        config: The settings in force.
        rescore: Whether what this scorer has scored is scored again.
    """
    spans = () if trace is None else trace.data.spans
    root = next((span for span in spans if span.parent_id is None), None)
    if trace is None or root is None:
        pending = _pending(trace.info.trace_id if trace else None, None)
    else:
        pending = _pending(trace.info.trace_id, root.span_id)
        kept = None if rescore else _kept(trace.info, root.span_id, _ask.scorer_name(config))
        if kept is not None:
            return kept
    try:
        row = _rows.exchange(inputs, outputs)
        notes = Notes(llm_model=row.answer.get("model") or row.request.get("model"))
        return Answer(pending, _ask.asked(row, config), notes)
    except Unscorable as nothing:
        return Answer(replace(pending, status="unscored", reason=nothing.reason))


def settled(answers: list[Answer], config: Config, asker: _ask.Asker) -> list[Answer]:
    """The same with their verdicts; all are asked for at the same time."""
    sent = [one.asked and one.asked.send() for one in answers]
    return [
        one if one.asked is None else one.judged(asker.verdict(one.asked, config, future))
        for one, future in zip(answers, sent, strict=True)
    ]


def least(answers: list[Answer]) -> Answer:
    """The answer that can be trusted least; one without a score only if none has any."""
    scored = [one for one in answers if one.trust.score is not None]
    return min(scored, key=lambda one: one.trust.score or 0.0) if scored else answers[0]


def assessment_id(trust: Trust, name: str = _annotate.ASSESSMENT) -> str:
    """The id of the assessment that tells a trust; the same for the same call and scorer."""
    told = _annotate.assessment(replace(trust, score=0.0), Notes(), name)
    return str(told.assessment_id)


def _kept(info: TraceInfo, span_id: str, scorer: str | None) -> Answer | None:
    """What the scorer's own assessment tells already."""
    if scorer is None:
        return None
    placed = Trust(scorer=scorer, trace_id=info.trace_id, span_id=span_id)
    its_id = assessment_id(placed)
    for item in info.assessments or ():
        if item.assessment_id != its_id or not isinstance(item, Feedback):
            continue
        if isinstance(item.value, (int, float)):
            trust = replace(placed, score=float(item.value), explanation=item.rationale or None)
            told = (item.metadata or {}).items()
            metadata = {key: value for key, value in told if not key.startswith(_OF_A_RUN)}
            return Answer(trust, metadata=metadata)
    return None


def _notes(call: StoredCall) -> Notes:
    return Notes(llm_model=call.answer.get("model") or call.request.get("model"))


def _pending(trace_id: str | None, span_id: str | None) -> Trust:
    return Trust(status="pending", trace_id=trace_id, span_id=span_id)
