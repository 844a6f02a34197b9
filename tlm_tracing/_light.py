"""Spans that cost the caller of a call little: they are MLflow's when their trace is written.

A live span of MLflow's costs a tenth of a millisecond to start and as much to end, most of it
for those who may watch it meanwhile. Inside a call of ours there are none: nothing is active but
the call's parent span, and our own exporter writes whole traces.
"""

from __future__ import annotations

import json
import random
import time
from collections.abc import Mapping
from typing import Any

from mlflow.entities import LiveSpan, Span, SpanEvent, SpanLogLevel, SpanStatus, SpanStatusCode
from mlflow.tracing.constant import SpanAttributeKey
from mlflow.tracing.utils import build_otel_context, dump_span_attribute_value
from mlflow.tracing.utils.default_log_level import default_log_level_for_span_type
from opentelemetry.sdk.trace import Event, ReadableSpan

# What may be changed by others later: written out at once.
_CONTENT = frozenset({SpanAttributeKey.INPUTS, SpanAttributeKey.OUTPUTS})
_OK = SpanStatus(SpanStatusCode.OK)


class LightSpan:
    """A span inside a live one; takes what a span of MLflow's takes.

    MLflow holds it with the live spans of the trace, and asks it as it asks those.
    """

    def __init__(
        self, name: str, kind: str, parent: LiveSpan, start_time_ns: int | None = None
    ) -> None:
        """Start it.

        Args:
            name: Its name.
            kind: MLflow's type of span.
            parent: What it is inside of.
            start_time_ns: When it began, since 1970; now by default.
        """
        self.name = name
        self.span_type = kind
        self.trace_id: str = parent.trace_id
        self.request_id = self.trace_id
        self.parent_id: str | None = parent.span_id
        self._number = random.getrandbits(64) or 1
        self.span_id = f"{self._number:016x}"
        self.start_time_ns = start_time_ns or time.time_ns()
        self.end_time_ns: int | None = None
        self.status = SpanStatus(SpanStatusCode.UNSET)
        self._around: Any = parent._span
        self._told: dict[str, Any] = {}
        self._written: dict[str, str] = {}
        self._events: list[Event] = []

    def set_attribute(self, key: str, value: Any) -> None:
        """Tell something of it; a value that is not content is not changed by anyone later."""
        if key in _CONTENT:
            self._written[key] = dump_span_attribute_value(value)
        else:
            self._told[key] = value

    def set_attributes(self, attributes: Mapping[str, Any]) -> None:
        """Tell several things of it."""
        for key, value in attributes.items():
            self.set_attribute(key, value)

    def get_attribute(self, key: str) -> Any:
        """What was told; None if nothing was."""
        if key in self._written:
            return json.loads(self._written[key])
        return self._told.get(key)

    def written(self, key: str) -> str:
        """A content attribute as it is stored."""
        return self._written[key]

    def set_status(self, status: SpanStatus) -> None:
        """Say how it went."""
        self.status = status

    def add_event(self, event: SpanEvent) -> None:
        """Note something that happened meanwhile."""
        self._events.append(Event(event.name, event.attributes, event.timestamp))
        if event.name == "exception":
            self._told.setdefault(SpanAttributeKey.LOG_LEVEL, int(SpanLogLevel.ERROR))

    def end(self, end_time_ns: int | None = None) -> None:
        """End it, as a success unless it is told to be a failure."""
        if self.status.status_code != SpanStatusCode.ERROR:
            self.status = _OK
        self.end_time_ns = end_time_ns or time.time_ns()

    def to_immutable_span(self) -> Span:
        """The span as MLflow stores it."""
        attributes = {
            SpanAttributeKey.REQUEST_ID: self.trace_id,
            SpanAttributeKey.SPAN_TYPE: self.span_type,
            SpanAttributeKey.LOG_LEVEL: int(default_log_level_for_span_type(self.span_type)),
            **self._told,
        }
        written = {key: dump_span_attribute_value(value) for key, value in attributes.items()}
        context = self._around.context
        span = ReadableSpan(
            self.name,
            context=build_otel_context(context.trace_id, self._number),
            parent=build_otel_context(context.trace_id, context.span_id),
            resource=self._around.resource,
            attributes={**written, **self._written},
            events=self._events,
            status=self.status.to_otel_status(),
            start_time=self.start_time_ns,
            end_time=self.end_time_ns,
        )
        return Span(span)
