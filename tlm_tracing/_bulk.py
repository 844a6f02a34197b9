"""What is added to traces that MLflow has stored already: many at a time, by the fastest road.

Spans and tags travel together, those of many traces in one request: OpenTelemetry's protocol
gives each trace a resource, whose attributes MLflow keeps as tags of the trace. Assessments have
a road of their own, one by one.

Source: OTLP, https://opentelemetry.io/docs/specs/otlp/; ``log_spans`` of MLflow's stores, 3.15 to
3.17.
"""

from __future__ import annotations

import copy
import logging
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any, Protocol, TypeAlias

from mlflow.entities import Feedback, Span, TraceInfo
from mlflow.exceptions import MlflowException
from mlflow.protos.service_pb2 import CreateAssessment
from mlflow.store.tracking.rest_store import RestStore
from mlflow.tracing.client import TracingClient
from mlflow.utils.proto_json_utils import message_to_json
from mlflow.utils.rest_utils import _V3_TRACE_REST_API_PATH_PREFIX, verify_rest_response
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.sdk.resources import Resource

from tlm_tracing import _tracking

Tags: TypeAlias = Mapping[str, str | None]

# A server's CPU is what limits them: more at once make it slower.
_AT_ONCE = 8
# What stores say of an assessment that is there already, among other things.
_MAY_BE_THERE = frozenset({"BAD_REQUEST", "INTERNAL_ERROR", "RESOURCE_ALREADY_EXISTS"})

_logger = logging.getLogger("tlm_tracing")


@dataclass(frozen=True)
class Addition:
    """What one stored trace gets.

    Attributes:
        info: The trace, as it was read.
        spans: Spans to be added, or to take the place of those with the same ids.
        tags: Tags to be set; None deletes.
        assessments: Those to be made, or updated if the trace has them by their id.
    """

    info: TraceInfo
    spans: Sequence[Span] = ()
    tags: Tags = field(default_factory=dict)
    assessments: Sequence[Feedback] = ()


def spans_are_in_store(info: TraceInfo) -> bool:
    """Whether a trace's spans are in the store itself, where others can be added to them.

    Of one whose spans are kept elsewhere, the store would then show those alone that were added.
    """
    return bool(info.tags.get("mlflow.trace.spansLocation") == "TRACKING_STORE")


class _Road(Protocol):
    """How a kind of store is written to.

    Attributes:
        AT_ONCE: How many assessments at the same time.
    """

    AT_ONCE: int

    def add(self, experiment_id: str, additions: Sequence[Addition]) -> None:
        """Write spans and tags of many traces; a tag that is None is left alone.

        Raises:
            NotImplementedError: If the store takes no spans.
        """

    def assess(self, feedback: Feedback) -> None:
        """Make an assessment; fails at once if it is there."""


class Store:
    """The store of a tracking URI, to be added to."""

    def __init__(self, client: TracingClient) -> None:
        """Nothing is written yet.

        Args:
            client: MLflow's client for the tracking URI.
        """
        self._client = client
        self._road = _road(client)
        self._is_proven = False
        self._takes_spans = True
        at_once = 1 if self._road is None else self._road.AT_ONCE
        self._pool = ThreadPoolExecutor(at_once, "tlm-tracing-assess")

    def write(self, additions: Sequence[Addition]) -> None:
        """Write all of it; it does no harm to write it again.

        The tags come last: who finds them can go by it that the rest is there.

        Args:
            additions: At most one for each trace.

        Raises:
            Refused: If the store will never take something of it.
            MlflowException, OSError: If the store can't be written now.
        """
        with _tracking.at_store(self._client):
            self._assess(additions)
            together = [one for one in additions if self._can_travel(one)]
            self._add(together)
            for one in additions:
                self._add_alone(one, is_rest=one in together)

    def has(self, info: TraceInfo) -> bool:
        """Whether a trace is still there."""
        try:
            self._client.store.get_trace_info(info.trace_id)
        except MlflowException as error:
            if error.error_code in ("NOT_FOUND", "RESOURCE_DOES_NOT_EXIST"):
                return False
            raise
        return True

    def close(self) -> None:
        """Let go of the threads."""
        self._pool.shutdown()

    def _assess(self, additions: Iterable[Addition]) -> None:
        wanted = [(one.info, feedback) for one in additions for feedback in one.assessments]
        for _ in self._pool.map(self._assess_one, *zip(*wanted, strict=True)) if wanted else ():
            pass

    def _assess_one(self, info: TraceInfo, feedback: Feedback) -> None:
        known = {item.assessment_id for item in info.assessments or ()}
        with _tracking.at_store(self._client):
            if feedback.assessment_id in known:
                self._update(feedback)
                return
            try:
                self._create(feedback)
            except MlflowException as error:
                # Somebody else has made it since, or we have and the answer got lost: to make it
                # again would be an error for ever.
                if error.error_code not in _MAY_BE_THERE or not self._has(feedback):
                    raise
                self._update(feedback)

    def _create(self, feedback: Feedback) -> None:
        if self._road is None:
            self._client.log_assessment(str(feedback.trace_id), feedback)
        else:
            self._road.assess(feedback)

    def _update(self, feedback: Feedback) -> None:
        if feedback.rationale is None:
            feedback = copy.copy(feedback)
            feedback.rationale = ""  # or that of the score before would stay
        self._client.update_assessment(
            str(feedback.trace_id), str(feedback.assessment_id), feedback
        )

    def _has(self, feedback: Feedback) -> bool:
        info = self._client.store.get_trace_info(str(feedback.trace_id))
        return any(item.assessment_id == feedback.assessment_id for item in info.assessments or ())

    def _can_travel(self, addition: Addition) -> bool:
        return self._road is not None and self._has_place_for_spans(addition)

    def _has_place_for_spans(self, addition: Addition) -> bool:
        return self._takes_spans and bool(addition.spans) and spans_are_in_store(addition.info)

    def _add(self, additions: Sequence[Addition]) -> None:
        if self._road is None or not additions:
            return
        try:
            for experiment_id, some in _by_experiment(additions):
                self._road.add(experiment_id, some)
        except NotImplementedError as error:
            is_news, self._takes_spans, self._is_proven = self._takes_spans, False, False
            if is_news:
                _logger.warning(
                    "MLflow's server takes no spans: %s. Tags and assessments tell the scores.",
                    error,
                )
            return
        if not self._is_proven:
            self._is_proven = self._have_arrived(additions[0])

    def _have_arrived(self, addition: Addition) -> bool:
        tags = self._client.store.get_trace_info(addition.info.trace_id).tags
        return all(tags.get(key) == tag for key, tag in addition.tags.items() if tag is not None)

    def _add_alone(self, addition: Addition, *, is_rest: bool) -> None:
        """By MLflow's own calls, one after the other: what has not travelled together."""
        trace_id = addition.info.trace_id
        if not is_rest and self._has_place_for_spans(addition):
            _tracking.log_spans(
                self._client, str(addition.info.experiment_id), list(addition.spans)
            )
        for key, tag in addition.tags.items():
            if tag is None and key in addition.info.tags:
                self._client.delete_trace_tag(trace_id, key)
            elif tag is not None and not (is_rest and self._is_proven):
                self._client.set_trace_tag(trace_id, key, tag)


class _Server:
    """An MLflow server, by HTTP."""

    AT_ONCE = _AT_ONCE

    def __init__(self, store: RestStore) -> None:
        self._store = store

    def add(self, experiment_id: str, additions: Sequence[Addition]) -> None:
        request = ExportTraceServiceRequest()
        for addition in additions:
            part = request.resource_spans.add()
            for key, tag in _set(addition.tags):
                attribute = part.resource.attributes.add()
                attribute.key = key
                attribute.value.string_value = tag
            part.scope_spans.add().spans.extend(span.to_otel_proto() for span in addition.spans)
        if not _tracking.send_spans(self._store, experiment_id, request):
            raise NotImplementedError("it has no endpoint for them")

    def assess(self, feedback: Feedback) -> None:
        told: Any = feedback.to_proto()  # type: ignore[no-untyped-call]
        body = message_to_json(CreateAssessment(assessment=told))
        path = f"{_V3_TRACE_REST_API_PATH_PREFIX}/{feedback.trace_id}/assessments"
        headers = {"Content-Type": "application/json"}
        verify_rest_response(_tracking.post(self._store, path, headers, body), path)


class _Database:
    """A database, without a server."""

    AT_ONCE = 1  # SQLite has one writer; threads would wait for its lock

    def __init__(self, store: Any) -> None:
        self._store = store

    def add(self, experiment_id: str, additions: Sequence[Addition]) -> None:
        self._store.log_spans(experiment_id, list(_tagged(additions)))

    def assess(self, feedback: Feedback) -> None:
        self._store.create_assessment(feedback)


def _road(client: TracingClient) -> _Road | None:
    """The fast road to a store; None if only MLflow's own calls lead there."""
    store = client.store
    if type(store) is RestStore:
        return _Server(store)
    module: Any = sys.modules.get("mlflow.store.tracking.sqlalchemy_store")
    is_database = module is not None and isinstance(store, module.SqlAlchemyStore)
    return _Database(store) if is_database else None


def _by_experiment(additions: Sequence[Addition]) -> Iterator[tuple[str, list[Addition]]]:
    def experiment(addition: Addition) -> str:
        return str(addition.info.experiment_id)

    for experiment_id, some in groupby(sorted(additions, key=experiment), experiment):
        yield experiment_id, list(some)


def _set(tags: Tags) -> Iterator[tuple[str, str]]:
    return ((key, tag) for key, tag in tags.items() if tag is not None)


def _tagged(additions: Iterable[Addition]) -> Iterator[Span]:
    for addition in additions:
        resource = Resource(dict(_set(addition.tags)))
        for span in addition.spans:
            span._span._resource = resource
            yield span
