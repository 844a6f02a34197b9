"""One call of a TLM client: its span, and in it those of the pairs of a batch."""

from __future__ import annotations

import asyncio
import functools
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

from tlm_tracing import _ends, _pipeline, _redacted
from tlm_tracing._config import Config
from tlm_tracing._record import CONTENT, _content
from tlm_tracing._scope import Scope
from tlm_tracing.tlm_client._asked import Asked
from tlm_tracing.tlm_client._courses import Course, course_of, courses
from tlm_tracing.tlm_client._kinds import Kind
from tlm_tracing.tlm_client._record import TLMRecord
from tlm_tracing.tlm_client._seams import Rounds, Timing
from tlm_tracing.tlm_client._settle import Pair, Settled, Settler

_BATCH = "CHAIN"
# Seconds without a request or an answer. No less can be told from an event loop's timers.
_IDLE = 0.001


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
        self.rounds = Rounds(client, when_sent=self._sent, when_ended=self._ended)
        self._chores: deque[Callable[[], None]] = deque()
        self._early: dict[int, Settled] = {}
        self._last_event = 0.0
        self._client = client
        self._kind = kind
        self._config = config
        self._settler = Settler(client, kind, config)
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
            self._record.note({**told, **self._settler.attributes()})

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
        self._chores.clear()
        if self._is_batch:
            self._batch(result, error, ended)
        else:
            seen = courses(self.rounds, 1, ended)[0] or Course(self._began, ended)
            course = seen._replace(ended=ended, result=result, error=error)
            self._settler.annotate(self._pairs[0], self._settler.settle(self._record, course))
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
                if not course.is_over:
                    course = course._replace(error=error)
                settled = self._early_of(number, course)
                settled.record.ended = course.ended
                self._settler.annotate(pair, settled)
        self._sum_up(len(found) - found.count(None))
        if error is not None:
            self._record.failed(error)
        self._record.close()

    # What can be recorded of a batch's pairs while TLM is waited for, one thing at a time and only
    # when there is nothing else to do, so that the client's event loop is never held up.

    def _sent(self, timing: Timing) -> None:
        self._soon(functools.partial(self._open, timing))

    def _ended(self, timing: Timing) -> None:
        self._soon(functools.partial(self._settle, timing))

    def _soon(self, chore: Callable[[], None]) -> None:
        with _pipeline.guarded("recording a call of TLM's"):
            if self._is_batch and not self._is_over and self._record.trace_id is not None:
                loop = asyncio.get_running_loop()
                self._last_event = loop.time()
                self._chores.append(chore)
                if len(self._chores) == 1:
                    loop.call_later(_IDLE, self._do_one, loop)

    def _do_one(self, loop: asyncio.AbstractEventLoop) -> None:
        if self._chores and loop.time() - self._last_event < _IDLE:
            loop.call_later(_IDLE, self._do_one, loop)
        elif self._chores:
            with _pipeline.guarded("recording a call of TLM's"):
                self._chores[0]()
            self._chores.popleft()
            loop.call_soon(self._do_one, loop)

    def _open(self, timing: Timing) -> None:
        if timing.sent is not None and timing.number < len(self._pairs):
            self._early[timing.number] = Settled(self._inside(timing.number, timing.sent))

    def _settle(self, timing: Timing) -> None:
        if (early := self._early.get(timing.number)) and timing.error is None:
            course = course_of([timing])
            if course is not None:
                self._early[timing.number] = self._settler.settle(early.record, course)

    def _early_of(self, number: int, course: Course) -> Settled:
        """What was recorded of a pair early, if that is still true; else it is recorded now."""
        early = self._early.get(number) if course.is_own else None
        if early is not None and early.course is None:
            return self._settler.settle(early.record, course)
        if early is not None and early.tells(course):
            return early
        return self._settler.settle(self._inside(number, course.began), course)

    def _inside(self, number: int, began: int) -> TLMRecord:
        name, span_type, _ = self._kind
        record = self._record.inside(name, span_type, self._inputs[number], began)
        record.note(self._settler.attributes())
        return record

    def _sum_up(self, count: int) -> None:
        """Say on a batch's own span what became of it."""
        if not self._kind.is_scored:
            self._record.outputs({"pairs": count})
            return
        trusts = [pair.trust for pair in self._pairs if pair.trust is not None]
        scores = [trust.score for trust in trusts if trust.score is not None]
        told = {"trust_score": min(scores, default=None), "scored": len(scores)}
        self._record.outputs({**told, "unscored": count - len(scores)})
