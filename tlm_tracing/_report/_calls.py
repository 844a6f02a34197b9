"""Calls: the rows of one trace, and what is said of each one's answer."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from mlflow.entities import Assessment, Trace, TraceInfo

from tlm_tracing._annotate import ASSESSMENT, EXPLANATION_TAG, SCORE_TAG, STATUS_TAG
from tlm_tracing._report._row import UNSEEN, Row, to_score
from tlm_tracing._report._truth import Claim, Verdict, claim

_SCORING = "tlm.trustworthiness"
_ANSWERED = "tlm.prompt"  # by TLM itself, as wrap_tlm records it
_LLM_MODEL = "llm_model"
_CUT = "..."


@dataclass(frozen=True)
class Call:
    """A row, and what somebody said of its answer.

    Attributes:
        row: The row.
        claim: What was said.
        is_traces: Whether of the trace's answer, not of this call's.
        is_listed: Whether that answer is the one that MLflow lists, though perhaps cut.
    """

    row: Row
    claim: Claim | None = None
    is_traces: bool = True
    is_listed: bool = True

    @property
    def is_unsure(self) -> bool:
        """Whether the trace has to be read to tell if the answer is right."""
        if self.claim is None or self.claim.is_right is not None:
            return False
        if not self.is_listed:
            return True
        verdict = self.claim.verdict(self.row.response)
        return verdict is not None and not verdict.is_right and self.row.response.endswith(_CUT)

    def verdict(self, trace: Trace | None) -> Verdict | None:
        """Whether the answer is right.

        Args:
            trace: The whole trace, if it was read.
        """
        if self.claim is None:
            return None
        if trace is None:
            is_known = self.is_listed or self.claim.is_right is not None
            return self.claim.verdict(self.row.response) if is_known else None
        return self.claim.verdict(self._answer(trace))

    def _answer(self, trace: Trace) -> str:
        if not self.is_traces and (texts := _scored_texts(trace, self.row.span_id)) is not None:
            return texts[1]
        roots = [span for span in trace.data.spans if span.parent_id is None]
        outputs: Any = roots[0].outputs if roots else self.row.response
        return outputs if isinstance(outputs, str) else json.dumps(outputs, ensure_ascii=False)


def calls(info: TraceInfo, experiment: str | None, reference: str | None) -> list[Call]:
    """The calls of a trace.

    Args:
        info: What MLflow lists of it.
        experiment: The name of its experiment.
        reference: The name of the expectation or feedback that tells what is right.
    """
    trace = Row(
        trace_id=info.trace_id,
        seconds=info.timestamp_ms / 1000,
        prompt=info.request_preview or "",
        response=info.response_preview or "",
        experiment=experiment,
        experiment_id=info.experiment_id,
        info=info,
    )
    rows = [_assessed(trace, one) for one in _newest(info.assessments)]
    found = _claimed(rows or [_tagged(trace, info.tags)], info.assessments or [], reference)
    if info.tags.get(STATUS_TAG) == "partial":
        found.append(Call(replace(trace, status="unscored")))
    return found


def _claimed(rows: Sequence[Row], said: Sequence[Assessment], reference: str | None) -> list[Call]:
    """What is said on a call's own span is said of it, all else of the trace's lowest score."""
    if len(rows) == 1:
        return [Call(rows[0], claim(said, reference), is_traces=False)]
    lowest = min(rows, key=lambda row: 1.0 if row.score is None else row.score)
    spans = {row.span_id for row in rows}
    of_trace = claim([one for one in said if one.span_id not in spans], reference)
    found: list[Call] = []
    for row in rows:
        own = claim([one for one in said if one.span_id == row.span_id], reference)
        if own is not None:
            found.append(Call(row, own, is_traces=False, is_listed=False))
        else:
            found.append(Call(row, of_trace if row is lowest else None))
    return found


def _newest(assessments: Iterable[Assessment] | None) -> list[Assessment]:
    """The last trust score of each call."""
    found: dict[str | None, Assessment] = {}
    for one in sorted(assessments or [], key=lambda one: one.last_update_time_ms or 0):
        if one.name == ASSESSMENT and one.valid is not False and _score(one) is not None:
            found[one.span_id] = one
    return list(found.values())


def _score(assessment: Assessment) -> float | None:
    return None if assessment.feedback is None else to_score(assessment.feedback.value)


def _assessed(trace: Row, assessment: Assessment) -> Row:
    return replace(
        trace,
        span_id=assessment.span_id,
        score=_score(assessment),
        explanation=assessment.rationale,
        model=(assessment.metadata or {}).get(_LLM_MODEL),
    )


def _tagged(trace: Row, tags: dict[str, str]) -> Row:
    """A trace of which its tags alone tell."""
    if (score := to_score(tags.get(SCORE_TAG))) is not None:
        return replace(trace, score=score, explanation=tags.get(EXPLANATION_TAG))
    return replace(trace, status="unscored" if STATUS_TAG in tags else UNSEEN)


def with_texts(row: Row, trace: Trace | None) -> Row:
    """The row with its texts as they were scored, if its trace tells."""
    texts = None if trace is None else _scored_texts(trace, row.span_id)
    return row if texts is None else replace(row, prompt=texts[0], response=texts[1])


def _scored_texts(trace: Trace, span_id: str | None) -> tuple[str, str] | None:
    """Prompt and response on the scoring span of a call; of the only one, if it is not named."""
    spans = [span for span in trace.data.spans if span.name in (_SCORING, _ANSWERED)]
    if span_id is not None:
        # One that wrap_tlm has recorded is the call's own span.
        own = [span for span in spans if span.span_id == span_id]
        spans = own or [span for span in spans if span.parent_id == span_id]
    if not spans or not (span_id or len(spans) == 1):
        return None
    texts: dict[str, Any] = {}
    for told in (spans[-1].outputs, spans[-1].inputs):
        if isinstance(told, dict):
            texts |= told
    prompt, response = texts.get("query") or texts.get("prompt"), texts.get("response")
    return None if prompt is None or response is None else (str(prompt), str(response))
