"""Feedback: a trust as MLflow's evaluation wants it, the same as a live call's assessment."""

from __future__ import annotations

import threading
from dataclasses import replace
from typing import Any

from mlflow.entities import AssessmentError, Feedback, Trace
from mlflow.exceptions import MlflowException
from mlflow.tracing.client import TracingClient
from mlflow.tracking import fluent

from tlm_tracing import _annotate, _redacted
from tlm_tracing._config import Config
from tlm_tracing._data import Trust
from tlm_tracing._visible import visible
from tlm_tracing.evaluation._answers import Answer, assessment_id

_SOURCE_RUN = "mlflow.sourceRun"
# How the threads are called whose feedback MLflow's evaluation stores.
_EVALUATING = "MlflowGenAIEvalScorer"
_WORDS = {
    "no_scorer": "There is no scorer: set CLEANLAB_TLM_API_KEY, or give one.",
    "off": "tlm_tracing is switched off.",
    "pending": "The score is on its way.",
    "empty": "There is no answer.",
    "refusal": "The answer is a refusal.",
    "call_failed": "The call of the LLM failed.",
    "partial_stream": "There is only a part of the answer.",
    "unsupported_content": "There is no text of prompt and answer that could be scored.",
    "budget": "The budget of scores is spent.",
}


def feedback(name: str, answer: Answer, config: Config, scorer: str | None) -> Feedback:
    """What an evaluation is told of an answer.

    Args:
        name: What the score is called.
        answer: A settled one.
        config: The settings in force.
        scorer: The scorer's name, if it has one.

    Returns:
        The score in [0, 1] with its explanation, or an error whose code is the reason's word.
    """
    trust = answer.trust
    if trust.score is None:
        return _error(name, answer, config, scorer)
    explanation = trust.explanation if config.capture_content else None
    if explanation is not None and answer.metadata is None:
        explanation = str(visible(config)(explanation))
    told = _annotate.assessment(replace(trust, explanation=explanation), answer.notes, name)
    if answer.metadata is not None:
        told.metadata = dict(answer.metadata)
    told.assessment_id = None
    return told


def passing(told: Feedback, threshold: float) -> Feedback:
    """The same as a pass or fail: ``"yes"`` if the score is not below the threshold."""
    if told.error is None:
        score: Any = told.value
        told.metadata = {
            **(told.metadata or {}),
            "score": f"{score:.4f}",
            "threshold": f"{threshold:g}",
        }
        told.value = "yes" if score >= threshold else "no"
    return told


def replacing(told: Feedback, trace: Trace | None) -> Feedback:
    """The same in place of what this scorer has said of the same call before.

    MLflow's evaluation always adds an assessment, so the earlier one has to go first.

    Args:
        told: A feedback of ours.
        trace: What it is on.
    """
    if trace is None or not threading.current_thread().name.startswith(_EVALUATING):
        return told  # nobody stores it
    run = fluent._get_latest_active_run()  # type: ignore[no-untyped-call]
    run_id = None if run is None else run.info.run_id
    placed = Trust(scorer=told.source.source_id, trace_id=told.trace_id, span_id=told.span_id)
    its_id = assessment_id(placed, told.name)
    if not _taken.take(run_id, its_id):
        return told  # the same trace is in the data twice
    is_there = any(item.assessment_id == its_id for item in trace.info.assessments or ())
    # A trace that was read before the run may have got it since.
    if is_there or trace.info.trace_metadata.get(_SOURCE_RUN) != run_id:
        try:
            TracingClient().delete_assessment(trace.info.trace_id, its_id)
        except (MlflowException, NotImplementedError):
            return told
    told.assessment_id = its_id
    return told


class _Taken:
    """The ids that the evaluation at hand has given away: each can be stored once."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._run_id: str | None = None
        self._ids: set[str] = set()

    def take(self, run_id: str | None, its_id: str) -> bool:
        """Whether an id is free; if so it is taken."""
        with self._lock:
            if run_id != self._run_id:
                self._run_id, self._ids = run_id, set()
            is_free = its_id not in self._ids
            self._ids.add(its_id)
            return is_free


_taken = _Taken()


def _error(name: str, answer: Answer, config: Config, scorer: str | None) -> Feedback:
    trust = answer.trust
    reason = trust.reason or trust.status
    detail = answer.detail and str(visible(config)(_redacted.redact(answer.detail)))
    placed = replace(trust, score=0.0, scorer=trust.scorer or scorer)
    like = _annotate.assessment(placed, answer.notes, name)
    return Feedback(
        name=name,
        error=AssessmentError(reason, detail or _WORDS.get(reason, reason)),
        source=like.source,
        metadata=like.metadata,
        trace_id=trust.trace_id,
        span_id=trust.span_id,
    )
