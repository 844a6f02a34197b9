"""MLflow's exporter, made to write by way of the outbox.

MLflow's own drops a trace when its queue of 1,000 is full or its server has been away for some
time, and holds up the end of the process for minutes. What is exported, and how it is written,
stays MLflow's. The only room that leans on the names of its exporter and stores.

Source: ``mlflow.tracing.export.mlflow_v3`` of MLflow 3.15 to 3.17.
"""

from __future__ import annotations

import contextlib
import functools
import os
import socket
import sys
import threading
import time
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from mlflow.entities import Span, Trace, TraceInfo
from mlflow.exceptions import MlflowException
from mlflow.tracing.client import TracingClient
from mlflow.tracing.export.async_export_queue import AsyncTraceExportQueue
from mlflow.tracing.export.mlflow_v3 import MlflowV3SpanExporter
from mlflow.tracing.export.utils import try_link_prompts_to_trace
from mlflow.tracing.provider import _get_span_processor, _get_trace_exporter
from mlflow.tracing.trace_manager import InMemoryTraceManager
from mlflow.tracing.utils import add_size_stats_to_trace_metadata
from mlflow.utils.workspace_context import ServerWorkspaceContext

from tlm_tracing import _outbox

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

_seen: dict[str, float] = {}


class _Exporter(MlflowV3SpanExporter):
    """MLflow's exporter, but for when it writes.

    MLflow's exporter objects become one of these: single inheritance, as for clients.
    """

    def export(self, spans: Any) -> Any:
        with _outbox.busy():  # it looks for IPython each time
            return super().export(spans)

    def _should_log_async(self) -> bool:
        return False  # so that what is to be written comes here, not into MLflow's queue

    def _log_spans(
        self, experiment_id: str, spans: list[Span], workspace: str | None = None
    ) -> None:
        self._post(functools.partial(self._write_spans, experiment_id, spans), workspace)

    def _log_trace(
        self, trace: Trace, prompts: Sequence[Any], workspace: str | None = None
    ) -> None:
        self._post(functools.partial(self._write_trace, trace, prompts), workspace)

    def _post(self, write: Callable[[], None], workspace: str | None) -> None:
        def in_workspace() -> bool:
            within = ServerWorkspaceContext(workspace) if workspace else contextlib.nullcontext()
            with within, at_store(self._client):
                write()
            return True

        parcel = _outbox.post(in_workspace)
        if not super()._should_log_async():
            _outbox.wait_for(parcel)

    def _write_spans(self, experiment_id: str, spans: list[Span]) -> None:
        if self._store_supports_log_spans:
            self._store_supports_log_spans = log_spans(self._client, experiment_id, spans)

    def _write_trace(self, trace: Trace, prompts: Sequence[Any]) -> None:
        add_size_stats_to_trace_metadata(trace)
        stored = self._client.start_trace(trace.info)
        if self._should_log_spans_to_artifacts(stored):
            self._client._upload_trace_data(stored, trace.data)
        attachments: dict[str, Any] = {}
        for span in trace.data.spans:
            attachments.update(getattr(span, "_attachments", None) or {})
        if attachments:
            self._client._upload_attachments(stored, attachments)
        try_link_prompts_to_trace(
            client=self._client, trace_id=trace.info.trace_id, prompts=prompts, synchronous=True
        )


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
    exporter.__class__ = _Exporter
    _outbox.start()


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
