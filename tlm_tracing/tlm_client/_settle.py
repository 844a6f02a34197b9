"""What becomes of a pair: on its span, on its trace, and in the counts."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from tlm_tracing import _annotate, _pipeline, _scoring, _telemetry
from tlm_tracing._config import Config
from tlm_tracing._data import Trust
from tlm_tracing._record import CONTENT, _content, trust_attributes
from tlm_tracing.tlm_client import _told
from tlm_tracing.tlm_client._courses import Course
from tlm_tracing.tlm_client._kinds import PROMPT, Kind
from tlm_tracing.tlm_client._record import TLMRecord


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


class Settled(NamedTuple):
    """A pair's span, and what it tells.

    Attributes:
        record: The span.
        course: How the pair fared; None as long as its span does not tell.
        trust: The trust in it, if it is one that is scored.
    """

    record: TLMRecord
    course: Course | None = None
    trust: Trust | None = None

    def tells(self, course: Course) -> bool:
        """Whether the span tells of this course already."""
        told = self.course
        return told is not None and told.result is course.result and course.error is None


class Settler:
    """Writes down what becomes of the pairs of one call."""

    def __init__(self, client: Any, kind: Kind, config: Config) -> None:
        """Args as for :class:`~tlm_tracing.tlm_client._call.TLMCall`."""
        self._client = client
        self._kind = kind
        self._config = config
        self._about = _told.about(client)

    def settle(self, record: TLMRecord, course: Course) -> Settled:
        """Write on a pair's span what became of it."""
        if course.error is not None:
            record.failed(course.error)
        else:
            record.outputs(course.result)
        trust = self._judged(record, course) if self._kind.is_scored else None
        record.note(_times(course))
        return Settled(record, course, trust)

    def _judged(self, record: TLMRecord, course: Course) -> Trust:
        found, detail = self._trust(course)
        is_timed = course.is_own and found.score is not None
        trust = replace(
            found,
            trace_id=record.trace_id,
            span_id=record.span_id,
            scorer=self._about.scorer,
            seconds=course.seconds if is_timed else None,
        )
        if detail is not None:
            record.went_wrong(detail)
        action = "flagged" if self._is_low(trust) else None
        record.note({**trust_attributes(trust), "tlm.action": action})
        return trust

    def annotate(self, pair: Pair, settled: Settled) -> None:
        """Write the trust in a pair on the trace, and let it be known."""
        record, course, trust = settled
        if trust is None:
            return
        pair.trust, pair.answer = trust, None if course is None else course.result
        _scoring.count(trust)
        _telemetry.settled(trust, self._config, None)
        notes = _annotate.Notes(
            model=self._about.model,
            preset=self._about.preset,
            llm_model=self._about.llm if self._kind is PROMPT else None,
        )
        record.when_placed(functools.partial(_pipeline._annotated, record.shown(trust), notes))

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

    def attributes(self) -> dict[str, Any]:
        """What the span of each pair tells."""
        told: dict[str, Any] = {CONTENT: _content(self._config)}
        if self._kind.is_scored:
            told["tlm.threshold"] = self._config.threshold
        if self._kind is PROMPT:
            told |= {"mlflow.llm.model": self._about.llm, "mlflow.llm.provider": "cleanlab"}
        return told


def _times(course: Course) -> dict[str, Any]:
    """What a pair's span tells of its times beside when it began and ended."""
    if not course.is_own:
        return {"tlm.timing": "batch"}
    return {"tlm.queued_seconds": None if course.queued is None else course.queued / 1e9}
