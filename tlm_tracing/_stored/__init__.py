"""Stored traces: what MLflow has already is found, scored and annotated like a live call."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

from tlm_tracing._stored._plan import plan
from tlm_tracing._stored._rows import Progress, ScoredCall, frame
from tlm_tracing._stored._run import Run
from tlm_tracing._stored._search import Moment

if TYPE_CHECKING:
    import pandas as pd

P = ParamSpec("P")
T = TypeVar("T")

__all__ = [
    "Progress",
    "ScoredCall",
    "aiter_scores",
    "ascore_traces",
    "iter_scores",
    "score_traces",
]


def score_traces(
    experiment_ids: Iterable[str | int] | str | int | None = None,
    experiment_names: Iterable[str] | str | None = None,
    filter_string: str | None = None,
    traces: Any = None,
    since: Moment = None,
    until: Moment = None,
    limit: int | None = None,
    rescore: bool = False,
    dry_run: bool = False,
    progress: Callable[[Progress], object] | None = None,
    *,
    shard: tuple[int, int] | str | None = None,
    assessments: bool = True,
    **settings: Any,
) -> pd.DataFrame:
    """Score traces that MLflow has stored, and write the scores back.

    Every LLM call is found in traces of ours, of ``mlflow.openai.autolog()`` and of MLflow's
    other integrations. Its trace gets the same tags and assessment as a live call, and the
    scoring span where the store takes one. What has a score is left alone, so a run that was
    stopped, or killed, goes on where it was; the newest traces come first. Traces of this process
    that are still to be written are waited for, up to 10 seconds.

    Args:
        experiment_ids: Where to search.
        experiment_names: The same by name. Without both, the active experiment.
        filter_string: A filter of MLflow's, such as ``"tag.env = 'production'"``.
        traces: These traces in place of a search: a frame of ``mlflow.search_traces``, traces,
            or their ids.
        since: The earliest time at which a trace began: a ``datetime``, how long ago (a
            ``timedelta``, or text such as ``"24h"``, ``"7d"``), ISO 8601, or seconds since 1970.
        until: The latest.
        limit: The most traces of which something is sent to the scorer.
        rescore: Whether calls that have a score get a new one in its place.
        dry_run: Whether to tell only what would be scored: nothing is sent, nothing written.
        progress: Told about twice a second how far it is.
        shard: Which part of how many, for several workers, from 1 on: ``(3, 8)`` or ``"3/8"``.
        assessments: Whether each call gets its assessment, for which MLflow has the slowest
            road; without, tags and scoring span are all.
        **settings: Any of :class:`~tlm_tracing.Config`'s fields. ``max_scores_per_minute`` is
            kept by waiting; ``max_concurrency`` is 64 unless it is set anywhere. ``mode``,
            ``threshold``, ``on_low`` and ``on_error`` have no meaning here.

    Returns:
        One row for each call that was looked at, the least trustworthy first, with the columns
        ``trace_id``, ``span_id``, ``timestamp``, ``prompt``, ``response``, ``trust_score``,
        ``explanation``, ``status``, ``reason`` (see :class:`ScoredCall`). Merges with a frame of
        ``mlflow.search_traces`` by ``trace_id``.

    Raises:
        ConfigurationError: If it can't be done as asked for.
        TLMTracingError: If the store does not take the scores. What is written already stays.
        MlflowException: If the traces can't be read.
    """
    rows = iter_scores(
        experiment_ids,
        experiment_names,
        filter_string,
        traces,
        since,
        until,
        limit,
        rescore,
        dry_run,
        progress,
        shard=shard,
        assessments=assessments,
        **settings,
    )
    return frame(rows)


def _as_asked_by(_: Callable[P, Any]) -> Callable[[Callable[..., T]], Callable[P, T]]:
    """For a function that takes the same arguments as another."""

    def decorate(function: Callable[..., T]) -> Callable[P, T]:
        function.__signature__ = inspect.signature(score_traces)  # type: ignore[attr-defined]
        return function

    return decorate


@_as_asked_by(score_traces)
def iter_scores(*args: Any, **kwargs: Any) -> Iterator[ScoredCall]:
    """Same as :func:`score_traces`, but gives each call as it is written; memory stays flat.

    Who stops early, or is interrupted, waits for what has been sent, and finds it written.

    Returns:
        An iterator of :class:`ScoredCall`, in no order.
    """
    return _rows(Run(plan(*args, **kwargs)))  # so that a fault is told here, not at the first row


@_as_asked_by(score_traces)
async def ascore_traces(*args: Any, **kwargs: Any) -> pd.DataFrame:
    """Same as :func:`score_traces`, but the event loop goes on meanwhile."""
    return frame([row async for row in aiter_scores(*args, **kwargs)])


@_as_asked_by(score_traces)
async def aiter_scores(*args: Any, **kwargs: Any) -> AsyncIterator[ScoredCall]:
    """Same as :func:`iter_scores`, but the event loop goes on meanwhile."""
    run = Run(await asyncio.to_thread(lambda: plan(*args, **kwargs)))
    try:
        run.start()
        while (rows := await asyncio.to_thread(run.next)) is not None:
            for row in rows:
                yield row
    finally:
        await asyncio.shield(asyncio.to_thread(run.end))


def _rows(run: Run) -> Iterator[ScoredCall]:
    run.start()
    try:
        while (rows := run.next()) is not None:
            yield from rows
    finally:
        run.end()
