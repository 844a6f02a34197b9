"""MLflow's exporter, made to write by way of the outbox.

MLflow's own drops a trace when its queue of 1,000 is full or its server has been away for some
time, and holds up the end of the process for minutes. What is exported, and how it is written,
stays MLflow's. The only room that leans on the names of its exporter and stores.

Source: ``mlflow.tracing.export.mlflow_v3`` of MLflow 3.15 to 3.17.
"""

from __future__ import annotations

import contextlib
import os
import socket
import sys
import threading
import time
import urllib.parse
import urllib.request
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any, NamedTuple, TypeVar

from mlflow.entities import Span, Trace, TraceData, TraceInfo
from mlflow.exceptions import MlflowException
from mlflow.protos.service_pb2 import StartTraceV3
from mlflow.store.tracking.rest_store import RestStore
from mlflow.tracing.client import TracingClient
from mlflow.tracing.config import get_config
from mlflow.tracing.export.async_export_queue import AsyncTraceExportQueue
from mlflow.tracing.export.mlflow_v3 import MlflowV3SpanExporter
from mlflow.tracing.export.utils import try_link_prompts_to_trace
from mlflow.tracing.provider import _get_span_processor, _get_trace_exporter, provider
from mlflow.tracing.trace_manager import InMemoryTraceManager
from mlflow.tracing.utils import add_size_stats_to_trace_metadata
from mlflow.utils.proto_json_utils import message_to_json
from mlflow.utils.rest_utils import (
    _V3_TRACE_REST_API_PATH_PREFIX,
    http_request,
    verify_rest_response,
)
from mlflow.utils.workspace_context import ServerWorkspaceContext
from requests import Response

from tlm_tracing import _live, _outbox, _threads

_CONNECT = 2.0
_STILL_THERE = 1.0
# Not BAD_REQUEST: a database that has lost its connection says that, too.
_FINAL = frozenset(
    {
        "INVALID_PARAMETER_VALUE",
        "MALFORMED_REQUEST",
        "RESOURCE_ALREADY_EXISTS",
        "RESOURCE_DOES_NOT_EXIST",
    }
)

_FINALIZED = "mlflow.trace.infoFinalized"
_TOKENS = "mlflow.trace.tokenUsage"
_NOT_FOUND = 404
# An open trace is shown in the store after so many seconds.
_SOON = 5.0
# Ended spans are exported after so many seconds, or when there are so many.
_COLLECT = 0.5
_MANY = 500

_seen: dict[str, float] = {}


class _Exporter(MlflowV3SpanExporter):
    """MLflow's exporter, but for when it writes.

    MLflow's exporter objects become one of these: single inheritance, as for clients.
    """

    # By trace id, what is not written yet: of open traces, and of those that have ended.
    _parts: weakref.WeakValueDictionary[str, _outbox.Parcel]
    _wholes: weakref.WeakValueDictionary[str, _outbox.Parcel]

    def export(self, spans: Any) -> Any:
        with _outbox.busy():  # it looks for IPython each time
            # Whole traces first: what is left then belongs to traces that are still open.
            self._export_traces(spans)
            if self._store_supports_log_spans:
                self._export_spans_incrementally(spans)

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
            spans_so_far = [*self._taken_back(trace_id), *some, *_live.light_inside(some)]
            part = _Part(experiment_id, spans_so_far, workspace)
            self._parts[trace_id] = _outbox.post_together(self._write_parts, part, _SOON)

    def _taken_back(self, trace_id: str) -> list[Span]:
        parcel = self._parts.pop(trace_id, None)
        part = None if parcel is None else _outbox.take_back(parcel)
        return [] if part is None else part.spans

    def _log_trace(
        self, trace: Trace, prompts: Sequence[Any], workspace: str | None = None
    ) -> None:
        self._taken_back(trace.info.trace_id)
        parcel = _outbox.post_together(self._write_traces, _Whole(trace, prompts, workspace))
        self._wholes[trace.info.trace_id] = parcel
        if not super()._should_log_async():
            _outbox.wait_for(parcel)

    def _write_parts(self, parts: list[_Part]) -> None:
        with at_store(self._client):
            for workspace, some in _grouped(parts, lambda part: part.workspace):
                with _within(workspace):
                    self._write_spans((part.experiment_id, part.spans) for part in some)

    def _write_traces(self, wholes: list[_Whole]) -> None:
        with at_store(self._client):
            for workspace, some in _grouped(wholes, lambda whole: whole.workspace):
                with _within(workspace):
                    self._write_whole(some)

    def _write_whole(self, wholes: list[_Whole]) -> None:
        """Write traces: what is known of each first, as that costs a store least, then spans."""
        early = [whole for whole in wholes if _outlasts(whole.trace)]
        self._write_spans(whole.spans for whole in early)
        for whole in wholes:
            self._start(whole.trace)
        self._write_spans(whole.spans for whole in wholes if whole not in early)
        for whole in wholes:
            self._write_rest(whole)

    def _start(self, trace: Trace) -> None:
        add_size_stats_to_trace_metadata(trace)
        store = self._client.store
        if type(store) is RestStore:
            told = Trace(trace.info, TraceData(spans=[])).to_proto()  # type: ignore[no-untyped-call]
            path = _V3_TRACE_REST_API_PATH_PREFIX
            body = message_to_json(StartTraceV3(trace=told))
            response = post(store, path, {"Content-Type": "application/json"}, body)
            if response.status_code != _NOT_FOUND:
                verify_rest_response(response, path)
                return
        self._client.start_trace(trace.info)  # which knows how to talk to older servers

    def _write_spans(self, parts: Iterable[tuple[str, list[Span]]]) -> None:
        for experiment_id, some in _grouped(parts, lambda part: part[0]):
            spans = [span for _, spans in some for span in spans]
            if spans and self._store_supports_log_spans:
                self._store_supports_log_spans = log_spans(self._client, experiment_id, spans)

    def _write_rest(self, whole: _Whole) -> None:
        trace, trace_id = whole.trace, whole.trace.info.trace_id
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


class _Whole(NamedTuple):
    """A trace that has ended."""

    trace: Trace
    prompts: Sequence[Any]
    workspace: str | None

    @property
    def spans(self) -> tuple[str, list[Span]]:
        """Where they belong, and all of its spans."""
        return str(self.trace.info.experiment_id), self.trace.data.spans


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


class _Batch:
    """Ended spans, on their way to the exporter.

    In place of OpenTelemetry's processor, which MLflow has wake a thread every five spans, and
    which forgets spans, and with them whole traces, when there are many.
    """

    def __init__(self, exporter: Any) -> None:
        self._exporter = exporter
        self._spans: deque[Any] = deque()
        self._exporting = threading.Lock()
        self._has_some = threading.Event()
        self._has_many = threading.Event()
        self._is_over = False
        self._process = 0

    def on_end(self, span: Any) -> None:
        self._spans.append(span)
        if self._process != os.getpid():
            self._start()
        if not self._has_some.is_set():
            self._has_some.set()
        elif len(self._spans) == _MANY:
            self._has_many.set()

    def force_flush(self, timeout_millis: float = 0) -> bool:
        with self._exporting:
            self._has_many.clear()
            spans = [self._spans.popleft() for _ in range(len(self._spans))]
            if spans:
                self._exporter.export(spans)
        return True

    def shutdown(self) -> None:
        self.force_flush()
        self._is_over = True
        self._has_some.set()

    def _start(self) -> None:
        """Start the thread, in a forked child its own, with nothing of the parent's."""
        is_child = self._process != 0
        self._process = os.getpid()
        if is_child:
            last = self._spans.pop()
            self.__init__(self._exporter)  # type: ignore[misc]
            self._process = os.getpid()
            self._spans.append(last)
        with contextlib.suppress(RuntimeError):  # too late for threads: the last flush exports
            _threads.start("export", self._run)

    def _run(self) -> None:
        while not self._is_over:
            self._has_some.wait()
            self._has_many.wait(_COLLECT)
            self._has_some.clear()
            with contextlib.suppress(Exception):  # MLflow's own errors; it logs what it can tell
                self.force_flush()


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
        before, processor._batch_delegate = processor._batch_delegate, _Batch(exporter)
        before.force_flush()
    exporter.__class__ = _Exporter
    _outbox.start()


def is_alone() -> bool:
    """Whether MLflow's present exporter writes by way of the outbox, and nobody sees spans before.

    Others are another processor of OpenTelemetry's, and MLflow's own span processors.
    """
    active = getattr(provider.get(), "_active_span_processor", None)
    processors: Sequence[Any] = getattr(active, "_span_processors", ())
    if len(processors) != 1 or get_config().span_processors:
        return False
    return type(getattr(processors[0], "span_exporter", None)) is _Exporter


def is_adopted() -> bool:
    """Whether MLflow's present exporter writes by way of the outbox."""
    return type(_get_trace_exporter()) is _Exporter  # type: ignore[no-untyped-call]


@contextlib.contextmanager
def kept(trace_id: str) -> Iterator[Any]:
    """Enter to have a trace that has ended, and its spans, before it is written.

    Nobody writes it meanwhile; None if it is written, or just being so.
    """
    exporter: Any = _get_trace_exporter()  # type: ignore[no-untyped-call]
    parcel = exporter._wholes.get(trace_id) if type(exporter) is _Exporter else None
    if parcel is None:
        yield None
        return
    with _outbox.waiting(parcel) as whole:
        yield None if whole is None else whole.trace


def is_being_written(trace_id: str) -> bool:
    """Whether a trace that has ended is not yet written as a whole."""
    exporter: Any = _get_trace_exporter()  # type: ignore[no-untyped-call]
    parcel = exporter._wholes.get(trace_id) if type(exporter) is _Exporter else None
    return parcel is not None and not parcel.written.is_set()


def post(store: RestStore, path: str, headers: dict[str, str], body: bytes | str) -> Response:
    """Post to an MLflow server, once: MLflow would try again for minutes.

    Raises:
        ConnectionError: If nobody has answered.
    """
    try:
        return http_request(  # type: ignore[no-any-return, no-untyped-call]
            host_creds=store.get_host_creds(),
            endpoint=path,
            method="POST",
            max_retries=0,
            raise_on_status=False,
            extra_headers=headers,
            data=body,
        )
    except MlflowException as error:
        raise ConnectionError(str(error)) from error


def log_spans(client: TracingClient, experiment_id: str, spans: list[Span]) -> bool:
    """Write spans to the store; it does no harm if they are there already.

    Returns:
        False for a store that takes whole traces only.
    """
    try:
        client.log_spans(experiment_id, spans)
    except NotImplementedError as error:
        if "server version" in str(error) and "less than" not in str(error):
            # The server did not say its version, and MLflow would never ask again.
            type(client.store)._get_server_version.cache_clear()
            raise ConnectionError("MLflow's server does not answer") from None
        return False
    except MlflowException as error:
        if "REST OTLP span logging is not supported" in str(error):
            return False
        raise
    return True


def stored(client: TracingClient, trace_id: str) -> TraceInfo | None:
    """The stored trace's info, once MLflow's own late write of it is over; None before."""
    try:
        info = client.store.get_trace_info(trace_id)
    except MlflowException as error:
        if error.error_code in ("RESOURCE_DOES_NOT_EXIST", "NOT_FOUND"):
            return None
        raise
    # Until then that write would overwrite newer values of the same tags. Stores that do not
    # say so are recognised by the state, which a started trace gets with the same write.
    if _FINALIZED in info.trace_metadata:
        return (info.trace_metadata[_FINALIZED] == "true" and info) or None
    return info if info.state.value != "IN_PROGRESS" else None


@contextlib.contextmanager
def at_store(client: TracingClient) -> Iterator[None]:
    """What is written inside fails soon if there is no server, and for good if it is refused.

    MLflow's requests would try for minutes.

    Raises:
        Refused: If the store will never take it.
        OSError: If nobody listens at the server's address.
    """
    uri = str(client.tracking_uri)
    if time.monotonic() - _seen.get(uri, float("-inf")) > _STILL_THERE:
        _connect(uri)
    try:
        yield
    except MlflowException as error:
        if error.error_code in _FINAL:
            raise _outbox.Refused(str(error)) from error
        _seen.pop(uri, None)
        raise
    except Exception:
        _seen.pop(uri, None)
        raise
    _seen[uri] = time.monotonic()


def _connect(uri: str) -> None:
    address = urllib.parse.urlsplit(uri)
    if address.scheme not in ("http", "https") or address.hostname is None:
        return
    if address.scheme in urllib.request.getproxies() and not urllib.request.proxy_bypass(
        address.hostname
    ):
        return  # the proxy's answer will tell
    port = address.port or (443 if address.scheme == "https" else 80)
    with socket.create_connection((address.hostname, port), _CONNECT):
        pass


_was_forked = False


def _after_fork() -> None:
    """What the parent's threads held is free here, and its connections stay the parent's."""
    global _was_forked
    _was_forked = True
    _seen.clear()
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
