"""Score: the runtime that asks scorers, on one event loop in one daemon thread.

Every other arrangement of the TLM clients hangs, leaks or raises: one loop, a cap before the
clock starts, a deadline always, and a breaker when the back end is gone. Inline callers wait
for the future that they get, background ones don't.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import queue
import threading
import time
from collections import Counter, OrderedDict
from collections.abc import Awaitable, Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from tlm_tracing._config import Config
from tlm_tracing._data import Scorer, Trust, as_trust
from tlm_tracing._limits import Breaker, Budget, Gate
from tlm_tracing.exceptions import ScoringError

_logger = logging.getLogger("tlm_tracing")

_RETRY_EVERY = 0.25
_KEEP_TRYING = 60.0
_EXIT_GRACE = 5.0
_LAST_WORDS = 2.0
_MOST_SCORERS = 256

Find = Callable[[], Scorer]
Ask = Callable[[Scorer], Awaitable[Any]]


class Verdict(NamedTuple):
    """What became of one request for a score."""

    trust: Trust
    error: ScoringError | None = None
    scorer: Scorer | None = None


@dataclass(frozen=True)
class Stats:
    """What this process has done so far.

    Attributes:
        scored: Calls that got a score.
        pending: Calls that wait for theirs.
        unscored: Calls without a score, counted by reason.
        dropped: Scores that could not be written on their trace.
        seconds: Time that scorers took, all scores together.
    """

    scored: int
    pending: int
    unscored: dict[str, int]
    dropped: int
    seconds: float


class _Runtime:
    """The threads, the loop and the counters of one process."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.settled = threading.Condition(self.lock)
        self.breakers: OrderedDict[int, tuple[Scorer, Breaker]] = OrderedDict()
        self.budget = Budget()
        self.gate = Gate()
        self.warned: set[str] = set()
        self.pending = 0
        self.scored = 0
        self.dropped = 0
        self.seconds = 0.0
        self.unscored: Counter[str] = Counter()
        self.chores: queue.SimpleQueue[_Chore] = queue.SimpleQueue()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._chore_thread: threading.Thread | None = None

    @property
    def loop(self) -> asyncio.AbstractEventLoop:
        """The scoring loop, started on first use."""
        with self.lock:
            if self._loop is None:
                self._loop = asyncio.new_event_loop()
                self.ending = self._loop.create_future()
                _start_thread(_run_loop, self._loop)
                # Not atexit: MLflow's own flush at exit must come after the last score, and
                # threads that are no daemons are waited for before that.
                _start_thread(_see_out, self, daemon=False)
            return self._loop

    def start_chores(self) -> None:
        """Start the thread that does what must not be done on the caller's or the loop's."""
        with self.lock:
            if self._chore_thread is None:
                self._chore_thread = _start_thread(_do_chores, self.chores)

    def breaker(self, scorer: Scorer) -> Breaker:
        """The scorer's own breaker; runs on the scoring loop."""
        if id(scorer) not in self.breakers:
            self.breakers[id(scorer)] = (scorer, Breaker())
            if len(self.breakers) > _MOST_SCORERS:
                # Someone makes a scorer for each call; an evicted one that is used again
                # opens anew.
                _, (oldest, _) = self.breakers.popitem(last=False)
                self._closing = asyncio.ensure_future(_close([oldest]))
        return self.breakers[id(scorer)][1]

    def warn_once(self, key: str, message: str) -> None:
        """Say it the first time only: an outage must not fill the log."""
        if key not in self.warned:
            self.warned.add(key)
            _logger.warning(message)

    def give_up(self) -> None:
        """Wait for no score any more: what is pending is unscored."""
        self.loop.call_soon_threadsafe(self.ending.set_result, None)

    def close_scorers(self) -> None:
        """Close what scorers hold open. The loop itself ends with the process."""
        scorers = [scorer for scorer, _ in self.breakers.values()]
        closing = asyncio.run_coroutine_threadsafe(_close(scorers), self.loop)
        with contextlib.suppress(Exception):
            closing.result(_EXIT_GRACE)


def submit(find: Find, ask: Ask, config: Config) -> Future[Verdict]:
    """Ask for a score.

    Args:
        find: Gives the scorer; runs on the scoring loop.
        ask: Gives the scorer the exchange; runs on the scoring loop.
        config: The settings in force.

    Returns:
        A future that always gets a verdict and never an exception.
    """
    verdict: Future[Verdict] = Future()
    with _runtime.lock:
        _runtime.pending += 1
    asyncio.run_coroutine_threadsafe(_settle(find, ask, config, verdict), _runtime.loop)
    return verdict


def count(trust: Trust) -> None:
    """Count a settled call."""
    with _runtime.lock:
        if trust.status == "scored":
            _runtime.scored += 1
            _runtime.seconds += trust.seconds or 0.0
        else:
            _runtime.unscored[str(trust.reason)] += 1


def stats() -> Stats:
    """What this process has done so far."""
    with _runtime.lock:
        return Stats(
            scored=_runtime.scored,
            pending=_runtime.pending,
            unscored=dict(_runtime.unscored),
            dropped=_runtime.dropped,
            seconds=_runtime.seconds,
        )


def later(chore: Callable[[], bool]) -> None:
    """Do something soon on another thread, again and again until it gives True.

    Safe from any thread and inside any lock: a finalizer may be run by the garbage collector.

    Args:
        chore: Gives False if it could not be done yet. Dropped, counted and logged after
            60 seconds.
    """
    _runtime.chores.put(_Chore(chore, time.monotonic() + _KEEP_TRYING))
    _runtime.start_chores()


def drain(timeout: float | None) -> bool:
    """Wait until nothing is pending and every chore is done.

    Args:
        timeout: Seconds to wait at most; None waits for as long as it takes.
    """
    until = None if timeout is None else time.monotonic() + timeout
    with _runtime.settled:
        if not _runtime.settled.wait_for(lambda: _runtime.pending == 0, timeout):
            return False
    done = threading.Event()

    def reached() -> bool:
        done.set()
        return True

    _runtime.chores.put(_Chore(reached, float("inf"), last=True))
    _runtime.start_chores()
    return done.wait(None if until is None else max(0.0, until - time.monotonic()))


async def _settle(find: Find, ask: Ask, config: Config, verdict: Future[Verdict]) -> None:
    try:
        result = await _judge(find, ask, config, verdict)
    except BaseException as error:
        _logger.exception("tlm_tracing could not ask for a score; the call is unscored.")
        result = _failure(error)
    with _runtime.settled:
        _runtime.pending -= 1
        _runtime.settled.notify_all()
    if not verdict.done():
        verdict.set_result(result)


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
    if not _runtime.budget.take(config.max_scores_per_minute, started):
        breaker.inconclusive()
        return Verdict(replace(Trust.unscored("budget"), scorer=scorer.name))
    if admission == "probe" and config.mode == "inline":
        # Its caller must not pay for finding out, so it goes on without the answer.
        verdict.set_result(_unavailable(scorer))
    try:
        result = as_trust(await _with_deadline(ask(scorer), config.timeout))
    except Exception as error:
        return _note_failure(_failure(error, scorer), breaker, scorer, started)
    now = time.monotonic()
    breaker.succeeded(now)
    return Verdict(replace(result, scorer=scorer.name, seconds=now - started), None, scorer)


def _note_failure(failure: Verdict, breaker: Breaker, scorer: Scorer, started: float) -> Verdict:
    error = failure.error
    if error is not None and error.outage:
        breaker.failed(started, time.monotonic(), error.retry_after)
        _runtime.warn_once(f"outage {scorer.name}", f"{scorer.name} is unavailable: {error}")
    else:
        breaker.inconclusive()
        _runtime.warn_once(f"error {scorer.name}", f"{scorer.name} gave no score: {error}")
    return failure


async def _with_deadline(asking: Awaitable[Any], timeout: float) -> Any:
    task = asyncio.ensure_future(asking)
    # Not wait_for: it would wait for a scorer that does not let itself be cancelled.
    await asyncio.wait(
        {task, _runtime.ending}, timeout=timeout, return_when=asyncio.FIRST_COMPLETED
    )
    if task.done():
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


class _Chore(NamedTuple):
    """Something to be done until it succeeds, or until it is too late."""

    do: Callable[[], bool]
    until: float
    last: bool = False


def _do_chores(chores: queue.SimpleQueue[_Chore]) -> None:
    unfinished: list[_Chore] = []
    while True:
        try:
            chore = chores.get(timeout=_RETRY_EVERY if unfinished else None)
        except queue.Empty:
            pass
        else:
            unfinished.append(chore)
        unfinished = [chore for chore in unfinished if not _done(chore, alone=len(unfinished) == 1)]


def _done(chore: _Chore, *, alone: bool) -> bool:
    if chore.last and not alone:
        return False
    try:
        if chore.do():
            return True
    except Exception:
        _logger.warning("tlm_tracing could not write a score on its trace.", exc_info=True)
    if time.monotonic() < chore.until:
        return False
    with _runtime.lock:
        _runtime.dropped += 1
    _runtime.warn_once("dropped", "A score could not be written: the store has no such trace.")
    return True


class _DaemonThreads(ThreadPoolExecutor):
    """A daemon thread for each job of the loop, such as to look up an address.

    A pool takes no job once the process is about to end, when the last scores are still being
    asked for, and a job that hangs would hold up the exit.
    """

    def submit(self, function: Any, /, *args: Any, **kwargs: Any) -> Future[Any]:
        job: Future[Any] = Future()

        def run() -> None:
            if not job.set_running_or_notify_cancel():
                return
            try:
                result = function(*args, **kwargs)
            except BaseException as error:
                job.set_exception(error)
            else:
                job.set_result(result)

        threading.Thread(target=run, name="tlm-tracing-job", daemon=True).start()
        return job


def _run_loop(loop: asyncio.AbstractEventLoop) -> None:
    asyncio.set_event_loop(loop)
    loop.set_default_executor(_DaemonThreads())
    loop.run_forever()


async def _close(scorers_to_close: list[Scorer]) -> None:
    for scorer in scorers_to_close:
        with contextlib.suppress(Exception):
            await scorer.aclose()


def _see_out(runtime: _Runtime) -> None:
    """Wait for the main thread to end, then for the last scores, then close up."""
    threading.main_thread().join()
    if not drain(_EXIT_GRACE):
        runtime.give_up()
        drain(_LAST_WORDS)
    runtime.close_scorers()


def _start_thread(
    target: Callable[[Any], None], arg: Any, *, daemon: bool = True
) -> threading.Thread:
    name = "tlm-tracing" + target.__name__.replace("_", "-")
    thread = threading.Thread(target=target, args=(arg,), name=name, daemon=daemon)
    thread.start()
    return thread


def _after_fork() -> None:
    """A forked child has none of its parent's threads; it starts anew."""
    global _runtime
    _runtime = _Runtime()


_runtime = _Runtime()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
