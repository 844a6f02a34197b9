"""One call of a TLM client: what is asked, what is told, and how far that can be trusted."""

from __future__ import annotations

import asyncio
import functools
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from tlm_tracing import _annotate, _ends, _pipeline, _redacted, _scoring, _telemetry
from tlm_tracing._config import Config
from tlm_tracing._data import Trust
from tlm_tracing._record import CONTENT, _content, trust_attributes
from tlm_tracing._scope import Scope
from tlm_tracing.tlm_client import _told
from tlm_tracing.tlm_client._asked import Asked
from tlm_tracing.tlm_client._courses import Course, courses
from tlm_tracing.tlm_client._kinds import PROMPT, Kind
from tlm_tracing.tlm_client._record import TLMRecord
from tlm_tracing.tlm_client._seams import Rounds

_BATCH = "CHAIN"


@dataclass
class Pair:
    """A prompt and its response, or what is to become one.

    Attributes:
        request: What is asked, by the names of the arguments.
        trust: The trust in it; None as long as nothing is known.
        answer: What TLM told.
    """

    request: Mapping[str, Any]
    trust: Trust | None = None
    answer: Any = None


class TLMCall:
    """A call of one of a client's methods while it runs.

    Attributes:
        rounds: How its pairs fare.
    """

    def __init__(
        self,
        client: Any,
        method: Callable[..., Any],
        kind: Kind,
        asked: Asked,
        config: Config,
        scopes: Sequence[Scope],
    ) -> None:
        """Open its span.

        Args:
            client: Whose call it is.
            method: The function of the method.
            kind: What that is for.
            asked: What is asked.
            config: The settings in force.
            scopes: The trusted blocks that it is made in.
        """
        _ends.prepare()
        _redacted.learn([getattr(client, "_api_key", None)])
        self.rounds = Rounds(self._sent)
        self._sent_pairs: deque[tuple[int, int]] = deque()
        self._records: dict[int, TLMRecord] = {}
        self._client = client
        self._kind = kind
        self._config = config
        self._about = _told.about(client)
        self._pairs = [Pair(one) for one in asked.pairs]
        self._is_batch = asked.count is not None
        self._is_over = False
        self._inputs: list[Any] = []
        self._record = self._opened(asked.count)
        self._began = time.time_ns()
        try:
            self._note(method.__name__)
        except BaseException:
            self._record.abandon()
            raise
        for scope in scopes:
            if kind.is_scored:
                scope.calls.extend(self._pairs)

    def _opened(self, count: int | None) -> TLMRecord:
        name, span_type, _ = self._kind
        if self._is_batch:
            return TLMRecord(f"{name}.batch", _BATCH, {"pairs": count}, self._config)
        return TLMRecord(name, span_type, self._pairs[0].request, self._config)

    def _note(self, method: str) -> None:
        told = {"tlm.client": type(self._client).__name__, "tlm.method": method}
        if self._is_batch:
            self._record.note({**told, CONTENT: _content(self._config)})
            # Now: an explanation is noted in the very result that is asked about.
            self._inputs = [self._record.seen(pair.request) for pair in self._pairs]
        else:
            self._record.note({**told, **self._attributes()})

    def returned(self, result: Any) -> None:
        """The call is over: this is what its caller gets."""
        with _pipeline.guarded("recording a call of TLM's", self._record.abandon):
            self._conclude(result, None)

    def failed(self, error: BaseException) -> None:
        """The call ended in an exception, which goes on to its caller as it is."""
        with _pipeline.guarded("recording a failed call of TLM's", self._record.abandon):
            self._conclude(None, error)

    def _conclude(self, result: Any, error: BaseException | None) -> None:
        ended = time.time_ns()
        self._is_over = True
        self._sent_pairs.clear()
        if self._is_batch:
            self._batch(result, error, ended)
        else:
            seen = courses(self.rounds, 1, ended)[0] or Course(self._began, ended)
            course = seen._replace(ended=ended, result=result, error=error)
            self._settle(self._record, self._pairs[0], course)
            self._record.close()

    def _batch(self, results: Any, error: BaseException | None, ended: int) -> None:
        found = courses(self.rounds, len(self._pairs), ended)
        if isinstance(results, list) and len(results) == len(self._pairs):
            unknown = Course(self._began, ended, is_own=False)
            found = [
                (course or unknown)._replace(result=result, error=None)
                for course, result in zip(found, results, strict=True)
            ]
        for number, (pair, course) in enumerate(zip(self._pairs, found, strict=True)):
            if course is not None:
                record = self._records.get(number) if course.is_own else None
                record = record or self._inside(number, course.began)
                record.ended = course.ended
                self._settle(
                    record, pair, course if course.is_over else course._replace(error=error)
                )
        self._sum_up(len(found) - found.count(None))
        if error is not None:
            self._record.failed(error)
        self._record.close()

    def _sent(self, number: int, when: int) -> None:
        """A pair of a batch is on its way: its span is opened while its result is waited for."""
        with _pipeline.guarded("recording a call of TLM's"):
            is_awaited = self._is_batch and not self._is_over and number < len(self._pairs)
            if is_awaited and self._record.trace_id is not None:
                self._sent_pairs.append((number, when))
                if len(self._sent_pairs) == 1:
                    asyncio.get_running_loop().call_soon(self._open_one)

    def _open_one(self) -> None:
        """One at a time, so that the client's event loop is never held up."""
        with _pipeline.guarded("recording a call of TLM's"):
            if self._sent_pairs:
                number, began = self._sent_pairs.popleft()
                self._records[number] = self._inside(number, began)
                if self._sent_pairs:
                    asyncio.get_running_loop().call_soon(self._open_one)

    def _inside(self, number: int, began: int) -> TLMRecord:
        name, span_type, _ = self._kind
        record = self._record.inside(name, span_type, self._inputs[number], began)
        record.note(self._attributes())
        return record

    def _settle(self, record: TLMRecord, pair: Pair, course: Course) -> None:
        """Write down what became of a pair."""
        if course.error is not None:
            record.failed(course.error)
        else:
            record.outputs(course.result)
        judged = self._judged(record, pair, course) if self._kind.is_scored else {}
        record.note({**_times(course), **judged})

    def _judged(self, record: TLMRecord, pair: Pair, course: Course) -> dict[str, Any]:
        """Write the trust in a pair on the trace; gives what its span is to tell of it."""
        found, detail = self._trust(course)
        is_timed = course.is_own and found.score is not None
        trust = replace(
            found,
            trace_id=record.trace_id,
            span_id=record.span_id,
            scorer=self._about.scorer,
            seconds=course.seconds if is_timed else None,
        )
        pair.trust, pair.answer = trust, course.result
        if detail is not None:
            record.went_wrong(detail)
        _scoring.count(trust)
        _telemetry.settled(trust, self._config, None)
        notes = _annotate.Notes(
            model=self._about.model,
            preset=self._about.preset,
            llm_model=self._about.llm if self._kind is PROMPT else None,
        )
        record.when_placed(functools.partial(_pipeline._annotated, record.shown(trust), notes))
        action = "flagged" if self._is_low(trust) else None
        return {**trust_attributes(trust), "tlm.action": action}

    def _trust(self, course: Course) -> tuple[Trust, str | None]:
        """The trust in a pair, and what went wrong, if that is not told already."""
        if course.error is not None:
            trust, detail = _told.failed(course.error), None
        else:
            trust, detail = _told.judged(course.result, self._client)
        if self._kind is PROMPT and not _told.has_answer(course.result):
            trust = Trust.unscored("call_failed")
        return trust, detail

    def _is_low(self, trust: Trust) -> bool:
        threshold = self._config.threshold
        return trust.score is not None and threshold is not None and trust.score < threshold

    def _attributes(self) -> dict[str, Any]:
        """What the span of each pair tells."""
        told: dict[str, Any] = {CONTENT: _content(self._config)}
        if self._kind.is_scored:
            told["tlm.threshold"] = self._config.threshold
        if self._kind is PROMPT:
            told |= {"mlflow.llm.model": self._about.llm, "mlflow.llm.provider": "cleanlab"}
        return told

    def _sum_up(self, count: int) -> None:
        """Say on a batch's own span what became of it."""
        if not self._kind.is_scored:
            self._record.outputs({"pairs": count})
            return
        trusts = [pair.trust for pair in self._pairs if pair.trust is not None]
        scores = [trust.score for trust in trusts if trust.score is not None]
        told = {"trust_score": min(scores, default=None), "scored": len(scores)}
        self._record.outputs({**told, "unscored": count - len(scores)})


def _times(course: Course) -> dict[str, Any]:
    """What a pair's span tells of its times beside when it began and ended."""
    if not course.is_own:
        return {"tlm.timing": "batch"}
    return {"tlm.queued_seconds": None if course.queued is None else course.queued / 1e9}
