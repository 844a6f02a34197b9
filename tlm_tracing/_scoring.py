"""Score: the runtime that asks scorers, on one event loop in one daemon thread.

Every other arrangement of the TLM clients hangs, leaks or raises: one loop, a cap before the
clock starts, a deadline always, and a breaker when the back end is gone. Inline callers wait
for the future that they get, background ones don't.
"""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import functools
import logging
import math
import os
import threading
import time
from collections import Counter, OrderedDict
from collections.abc import Awaitable, Callable, Coroutine, Mapping
from concurrent.futures import Future
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from tlm_tracing import _outbox, _scope, _threads
from tlm_tracing._config import Config
from tlm_tracing._data import REASONS, Scorer, Trust
from tlm_tracing._limits import Breaker, Budget, Gate
from tlm_tracing._visible import visible
from tlm_tracing.exceptions import ScoringError

_logger = logging.getLogger("tlm_tracing")

_CLOSING = 5.0
# Scores that nobody waits for begin so many seconds apart at least, then all that there are.
_MOMENT = 0.01
_MOST_SCORERS = 256
_TRUSTWORTHINESS = "trustworthiness"
_LONGEST_NAME = 250  # of an assessment, in MLflow

Find = Callable[[], Scorer]
Ask = Callable[[Scorer], Awaitable[Any]]
Settling = Callable[[], Coroutine[Any, Any, None]]


class Verdict(NamedTuple):
    """What became of one request for a score."""

    trust: Trust
    error: ScoringError | None = None
    scorer: Scorer | None = None
    is_cached: bool = False


@dataclass(frozen=True)
class Stats:
    """What this process has done so far.

    Attributes:
        scored: Calls that got a score.
        pending: Calls that wait for theirs.
        unscored: Calls without a score, counted by reason.
        dropped: Scores and spans that could not be written.
        seconds: Time that scorers took, all scores together.
    """

    scored: int
    pending: int
    unscored: dict[str, int]
    dropped: int
    seconds: float


class _Runtime:
    """The loop, the limits and the counters of one process."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.settled = threading.Condition(self.lock)
        self.breakers: OrderedDict[int, tuple[Scorer, Breaker]] = OrderedDict()
        self.budget = Budget()
        self.gate = Gate()
        self.warned: set[str] = set()
        self.asked = 0
        self.pending = 0
        self.following: set[Future[Verdict]] = set()
        self.tasks: set[asyncio.Future[None]] = set()
        self.scored = 0
        self.dropped = 0
        self.seconds = 0.0
        self.unscored: Counter[str] = Counter()
        self.chores = _threads.Chores(self._drop)
        self._loop: asyncio.AbstractEventLoop | None = None
        self._coming: list[tuple[contextvars.Context, Settling]] = []
        self._is_woken = False

    def start(self) -> asyncio.AbstractEventLoop:
        """Start the scoring loop, unless it runs; gives it."""
        with self.lock:
            if self._loop is None:
                self._loop = _threads.start_loop()
                self.ending = self._loop.create_future()
                self.chores.start()
            return self._loop

    def settle_soon(
        self, loop: asyncio.AbstractEventLoop, context: contextvars.Context, settling: Settling
    ) -> None:
        """Settle a score for which nobody waits, with those of the next moment.

        In a burst, to wake the loop's thread for each would cost calls more than the score does.
        """
        with self.lock:
            self._coming.append((context, settling))
            if not self._is_woken:
                loop.call_soon_threadsafe(self._settle_coming)
                # Last: if Ctrl-C comes before it, the next score wakes the loop again.
                self._is_woken = True

    def _settle_coming(self) -> None:
        with self.lock:
            coming, self._coming = self._coming, []
            self._is_woken = bool(coming)
        for context, settling in coming:
            context.run(self.settle, settling)
        if coming:
            asyncio.get_running_loop().call_later(_MOMENT, self._settle_coming)

    def settle(self, settling: Settling) -> None:
        """Settle a score; runs on the scoring loop, in the context that is to be the score's."""
        task = asyncio.ensure_future(settling())
        self.tasks.add(task)  # the loop itself would not keep it
        task.add_done_callback(self.tasks.discard)

    def breaker(self, scorer: Scorer) -> Breaker:
        """The scorer's own breaker; runs on the scoring loop."""
        if id(scorer) not in self.breakers:
            self.breakers[id(scorer)] = (scorer, Breaker())
            if len(self.breakers) > _MOST_SCORERS:
                # Someone makes a scorer for each call; an evicted one that is used again
                # opens anew.
                _, (oldest, _) = self.breakers.popitem(last=False)
                self._closing = asyncio.ensure_future(_close([oldest]))
        self.breakers.move_to_end(id(scorer))
        return self.breakers[id(scorer)][1]

    def warn_once(self, key: str, message: str) -> None:
        """Say it the first time only: an outage must not fill the log."""
        if key not in self.warned:
            self.warned.add(key)
            _logger.warning(message)

    def _drop(self, error: Exception | None) -> None:
        with self.lock:
            self.dropped += 1
        why = "the store has no such trace" if error is None else str(error)
        self.warn_once("dropped", f"A score or span could not be written: {why}.")


def submit(find: Find, ask: Ask, config: Config, *, is_awaited: bool = True) -> Future[Verdict]:
    """Ask for a score.

    Args:
        find: Gives the scorer; runs on the scoring loop.
        ask: Gives the scorer the exchange; runs on the scoring loop.
        config: The settings in force.
        is_awaited: Whether somebody waits for it, so that it is asked for at once.

    Returns:
        A future that always gets a verdict and never an exception.
    """
    verdict: Future[Verdict] = Future()
    loop = _runtime.start()
    with _runtime.lock:
        _runtime.asked += 1
        _runtime.pending += 1
    # In the caller's context, for scorers that look into it, but for the block they are in: a
    # timer that was cancelled keeps its context until its time has come.
    context = contextvars.copy_context()
    context.run(_scope.forget)
    settling = functools.partial(_settle, find, ask, config, verdict)
    if is_awaited:
        loop.call_soon_threadsafe(_runtime.settle, settling, context=context)
    else:
        _runtime.settle_soon(loop, context, settling)
    return verdict


def follow(verdict: Future[Verdict]) -> None:
    """Count a call that waits, too, though another has asked for its score."""
    # Without the lock: the other's verdict is handed over inside of it.
    following = _runtime.following
    following.add(verdict)
    verdict.add_done_callback(following.discard)


@functools.lru_cache(maxsize=len(REASONS))
def unscored(reason: str) -> Future[Verdict]:
    """The verdict on what is not even sent to a scorer; nobody can change it."""
    verdict: Future[Verdict] = Future()
    verdict.set_result(Verdict(Trust.unscored(reason)))
    return verdict


def count(trust: Trust) -> None:
    """Count a settled call."""
    with _runtime.lock:
        if trust.status == "scored":
            _runtime.scored += 1
            _runtime.seconds += trust.seconds or 0.0
        else:
            _runtime.unscored[str(trust.reason)] += 1


def pending() -> int:
    """How many scores are waited for."""
    return _runtime.pending + len(_runtime.following)


def stats() -> Stats:
    """What this process has done so far."""
    with _runtime.lock:
        return Stats(
            scored=_runtime.scored,
            pending=_runtime.pending + len(_runtime.following),
            unscored=dict(_runtime.unscored),
            dropped=_runtime.dropped + _outbox.dropped(),
            seconds=_runtime.seconds,
        )


def later(chore: Callable[[], bool]) -> None:
    """Do something soon on another thread, again and again until it gives True.

    Safe from any thread and inside any lock: a finalizer may be run by the garbage collector.

    Args:
        chore: Gives False if it could not be done yet. Dropped, counted and logged after
            60 seconds.
    """
    _runtime.chores.add(chore)


def drain(timeout: float | None) -> bool:
    """Wait until nothing is pending and every chore is done.

    Args:
        timeout: Seconds to wait at most; None waits for as long as it takes.
    """
    until = None if timeout is None else time.monotonic() + timeout

    def left() -> float | None:
        return None if until is None else max(0.0, until - time.monotonic())

    while True:
        with _runtime.settled:
            if not _runtime.settled.wait_for(lambda: _runtime.pending == 0, left()):
                return False
            asked = _runtime.asked
        if not _runtime.chores.wait(left()):
            return False
        if _runtime.asked == asked:  # no chore has asked for another score meanwhile
            return True


def give_up() -> None:
    """Wait for no score any more: what is pending is unscored."""
    _runtime.start().call_soon_threadsafe(_end)


def _end() -> None:
    if not _runtime.ending.done():
        _runtime.ending.set_result(None)


def close_scorers() -> None:
    """Close what scorers hold open. The loop itself ends with the process."""
    scorers = [scorer for scorer, _ in _runtime.breakers.values()]
    if scorers:
        closing = asyncio.run_coroutine_threadsafe(_close(scorers), _runtime.start())
        with contextlib.suppress(Exception):
            closing.result(_CLOSING)


async def _settle(find: Find, ask: Ask, config: Config, verdict: Future[Verdict]) -> None:
    try:
        result = await _judge(find, ask, config, verdict)
    except BaseException as error:
        _logger.exception("tlm_tracing could not ask for a score; the call is unscored.")
        result = _failure(error)
    with _runtime.settled:
        # In one step: whoever sees that nothing is pending finds every verdict handed over.
        if not verdict.done():
            verdict.set_result(result)
        _runtime.pending -= 1
        _runtime.settled.notify_all()


async def _judge(find: Find, ask: Ask, config: Config, verdict: Future[Verdict]) -> Verdict:
    if _runtime.gate.is_full(config.max_concurrency, config.queue_size):
        return Verdict(Trust.unscored("queue_full"))
    await _runtime.gate.enter(config.max_concurrency)
    try:
        try:
            scorer = find()
        except Exception as error:
            _runtime.warn_once(f"find {config.scorer}", f"No score can be given: {error}")
            return _failure(error)
        if _runtime.ending.done():
            return _failure(_too_late(), scorer)
        return await _ask_within_bounds(ask, scorer, config, verdict)
    finally:
        _runtime.gate.leave()


async def _ask_within_bounds(
    ask: Ask, scorer: Scorer, config: Config, verdict: Future[Verdict]
) -> Verdict:
    breaker = _runtime.breaker(scorer)
    started = time.monotonic()
    admission = breaker.admit(started)
    if admission == "no":
        return _unavailable(scorer)
    limit = config.max_scores_per_minute
    if not _runtime.budget.take(limit, started, scorer.name, is_probe=admission == "probe"):
        breaker.inconclusive()
        return Verdict(replace(Trust.unscored("budget"), scorer=scorer.name))
    if admission == "probe" and config.mode == "inline":
        # Its caller must not pay for finding out, so it goes on without the answer.
        verdict.set_result(_unavailable(scorer))
    try:
        result = as_trust(await _with_deadline(ask(scorer), config.timeout))
    except Exception as error:
        failure = _failure(error, scorer)
        return _note_failure(failure, breaker, scorer, started, visible(config))
    now = time.monotonic()
    breaker.succeeded(now)
    return Verdict(replace(result, scorer=scorer.name, seconds=now - started), None, scorer)


def _note_failure(
    failure: Verdict,
    breaker: Breaker,
    scorer: Scorer,
    started: float,
    see: Callable[[Any], Any],
) -> Verdict:
    error = failure.error
    if error is not None and error.outage:
        breaker.failed(started, time.monotonic(), error.retry_after)
        _runtime.warn_once(f"outage {scorer.name}", f"{scorer.name} is unavailable: {error}")
    else:
        breaker.inconclusive()
        told = f"{scorer.name} gave no score: {see(str(error))}"
        _runtime.warn_once(f"error {scorer.name}", told)
    return failure


async def _with_deadline(asking: Awaitable[Any], timeout: float) -> Any:
    task = asyncio.ensure_future(asking)
    # Not wait_for: it would wait for a scorer that does not let itself be cancelled.
    await asyncio.wait(
        {task, _runtime.ending}, timeout=timeout, return_when=asyncio.FIRST_COMPLETED
    )
    # Some versions of aiohttp end a request whose time has run out as cancelled.
    if task.done() and not task.cancelled():
        return task.result()
    task.cancel()
    task.add_done_callback(_forget)
    if _runtime.ending.done():
        raise _too_late()
    raise ScoringError(f"No score within {timeout:g} seconds.", reason="timeout", outage=True)


def _too_late() -> ScoringError:
    return ScoringError("The process ended before the score came.", reason="timeout")


def _forget(task: asyncio.Future[Any]) -> None:
    if not task.cancelled():
        task.exception()


def _failure(error: BaseException, scorer: Scorer | None = None) -> Verdict:
    if not isinstance(error, ScoringError):
        cause = error
        error = ScoringError(f"{type(cause).__name__}: {cause}")
        error.__cause__ = cause
    trust = replace(Trust.unscored(error.reason), scorer=scorer.name if scorer else None)
    return Verdict(trust, error, scorer)


def _unavailable(scorer: Scorer) -> Verdict:
    return _failure(
        ScoringError(
            f"Scorer {scorer.name} did not answer lately and is left alone for a while.",
            reason="scorer_unavailable",
        ),
        scorer,
    )


def as_trust(result: Any) -> Trust:
    """Read a scorer's result.

    Args:
        result: A number, a :class:`Trust`, or one of Cleanlab's dicts.

    Returns:
        A scored trust with a finite score in [0, 1], or an unscored one as the scorer gave it.

    Raises:
        ScoringError: If there is no usable score in the result.
    """
    if isinstance(result, Trust):
        if result.status == "unscored" and result.reason in REASONS:
            return result
        return replace(
            result,
            score=_checked(result.score),
            status="scored",
            reason=None,
            evals=_evals(result.evals),
        )
    if isinstance(result, Mapping):
        score, log, evals = _parts(result)
        explanation = log.get("explanation")
        return Trust(
            score=_checked(score),
            explanation=None if explanation is None else str(explanation),
            fields=_fields(log.get("per_field_score")),
            evals=_evals(evals),
        )
    return Trust(score=_checked(result))


def _parts(result: Mapping[str, Any]) -> tuple[Any, Mapping[str, Any], Any]:
    """Score, log and evals of one of Cleanlab's dicts."""
    told = result.get(_TRUSTWORTHINESS)
    if not isinstance(told, Mapping):
        return result.get("trustworthiness_score"), _log(result), result.get("evals")
    # That of its TrustworthyRAG, where a response may be told as well.
    evals = {name: one for name, one in result.items() if isinstance(one, Mapping)}
    return told.get("score"), _log(told), evals


def _log(told: Mapping[str, Any]) -> Mapping[str, Any]:
    log = told.get("log")
    return log if isinstance(log, Mapping) else {}


def _evals(scores: Any) -> Mapping[str, float] | None:
    """The scores beside the trust by name; what is no score, or can't have a name, is left out."""
    if not isinstance(scores, Mapping):
        return None
    evals: dict[str, float] = {}
    for name, told in scores.items():
        if _is_name(name) and name != _TRUSTWORTHINESS:
            with contextlib.suppress(ScoringError):
                evals[name] = _checked(told.get("score") if isinstance(told, Mapping) else told)
    return evals or None


def _is_name(name: Any) -> bool:
    # One that a store does not take would cost the whole trace.
    return isinstance(name, str) and 0 < len(name) <= _LONGEST_NAME and name.isprintable()


def _fields(scores: Any) -> Mapping[str, Trust] | None:
    """Cleanlab's ``per_field_score``; what of it is no score is left out."""
    if not isinstance(scores, Mapping):
        return None
    fields: dict[str, Trust] = {}
    for name, told in scores.items():
        if isinstance(told, Mapping):
            with contextlib.suppress(ScoringError):
                fields[str(name)] = Trust(
                    score=_checked(told.get("score")), explanation=told.get("explanation")
                )
    return fields or None


def _checked(value: Any) -> float:
    try:
        score = float(value)
    except (TypeError, ValueError):
        raise ScoringError(f"The scorer gave no number but {value!r:.100}.") from None
    if not math.isfinite(score) or not 0.0 <= score <= 1.0:
        raise ScoringError(f"The scorer gave {score!r}, which is not a score in [0, 1].")
    return score


async def _close(scorers_to_close: list[Scorer]) -> None:
    for scorer in scorers_to_close:
        with contextlib.suppress(Exception):
            await scorer.aclose()


def _after_fork() -> None:
    """A forked child has none of its parent's threads; it starts anew."""
    global _runtime
    _runtime = _Runtime()


_runtime = _Runtime()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
