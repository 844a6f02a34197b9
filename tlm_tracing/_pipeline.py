"""Record, score, annotate: the one place where the three meet.

Also the guard that keeps our own bugs from the caller: whatever goes wrong here is logged, and
the caller gets what OpenAI gave.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import inspect
import logging
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from dataclasses import dataclass, replace
from types import TracebackType
from typing import Any

from tlm_tracing import (
    _annotate,
    _asking,
    _ends,
    _live,
    _outbox,
    _propagation,
    _ready,
    _record,
    _scope,
    _scoring,
    _telemetry,
    _threads,
    _watching,
)
from tlm_tracing._config import Config
from tlm_tracing._data import Trust
from tlm_tracing._endpoints import Endpoint
from tlm_tracing._messages import Unscorable
from tlm_tracing._returned import answered, http_response, plain, remember
from tlm_tracing._scoring import Verdict
from tlm_tracing._watching import Heard
from tlm_tracing.exceptions import UntrustworthyResponseError

_logger = logging.getLogger("tlm_tracing")

# Well below the 1,000 traces that MLflow has room for: beyond that it loses the oldest.
_MOST_HELD = 500
# How many scores are kept during an evaluation, which asks for the first answer twice.
_KEPT_FOR_EVALUATION = 10_000


class guarded:  # noqa: N801 - used like a function
    """Our bugs are ours: logged with their traceback, never raised at the caller.

    Args:
        doing: What was going on, to complete "tlm_tracing failed while ...".
        otherwise: What to do when it failed.
    """

    def __init__(self, doing: str, otherwise: Callable[[], None] | None = None) -> None:
        self._doing = doing
        self._otherwise = otherwise

    def __enter__(self) -> None:
        """Nothing to set up."""

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> bool:
        if not isinstance(error, Exception):
            return False
        _logger.error(
            "tlm_tracing failed while %s; the application's call is not affected.",
            self._doing,
            exc_info=error,
        )
        if self._otherwise is not None:
            self._otherwise()
        return True


class Call:
    """One request to an LLM on its way through record, score and annotate.

    Attributes:
        endpoint: Where it goes.
        request: The request body as sent.
        answer: The answer as plain data; None while the call runs.
        trust: The trust in its answer so far; None while the call runs.
    """

    def __init__(
        self,
        request: Mapping[str, Any],
        config: Config,
        *,
        endpoint: Endpoint,
        provider: str = "openai",
    ) -> None:
        """Open the call's spans. Args as in :class:`~tlm_tracing._record.CallRecord`."""
        _ends.prepare()
        self.trust: Trust | None = None
        self.request = request
        self.endpoint = endpoint
        self._is_evaluated = _live.is_evaluated()
        if self._is_evaluated or _live.is_tried_out():
            kept = max(config.cache_size, _KEPT_FOR_EVALUATION)
            config = replace(config, cache_size=kept)
        self._config = config
        self._started = time.monotonic()
        self._scopes = scope.chain() if (scope := _scope.current()) else []
        self._retrieved = _scope.retrieved_for(self._scopes)
        self._record = _record.CallRecord(
            request, endpoint=endpoint, provider=provider, config=config
        )
        self.answer: Any = None
        # In background mode a score may be in at once, or not: the caller gets the same.
        self._flag_only = config.mode != "inline"
        self._action: str | None = None
        for scope in self._scopes:
            scope.calls.append(self)

    @property
    def wants_usage(self) -> bool:
        """Whether streams are to tell their usage, asked for or not."""
        return self._config.stream_usage

    @property
    def holds_last_chunk(self) -> bool:
        """Whether the end of a stream is held back until the score is in."""
        return self._config.hold_last_chunk and self._config.mode == "inline"

    @property
    def may_replace(self) -> bool:
        """Whether an answer that its caller reads later may be replaced then."""
        is_set = self._config.threshold is not None and callable(self._config.on_low)
        return is_set and self._config.mode == "inline" and not self.request.get("stream")

    @property
    def has_replaced(self) -> bool:
        """Whether the caller gets something else than the answer."""
        return self._action == "replaced"

    # How a call goes on. Each is called once, by the hook or by a stream that ends.

    def retried(self, number: int) -> None:
        """The request is sent again, for the first, second, ... time."""
        with guarded("recording a retry"):
            self._record.retried(number)

    def identified(self, headers: Mapping[str, str]) -> None:
        """The response has begun."""
        with guarded("recording a request id"):
            self._record.identified(headers.get("x-request-id"))

    def failed(self, error: BaseException) -> None:
        """The request ended in an exception, which goes on to the caller as it is."""
        with guarded("recording a failed call", self._record.abandon):
            self._record.identified(getattr(error, "request_id", None))
            # A structured output that was cut short carries the answer with it.
            self.answer = plain(getattr(error, "completion", None))
            self._record.failed(error, self.answer)
            self._note(None, Verdict(Trust.unscored("call_failed")))
            self._close(None)

    def answered(self, completion: Any) -> Any:
        """The whole answer is there: score it as the mode says.

        Args:
            completion: What OpenAI's client returned.

        Returns:
            What the caller gets: the same object, or what ``on_low`` made of it.

        Raises:
            UntrustworthyResponseError: If asked for and the score is low.
            ScoringError: If asked for and there is no score.
        """
        asked = self._answer_noted(completion)
        if not self._must_wait(completion, asked):
            return completion
        with self._leaving_early(completion, asked):
            verdict = asked.result()
        return self._handed_over(completion, verdict)

    async def aanswered(self, completion: Any) -> Any:
        """Same as :meth:`answered`, but the event loop goes on while the score is awaited."""
        asked = self._answer_noted(completion)
        if not self._must_wait(completion, asked):
            return completion
        with self._leaving_early(completion, asked):
            verdict = await _threads.result(asked)
        return await self._ahanded_over(completion, verdict)

    def stream_opened(self, stream: Any) -> None:
        """The caller holds a stream, or a raw response, and may ask for the trust in it."""
        _ends.prepare(_watching.drop_all)
        remember(stream, self)
        remember(http_response(stream), self)

    def stream_ended(self, heard: Heard, how: str, error: BaseException | None = None) -> None:
        """A stream has ended: score what it said, if that is the whole answer."""
        asked = self._stream_noted(heard, how, error)
        if self._must_wait(None, asked):
            with self._leaving_early(None, asked):
                verdict = asked.result()
            with self._stream_concluded(heard, how) as decision:
                decision.given = self._handed_over(decision.given, verdict)

    async def astream_ended(
        self, heard: Heard, how: str, error: BaseException | None = None
    ) -> None:
        """Same as :meth:`stream_ended`, but the event loop goes on meanwhile."""
        asked = self._stream_noted(heard, how, error)
        if self._must_wait(None, asked):
            with self._leaving_early(None, asked):
                verdict = await _threads.result(asked)
            with self._stream_concluded(heard, how) as decision:
                decision.given = await self._ahanded_over(decision.given, verdict)

    def stream_dropped(self, heard: Heard) -> None:
        """A stream is garbage, with or without the whole answer; nobody waits for its score."""

        def record() -> bool:
            self._go_on_alone(None, self._stream_noted(heard, "closed"))
            return True

        self.soon(record)

    def soon(self, chore: Callable[[], bool]) -> None:
        """Do something soon elsewhere, again and again until it gives True."""
        _scoring.later(chore)

    def unobserved(self) -> None:
        """The answer goes to the caller unread, so there is nothing to score."""
        with guarded("recording an unread answer", self._record.abandon):
            self._record.answered(None)
            self._note(None, Verdict(Trust.unscored("partial_stream")))
            self._close(None)

    # The thinking, shared by sync and async.

    def _answer_noted(self, completion: Any) -> Future[Verdict]:
        with guarded("recording an answer"):
            self.answer = plain(completion)
            self._record.identified(getattr(completion, "_request_id", None))
            self._record.answered(self.answer)
            return self._ask(completion)
        return _scoring.unscored("scorer_error")

    def _stream_noted(
        self, heard: Heard, how: str, error: BaseException | None = None
    ) -> Future[Verdict]:
        with guarded("recording a stream"):
            self._flag_only = True
            self.answer = heard.answer(self.endpoint)
            answered(self.answer, self)
            outcome = self._outcome(how, error)
            first = None if heard.first_at is None else heard.first_at - self._started
            if error is not None and outcome != "complete":
                self._record.failed(error, self.answer, first_token=first, outcome=outcome)
            else:
                self._record.answered(self.answer, first_token=first, outcome=outcome)
            if outcome == "complete":
                return self._ask(self.endpoint.construct(self.answer))
            return _scoring.unscored("partial_stream")
        return _scoring.unscored("scorer_error")

    def _outcome(self, how: str, error: BaseException | None) -> str:
        """What became of a stream's answer.

        A caller who stops at the last chunk, before the body's end, has all of it.
        """
        answer = self.answer
        if how != "interrupted" and answer is not None and self.endpoint.is_whole(answer):
            return "complete"
        if error is not None:
            stopped = isinstance(error, (asyncio.CancelledError, KeyboardInterrupt, SystemExit))
            return "cancelled" if stopped else "error"
        if answer is not None and self.endpoint.failure(answer) is not None:
            return "error"
        return "truncated" if how == "exhausted" else "abandoned"

    def _ask(self, completion: Any) -> Future[Verdict]:
        """Ask for the score; the verdict may be there at once."""
        try:
            asked = _asking.ask(
                self.endpoint,
                self.request,
                completion,
                self.answer,
                self._config,
                self._retrieved,
            )
        except Unscorable as nothing:
            if self._retrieved is not None:
                self._record.left_unscored(self._retrieved.query, self._retrieved.context)
            return _scoring.unscored(nothing.reason)
        self._record.scoring_started(
            asked.prompt,
            asked.responses,
            is_partial=asked.is_partial,
            query=asked.query,
            context=asked.context,
        )
        if _scoring.pending() >= _MOST_HELD:
            self._record.let_go(self.answer)
        return asked.send(is_awaited=self._is_awaited())

    def _is_awaited(self) -> bool:
        return self._config.mode != "background" or self._is_evaluated

    def _must_wait(self, completion: Any, asked: Future[Verdict]) -> bool:
        """Whether the caller waits for the verdict; if not, the call goes on without it."""
        if asked.done() or self._is_awaited():
            return True
        self._go_on_alone(completion, asked)
        return False

    @contextlib.contextmanager
    def _leaving_early(self, completion: Any, asked: Future[Verdict]) -> Iterator[None]:
        """A caller who is cancelled or interrupted while waiting does not cost the score."""
        try:
            yield
        except BaseException:
            self._go_on_alone(completion, asked)
            raise

    def _go_on_alone(self, completion: Any, asked: Future[Verdict]) -> None:
        """The caller leaves; the score follows on the same trace when it comes."""
        settled: Future[Trust] = Future()
        self.trust = Trust(
            status="pending",
            trace_id=self._record.trace_id,
            span_id=self._record.span_id,
            _settled=settled,
        )
        remember(completion, self)

        def conclude(verdict: Verdict) -> bool:
            with guarded("annotating a trace", self._record.abandon):
                self._note(completion, verdict)
                self._close(self.answer, "flagged" if self._is_low() else None)
            trust = self.trust or Trust.unscored("scorer_error")
            settled.set_result(
                Trust.unscored("scorer_error") if trust.status == "pending" else trust
            )
            return True

        # Without what was asked in it: a future keeps its callbacks, and would be in a circle.
        asked.add_done_callback(
            lambda done: _scoring.later(functools.partial(conclude, done.result()))
        )

    def _note(self, completion: Any, verdict: Verdict) -> None:
        """Write the verdict on the scoring span, the trace and the returned object."""
        trust = _placed(verdict.trust, self._record)
        detail = None if verdict.error is None else str(verdict.error)
        self._record.scored(trust, detail, is_cached=verdict.is_cached)
        self.trust = trust
        _scoring.count(trust)
        _telemetry.settled(trust, self._config, self.answer)
        remember(completion, self)
        notes = _annotate.Notes(
            model=getattr(verdict.scorer, "model", None),
            preset=getattr(verdict.scorer, "preset", None),
            llm_model=self._model(),
        )
        self._record.when_placed(functools.partial(_annotated, self._record.shown(trust), notes))

    def _model(self) -> str | None:
        answer = self.answer if isinstance(self.answer, Mapping) else {}
        return answer.get("model") or self.request.get("model")

    def _close(self, answer: Any, action: str | None = None) -> None:
        if self.trust is not None:
            self._record.close(answer, self.trust, action)

    def _noted(self, completion: Any, verdict: Verdict) -> str | None:
        """Note the verdict; gives what the threshold asks for."""
        with guarded("annotating a trace", self._record.abandon):
            self._note(completion, verdict)
            if self._is_low():
                return "flagged" if self._flag_only else self._asked_for()
        return None

    def _is_low(self) -> bool:
        score = None if self.trust is None else self.trust.score
        threshold = self._config.threshold
        return score is not None and threshold is not None and score < threshold

    def _asked_for(self) -> str:
        on_low = self._config.on_low
        return "replaced" if callable(on_low) else {"flag": "flagged", "raise": "raised"}[on_low]

    def _fallback(self, completion: Any) -> Any:
        on_low = self._config.on_low
        return on_low(completion, self.trust) if callable(on_low) else completion  # type: ignore[arg-type]

    def _handed_over(self, completion: Any, verdict: Verdict) -> Any:
        decision = _Decision(completion)
        action = self._noted(completion, verdict)
        if action != "replaced":
            self._conclude(self.answer, action)
        else:
            with self._replacing(decision):
                decision.given = self._fallback(completion)
        return self._given(decision.given, action, verdict)

    async def _ahanded_over(self, completion: Any, verdict: Verdict) -> Any:
        decision = _Decision(completion)
        action = self._noted(completion, verdict)
        if action != "replaced":
            self._conclude(self.answer, action)
        else:
            with self._replacing(decision):
                given = self._fallback(completion)
                decision.given = await given if inspect.isawaitable(given) else given
        return self._given(decision.given, action, verdict)

    @contextlib.contextmanager
    def _stream_concluded(self, heard: Heard, how: str) -> Iterator[_Decision]:
        """What is held back of a stream goes to its caller with the score, or not at all."""
        completion = None
        if how == "exhausted" and self.answer is not None and not heard.is_given:
            with guarded("reading a streamed answer"):
                completion = self.endpoint.construct(self.answer)
        self._flag_only = completion is None or self._config.mode != "inline"
        decision = _Decision(completion)
        try:
            yield decision
        except BaseException:
            if self._is_low():
                heard.held.clear()
            raise
        with guarded("handing over what was held back"):
            if self.has_replaced:
                heard.replacement.append(decision.given)
            if heard.held and completion is not None:
                self._sign(heard.held[-1], completion, heard.replacement)

    def _sign(self, chunk: Any, completion: Any, replacement: list[Any]) -> None:
        """Have a stream's last chunk tell of the trust as a completion does."""
        metadata = getattr(completion, "tlm_metadata", None)
        for signed in (chunk, getattr(chunk, "response", None)):
            remember(signed, self)
            if signed is not None and metadata is not None:
                signed.tlm_metadata = dict(metadata)
                if replacement:
                    signed.tlm_metadata["replacement"] = replacement[0]

    @contextlib.contextmanager
    def _replacing(self, decision: _Decision) -> Iterator[None]:
        """The answer is low, and a fallback is asked for another."""
        output = self.answer
        try:
            with self._retrying():
                yield
            output = _shown(decision.given)
        finally:
            self._conclude(output, "replaced")

    def _conclude(self, output: Any, action: str | None) -> None:
        self._action = action
        with guarded("closing a call", self._record.abandon):
            self._close(output, action)

    @contextlib.contextmanager
    def _retrying(self) -> Iterator[None]:
        """The call's span stays open and active, so that a retry is traced inside it."""
        # Never closed: what a fallback leaves running must not be judged either, or it would
        # come back here for ever.
        retry = _scope.Scope({"threshold": None})
        before = retry.enter()
        token = self._record.activate()
        _propagation.pools.install()
        try:
            yield
        finally:
            _propagation.pools.uninstall()
            self._record.deactivate(token)
            retry.leave(before)

    def _given(self, given: Any, action: str | None, verdict: Verdict) -> Any:
        if action == "raised" and self.trust is not None:
            raise UntrustworthyResponseError(given, self.trust, self._config.threshold or 0.0)
        is_inline = self._config.mode == "inline"
        if verdict.error is not None and is_inline and self._config.on_error == "raise":
            raise verdict.error
        return given


def _shown(given: Any) -> Any:
    """What a fallback gave as it is recorded: plain data, if it is an answer."""
    with guarded("reading a fallback"):
        answer = plain(given)
        return given if answer is None else answer
    return None


def _placed(trust: Trust, record: _record.CallRecord) -> Trust:
    """A trust, and where its proof is."""
    choices = tuple(_placed(choice, record) for choice in trust.choices)
    return replace(trust, trace_id=record.trace_id, span_id=record.span_id, choices=choices)


def _annotated(trust: Trust, notes: _annotate.Notes, trace_id: str, span_id: str) -> None:
    """Write a trust on its trace: at once in memory, else in the store as soon as it has it."""
    placed = trust
    if (trust.trace_id, trust.span_id) != (trace_id, span_id):
        placed = replace(trust, trace_id=trace_id, span_id=span_id)
    if not _annotate.annotate_live(placed, notes):
        _outbox.post(functools.partial(_annotate.annotate_stored, placed, notes))


@dataclass
class _Decision:
    """What the caller gets."""

    given: Any


def flush(timeout: float | None = None) -> bool:
    """Wait for pending scores, then for their traces to be written to MLflow's store.

    Args:
        timeout: Seconds to wait at most; None waits for as long as it takes.

    Returns:
        True if nothing is left to be written.
    """
    until = None if timeout is None else time.monotonic() + timeout

    def left() -> float | None:
        return None if until is None else max(0.0, until - time.monotonic())

    if not _scoring.drain(timeout) or not _ready.flush(left()):
        return False
    # MLflow's flush knows no timeout of its own.
    exported = threading.Event()

    def export() -> None:
        with guarded("flushing MLflow"):
            _record.flush()
        exported.set()

    _threads.run_beside("flush", export)
    return exported.wait(left()) and _outbox.flush(left())
