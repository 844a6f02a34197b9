"""One call of a TLM client: what is asked, what is told, and how far that can be trusted."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from tlm_tracing import _annotate, _ends, _pipeline, _redacted, _scoring, _telemetry
from tlm_tracing._config import Config
from tlm_tracing._data import Trust
from tlm_tracing._scope import Scope
from tlm_tracing.tlm_client import _told
from tlm_tracing.tlm_client._asked import Asked
from tlm_tracing.tlm_client._record import TLMRecord
from tlm_tracing.tlm_client._seams import Course, Rounds, courses

_BATCH = "CHAIN"


class Kind(NamedTuple):
    """What a method is for.

    Attributes:
        span: The name of a pair's span.
        span_type: Its type, as MLflow has it.
        is_scored: Whether the pair gets a score.
    """

    span: str
    span_type: str
    is_scored: bool = True


_SCORE = Kind("tlm.trustworthiness", "EVALUATOR")
_PROMPT = Kind("tlm.prompt", "LLM")
_EXPLAIN = Kind("tlm.explanation", "EVALUATOR", is_scored=False)

METHODS: Mapping[str, Kind] = {
    "get_trustworthiness_score": _SCORE,
    "score": _SCORE,
    "prompt": _PROMPT,
    "generate": _PROMPT,
    "get_explanation": _EXPLAIN,
}
"""The methods that are traced, each with its async twin."""


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
        self.rounds: Rounds = {}
        self._client = client
        self._kind = kind
        self._config = config
        self._about = _told.about(client)
        self._pairs = [Pair(one) for one in asked.pairs]
        self._is_batch = asked.count is not None
        self._record = self._opened(asked)
        self._began = time.time_ns()
        # Now: an explanation is noted in the very result that is asked about.
        self._inputs = [self._record.seen(one) for one in asked.pairs] if self._is_batch else []
        self._record.note({"tlm.client": type(client).__name__, "tlm.method": method.__name__})
        for scope in scopes:
            if kind.is_scored:
                scope.calls.extend(self._pairs)

    def _opened(self, asked: Asked) -> TLMRecord:
        name, span_type = self._kind.span, self._kind.span_type
        if self._is_batch:
            inputs = {"pairs": asked.count}
            return TLMRecord(f"{name}.batch", _BATCH, inputs, self._config)
        record = TLMRecord(name, span_type, asked.pairs[0], self._config)
        record.note(self._attributes())
        return record

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
        closed: list[tuple[TLMRecord, int]] = []
        for pair, inputs, course in zip(self._pairs, self._inputs, found, strict=True):
            if course is not None:
                record = self._record.inside(*self._kind[:2], inputs, course.began)
                record.note(self._attributes())
                self._settle(
                    record, pair, course if course.is_over else course._replace(error=error)
                )
                closed.append((record, course.ended))
        self._sum_up(len(closed))
        if error is not None:
            self._record.failed(error)
        self._record.close(closed)

    def _settle(self, record: TLMRecord, pair: Pair, course: Course) -> None:
        """Write down what became of a pair."""
        if not course.is_own:
            record.note({"tlm.timing": "batch"})
        elif course.queued is not None:
            record.note({"tlm.queued_seconds": course.queued / 1e9})
        if course.error is not None:
            record.failed(course.error)
        else:
            record.outputs(course.result)
        if self._kind.is_scored:
            self._judge(record, pair, course)

    def _judge(self, record: TLMRecord, pair: Pair, course: Course) -> None:
        trust, detail = self._trust(course)
        own = course.seconds if course.is_own and trust.score is not None else None
        trust = replace(
            trust,
            trace_id=record.trace_id,
            span_id=record.span_id,
            scorer=self._about.scorer,
            seconds=own,
        )
        pair.trust, pair.answer = trust, course.result
        record.judged(trust, detail)
        record.note({"tlm.action": "flagged" if self._is_low(trust) else None})
        _scoring.count(trust)
        _telemetry.settled(trust, self._config, None)
        notes = _annotate.Notes(
            model=self._about.model,
            preset=self._about.preset,
            llm_model=self._about.llm if self._kind is _PROMPT else None,
        )
        record.when_placed(functools.partial(_pipeline._annotated, record.shown(trust), notes))

    def _trust(self, course: Course) -> tuple[Trust, str | None]:
        """The trust in a pair, and what went wrong, if that is not told already."""
        if course.error is not None:
            trust, detail = _told.failed(course.error), None
        else:
            trust, detail = _told.judged(course.result, self._client)
        if self._kind is _PROMPT and not _told.has_answer(course.result):
            trust = Trust.unscored("call_failed")
        return trust, detail

    def _is_low(self, trust: Trust) -> bool:
        threshold = self._config.threshold
        return trust.score is not None and threshold is not None and trust.score < threshold

    def _attributes(self) -> dict[str, Any]:
        """What is the same for each pair."""
        scored = {"tlm.threshold": self._config.threshold}
        if self._kind is _PROMPT:
            return {
                **scored,
                "mlflow.llm.model": self._about.llm,
                "mlflow.llm.provider": "cleanlab",
            }
        return scored if self._kind.is_scored else {}

    def _sum_up(self, count: int) -> None:
        """Say on a batch's own span what became of it."""
        if not self._kind.is_scored:
            self._record.outputs({"pairs": count})
            return
        trusts = [pair.trust for pair in self._pairs if pair.trust is not None]
        scores = [trust.score for trust in trusts if trust.score is not None]
        told = {"trust_score": min(scores, default=None), "scored": len(scores)}
        self._record.outputs({**told, "unscored": count - len(scores)})
