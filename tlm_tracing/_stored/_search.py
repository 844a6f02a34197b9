"""Search: which traces are meant, and to read them from MLflow, page by page.

Source: MLflow's search syntax, https://mlflow.org/docs/latest/genai/tracing/search-traces/
"""

from __future__ import annotations

import math
import re
import time
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timedelta, timezone
from typing import Any, TypeAlias

from mlflow.entities import Trace, TraceInfo
from mlflow.exceptions import MlflowException
from mlflow.tracing.client import TracingClient
from mlflow.tracking.fluent import _get_experiment_id

from tlm_tracing import _outbox
from tlm_tracing._bulk import spans_are_in_store
from tlm_tracing.exceptions import ConfigurationError

Moment: TypeAlias = datetime | timedelta | str | float | None
"""A time: with or without a time zone (then the local one), how long ago, one of these as text
(``"24h"``, ``"2026-11-25T08:00"``), or seconds since 1970."""

# A server gives no more at once.
PAGE = 500
# Of whole traces: an answer of some megabytes.
BATCH = 50
_AGO = re.compile(r"(\d+(?:\.\d+)?)\s*([smhdw])")
_UNITS = {"s": 1, "m": 60, "h": 3_600, "d": 86_400, "w": 604_800}
_FINALIZED = "mlflow.trace.infoFinalized"
_SIZE = "mlflow.trace.sizeStats"
# Seconds within which a client writes both, a trace and its spans.
_LATE_WRITE = 60.0
# How long a search waits for what this process itself has recorded.
_OWN = 10.0
_NEWEST_FIRST = ["timestamp_ms DESC"]


@dataclass(frozen=True)
class Query:
    """Which traces are meant.

    Attributes:
        experiment_ids: Where to search.
        filter_string: A filter of MLflow's; None for all.
        since_ms: The earliest time at which they began, in milliseconds since 1970.
        until_ms: The latest.
        shard: Only these of so many parts, by trace id: ``(2, 8)`` is the third of eight.
    """

    experiment_ids: tuple[str, ...]
    filter_string: str | None = None
    since_ms: int | None = None
    until_ms: int | None = None
    shard: tuple[int, int] | None = None

    def has(self, trace_id: str) -> bool:
        """Whether a trace is in this part."""
        if self.shard is None:
            return True
        part, parts = self.shard
        return zlib.crc32(trace_id.encode()) % parts == part

    def filter(self, *others: str | None) -> str | None:
        """All of it as one filter of MLflow's."""
        bounds = (
            None if self.since_ms is None else f"timestamp_ms >= {self.since_ms}",
            None if self.until_ms is None else f"timestamp_ms <= {self.until_ms}",
        )
        return " AND ".join(one for one in (self.filter_string, *bounds, *others) if one) or None


def query(
    experiment_ids: Iterable[str | int] | str | int | None = None,
    experiment_names: Iterable[str] | str | None = None,
    filter_string: str | None = None,
    since: Moment = None,
    until: Moment = None,
    shard: tuple[int, int] | str | None = None,
) -> Query:
    """Check and read what a user has asked for.

    What this process itself has recorded is written first, so that it is found.

    Args:
        experiment_ids: Where to search.
        experiment_names: The same by name. Without both, the active experiment.
        filter_string: A filter of MLflow's, such as ``"trace.status = 'OK'"``.
        since: The earliest time at which a trace began.
        until: The latest.
        shard: Which part of how many, from 1 on: ``(3, 8)`` or ``"3/8"``.

    Raises:
        ConfigurationError: If something of it can't be understood, or there is no such experiment.
    """
    found = [str(one) for one in _several(experiment_ids)]
    found += [_by_name(name) for name in _several(experiment_names)]
    if not found and (experiment_ids, experiment_names) != (None, None):
        raise ConfigurationError(
            "The list of experiments is empty; without any list, the active experiment is meant."
        )
    _outbox.flush(_OWN)
    return Query(
        tuple(dict.fromkeys(found)) or (_active(),),
        (filter_string or "").strip() or None,
        _milliseconds("since", since),
        _milliseconds("until", until),
        None if shard is None else _shard(shard),
    )


def pages(
    client: TracingClient,
    asked: Query,
    *,
    extra_filter: str | None = None,
    order_by: Sequence[str] = tuple(_NEWEST_FIRST),
    page: int = PAGE,
) -> Iterator[list[TraceInfo]]:
    """What MLflow tells of the traces, without their spans.

    Args:
        client: Where to search.
        asked: Which traces.
        extra_filter: Another filter that they have to pass.
        order_by: As for ``mlflow.search_traces``.
        page: How many at a time.

    Yields:
        Some traces' infos.

    Raises:
        ConfigurationError: If MLflow does not understand the filter.
    """
    token: str | None = None
    while True:
        found, token = _found(client, asked, asked.filter(extra_filter), order_by, page, token)
        yield [info for info in found if asked.has(info.trace_id)]
        if not token:
            return


def newest_first(
    client: TracingClient, asked: Query, *, extra_filter: str | None = None, page: int = PAGE
) -> Iterator[list[TraceInfo]]:
    """The same, while what was found is changed so that the filter does not find it any more.

    Goes by time: MLflow's own pages go by number, and would leave out as many as have gone.
    """
    at_edge: set[str] = set()
    while True:
        found, token = _found(client, asked, asked.filter(extra_filter), _NEWEST_FIRST, page, None)
        fresh = [info for info in found if info.trace_id not in at_edge]
        if token and found[0].timestamp_ms == found[-1].timestamp_ms:
            more, token = _rest_of_the_moment(client, asked, extra_filter, page, token)
            fresh += [info for info in more if info.trace_id not in at_edge]
        yield [info for info in fresh if asked.has(info.trace_id)]
        if not token:
            return
        edge = min(info.timestamp_ms for info in (*found, *fresh))
        at_edge = {info.trace_id for info in (*found, *fresh) if info.timestamp_ms == edge}
        asked = replace(asked, until_ms=edge)


def traces(client: TracingClient, infos: Sequence[TraceInfo]) -> list[Trace]:
    """The whole traces, with their spans, in bulk where the store has them.

    What has gone meanwhile, or can't be read, is missing.
    """
    in_store = [info.trace_id for info in infos if spans_are_in_store(info)]
    elsewhere = [info.trace_id for info in infos if not spans_are_in_store(info)]
    found: list[Trace] = []
    for start in range(0, len(in_store), BATCH):
        found += _batch(client, in_store[start : start + BATCH])
    return found + _one_by_one(client, elsewhere)


def is_final(info: TraceInfo) -> bool:
    """Whether a trace has ended, and a client is through with what is told of it.

    MLflow's client writes spans first, then the trace, which takes the place of tags and
    assessments that it has got between the two. Our own writes spans last.
    """
    if info.state.value == "IN_PROGRESS":
        return False
    if info.trace_metadata.get(_FINALIZED) == "true" or _SIZE in info.trace_metadata:
        return True
    # Nothing tells so of those that came by OpenTelemetry's protocol, or are with older servers.
    return not is_new(info)


def is_new(info: TraceInfo) -> bool:
    """Whether a trace has ended so lately that a client may be at work on it."""
    ended = (info.timestamp_ms + (info.execution_duration or 0)) / 1_000
    return time.time() - ended <= _LATE_WRITE


def _found(
    client: TracingClient,
    asked: Query,
    filter_string: str | None,
    order_by: Sequence[str],
    page: int,
    token: str | None,
) -> tuple[list[TraceInfo], str | None]:
    try:
        found = client.search_traces(
            locations=list(asked.experiment_ids),
            filter_string=filter_string,
            max_results=page,
            order_by=list(order_by),
            page_token=token,
            include_spans=False,
        )
    except MlflowException as error:
        if error.error_code in ("INVALID_PARAMETER_VALUE", "BAD_REQUEST"):
            raise ConfigurationError(
                f"MLflow does not understand the filter {asked.filter_string!r}: {error.message}"
            ) from error
        raise
    return [trace.info for trace in found], found.token


def _rest_of_the_moment(
    client: TracingClient, asked: Query, extra_filter: str | None, page: int, token: str | None
) -> tuple[list[TraceInfo], str | None]:
    """When more traces began in the same millisecond than fit on a page: the other pages.

    Up to the first that has an older trace; None in place of a token if there is none.
    """
    rest: list[TraceInfo] = []
    while token:
        found, token = _found(client, asked, asked.filter(extra_filter), _NEWEST_FIRST, page, token)
        rest += found
        if found and found[-1].timestamp_ms != rest[0].timestamp_ms:
            break
    return rest, token


def _batch(client: TracingClient, trace_ids: list[str]) -> list[Trace]:
    try:
        return list(client.store.batch_get_traces(trace_ids))
    except (MlflowException, NotImplementedError) as error:
        if isinstance(error, MlflowException) and error.error_code not in (
            "ENDPOINT_NOT_FOUND",
            "NOT_IMPLEMENTED",
            "NOT_FOUND",
        ):
            raise
        return _one_by_one(client, trace_ids)  # an older server


def _one_by_one(client: TracingClient, trace_ids: list[str]) -> list[Trace]:
    found = (_one(client, trace_id) for trace_id in trace_ids)
    return [trace for trace in found if trace is not None]


def _one(client: TracingClient, trace_id: str) -> Trace | None:
    try:
        return client.get_trace(trace_id)
    except MlflowException as error:
        if error.error_code in ("BAD_REQUEST", "NOT_FOUND", "RESOURCE_DOES_NOT_EXIST"):
            return None  # it has gone, or its spans were never written
        raise


def _several(value: Any) -> list[Any]:
    if value is None:
        return []
    return [value] if isinstance(value, (str, int)) else list(value)


def _by_name(name: str) -> str:
    experiment = TracingClient().store.get_experiment_by_name(name)
    if experiment is None:
        raise ConfigurationError(
            f"MLflow has no experiment {name!r}. Check the name, and that the tracking URI is "
            "that of the application."
        )
    return str(experiment.experiment_id)


def _active() -> str:
    return str(_get_experiment_id())


def _shard(shard: tuple[int, int] | str) -> tuple[int, int]:
    try:
        part, parts = (int(one) for one in (shard.split("/") if isinstance(shard, str) else shard))
    except (TypeError, ValueError):
        part, parts = 0, 0
    if not 1 <= part <= parts:
        raise ConfigurationError(
            f"shard must be which part of how many, such as 3/8 or (3, 8), not {shard!r}."
        )
    return part - 1, parts


def _milliseconds(name: str, moment: Moment) -> int | None:
    if moment is None:
        return None
    try:
        return math.floor(_seconds(moment) * 1_000)
    except (TypeError, ValueError, OverflowError):
        raise ConfigurationError(
            f"{name} must be a datetime, how long ago (a timedelta, or text such as 24h, 7d, "
            f"90m), ISO 8601 such as 2026-11-25T08:00, or seconds since 1970, not {moment!r}."
        ) from None


def _seconds(moment: datetime | timedelta | str | float) -> float:
    if isinstance(moment, datetime):
        return moment.timestamp()
    if isinstance(moment, timedelta):
        return (datetime.now(timezone.utc) - moment).timestamp()
    if isinstance(moment, str):
        if found := _AGO.fullmatch(moment.strip().lower()):
            return _seconds(timedelta(seconds=float(found[1]) * _UNITS[found[2]]))
        return datetime.fromisoformat(moment.strip().replace("Z", "+00:00")).timestamp()
    if isinstance(moment, bool) or not math.isfinite(moment):
        raise ValueError
    return float(moment)
