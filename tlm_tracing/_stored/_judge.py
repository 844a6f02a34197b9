"""Judge: have the calls of a stored trace scored."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from mlflow.entities import Trace, TraceInfo

from tlm_tracing import _annotate, _asking
from tlm_tracing._data import Trust
from tlm_tracing._messages import Unscorable
from tlm_tracing._record import CONTEXT, QUERY
from tlm_tracing._scope import Retrieved
from tlm_tracing._scoring import Verdict
from tlm_tracing._stored._calls import StoredCall, calls
from tlm_tracing._stored._late import Judged
from tlm_tracing._stored._plan import Plan

FINAL = frozenset({"refusal", "empty", "unsupported_content", "partial_stream", "call_failed"})
"""Why an answer will not be scored another time either."""

# Worth waiting for: the scorer may be back soon.
_PASSING = frozenset({"scorer_unavailable", "timeout", "queue_full", "budget"})
_PAUSES = (1.0, 4.0, 15.0, 30.0)
# As long as a live call may take to be scored and written.
_STILL_LIVE = 600.0
_SCORE = "tlm.trustworthiness_score"
_PENDING = Trust(status="pending")
_UNAVAILABLE = Trust.unscored("scorer_unavailable")


class Wanted(NamedTuple):
    """A call that is to be scored, and what leaves for the scorer.

    Attributes:
        call: The call.
        asked: What leaves.
        before: The trust that the trace tells already.
    """

    call: StoredCall
    asked: _asking.Asked
    before: Trust | None


class Judge:
    """Asks for scores, no faster than the budget has it.

    Attributes:
        is_outage: Whether the scorer has been unavailable for as long as it is waited for.
        characters: How much text was sent.
    """

    def __init__(self, plan: Plan) -> None:
        """Nothing is sent yet."""
        self.is_outage = False
        self.characters = 0
        self._plan = plan
        limit = plan.config.max_scores_per_minute
        self._every = 0.0 if limit is None else 60.0 / limit
        # The budget is kept here, by waiting; the scoring loop would refuse instead.
        self._config = replace(plan.config, max_scores_per_minute=None)
        self._readable = replace(self._config, sample_rate=1.0, should_score=None)
        self._reads_completion = _asking.reads_completion(plan.config)
        self._slots = asyncio.Semaphore(plan.config.max_concurrency)
        self._hurry = asyncio.Event()
        self._next = 0.0
        self._last_success = float("-inf")

    def look(self, trace: Trace) -> list[Judged | Wanted]:
        """The calls of a trace, in the order in which they began; nothing is sent yet."""
        found = [self._look(trace.info, call) for call in calls(trace)]
        if not any(isinstance(one, Judged) and one.trust.status == "pending" for one in found):
            return found
        # Such a trace is not written yet: what is sent of it now would be paid for again.
        return [
            _pending(trace.info, one.call, one.asked) if isinstance(one, Wanted) else one
            for one in found
        ]

    async def judge(self, info: TraceInfo, found: Sequence[Judged | Wanted]) -> list[Judged]:
        """The same with the scores of those that want one."""
        return list(await asyncio.gather(*(self._judge(info, one) for one in found)))

    def _look(self, info: TraceInfo, call: StoredCall) -> Judged | Wanted:
        known = _known(info, call)
        is_wanted = known is None or self._plan.rescore
        if call.reason is not None:
            return _left(info, call, call.reason, known)
        if known is None and _is_still_live(call):
            return _pending(info, call)
        try:
            config = self._config if is_wanted else self._readable
            completion = call.endpoint.construct(call.answer) if self._reads_completion else None
            asked = _asking.ask(
                call.endpoint, call.request, completion, call.answer, config, _retrieved(call)
            )
        except Unscorable as nothing:
            return _left(info, call, nothing.reason, known)
        except Exception:  # a shape that nobody has thought of
            return _left(info, call, "unsupported_content", known)
        if known is None or is_wanted:
            return Wanted(call, asked, known)
        return Judged(call, known, asked)

    async def _judge(self, info: TraceInfo, found: Judged | Wanted) -> Judged:
        if isinstance(found, Judged):
            return found
        call, asked, before = found
        if self._plan.dry_run:
            self.characters += _length(asked)
            return _pending(info, call, asked)
        if self.is_outage:
            return Judged(call, _placed(_UNAVAILABLE, info, call), asked, before=before)
        return _scored(info, found, await self._verdict(asked))

    def hurry(self) -> None:
        """Send no more; what has not been sent is unscored."""
        self._hurry.set()

    async def _verdict(self, asked: _asking.Asked) -> Verdict:
        """Ask for the score; again while the scorer is away, for as long as that is of use."""
        started = time.monotonic()
        for pause in (*_PAUSES, None):
            verdict = await self._ask(asked)
            if verdict.trust.reason not in _PASSING or self.is_outage or pause is None:
                break
            if await self._is_hurried_within(pause):
                break
        if verdict.trust.reason == "scorer_unavailable" and self._last_success < started:
            self.is_outage = not self._hurry.is_set()
        return verdict

    async def _ask(self, asked: _asking.Asked) -> Verdict:
        async with self._slots:
            if await self._is_hurried_within(self._time_to_turn(len(asked.responses))):
                return Verdict(Trust.unscored("budget"))
            self.characters += _length(asked)
            verdict = await asyncio.wrap_future(asked.send())
        if verdict.trust.status == "scored":
            self._last_success = time.monotonic()
        return verdict

    def _time_to_turn(self, scores: int) -> float:
        now = time.monotonic()
        turn = max(self._next, now)
        self._next = turn + scores * self._every
        return turn - now

    async def _is_hurried_within(self, seconds: float) -> bool:
        if seconds > 0.0 and not self._hurry.is_set():
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(self._hurry.wait(), seconds)
        return self._hurry.is_set()


def _placed(trust: Trust, info: TraceInfo, call: StoredCall) -> Trust:
    return replace(trust, trace_id=info.trace_id, span_id=call.span_id)


def _pending(info: TraceInfo, call: StoredCall, asked: _asking.Asked | None = None) -> Judged:
    return Judged(call, _placed(_PENDING, info, call), asked)


def _scored(info: TraceInfo, wanted: Wanted, verdict: Verdict) -> Judged:
    call, asked, before = wanted
    trust = verdict.trust
    choices = tuple(_placed(choice, info, call) for choice in trust.choices)
    return Judged(
        call,
        _placed(replace(trust, choices=choices), info, call),
        asked,
        _annotate.Notes(
            model=getattr(verdict.scorer, "model", None),
            preset=getattr(verdict.scorer, "preset", None),
            llm_model=call.answer.get("model") or call.request.get("model"),
        ),
        None if verdict.error is None else str(verdict.error),
        is_new=trust.status == "scored" or (before is None and trust.reason in FINAL),
        is_cached=verdict.is_cached,
        before=before,
    )


def _left(info: TraceInfo, call: StoredCall, reason: str, known: Trust | None) -> Judged:
    """A call that is not sent: what the trace tells of it stays."""
    if known is not None:
        return Judged(call, known)
    is_told = _attributes(call).get("tlm.reason") in FINAL
    return Judged(
        call,
        _placed(Trust.unscored(reason), info, call),
        is_new=reason in FINAL and not is_told,
    )


def _known(info: TraceInfo, call: StoredCall) -> Trust | None:
    """The trust that the trace tells already."""
    if (assessed := _annotate.assessed(info, call.span_id)) is not None:
        return assessed
    score = _attributes(call).get(_SCORE)
    if not isinstance(score, (int, float)):
        return None
    outputs: Any = call.scoring.outputs if call.scoring is not None else None
    explanation = outputs.get("explanation") if isinstance(outputs, Mapping) else None
    trust = Trust(
        score=float(score), explanation=explanation, scorer=_attributes(call).get("tlm.scorer")
    )
    return _placed(trust, info, call)


def _retrieved(call: StoredCall) -> Retrieved | None:
    """The context that was named when the answer was given."""
    told: Any = call.scoring.inputs if call.scoring is not None else None
    if isinstance(told, Mapping):
        query, context = told.get("query"), told.get("context")
    else:
        query, context = (_attributes(call).get(name) for name in (QUERY, CONTEXT))
    if not isinstance(context, str):
        return None
    return Retrieved(context, query if isinstance(query, str) else None)


def _is_still_live(call: StoredCall) -> bool:
    """Whether a call of ours has not been closed yet: its score is on its way."""
    if call.parent is None or "tlm.status" in _attributes(call):
        return False
    ended = call.llm.end_time_ns or call.llm.start_time_ns
    return bool(time.time() - ended / 1e9 < _STILL_LIVE)


def _attributes(call: StoredCall) -> Mapping[str, Any]:
    span = call.parent or call.scoring
    return {} if span is None else span.attributes


def _length(asked: _asking.Asked) -> int:
    named = len(asked.query or "") + len(asked.context or "")
    return sum(len(asked.prompt) + named + len(response) for response in asked.responses)
