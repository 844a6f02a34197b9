"""The traces that MLflow holds in memory, before it has written them.

The only room that leans on MLflow's own names for that: its public calls reach the trace that is
active in the very context, and no other.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any

import mlflow
from mlflow.entities import LiveSpan, NoOpSpan
from mlflow.tracing.constant import SpanAttributeKey, TraceTagKey
from mlflow.tracing.trace_manager import InMemoryTraceManager
from opentelemetry.context import Context

from tlm_tracing._light import LightSpan

_NOWHERE = Context()
_EVALUATED = TraceTagKey.EVAL_REQUEST_ID


def held(trace_id: str) -> AbstractContextManager[Any]:
    """Enter to have the live trace, locked; None if MLflow does not hold it (any more)."""
    return _manager().get_trace(trace_id)  # type: ignore[no-any-return]


def is_evaluated() -> bool:
    """Whether an evaluation of MLflow's makes the call at hand.

    It reads the trace as soon as the application has returned, and fails if that is not written.
    """
    pyfunc: Any = sys.modules.get("mlflow.pyfunc.context")  # without it, nothing is evaluated
    context = None if pyfunc is None else pyfunc.get_prediction_context()
    return context is not None and bool(context.is_evaluate and context.request_id)


def is_tried_out() -> bool:
    """Whether MLflow tries an application out before an evaluation, with tracing off."""
    # It counts the spans that are not recorded meanwhile, by a method of its own.
    name = "mlflow.genai.utils.trace_utils"
    tracer = getattr(sys.modules.get(name), "NoOpTracer", None)
    return tracer is not None and bool(tracer.start_span.__module__ == name)


def may_be_lost(span: Any, *, whole: bool) -> bool:
    """Whether MLflow may let go of a span's trace without writing the span.

    It holds a trace of which a span is open, but once the root has ended it lets go of it with
    the first batch that it exports after that, and may not have put the last spans into it.

    Args:
        span: One that has just ended, and is no root.
        whole: Whether all spans of a trace are written with it, in a batch or not.
    """
    with held(span.trace_id) as trace:
        if trace is None or whole:
            return trace is None
        root = trace.get_root_span()
        return root is not None and root.end_time_ns is not None


def take(otel_trace_id: int) -> Any:
    """Have MLflow forget a trace that has ended; gives it as MLflow has it, without work.

    None for one that MLflow has to see to: of an evaluation, or with a root elsewhere.
    """
    manager = _manager()
    with manager._lock:
        trace_id = manager.get_mlflow_trace_id_from_otel_id(otel_trace_id)
        trace = manager._traces.get(trace_id)
        if trace is None or trace.is_remote_trace or _EVALUATED in trace.info.tags:
            return None
        manager._otel_id_to_mlflow_trace_id.pop(otel_trace_id)
        return manager._traces.pop(trace_id)


def start_light(
    name: str,
    kind: str,
    parent: LiveSpan | LightSpan,
    start_time_ns: int | None = None,
    processor: Any = None,
) -> LightSpan:
    """Start a light span in another; MLflow waits for its end, and writes it with the trace.

    Args:
        name: Its name.
        kind: MLflow's type of span.
        parent: What it is inside of.
        start_time_ns: When it began, since 1970; now by default.
        processor: MLflow's, which is told of its end; None if it is written with its parent.
    """
    span = LightSpan(name, kind, parent, start_time_ns, processor)
    _register(span)
    return span


def start_trace(
    name: str, kind: str, processor: Any, tracers: Any, experiment_id: str | None
) -> LightSpan | NoOpSpan | None:
    """Start a light span that begins a trace, as MLflow starts one.

    Args:
        name: Its name.
        kind: MLflow's type of span.
        processor: MLflow's.
        tracers: The tracer provider that this belongs to.
        experiment_id: Where the trace belongs; None if MLflow knows it by itself.

    Returns:
        The span; one that does nothing if the trace is not sampled, None if there can't be one.
    """
    span = LightSpan(name, kind, None, processor=processor, resource=tracers.resource)
    sampled = tracers.sampler.should_sample(_NOWHERE, span.otel_trace_id, name)
    if not sampled.decision.is_sampled():
        return NoOpSpan()  # type: ignore[no-untyped-call]
    if experiment_id is not None:
        span.set_attribute(SpanAttributeKey.EXPERIMENT_ID, experiment_id)
    info = processor._start_trace(span._span)
    if info is None:
        return None
    span.belong(info.trace_id)
    _register(span)
    return span


def _register(span: LightSpan) -> None:
    with held(span.trace_id) as trace:
        if trace is not None:
            trace.span_dict[span.span_id] = span


def with_light(spans: Sequence[Any]) -> list[Any]:
    """Spans of one trace as they can be written, and the light ones in them that have ended."""
    ids = {span.span_id for span in spans}
    found = {span.span_id: _written(span) for span in spans}
    for trace_id in {span.trace_id for span in spans}:
        with held(trace_id) as trace:
            inside = [] if trace is None else list(trace.span_dict.values())
        for span in inside:
            if isinstance(span, LightSpan) and span.parent_id in ids and span.end_time_ns:
                found.setdefault(span.span_id, span.to_immutable_span())
    return list(found.values())


def _written(span: Any) -> Any:
    return span.to_immutable_span() if isinstance(span, LightSpan) else span


def copy(key: str, source: Any, target: Any) -> bool:
    """Tell a span a content attribute as another has it, which is written out already.

    Args:
        key: Inputs or outputs.
        source: A light span.
        target: A light or live one.

    Returns:
        Whether the two are such spans; nothing is told otherwise.
    """
    if not isinstance(source, LightSpan):
        return False
    if isinstance(target, LightSpan):
        target.copy(key, source)
    elif isinstance(target, LiveSpan):
        open_one: Any = target._span
        open_one.set_attribute(key, source.written(key))
    else:
        return False
    return True


def discard(otel_trace_id: int, span_id: str) -> bool:
    """Have MLflow forget an open LLM span that somebody else has started, not the active one.

    Whatever is still noted on it is not recorded.

    Args:
        otel_trace_id: OpenTelemetry's id of its trace.
        span_id: Its own id.

    Returns:
        Whether there was such a span.
    """
    manager = _manager()
    trace_id = manager.get_mlflow_trace_id_from_otel_id(otel_trace_id)
    span = trace_id and manager.get_span_from_id(trace_id, span_id)
    if not span or span.span_type != "CHAT_MODEL" or span is mlflow.get_current_active_span():
        return False
    if span.parent_id is None:
        manager.pop_trace(otel_trace_id)
    else:
        with held(trace_id) as trace:
            trace.span_dict.pop(span_id, None)
    return True


def forget(span: LiveSpan | LightSpan | NoOpSpan) -> None:
    """Have MLflow not wait for an open span any more, nor write it."""
    with held(span.trace_id) as trace:
        if trace is not None:
            trace.span_dict.pop(span.span_id, None)


def _manager() -> Any:
    return InMemoryTraceManager.get_instance()  # type: ignore[no-untyped-call]
