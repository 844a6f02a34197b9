"""Spans that cost the caller of a call little: they are MLflow's when their trace is written.

A live span of MLflow's costs a tenth of a millisecond to start and end, most of it for those who
may watch it meanwhile. Nobody does if none of ours is active, and our own exporter writes them.
"""

from __future__ import annotations

import json
import os
import random
import time
from collections.abc import Mapping
from typing import Any

from mlflow.entities import LiveSpan, Span, SpanEvent, SpanLogLevel, SpanStatus, SpanStatusCode
from mlflow.tracing.constant import SpanAttributeKey
from mlflow.tracing.utils import build_otel_context, dump_span_attribute_value
from mlflow.tracing.utils.default_log_level import default_log_level_for_span_type
from opentelemetry.sdk.trace import Event, ReadableSpan
from opentelemetry.trace import SpanContext, Status, TraceFlags

# What may be changed by others later: written out at once.
_CONTENT = frozenset({SpanAttributeKey.INPUTS, SpanAttributeKey.OUTPUTS})
_OK = SpanStatus(SpanStatusCode.OK)
_SAMPLED = TraceFlags(TraceFlags.SAMPLED)
_encoded = json.JSONEncoder(ensure_ascii=False).encode


class LightSpan:
    """A span that is told things, and nothing else; takes what a span of MLflow's takes.

    MLflow holds it with the live spans of its trace, and asks it as it asks those.
    """

    def __init__(
        self,
        name: str,
        kind: str,
        parent: LiveSpan | LightSpan | None,
        start_time_ns: int | None = None,
        processor: Any = None,
        resource: Any = None,
    ) -> None:
        """Start it.

        Args:
            name: Its name.
            kind: MLflow's type of span.
            parent: What it is inside of; None if it begins a trace, whose id is told later.
            start_time_ns: When it began, since 1970; now by default.
            processor: MLflow's, which is told of its end. None for one that is written with its
                parent.
            resource: OpenTelemetry's account of the process, for one that begins a trace.
        """
        self.name = name
        self.span_type = kind
        self._number = _new_id(64)
        self.span_id = f"{self._number:016x}"
        self.trace_id = ""
        self.parent_id: str | None = None
        # Of what it is inside of no more is kept: there is to be no circle for the collector.
        self.around: SpanContext | None = None
        self.resource = resource
        if parent is None:
            self.otel_trace_id = _new_id(128)
        else:
            seen: Any = parent._span
            self.belong(parent.trace_id)
            self.parent_id = parent.span_id
            self.around = seen.context
            self.resource = seen.resource
            self.otel_trace_id = seen.context.trace_id
        self.start_time_ns = start_time_ns or time.time_ns()
        self.end_time_ns: int | None = None
        self.status = SpanStatus(SpanStatusCode.UNSET)
        self._processor = processor
        self._told: dict[str, Any] = {}
        self._written: dict[str, str] = {}
        self._events: tuple[Event, ...] = ()

    def belong(self, trace_id: str) -> None:
        """Tell it MLflow's id of its trace."""
        self.trace_id = self.request_id = trace_id

    def set_attribute(self, key: str, value: Any) -> None:
        """Tell something of it; a value that is not content is not changed by anyone later."""
        if key in _CONTENT:
            self._written[key] = _stored(value)
        else:
            self._told[key] = value

    def set_attributes(self, attributes: Mapping[str, Any]) -> None:
        """Tell several things of it."""
        for key, value in attributes.items():
            self.set_attribute(key, value)

    def set_inputs(self, value: Any) -> None:
        """Tell what went in."""
        self.set_attribute(SpanAttributeKey.INPUTS, value)

    def set_outputs(self, value: Any) -> None:
        """Tell what came out."""
        self.set_attribute(SpanAttributeKey.OUTPUTS, value)

    def get_attribute(self, key: str) -> Any:
        """What was told; None if nothing was."""
        if key in self._written:
            return json.loads(self._written[key])
        return self._told.get(key)

    def copy(self, key: str, source: LightSpan) -> None:
        """Tell it a content attribute as another has it, which is written out already."""
        self._written[key] = source.written(key)

    def written(self, key: str) -> str:
        """A content attribute as it is stored."""
        return self._written[key]

    def set_status(self, status: SpanStatus | SpanStatusCode) -> None:
        """Say how it went."""
        self.status = status if isinstance(status, SpanStatus) else SpanStatus(status)

    def add_event(self, event: SpanEvent) -> None:
        """Note something that happened meanwhile."""
        self._events = (*self._events, Event(event.name, event.attributes, event.timestamp))
        if event.name == "exception":
            self._told.setdefault(SpanAttributeKey.LOG_LEVEL, int(SpanLogLevel.ERROR))

    def end(self, end_time_ns: int | None = None) -> None:
        """End it, as a success unless it is told to be a failure."""
        if self.status.status_code != SpanStatusCode.ERROR:
            self.status = _OK
        self.end_time_ns = end_time_ns or time.time_ns()
        if self._processor is not None:
            self._processor.on_end(self._span)

    def to_immutable_span(self) -> Span:
        """The span as MLflow stores it."""
        attributes = {
            SpanAttributeKey.REQUEST_ID: self.trace_id,
            SpanAttributeKey.SPAN_TYPE: self.span_type,
            SpanAttributeKey.LOG_LEVEL: int(default_log_level_for_span_type(self.span_type)),
            **self._told,
        }
        written = {key: _stored(value) for key, value in attributes.items()}
        around = self.around
        span = ReadableSpan(
            self.name,
            context=build_otel_context(self.otel_trace_id, self._number),
            parent=around and build_otel_context(around.trace_id, around.span_id),
            resource=self.resource,
            attributes={**written, **self._written},
            events=self._events,
            status=self.status.to_otel_status(),
            start_time=self.start_time_ns,
            end_time=self.end_time_ns,
        )
        return Span(span)

    @property
    def _span(self) -> _AsRead:
        return _AsRead(self)


class _AsRead:
    """A light span as MLflow's processors and exporters read one of OpenTelemetry's."""

    def __init__(self, light: LightSpan) -> None:
        self._light = light
        self.name = light.name
        self.start_time = light.start_time_ns
        self.context = SpanContext(
            light.otel_trace_id, light._number, is_remote=False, trace_flags=_SAMPLED
        )
        self.parent = self._parent = light.around
        self.resource = light.resource

    @property
    def end_time(self) -> int | None:
        return self._light.end_time_ns

    @property
    def status(self) -> Status:
        return self._light.status.to_otel_status()

    @property
    def attributes(self) -> dict[str, str]:
        """Those that are asked for: which trace it belongs to, and its content."""
        light = self._light
        own = {SpanAttributeKey.REQUEST_ID: light.trace_id}
        own[SpanAttributeKey.EXPERIMENT_ID] = light.get_attribute(SpanAttributeKey.EXPERIMENT_ID)
        return {
            **{key: json.dumps(value) for key, value in own.items() if value},
            **light._written,
        }


def _stored(value: Any) -> str:
    """A value as MLflow stores it; most are plain data, for which its own way is a detour."""
    try:
        return _encoded(value)
    except (TypeError, ValueError):
        return dump_span_attribute_value(value)


def _new_id(bits: int) -> int:
    return _random.getrandbits(bits) or 1


# Our own: users set Python's back to get the same numbers again.
_random = random.Random()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_random.seed)
