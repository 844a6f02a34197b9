"""Run: read, score and write stored traces, all at the same time and each within bounds."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import queue
import threading
import time
from collections.abc import Awaitable, Iterator
from dataclasses import replace
from datetime import datetime, timezone
from typing import Any, TypeAlias, TypeVar

from mlflow.entities import Trace, TraceInfo
from mlflow.exceptions import MlflowException

from tlm_tracing import _threads
from tlm_tracing._bulk import Addition, Store
from tlm_tracing._data import Status
from tlm_tracing._outbox import Refused
from tlm_tracing._stored._judge import FINAL, Judge, Wanted
from tlm_tracing._stored._late import Judged, addition
from tlm_tracing._stored._plan import Plan
from tlm_tracing._stored._rows import Progress, ScoredCall
from tlm_tracing._stored._search import is_final, is_new
from tlm_tracing.exceptions import TLMTracingError

_logger = logging.getLogger("tlm_tracing")

_CHUNKS_AHEAD = 2
_MOST_UNWRITTEN = 400
_BATCH = 50
_LINGER = 1.0
_WRITERS = 2
_ROWS_AHEAD = 8
# A store that does not take what was scored is waited for about a minute.
_PAUSES = (0.5, 2.0, 8.0, 20.0, 30.0)
_TELL_EVERY = 0.5
_POLL = 0.2
# What has not been drawn is not drawn for again.
_DONE_WITH = FINAL | {"sampled_out"}

T = TypeVar("T")
Chunk: TypeAlias = list[Trace | TraceInfo]


class Run:
    """A run in a thread and on an event loop of its own; its rows come as they are written.

    Attributes:
        progress: How far it is.
        is_outage: Whether it has ended early, as the scorer was unavailable for too long.
    """

    def __init__(self, plan: Plan, done: set[str] | None = None) -> None:
        """Nothing has begun.

        Args:
            plan: What to do.
            done: Ids of traces that an earlier run has found nothing to score in; those that this
                one finds are added.
        """
        self.progress = Progress()
        self.is_outage = False
        self._done = set() if done is None else done
        self._plan = plan
        self._started = time.monotonic()
        self._told = 0.0
        self._tell_failed = False
        self._stopped = threading.Event()
        self._unread = threading.Event()
        self._rows: queue.Queue[list[ScoredCall] | BaseException | None] = queue.Queue(_ROWS_AHEAD)
        self._thread: threading.Thread | None = None
        self._loop: asyncio.AbstractEventLoop | None = None

    def start(self) -> Run:
        """Begin."""
        self._started = time.monotonic()
        self._thread = _threads.start("stored", self._work)
        return self

    def next(self) -> list[ScoredCall] | None:
        """Wait for some more rows; None when there are no more.

        Raises:
            TLMTracingError: If the store can't be written.
            MlflowException: If it can't be read.
        """
        rows = self._rows.get()
        if isinstance(rows, BaseException):
            raise rows
        return rows

    def stop(self) -> None:
        """Read and send no more; the rows of what was sent still come."""
        self._stopped.set()
        with contextlib.suppress(RuntimeError):  # it is over already
            if self._loop is not None:
                self._loop.call_soon_threadsafe(self._hurry)

    def end(self) -> None:
        """Stop, and wait until what was sent is written; nobody reads its rows."""
        self._unread.set()
        self.stop()
        if self._thread is not None:
            self._thread.join()

    def _work(self) -> None:
        try:
            _threads.run(self._run())
        except BaseException as error:
            self._hand_over(error)
        else:
            self._hand_over(None)

    async def _run(self) -> None:
        self._judge = Judge(self._plan)
        self._ending = asyncio.Event()
        self._loop = asyncio.get_running_loop()
        if self._stopped.is_set():
            self._hurry()
        self._store = Store(self._plan.client)
        self._chunks: asyncio.Queue[Chunk | None] = asyncio.Queue(_CHUNKS_AHEAD)
        self._judged: asyncio.Queue[tuple[Any, list[Judged]] | None] = asyncio.Queue()
        self._room = asyncio.Semaphore(_MOST_UNWRITTEN)
        self._unscored = set(self._done)
        self._left = self._plan.limit
        writers = 1 if self._plan.dry_run else _WRITERS
        steps = [self._read(), self._score(writers), *(self._write() for _ in range(writers))]
        try:
            await _together(*steps, *([self._count()] if self._plan.tell else []))
        finally:
            await asyncio.to_thread(self._store.close)
            self._tell(now=True)
        self.is_outage = self._judge.is_outage
        if self.is_outage:
            _logger.warning(
                "The scorer was unavailable for too long, so the run has ended early. What was "
                "scored is written; the same again goes on from there."
            )

    # Reading.

    async def _read(self) -> None:
        chunks = self._plan.chunks(self._unscored)
        while not self._is_over():
            chunk = await self._before_end(asyncio.to_thread(next, chunks, None))
            if chunk is None:
                break
            await self._chunks.put(chunk)
        await self._chunks.put(None)

    async def _count(self) -> None:
        total = await self._before_end(asyncio.to_thread(self._plan.count))
        limit = self._plan.limit
        if total is None:
            return
        self.progress = replace(self.progress, total=total if limit is None else min(total, limit))

    async def _before_end(self, reading: Awaitable[T]) -> T | None:
        """What is read; None as soon as nobody waits for it: a store that is away takes minutes."""
        read, ending = asyncio.ensure_future(reading), asyncio.ensure_future(self._ending.wait())
        try:
            await asyncio.wait({read, ending}, return_when=asyncio.FIRST_COMPLETED)
            return read.result() if read.done() else None
        finally:
            read.cancel()
            ending.cancel()

    def _hurry(self) -> None:
        self._ending.set()
        self._judge.hurry()

    def _is_over(self) -> bool:
        return self._stopped.is_set() or self._judge.is_outage or self._left == 0

    # Scoring.

    async def _score(self, writers: int) -> None:
        asking: set[asyncio.Task[None]] = set()
        while (chunk := await self._chunks.get()) is not None:
            for trace in chunk:
                found = self._judge.look(trace) if isinstance(trace, Trace) else []
                if self._is_over() or not self._may_send(found):
                    break
                await self._room.acquire()
                task = asyncio.create_task(self._score_one(trace, found))
                asking.add(task)
                task.add_done_callback(asking.discard)
        await asyncio.gather(*asking)
        for _ in range(writers):
            await self._judged.put(None)

    def _may_send(self, found: list[Judged | Wanted]) -> bool:
        """Whether what is wanted is within the limit; if so it is counted."""
        if self._left is not None and any(isinstance(one, Wanted) for one in found):
            self._left -= 1
            return self._left >= 0
        return True

    async def _score_one(self, trace: Trace | TraceInfo, found: list[Judged | Wanted]) -> None:
        judged: list[Judged] = []
        if isinstance(trace, Trace):
            judged = await self._judge.judge(trace.info, found)
            reasons = {one.trust.reason for one in judged if one.trust.score is None}
            if "budget" in reasons and not any(one.is_new for one in judged):
                self._room.release()  # stopped before anything of it was sent
                return
            if reasons or not judged:
                self._unscored.add(trace.info.trace_id)
            if reasons <= _DONE_WITH and (reasons or not judged):
                self._done.add(trace.info.trace_id)
        await self._judged.put((trace, judged))

    # Writing.

    async def _write(self) -> None:
        is_last = False
        while not is_last:
            batch: list[tuple[Any, list[Judged]]] = []
            is_last = await self._fill(batch)
            if batch:
                await self._write_batch(batch)

    async def _fill(self, batch: list[tuple[Any, list[Judged]]]) -> bool:
        """Take what is there, waiting a moment for more; gives whether that was the last."""
        until = None
        while len(batch) < _BATCH:
            left = None if until is None else max(0.0, until - time.monotonic())
            try:
                one = await asyncio.wait_for(self._judged.get(), left)
            except asyncio.TimeoutError:
                return False
            if one is None:
                return True
            batch.append(one)
            until = until or time.monotonic() + _LINGER
        return False

    async def _write_batch(self, batch: list[tuple[Any, list[Judged]]]) -> None:
        if not self._plan.dry_run:
            await self._store_all(batch)
        rows = [row for trace, judged in batch for row in _rows(trace, judged)]
        self.progress = replace(
            self.progress,
            traces=self.progress.traces + len(batch),
            scored=self.progress.scored + sum(row.status == "scored" for row in rows),
            unscored=self.progress.unscored + sum(row.status != "scored" for row in rows),
            characters=self._judge.characters,
        )
        self._tell()
        await asyncio.to_thread(self._hand_over, rows)
        for _ in batch:
            self._room.release()

    async def _store_all(self, batch: list[tuple[Any, list[Judged]]]) -> None:
        additions = [
            addition(trace.info, judged, self._plan.config)
            for trace, judged in batch
            if isinstance(trace, Trace) and all(one.trust.status != "pending" for one in judged)
        ]
        if not self._plan.assessments:
            additions = [replace(one, assessments=()) for one in additions]
        wanted = [one for one in additions if one.spans or one.tags or one.assessments]
        for pause in (*_PAUSES, None):
            try:
                return await asyncio.to_thread(self._write_present, wanted)
            except (MlflowException, OSError, Refused) as error:
                if pause is None or isinstance(error, Refused):
                    raise TLMTracingError(
                        f"MLflow's store does not take the scores: {error}. What is written "
                        "already stays; the same again goes on from there."
                    ) from error
            await asyncio.sleep(pause)
        return None

    def _write_present(self, wanted: list[Addition]) -> None:
        """Write; what has been deleted since it was read is left out."""
        try:
            self._store.write(wanted)
        except Refused:
            present = [one for one in wanted if self._store.has(one.info)]
            if len(present) == len(wanted):
                raise
            self._write_present(present)

    # Telling.

    def _hand_over(self, rows: list[ScoredCall] | BaseException | None) -> None:
        while not self._unread.is_set():
            with contextlib.suppress(queue.Full):
                self._rows.put(rows, timeout=_POLL)
                return
        # Nobody reads any more, but who waits already must not wait for ever.
        with contextlib.suppress(queue.Full):
            self._rows.put_nowait(rows)

    def _tell(self, *, now: bool = False) -> None:
        at = time.monotonic()
        if self._plan.tell is None or (at - self._told < _TELL_EVERY and not now):
            return
        self._told = at
        self.progress = replace(self.progress, seconds=at - self._started)
        try:
            self._plan.tell(self.progress)
        except Exception as error:
            if not self._tell_failed:
                _logger.warning(
                    "The progress callable failed with %s: %s.", type(error).__name__, error
                )
            self._tell_failed = True


async def _together(*steps: Awaitable[None]) -> None:
    """Wait for all; the first that fails ends the others."""
    tasks = [asyncio.ensure_future(step) for step in steps]
    try:
        await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def _rows(trace: Trace | TraceInfo, judged: list[Judged]) -> Iterator[ScoredCall]:
    info = trace.info if isinstance(trace, Trace) else trace
    if not judged:
        yield _without_calls(info, has_spans=isinstance(trace, Trace))
    for one in judged:
        trust, asked = one.trust, one.asked
        yield ScoredCall(
            info.trace_id,
            one.call.span_id,
            _moment(one.call.llm.start_time_ns / 1e9),
            None if asked is None else asked.prompt,
            None if asked is None else asked.responses[0],
            trust.score,
            trust.explanation,
            trust.status,
            trust.reason,
        )


def _without_calls(info: TraceInfo, *, has_spans: bool) -> ScoredCall:
    is_pending = not is_final(info) or (not has_spans and is_new(info))
    status: Status = "pending" if is_pending else "unscored"
    reason = None if is_pending else "empty" if has_spans else "unsupported_content"
    began = _moment(info.timestamp_ms / 1e3)
    return ScoredCall(info.trace_id, None, began, None, None, None, None, status, reason)


def _moment(seconds: float) -> datetime:
    return datetime.fromtimestamp(seconds, timezone.utc)
