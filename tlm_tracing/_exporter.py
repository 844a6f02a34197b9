"""MLflow's exporter, made to write by way of the outbox.

MLflow's own drops a trace when its queue of 1,000 is full or its server has been away for some
time, and holds up the end of the process for minutes. What is exported, and how it is written,
stays MLflow's.

Source: ``mlflow.tracing.export.mlflow_v3`` of MLflow 3.15 to 3.17.
"""

from __future__ import annotations

import contextlib
import functools
import os
import sys
import threading
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any, NamedTuple, TypeVar

from mlflow.entities import Span, Trace, TraceData, TraceInfo
from mlflow.environment_variables import MLFLOW_HTTP_POOL_MAXSIZE
from mlflow.protos.service_pb2 import StartTraceV3
from mlflow.store.tracking.rest_store import RestStore
from mlflow.tracing.config import get_config
from mlflow.tracing.display.display_handler import is_trace_ui_available
from mlflow.tracing.export.async_export_queue import AsyncTraceExportQueue
from mlflow.tracing.export.mlflow_v3 import MlflowV3SpanExporter
from mlflow.tracing.export.utils import try_link_prompts_to_trace
from mlflow.tracing.processor.mlflow_v3 import MlflowV3SpanProcessor
from mlflow.tracing.provider import _get_span_processor, _get_trace_exporter, provider
from mlflow.tracing.trace_manager import InMemoryTraceManager
from mlflow.tracing.utils import add_size_stats_to_trace_metadata
from mlflow.utils.databricks_utils import is_in_databricks_model_serving_environment
from mlflow.utils.proto_json_utils import message_to_json
from mlflow.utils.rest_utils import (
    _V3_TRACE_REST_API_PATH_PREFIX,
    verify_rest_response,
)
from mlflow.utils.workspace_context import ServerWorkspaceContext

from tlm_tracing import _live, _outbox, _tracking
from tlm_tracing._batch import Batch

_TOKENS = "mlflow.trace.tokenUsage"
_NOT_FOUND = 404
# An open trace is shown in the store after so many seconds.
_SOON = 5.0
# About as long as MLflow's own requests would try.
_FOR_EVALUATION = 120.0


class _Exporter(MlflowV3SpanExporter):
    """MLflow's exporter, but for when it writes.

    MLflow's exporter objects become one of these: single inheritance, as for clients.
    """

    # By trace id, what is not written yet: of open traces, and of those that have ended.
    _parts: weakref.WeakValueDictionary[str, _outbox.Parcel]
    _wholes: weakref.WeakValueDictionary[str, _outbox.Parcel]
    # Whether each trace is seen as it ends.
    _is_shown = False

    def export(self, spans: Any) -> Any:
        with _outbox.busy():  # it looks for IPython each time
            self._is_shown = _is_shown(self._display_handler)
            # Whole traces first: what is left then belongs to traces that are still open.
            self._export_traces(spans)
            if self._store_supports_log_spans:
                self._export_spans_incrementally(spans)

    def _do_export_trace(self, manager: Any, span: Any) -> None:
        held = None if self._is_shown else _live.take(span.context.trace_id)
        if held is None:
            super()._do_export_trace(manager, span)
        else:
            self._post(_Whole(held.info, held.to_mlflow_trace, held.prompts, held.workspace))

    def _should_log_async(self) -> bool:
        return False  # so that what is to be written comes here, not into MLflow's queue

    def _log_spans(
        self, experiment_id: str, spans: list[Span], workspace: str | None = None
    ) -> None:
        """Show an open trace in the store, unless it is whole soon."""
        by_trace: dict[str, list[Span]] = {}
        for span in spans:
            by_trace.setdefault(span.trace_id, []).append(span)
        for trace_id, some in by_trace.items():
            spans_so_far = [*self._taken_back(trace_id), *_live.with_light(some)]
            part = _Part(experiment_id, spans_so_far, workspace)
            self._parts[trace_id] = _outbox.post_together(self._write_parts, part, _SOON)

    def _taken_back(self, trace_id: str) -> list[Span]:
        parcel = self._parts.pop(trace_id, None)
        part = None if parcel is None else _outbox.take_back(parcel)
        return [] if part is None else part.spans

    def _log_trace(
        self, trace: Trace, prompts: Sequence[Any], workspace: str | None = None
    ) -> None:
        self._post(_Whole(trace.info, lambda: trace, prompts, workspace))

    def _post(self, whole: _Whole) -> None:
        self._taken_back(whole.info.trace_id)
        parcel = _outbox.post_together(self._write_traces, whole)
        self._wholes[whole.info.trace_id] = parcel
        if _live.is_evaluated():
            _outbox.wait_for(parcel, _FOR_EVALUATION)
        elif not super()._should_log_async():
            _outbox.wait_for(parcel)

    def _write_parts(self, parts: list[_Part]) -> None:
        with _tracking.at_store(self._client):
            for workspace, some in _grouped(parts, lambda part: part.workspace):
                with _within(workspace):
                    self._write_spans((part.experiment_id, part.spans) for part in some)

    def _write_traces(self, wholes: list[_Whole]) -> None:
        with _tracking.at_store(self._client):
            for workspace, some in _grouped(wholes, lambda whole: whole.workspace):
                with _within(workspace):
                    self._write_whole(some)

    def _write_whole(self, wholes: list[_Whole]) -> None:
        """Write traces: what is known of each first, as that costs a store least, then spans."""
        early: list[_Whole] = []
        late: list[_Whole] = []
        for whole in wholes:
            (early if _outlasts(whole.trace) else late).append(whole)
        self._write_spans(whole.spans for whole in early)
        for whole in wholes:
            self._start(whole.trace)
        self._write_spans(whole.spans for whole in late)
        for whole in wholes:
            self._write_rest(whole)

    def _start(self, trace: Trace) -> None:
        add_size_stats_to_trace_metadata(trace)
        store = self._client.store
        if type(store) is RestStore:
            told = Trace(trace.info, TraceData(spans=[])).to_proto()  # type: ignore[no-untyped-call]
            path = _V3_TRACE_REST_API_PATH_PREFIX
            body = message_to_json(StartTraceV3(trace=told))
            response = _tracking.post(store, path, {"Content-Type": "application/json"}, body)
            if response.status_code != _NOT_FOUND:
                verify_rest_response(response, path)
                return
        self._client.start_trace(trace.info)  # which knows how to talk to older servers

    def _write_spans(self, parts: Iterable[tuple[str, list[Span]]]) -> None:
        for experiment_id, some in _grouped(parts, lambda part: part[0]):
            spans = [span for _, spans in some for span in spans]
            if spans and self._store_supports_log_spans:
                self._store_supports_log_spans = _tracking.log_spans(
                    self._client, experiment_id, spans
                )

    def _write_rest(self, whole: _Whole) -> None:
        trace, trace_id = whole.trace, whole.info.trace_id
        attachments: dict[str, Any] = {}
        for span in trace.data.spans:
            attachments.update(getattr(span, "_attachments", None) or {})
        if attachments or not self._store_supports_log_spans:
            stored = self._client.get_trace_info(trace_id)  # it tells where artifacts go
            if not self._store_supports_log_spans:
                self._client._upload_trace_data(stored, trace.data)
            if attachments:
                self._client._upload_attachments(stored, attachments)
        try_link_prompts_to_trace(
            client=self._client, trace_id=trace_id, prompts=whole.prompts, synchronous=True
        )


class _Part(NamedTuple):
    """Spans of a trace that is still open."""

    experiment_id: str
    spans: list[Span]
    workspace: str | None


class _Whole:
    """A trace that has ended.

    Attributes:
        info: What is told of it beside its spans.
        prompts: Those that it used.
        workspace: Where it belongs, if there are several.
    """

    def __init__(
        self,
        info: TraceInfo,
        make: Callable[[], Trace],
        prompts: Sequence[Any],
        workspace: str | None,
    ) -> None:
        self.info = info
        self.prompts = prompts
        self.workspace = workspace
        self._make = make

    @functools.cached_property
    def trace(self) -> Trace:
        """As it is written, of which nothing is made before: the application may be at work."""
        return self._make()

    @property
    def spans(self) -> tuple[str, list[Span]]:
        """Where they belong, and all of its spans."""
        return str(self.info.experiment_id), self.trace.data.spans

    def add(self, spans: Iterable[Span]) -> None:
        """Have it hold these, too, or in the place of those with the same ids."""
        known = self.trace.data.spans
        known[:] = {span.span_id: span for span in (*known, *spans)}.values()


def _is_shown(display: Any) -> bool:
    """Whether somebody sees each trace as it ends: a notebook, or a model server."""
    ui: Any = is_trace_ui_available
    serving: Any = is_in_databricks_model_serving_environment
    return bool((not display.disabled and ui()) or serving())


T = TypeVar("T")


def _grouped(items: Iterable[T], key: Callable[[T], Any]) -> Iterable[tuple[Any, list[T]]]:
    groups: dict[Any, list[T]] = {}
    for item in items:
        groups.setdefault(key(item), []).append(item)
    return groups.items()


def _within(workspace: str | None) -> AbstractContextManager[Any]:
    return ServerWorkspaceContext(workspace) if workspace else contextlib.nullcontext()


def _outlasts(trace: Trace) -> bool:
    """Whether a store would take a late span's time for the trace's, were it told last.

    It does not if it knows the trace's tokens.
    """
    if _TOKENS in trace.info.trace_metadata:
        return False
    ends = [span.end_time_ns or 0 for span in trace.data.spans]
    roots = [span.end_time_ns or 0 for span in trace.data.spans if span.parent_id is None]
    return bool(roots) and max(ends) > max(roots)


class _Queue(AsyncTraceExportQueue):
    """MLflow's queue, which nothing comes into any more: to flush it is to flush the outbox."""

    def is_active(self) -> bool:
        return True  # or it would not be flushed at exit

    def flush(self, terminate: bool = False) -> None:
        if self._is_active and not _was_forked:
            super().flush(terminate)
        _outbox.flush()


def adopt() -> None:
    """Have MLflow's present exporter write by way of the outbox.

    Another kind of exporter, such as Databricks' or OpenTelemetry's, is left alone.
    """
    exporter = _get_trace_exporter()  # type: ignore[no-untyped-call]
    if type(exporter) is not MlflowV3SpanExporter:
        return
    if hasattr(exporter, "_async_queue"):
        exporter._async_queue.__class__ = _Queue
    for name in _Exporter.__annotations__:
        setattr(exporter, name, weakref.WeakValueDictionary())
    processor: Any = _get_span_processor()  # type: ignore[no-untyped-call]
    if getattr(processor, "_batch_delegate", None) is not None:
        before, processor._batch_delegate = processor._batch_delegate, Batch(exporter)
        before.force_flush()
    exporter.__class__ = _Exporter
    is_server = str(exporter._client.tracking_uri).startswith("http")
    pool: Any = MLFLOW_HTTP_POOL_MAXSIZE
    _outbox.start(pool.get() if is_server else None)


def alone() -> tuple[Any, Any] | None:
    """MLflow's span processor and its tracer provider, if nobody else sees spans.

    Its exporter writes by way of the outbox then. Others are another processor of OpenTelemetry's,
    MLflow's own span processors, and metrics.
    """
    tracers = provider.get()
    active = getattr(tracers, "_active_span_processor", None)
    processors: Sequence[Any] = getattr(active, "_span_processors", ())
    if len(processors) != 1 or get_config().span_processors:
        return None
    processor = processors[0]
    if type(processor) is not MlflowV3SpanProcessor or processor._export_metrics:
        return None
    return (processor, tracers) if type(processor.span_exporter) is _Exporter else None


def is_adopted() -> bool:
    """Whether MLflow's present exporter writes by way of the outbox."""
    return type(_get_trace_exporter()) is _Exporter  # type: ignore[no-untyped-call]


@contextlib.contextmanager
def kept(trace_id: str) -> Iterator[Any]:
    """Enter to have a trace that has ended, with its info, before it is written.

    Nobody writes it meanwhile; None if it is written, or just being so.
    """
    exporter: Any = _get_trace_exporter()  # type: ignore[no-untyped-call]
    parcel = exporter._wholes.get(trace_id) if type(exporter) is _Exporter else None
    if parcel is None:
        yield None
        return
    with _outbox.waiting(parcel) as whole:
        yield whole


def is_being_written(trace_id: str) -> bool:
    """Whether a trace that has ended is not yet written as a whole."""
    exporter: Any = _get_trace_exporter()  # type: ignore[no-untyped-call]
    parcel = exporter._wholes.get(trace_id) if type(exporter) is _Exporter else None
    return parcel is not None and not parcel.written.is_set()


_was_forked = False


def _after_fork() -> None:
    """What the parent's threads held is free here, and its connections stay the parent's."""
    global _was_forked
    _was_forked = True
    with contextlib.suppress(Exception):
        InMemoryTraceManager.get_instance()._lock = threading.RLock()  # type: ignore[no-untyped-call]
    with contextlib.suppress(Exception):
        processor: Any = _get_span_processor()  # type: ignore[no-untyped-call]
        processor._deduplication_lock = threading.RLock()
        processor._pending_on_end_condition = threading.Condition(threading.Lock())
        processor._pending_on_end_count = 0
    with contextlib.suppress(Exception):
        stores: Any = sys.modules.get("mlflow.store.tracking.sqlalchemy_store")
        for engine in stores.SqlAlchemyStore._engine_map.values() if stores else ():
            engine.dispose(close=False)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
