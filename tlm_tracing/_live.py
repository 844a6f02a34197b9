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
from mlflow.entities import LiveSpan, Span
from mlflow.tracing.trace_manager import InMemoryTraceManager

from tlm_tracing._light import LightSpan


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
        span: One that has just ended.
        whole: Whether all spans of a trace are written with it, in a batch or not.
    """
    if span.parent_id is None:
        return False
    with held(span.trace_id) as trace:
        if trace is None or whole:
            return trace is None
        root = trace.get_root_span()
        return root is not None and root.end_time_ns is not None


def start_light(
    name: str, kind: str, parent: LiveSpan, start_time_ns: int | None = None
) -> LightSpan:
    """Start a light span in a live one; MLflow waits for its end, and writes it with the trace.

    Args:
        name: Its name.
        kind: MLflow's type of span.
        parent: What it is inside of.
        start_time_ns: When it began, since 1970; now by default.
    """
    span = LightSpan(name, kind, parent, start_time_ns)
    with held(span.trace_id) as trace:
        if trace is not None:
            trace.span_dict[span.span_id] = span
    return span


def light_inside(spans: Sequence[Any]) -> list[Span]:
    """The light spans in these spans of one trace, as MLflow stores them, if they have ended."""
    ids = {span.span_id for span in spans}
    found: list[Span] = []
    for trace_id in {span.trace_id for span in spans}:
        with held(trace_id) as trace:
            inside = [] if trace is None else list(trace.span_dict.values())
        found += [
            span.to_immutable_span()
            for span in inside
            if isinstance(span, LightSpan) and span.parent_id in ids and span.end_time_ns
        ]
    return found


def copy(key: str, source: Any, target: Any) -> bool:
    """Tell a live span a content attribute as another has it, which is written out already.

    Args:
        key: Inputs or outputs.
        source: A light span.
        target: A live one.

    Returns:
        Whether the two are such spans; nothing is told otherwise.
    """
    if not (isinstance(source, LightSpan) and isinstance(target, LiveSpan)):
        return False
    open_one: Any = target._span
    open_one.set_attribute(key, source.written(key))
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


def forget(span: LiveSpan | LightSpan) -> None:
    """Have MLflow not wait for an open span any more, nor write it."""
    with held(span.trace_id) as trace:
        if trace is not None:
            trace.span_dict.pop(span.span_id, None)


def _manager() -> Any:
    return InMemoryTraceManager.get_instance()  # type: ignore[no-untyped-call]
