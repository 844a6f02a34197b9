"""Telemetry: what OpenTelemetry's meters and event loggers are told of the scores.

Through its API alone, which does nothing until the application sets a provider, be it before or
after the first call. The names are those of its conventions and of our spans' attributes.

Source: https://github.com/open-telemetry/semantic-conventions-genai (docs/gen-ai).
"""

from __future__ import annotations

import functools
import importlib
import inspect
import logging
import re
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from opentelemetry import context, metrics, trace
from opentelemetry.metrics import CallbackOptions, Observation

from tlm_tracing import _scoring
from tlm_tracing._config import Config
from tlm_tracing._data import Trust
from tlm_tracing._visible import visible

_logger = logging.getLogger("tlm_tracing")

_SCOPE = "tlm_tracing"
_EVENT = "gen_ai.evaluation.result"
_TRACE_ID = re.compile("[0-9a-f]{32}$")  # MLflow's ids are "tr-" and OpenTelemetry's

# OpenTelemetry's own bounds are made for milliseconds; these seconds are those of its GenAI
# conventions.
_SCORES = [number / 20 for number in range(1, 20)]
_SECONDS = [0.01 * 2**number for number in range(14)]

Attributes = dict[str, str | float]
Emit = Callable[[Attributes, "trace.SpanContext | None"], None]


def _pending(_: CallbackOptions) -> Iterable[Observation]:
    yield Observation(_scoring.stats().pending)


def _dropped(_: CallbackOptions) -> Iterable[Observation]:
    yield Observation(_scoring.stats().dropped)


def _histogram(name: str, unit: str, description: str, bounds: list[float]) -> metrics.Histogram:
    make: Any = _meter.create_histogram
    advice = {"explicit_bucket_boundaries_advisory": bounds}
    is_heard = advice.keys() <= inspect.signature(make).parameters.keys()  # since 1.30
    made: metrics.Histogram = make(name, unit, description, **(advice if is_heard else {}))
    return made


_meter = metrics.get_meter(_SCOPE)
_calls = _meter.create_counter("tlm_tracing.calls", "{call}", "Calls, scored or not.")
_scores = _histogram("tlm_tracing.score", "1", "Trust scores of answers.", _SCORES)
_durations = _histogram(
    "tlm_tracing.scoring.duration", "s", "How long scorers took for a score.", _SECONDS
)
_meter.create_observable_up_down_counter(
    "tlm_tracing.pending", [_pending], "{score}", "Scores that are waited for."
)
_meter.create_observable_counter(
    "tlm_tracing.dropped", [_dropped], "{item}", "Scores and spans that could not be written."
)


def settled(trust: Trust, config: Config, answer: Any) -> None:
    """Tell of a call that is scored, or will not be.

    Args:
        trust: The trust in its answer.
        config: The settings in force.
        answer: The answer as plain data, if there is one.
    """
    try:
        _measure(trust)
        if config.evaluation_events:
            _emitter()(_evaluation(trust, config, answer), _span(trust))
    except Exception as error:
        _warn_of(type(error).__name__)


def _measure(trust: Trust) -> None:
    told = {"tlm.status": trust.status, "tlm.reason": trust.reason, "tlm.scorer": trust.scorer}
    attributes = {name: word for name, word in told.items() if word is not None}
    _calls.add(1, attributes)
    if trust.score is None:
        return
    scorer = {"tlm.scorer": trust.scorer} if trust.scorer is not None else {}
    _scores.record(trust.score, scorer)
    if trust.seconds:  # none for a score that was known already
        _durations.record(trust.seconds, scorer)


def _evaluation(trust: Trust, config: Config, answer: Any) -> Attributes:
    """What the event says, by the conventions for it."""
    label = explanation = None
    if trust.score is not None and config.threshold is not None:
        label = "fail" if trust.score < config.threshold else "pass"
    if trust.explanation is not None and config.capture_content:
        explanation = str(visible(config)(trust.explanation))
    told = {
        "gen_ai.evaluation.name": "trustworthiness",
        "gen_ai.evaluation.score.value": trust.score,
        "gen_ai.evaluation.score.label": label,
        "gen_ai.evaluation.explanation": explanation,
        "gen_ai.response.id": answer.get("id") if isinstance(answer, Mapping) else None,
        "error.type": trust.reason,
    }
    return {name: value for name, value in told.items() if isinstance(value, (str, float))}


def _span(trust: Trust) -> trace.SpanContext | None:
    """The call's span, as far as it is recorded."""
    found = _TRACE_ID.search(trust.trace_id or "")
    if found is None or trust.span_id is None:
        return None
    flags = trace.TraceFlags(trace.TraceFlags.SAMPLED)
    return trace.SpanContext(int(found[0], 16), int(trust.span_id, 16), False, flags)


@functools.lru_cache(maxsize=1)
def _emitter() -> Emit:
    """How events are emitted in this version of OpenTelemetry."""
    try:
        logs: Any = importlib.import_module("opentelemetry._logs")
        if "event_name" in inspect.signature(logs.Logger.emit).parameters:  # since 1.38
            return functools.partial(_emit, logs)
        return functools.partial(
            _emit_before_1_38, importlib.import_module("opentelemetry._events")
        )
    except ImportError:
        _logger.warning("evaluation_events needs opentelemetry-api 1.25 or newer.")
        return lambda attributes, span: None


def _emit(logs: Any, attributes: Attributes, span: trace.SpanContext | None) -> None:
    around = context.get_current()
    if span is not None:
        around = trace.set_span_in_context(trace.NonRecordingSpan(span), around)
    logs.get_logger(_SCOPE).emit(
        timestamp=time.time_ns(), context=around, attributes=attributes, event_name=_EVENT
    )


def _emit_before_1_38(events: Any, attributes: Attributes, span: trace.SpanContext | None) -> None:
    ids = {}
    if span is not None:
        ids = {
            "trace_id": span.trace_id,
            "span_id": span.span_id,
            "trace_flags": span.trace_flags,
        }
    event = events.Event(_EVENT, time.time_ns(), attributes=attributes, **ids)
    events.get_event_logger(_SCOPE).emit(event)


@functools.lru_cache(maxsize=16)
def _warn_of(failure: str) -> None:
    _logger.warning("OpenTelemetry could not be told of a score: %s.", failure)
