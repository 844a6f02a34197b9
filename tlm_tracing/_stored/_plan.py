"""Plan: what a run over stored traces is asked to do, checked before it begins."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Set
from dataclasses import dataclass, replace
from typing import Any

from mlflow.entities import Trace, TraceInfo
from mlflow.tracing.client import TracingClient

from tlm_tracing import _asking, _config
from tlm_tracing._annotate import STATUS_TAG
from tlm_tracing._config import Config
from tlm_tracing._stored import _search
from tlm_tracing._stored._rows import Progress
from tlm_tracing.exceptions import ConfigurationError, ScoringError

# Those without any status first; the others may lack the score of some call.
_UNSCORED = (
    f"tag.{STATUS_TAG} IS NULL",
    f"tag.{STATUS_TAG} = 'unscored'",
    f"tag.{STATUS_TAG} = 'partial'",
)
_EVERYTHING = (None,)
# Nobody waits for the single score, and a server may take more than 32 in 0.2 s.
_MAX_CONCURRENCY = 64


@dataclass(frozen=True)
class Plan:
    """What is to be done.

    Attributes:
        client: MLflow's client for the store in force.
        query: Which traces are meant.
        given: The traces, or their ids, if they were given; then nothing is searched for.
        config: The settings in force.
        limit: The most traces of which something is sent to the scorer.
        rescore: Whether what has a score is scored again.
        dry_run: Whether nothing is sent and nothing written.
        assessments: Whether assessments are written beside tags and spans.
        tell: Told how far it is.
    """

    client: TracingClient
    query: _search.Query
    given: tuple[Trace | str, ...] | None
    config: Config
    limit: int | None
    rescore: bool
    dry_run: bool
    assessments: bool
    tell: Callable[[Progress], object] | None

    def chunks(self, done: Set[str]) -> Iterator[list[Trace | TraceInfo]]:
        """The traces, some at a time; of those that can't be read (yet), what is told of them.

        Args:
            done: Ids of those that were left without a score meanwhile, not to be read again.
        """
        if self.given is not None:
            yield from self._chunks_of_given(self.given)
            return
        for wanted in _EVERYTHING if self.rescore else _UNSCORED:
            for infos in _search.newest_first(self.client, self.query, extra_filter=wanted):
                new = [info for info in infos if info.trace_id not in done]
                for start in range(0, len(new), _search.BATCH):
                    yield self._read(new[start : start + _search.BATCH])

    def count(self) -> int:
        """How many traces there are."""
        if self.given is not None:
            return len(self.given)
        return sum(
            len(infos)
            for wanted in (_EVERYTHING if self.rescore else _UNSCORED)
            for infos in _search.pages(self.client, self.query, extra_filter=wanted)
        )

    def _chunks_of_given(self, given: tuple[Trace | str, ...]) -> Iterator[list[Trace | TraceInfo]]:
        for start in range(0, len(given), _search.BATCH):
            some = given[start : start + _search.BATCH]
            whole = [one for one in some if isinstance(one, Trace) and _is_whole(one)]
            ids = {one if isinstance(one, str) else one.info.trace_id: None for one in some}
            for trace in whole:
                ids.pop(trace.info.trace_id, None)
            infos = [self.client.store.get_trace_info(trace_id) for trace_id in ids]
            yield [*whole, *self._read(infos)]

    def _read(self, infos: list[TraceInfo]) -> list[Trace | TraceInfo]:
        final = [info for info in infos if _search.is_final(info)]
        traces = _search.traces(self.client, final)
        whole = {trace.info.trace_id for trace in traces}
        return [*traces, *(info for info in infos if info.trace_id not in whole)]


def plan(
    experiment_ids: Iterable[str | int] | str | int | None = None,
    experiment_names: Iterable[str] | str | None = None,
    filter_string: str | None = None,
    traces: Any = None,
    since: _search.Moment = None,
    until: _search.Moment = None,
    limit: int | None = None,
    rescore: bool = False,
    dry_run: bool = False,
    progress: Callable[[Progress], object] | None = None,
    *,
    shard: tuple[int, int] | str | None = None,
    assessments: bool = True,
    **settings: Any,
) -> Plan:
    """Check what a user has asked for; the arguments are those of ``score_traces``.

    Raises:
        ConfigurationError: If it can't be done.
    """
    if limit is not None and (isinstance(limit, bool) or not isinstance(limit, int) or limit < 1):
        raise ConfigurationError(f"limit must be a whole number of at least 1, not {limit!r}.")
    if progress is not None and not callable(progress):
        raise ConfigurationError("progress must be a callable or None.")
    searched = (experiment_ids, experiment_names, filter_string, since, until)
    if traces is not None and any(one is not None for one in searched):
        raise ConfigurationError("Give either traces, or what to search for in MLflow, not both.")
    query = _search.query(experiment_ids, experiment_names, filter_string, since, until, shard)
    return Plan(
        client=TracingClient(),
        query=query,
        given=None if traces is None else _once(_given(traces), query),
        config=_settings(settings, dry_run=dry_run),
        limit=limit,
        rescore=rescore,
        dry_run=dry_run,
        assessments=assessments,
        tell=progress,
    )


def _settings(given: Mapping[str, Any], *, dry_run: bool) -> Config:
    _config.check(given)
    # What the application does with its own calls says nothing about those that are stored.
    config = replace(_config.resolve(given), mode="background", on_error="pass")
    if not _config.is_set("max_concurrency", given):
        config = replace(config, max_concurrency=_MAX_CONCURRENCY)
    if config.scorer is None and dry_run:
        config = replace(config, scorer="hosted")  # who is not asked
    if config.scorer is None:
        raise ConfigurationError(
            "There is no scorer. Set CLEANLAB_TLM_API_KEY (a key is to be had at "
            "https://tlm.cleanlab.ai), or give one: scorer=... with a function "
            "(request, completion) -> score. dry_run=True needs none."
        )
    if config.max_scores_per_minute == 0:
        raise ConfigurationError(
            "max_scores_per_minute is 0, so nothing could be scored; dry_run=True tells what "
            "would be."
        )
    if not config.enabled:
        raise ConfigurationError("tlm_tracing is switched off: TLM_TRACING_ENABLED is false.")
    if not dry_run:
        try:
            _asking.scorer(config)  # a key that can't work is told now, not call by call
        except ScoringError as error:
            raise ConfigurationError(str(error)) from error
    return config


def _given(traces: Any) -> Iterator[Trace | str]:
    """The traces that a user means by a frame, by traces or by their ids."""
    if hasattr(traces, "columns"):
        if "trace_id" not in traces.columns:
            raise ConfigurationError(
                "traces is a frame without the column trace_id; mlflow.search_traces gives one."
            )
        traces = dict.fromkeys(traces["trace_id"])
    if isinstance(traces, (str, Trace, TraceInfo)):
        traces = [traces]
    if not isinstance(traces, Iterable):
        raise _no_trace(traces)
    for one in traces:
        if isinstance(one, TraceInfo):
            yield one.trace_id
        elif isinstance(one, (str, Trace)):
            yield one
        else:
            raise _no_trace(one)


def _once(traces: Iterable[Trace | str], query: _search.Query) -> tuple[Trace | str, ...]:
    """Each of those in this part, however often it was given."""
    by_id = {one if isinstance(one, str) else one.info.trace_id: one for one in traces}
    return tuple(one for trace_id, one in by_id.items() if query.has(trace_id))


def _is_whole(trace: Trace) -> bool:
    return bool(trace.data.spans) and _search.is_final(trace.info)


def _no_trace(value: object) -> ConfigurationError:
    return ConfigurationError(
        f"traces must be a frame of mlflow.search_traces, traces, or trace ids, not {value!r:.100}."
    )
