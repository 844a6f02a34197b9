"""MLflow's tracking store: what is asked of it and written to it, and how it may fail.

Source: ``mlflow.store.tracking`` of MLflow 3.15 to 3.17.
"""

from __future__ import annotations

import contextlib
import os
import socket
import time
import urllib.parse
import urllib.request
from collections.abc import Iterator
from typing import Any

from mlflow.entities import Span, TraceInfo
from mlflow.exceptions import MlflowException
from mlflow.store.tracking.rest_store import RestStore
from mlflow.tracing.client import TracingClient
from mlflow.tracing.utils.otlp import (
    MLFLOW_EXPERIMENT_ID_HEADER,
    OTLP_TRACES_PATH,
    resource_to_otel_proto,
)
from mlflow.utils.rest_utils import http_request, verify_rest_response
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from requests import Response

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

# What a server, or a gateway before it, answers where it takes no spans.
_NO_SUCH_ROAD = frozenset({404, 405, 501})

_FINALIZED = "mlflow.trace.infoFinalized"

_seen: dict[str, float] = {}


def post(store: RestStore, path: str, headers: dict[str, str], body: bytes | str) -> Response:
    """Post to an MLflow server, once: MLflow would try again for minutes.

    Raises:
        ConnectionError: If nobody has answered.
    """
    server = store.get_host_creds()
    if str(server.host).startswith("http:"):
        # MLflow's server with several workers answers 44 ms late on connections that are kept:
        # its sockets wait for the client's acknowledgement between head and body.
        headers = {**headers, "Connection": "close"}
    try:
        return http_request(  # type: ignore[no-any-return, no-untyped-call]
            host_creds=server,
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
    store = client.store
    if type(store) is RestStore:
        # Not by MLflow's client: after a second failure it would wait for seconds, with the rest.
        request = ExportTraceServiceRequest()
        part = request.resource_spans.add()
        resource: Any = getattr(spans[0]._span, "resource", None)
        part.resource.CopyFrom(resource_to_otel_proto(resource))
        part.scope_spans.add().spans.extend(span.to_otel_proto() for span in spans)
        return send_spans(store, experiment_id, request)
    try:
        client.log_spans(experiment_id, spans)
    except NotImplementedError:
        return False
    return True


def send_spans(store: RestStore, experiment_id: str, request: ExportTraceServiceRequest) -> bool:
    """Send spans to an MLflow server, by OpenTelemetry's protocol.

    Returns:
        False for a server, or a gateway before it, that takes no spans.
    """
    headers = {
        "Content-Type": "application/x-protobuf",
        MLFLOW_EXPERIMENT_ID_HEADER: experiment_id,
    }
    response = post(store, OTLP_TRACES_PATH, headers, request.SerializeToString())
    # With a code of MLflow's it is about these spans, such as an experiment that is gone.
    if response.status_code in _NO_SUCH_ROAD and "error_code" not in response.text:
        return False
    verify_rest_response(response, OTLP_TRACES_PATH)
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


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_seen.clear)
