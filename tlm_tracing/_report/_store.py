"""Store: rows from what MLflow has, page by page, with spans only where they are needed."""

from __future__ import annotations

import contextlib
import functools
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from mlflow.entities import Assessment, Trace, TraceInfo
from mlflow.exceptions import MlflowException
from mlflow.tracing.client import TracingClient

from tlm_tracing import _exporter, _redacted
from tlm_tracing._annotate import ASSESSMENT, EXPLANATION_TAG, SCORE_TAG, STATUS_TAG
from tlm_tracing._report._row import UNSEEN, Row, to_score
from tlm_tracing._report._truth import Claim, claim
from tlm_tracing._stored import _search

_SCORING = "tlm.trustworthiness"
_LLM_MODEL = "llm_model"
_CUT = "..."
_MOST_EXPERIMENTS = 1000


@dataclass(frozen=True)
class _Call:
    """A row, and what somebody said of its answer.

    Attributes:
        row: The row.
        claim: What was said.
        is_traces: Whether of the trace's answer, not of this call's.
        is_cut: Whether the answer as MLflow lists it is not the whole of it.
    """

    row: Row
    claim: Claim | None = None
    is_traces: bool = True
    is_cut: bool = False


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
            with _exporter.at_store(self._client):
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
        return [_with_texts(row, traces.get(row.trace_id)) for row in rows]

    def located(self, rows: Sequence[Row]) -> list[Row]:
        """The same rows with their experiments, as far as MLflow answers and knows them."""
        found: dict[str, str | None] = {}
        with contextlib.suppress(OSError, MlflowException), _exporter.at_store(self._client):
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

    def _calls(self, info: TraceInfo) -> list[_Call]:
        trace = Row(
            trace_id=info.trace_id,
            seconds=info.timestamp_ms / 1000,
            prompt=info.request_preview or "",
            response=info.response_preview or "",
            experiment=self._name(info.experiment_id),
            experiment_id=info.experiment_id,
            info=info,
        )
        rows = [_assessed(trace, one) for one in _newest(info.assessments)]
        rows = rows or [_tagged(trace, info.tags)]
        lowest = min(rows, key=lambda row: 1.0 if row.score is None else row.score)
        calls = [
            self._call(row, info, is_only=len(rows) == 1, is_lowest=row is lowest) for row in rows
        ]
        if info.tags.get(STATUS_TAG) == "partial":
            calls.append(_Call(replace(trace, status="unscored")))
        return calls

    def _call(self, row: Row, info: TraceInfo, *, is_only: bool, is_lowest: bool) -> _Call:
        """What is said on a call's own span is said of it, all else of the trace's lowest."""
        said = info.assessments or []
        own = said if is_only else [one for one in said if one.span_id == row.span_id]
        if (found := claim(own, self._reference)) is not None:
            return _Call(row, found, False, not is_only or row.response.endswith(_CUT))
        if is_lowest and (found := claim(said, self._reference)) is not None:
            return _Call(row, found, True, row.response.endswith(_CUT))
        return _Call(row)

    def _judged(self, calls: list[_Call]) -> Iterator[Row]:
        """The calls' rows with a verdict; what is listed of an answer may do for that."""
        verdicts = [call.claim.verdict(call.row.response) if call.claim else None for call in calls]
        unsure = [
            call.row
            for call, verdict in zip(calls, verdicts, strict=True)
            if verdict is not None and verdict.how == "text" and call.is_cut
        ]
        traces = self._traces(unsure)
        for call, verdict in zip(calls, verdicts, strict=True):
            trace = traces.get(call.row.trace_id)
            if verdict is not None and call.is_cut and trace is not None and call.claim is not None:
                verdict = call.claim.verdict(_answer(call, trace))
            yield replace(call.row, verdict=verdict)


def _newest(assessments: Iterable[Assessment] | None) -> list[Assessment]:
    """The last trust score of each call."""
    found: dict[str | None, Assessment] = {}
    for one in sorted(assessments or [], key=lambda one: one.last_update_time_ms or 0):
        if one.name == ASSESSMENT and one.valid is not False and _score(one) is not None:
            found[one.span_id] = one
    return list(found.values())


def _score(assessment: Assessment) -> float | None:
    return None if assessment.feedback is None else to_score(assessment.feedback.value)


def _assessed(trace: Row, assessment: Assessment) -> Row:
    return replace(
        trace,
        span_id=assessment.span_id,
        score=_score(assessment),
        explanation=assessment.rationale,
        model=(assessment.metadata or {}).get(_LLM_MODEL),
    )


def _tagged(trace: Row, tags: dict[str, str]) -> Row:
    """A trace of which its tags alone tell."""
    if (score := to_score(tags.get(SCORE_TAG))) is not None:
        return replace(trace, score=score, explanation=tags.get(EXPLANATION_TAG))
    return replace(trace, status="unscored" if STATUS_TAG in tags else UNSEEN)


def _with_texts(row: Row, trace: Trace | None) -> Row:
    texts = None if trace is None else _scored_texts(trace, row.span_id)
    return row if texts is None else replace(row, prompt=texts[0], response=texts[1])


def _scored_texts(trace: Trace, span_id: str | None) -> tuple[str, str] | None:
    """Prompt and response on the scoring span of a call; of the only one, if it is not named."""
    spans = [span for span in trace.data.spans if span.name == _SCORING]
    if span_id is not None:
        spans = [span for span in spans if span.parent_id == span_id]
    texts = spans[-1].inputs if spans and (span_id or len(spans) == 1) else None
    if not isinstance(texts, dict) or not {"prompt", "response"} <= texts.keys():
        return None
    return str(texts["prompt"]), str(texts["response"])


def _answer(call: _Call, trace: Trace) -> str:
    if not call.is_traces and (texts := _scored_texts(trace, call.row.span_id)) is not None:
        return texts[1]
    roots = [span for span in trace.data.spans if span.parent_id is None]
    outputs: Any = roots[0].outputs if roots else call.row.response
    return outputs if isinstance(outputs, str) else json.dumps(outputs, ensure_ascii=False)
