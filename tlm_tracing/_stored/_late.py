"""What a stored trace gets when its calls have been scored: spans, tags and assessments."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime, timezone
from typing import Any

from mlflow.entities import Span, TraceInfo

from tlm_tracing import _annotate, _redacted
from tlm_tracing._asking import Asked
from tlm_tracing._bulk import Addition, Tags
from tlm_tracing._config import Config
from tlm_tracing._data import Trust
from tlm_tracing._record import EVALS, texts, told, trust_attributes
from tlm_tracing._stored._calls import StoredCall
from tlm_tracing._visible import visible

# Of no tokens, or the store would take the scoring's time for the trace's.
_NO_TOKENS = {"input_tokens": 0, "output_tokens": 0, "total_tokens": 0}
_REQUEST_ID = "mlflow.traceRequestId"


@dataclass(frozen=True)
class Judged:
    """A call of a stored trace, and the trust in its answer.

    Attributes:
        call: The call.
        trust: With the ids of trace and span.
        asked: The texts, if there are any.
        notes: What the assessment tells beside the trust.
        detail: What went wrong, when it is unscored.
        is_new: Whether the trust is to be written; else the trace tells it already, or the
            reason why there is no score may be another one next time.
        is_cached: Whether nobody was asked, as the score was known.
        before: The trust that the trace tells already, if there was one and it was asked for
            another.
    """

    call: StoredCall
    trust: Trust
    asked: Asked | None = None
    notes: _annotate.Notes = field(default_factory=_annotate.Notes)
    detail: str | None = None
    is_new: bool = False
    is_cached: bool = False
    before: Trust | None = None

    @property
    def standing(self) -> Trust:
        """The trust that the trace is to tell."""
        return self.trust if self.is_new or self.before is None else self.before


def addition(info: TraceInfo, judged: Sequence[Judged], config: Config) -> Addition:
    """What a trace gets.

    Args:
        info: The trace.
        judged: All of its calls.
        config: The settings in force.
    """
    see = visible(config)
    shown = [_shown(one, see if config.capture_content else None) for one in judged]
    return Addition(
        info,
        [span for one in judged for span in _spans(one, see)],
        _tags(info, shown),
        [
            feedback
            for one in shown
            if one.is_new
            for feedback in _annotate.assessments(one.trust, one.notes)
        ],
    )


def _shown(judged: Judged, see: Callable[[Any], Any] | None) -> Judged:
    """With the explanation as it may be seen; if no words may, with none."""
    if judged.trust.explanation is None or not judged.is_new:
        return judged
    explanation = None if see is None else str(see(judged.trust.explanation))
    return replace(judged, trust=replace(judged.trust, explanation=explanation))


def _tags(info: TraceInfo, judged: Iterable[Judged]) -> Tags:
    """Those that change."""
    known = [one.standing for one in judged]
    if not known:
        # A score that is there all the same is of something else, such as a pair of wrap_tlm's.
        is_scored = _annotate.SCORE_TAG in info.tags
        wanted: Tags = {} if is_scored else {_annotate.STATUS_TAG: "unscored"}
    elif any(one.is_new or one.standing.score is not None for one in judged):
        wanted = _annotate.tags(known)
    else:
        wanted = {}
    return {
        key: tag
        for key, tag in wanted.items()
        if tag != info.tags.get(key) and (tag is not None or key in info.tags)
    }


def _spans(judged: Judged, see: Callable[[Any], Any]) -> Iterator[Span]:
    if not judged.is_new and (judged.trust.score is None or judged.call.scoring is not None):
        return
    if judged.asked is not None or judged.call.parent is None:
        yield _scoring(judged, see)
    if judged.call.parent is not None:
        yield _with_trust(judged.call.parent, judged.trust)


def _scoring(judged: Judged, see: Callable[[Any], Any]) -> Span:
    """The scoring span; placed right after the call, though it was scored later."""
    call, trust = judged.call, judged.trust
    above = call.parent or call.llm
    begins = above.end_time_ns or above.start_time_ns
    data = dict(above.to_dict())  # MLflow keeps that one
    attributes: dict[str, Any] = {
        "mlflow.spanType": "EVALUATOR",
        "mlflow.spanInputs": see({} if judged.asked is None else _texts(judged.asked)),
        "mlflow.spanOutputs": see(told(trust)),
        "mlflow.chat.tokenUsage": _NO_TOKENS,
        "tlm.scored_at": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        **trust_attributes(trust),
    }
    if judged.is_cached:
        attributes["tlm.cached"] = True
    if judged.asked is not None and judged.asked.is_partial:
        attributes["tlm.prompt_is_partial"] = True
    is_scored = trust.score is not None
    data |= {
        "name": "tlm.trustworthiness",
        "parent_span_id": data["span_id"],
        "span_id": _scoring_id(call, str(trust.trace_id)),
        "start_time_unix_nano": begins,
        "end_time_unix_nano": begins + int((trust.seconds or 0.0) * 1e9),
        "events": [],
        "links": [],
        "status": {
            "code": "STATUS_CODE_OK" if is_scored else "STATUS_CODE_ERROR",
            "message": "" if is_scored else _why(judged, see),
        },
        "attributes": {_REQUEST_ID: data["attributes"][_REQUEST_ID], **_as_json(attributes)},
    }
    return Span.from_dict(data)


def _texts(asked: Asked) -> dict[str, Any]:
    return texts(asked.prompt, asked.responses, asked.query, asked.context)


def _why(judged: Judged, see: Callable[[Any], Any]) -> str:
    if judged.detail is None:
        return str(judged.trust.reason)
    return str(see(_redacted.redact(judged.detail)))


def _scoring_id(call: StoredCall, trace_id: str) -> str:
    """That of the span that is there, else always the same: a second one takes its place."""
    if call.scoring is not None:
        number = bytes.fromhex(call.scoring.span_id)
    else:
        number = hashlib.sha256(f"{trace_id}:{call.span_id}:tlm".encode()).digest()[:8]
    return base64.b64encode(number).decode()


def _with_trust(parent: Span, trust: Trust) -> Span:
    """The parent span of a call of ours, telling the trust."""
    data = dict(parent.to_dict())
    kept = {
        key: value
        for key, value in data["attributes"].items()
        if key not in ("tlm.reason", "tlm.trustworthiness_score", "tlm.seconds")
        and not key.startswith(EVALS)
    }
    data["attributes"] = {**kept, **_as_json(trust_attributes(trust))}
    return Span.from_dict(data)


def _as_json(attributes: Mapping[str, Any]) -> dict[str, str]:
    return {key: json.dumps(value, default=str) for key, value in attributes.items()}
