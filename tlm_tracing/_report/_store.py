"""Store: rows from what MLflow has, page by page, with spans only where they are needed."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace

from mlflow.entities import Trace, TraceInfo
from mlflow.exceptions import MlflowException
from mlflow.tracing.client import TracingClient

from tlm_tracing import _redacted, _tracking
from tlm_tracing._annotate import SCORE_TAG
from tlm_tracing._report._calls import Call, calls, with_texts
from tlm_tracing._report._row import Row
from tlm_tracing._stored import _search

_MOST_EXPERIMENTS = 1000


class Store:
    """What a report reads from MLflow."""

    def __init__(self, reference: str | None = None) -> None:
        """Read from where MLflow's tracking URI points.

        Args:
            reference: The name of the expectation or feedback that tells what is right.
        """
        self._client = TracingClient()
        self._reference = reference
        self._name = functools.cache(self._experiment_name)

    @property
    def uri(self) -> str:
        """MLflow's tracking URI."""
        return str(self._client.tracking_uri)

    def reach(self) -> None:
        """Find out whether MLflow is there: it would try for minutes.

        Raises:
            ConnectionError: If nobody listens at the server's address.
        """
        try:
            with _tracking.at_store(self._client):
                pass
        except OSError as error:
            address = _redacted.address(self.uri)
            raise ConnectionError(f"MLflow does not answer at {address}: {error}") from error

    def rows(self, asked: _search.Query) -> Iterator[Row]:
        """All calls of these traces, with texts as MLflow lists them.

        A trace that nobody has tried to score is one row with the status ``"unseen"``.
        """
        for infos in _search.pages(self._client, asked):
            yield from self._judged([call for info in infos for call in self._calls(info)])

    def lowest(self, asked: _search.Query, n: int) -> list[Row]:
        """The scored calls of the ``n`` traces with the lowest scores."""
        infos: list[TraceInfo] = []
        for page in _search.pages(
            self._client,
            asked,
            extra_filter=f"tag.{SCORE_TAG} IS NOT NULL",
            order_by=[f"tag.{SCORE_TAG} ASC"],
            page=min(n, _search.PAGE),
        ):
            infos += page
            if len(infos) >= n:
                break
        return [call.row for info in infos[:n] for call in self._calls(info)]

    def whole(self, rows: Sequence[Row]) -> list[Row]:
        """The same rows, with their texts as they were scored."""
        traces = self._traces(rows)
        return [with_texts(row, traces.get(row.trace_id)) for row in rows]

    def located(self, rows: Sequence[Row]) -> list[Row]:
        """The same rows with their experiments, as far as MLflow answers and knows them."""
        found: dict[str, str | None] = {}
        with contextlib.suppress(OSError, MlflowException), _tracking.at_store(self._client):
            for row in rows:
                if row.experiment_id is None and (info := self._info(row.trace_id)) is not None:
                    found[row.trace_id] = info.experiment_id
        return [
            replace(
                row,
                experiment_id=found[row.trace_id],
                experiment=row.experiment or self._name(found[row.trace_id]),
            )
            if row.trace_id in found
            else row
            for row in rows
        ]

    def names(self, asked: _search.Query) -> list[str]:
        """Where is searched."""
        return [self._name(one) or one for one in asked.experiment_ids]

    def scored_experiments(self) -> list[str]:
        """Names of experiments in which there are scores; not of all, if there are many."""
        everywhere = self._client.store.search_experiments(
            max_results=_MOST_EXPERIMENTS, order_by=["last_update_time DESC"]
        )
        asked = _search.Query(tuple(str(one.experiment_id) for one in everywhere))
        found = _search.pages(
            self._client, asked, extra_filter=f"tag.{SCORE_TAG} IS NOT NULL", page=100
        )
        names = [self._name(info.experiment_id) for info in next(found, [])]
        return sorted({name for name in names if name})

    def _traces(self, rows: Iterable[Row]) -> dict[str, Trace]:
        infos = {row.trace_id: row.info for row in rows if row.info is not None}
        found = _search.traces(self._client, list(infos.values()))
        return {trace.info.trace_id: trace for trace in found}

    def _info(self, trace_id: str) -> TraceInfo | None:
        try:
            info: TraceInfo = self._client.store.get_trace_info(trace_id)
        except MlflowException as error:
            if error.error_code in ("RESOURCE_DOES_NOT_EXIST", "NOT_FOUND"):
                return None
            raise
        return info

    def _experiment_name(self, experiment_id: str) -> str | None:
        try:
            return str(self._client.store.get_experiment(experiment_id).name)
        except MlflowException:
            return None  # it may be nobody's business

    def _calls(self, info: TraceInfo) -> list[Call]:
        return calls(info, self._name(info.experiment_id), self._reference)

    def _judged(self, found: Sequence[Call]) -> Iterator[Row]:
        """The calls' rows with a verdict, for which some of their traces have to be read."""
        traces = self._traces(call.row for call in found if call.is_unsure)
        for call in found:
            yield replace(call.row, verdict=call.verdict(traces.get(call.row.trace_id)))
