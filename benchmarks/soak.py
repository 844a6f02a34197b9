"""A soak: thousands of mixed calls, a fifth of them abandoned or failing, and nothing is left over.

Sync calls in threads and async calls in tasks, plain and streamed, by every way in, inline and in
background mode, against the Sandbox in a process of its own and a SQLite store with MLflow's
default asynchronous export. In the end every call has to be one ended trace with one LLM span and
its trust status, every score and every reason the expected one; and after warm-up (the first
fifth) there must be no more open spans, threads, file descriptors or memory than before.
Streams that nobody reads or closes keep their connection until their client is closed, with or
without tlm_tracing: clients live for one lot of calls.

    python benchmarks/soak.py [--calls 10000] [--seed 0]

The exit status is 1 if anything is wrong. Runs on Linux.
"""

from __future__ import annotations

import argparse
import asyncio
import ctypes
import functools
import gc
import logging.handlers
import operator
import os
import random
import re
import sqlite3
import statistics
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack, closing, contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

# Before MLflow is imported: no call to the outside.
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ.setdefault("MLFLOW_MODEL_CATALOG_URI", "")

import mlflow
import openai
import pydantic
from mlflow.tracing.trace_manager import InMemoryTraceManager

import tlm_tracing as tt
from tlm_tracing.scorers import HostedTLM
from tlm_tracing.testing import Sandbox

MODES = ("inline", "background")
AT_ONCE = 20
# MLflow's export to SQLite is slower than the calls, and it discards what its queue of 1,000
# traces cannot hold: so many calls are made before it is waited for.
LOT = 500
# What may be more after warm-up: in any case, and for each call. A call that is kept for ever
# costs 200 to 600 of Python's memory blocks. Known are the turns of the Responses API that are
# kept (12 blocks a response, up to a limit), and some 20 calls that timers hold for half a minute.
SPARE_BLOCKS, BLOCKS_PER_CALL = 15_000, 2.5
# MLflow alone, with spans of the same shape, came to 5 MB in the soak of 10,000 calls.
SPARE_MEGABYTES, MEGABYTES_PER_CALL = 15.0, 0.0005
PARTIAL, FAILED, CANCELLED = "partial_stream", "call_failed", asyncio.CancelledError

CREATE = "chat.completions.create"
PARSE = "chat.completions.parse"
HELPER = "chat.completions.stream"
RAW = "chat.completions.with_raw_response.create"
RESPONSE = "responses.create"


@dataclass(frozen=True)
class Kind:
    """How calls go.

    Attributes:
        weight: So many of 100 calls.
        method: What is called.
        model: Steers the Sandbox.
        stream: Whether the answer is streamed.
        leaves: How a stream is left; None exhausts it.
        meets: What the caller meets.
        reason: Why there is no score.
    """

    weight: int
    method: str
    model: str = "gpt-4o"
    stream: bool = False
    leaves: str | None = None
    meets: type[BaseException] | None = None
    reason: str | None = None


stream = functools.partial(Kind, stream=True)
left = functools.partial(stream, reason=PARTIAL)
KINDS = (
    Kind(14, CREATE),
    Kind(8, PARSE),
    Kind(8, RAW),
    Kind(6, RESPONSE),
    stream(18, CREATE),
    stream(10, HELPER),
    stream(10, RAW),
    stream(6, RESPONSE),
    # A fifth is abandoned or fails.
    left(2, CREATE, leaves="break"),
    left(2, CREATE, leaves="close"),
    left(1, CREATE, leaves="unread"),
    left(1, CREATE, leaves="hold"),
    stream(1, CREATE, leaves="read later"),
    left(1, HELPER, leaves="break"),
    left(1, HELPER, leaves="consumer"),
    left(1, CREATE, leaves="consumer"),
    left(1, RESPONSE, leaves="consumer"),
    left(1, CREATE, leaves="consumer", meets=InterruptedError),
    left(1, CREATE, "sandbox:chunk_delay=60", meets=CANCELLED),
    Kind(1, CREATE, "sandbox:hang=true", meets=CANCELLED, reason=FAILED),
    left(1, CREATE, "sandbox:stream_error=2", meets=openai.APIError),
    left(1, CREATE, "sandbox:disconnect=2", meets=Exception),
    left(1, CREATE, "sandbox:truncate=2"),
    Kind(1, CREATE, "sandbox:disconnect=1", meets=openai.APIConnectionError, reason=FAILED),
    Kind(1, CREATE, "sandbox:status=400", meets=openai.BadRequestError, reason=FAILED),
    Kind(1, CREATE, "sandbox:status=429", meets=openai.RateLimitError, reason=FAILED),
)


class Answer(pydantic.BaseModel):
    """A structured output."""

    text: str


@functools.cache
def trusted(function: Any, mode: str) -> Any:
    """A trusted function, decorated once as at its definition."""
    return tt.trusted(mode=mode)(function)


def text_of(piece: Any) -> str:
    """The text of an answer or a chunk, the type of an event."""
    if not hasattr(piece, "choices"):
        return str(getattr(piece, "output_text", None) or getattr(piece, "type", ""))
    choice = piece.choices[0]
    said = choice.delta if hasattr(choice, "delta") else choice.message
    return said.content or ""


@dataclass
class Call:
    """One call to be made. What is named with an ``a`` is the async twin."""

    kind: Kind
    way: str
    mode: str
    client: Any
    question: str
    held: list[tuple[Kind, Any]]
    reached: asyncio.Event = field(default_factory=asyncio.Event)

    def _request(self) -> Any:
        ask: dict[str, Any] = {"model": self.kind.model}
        asked = [{"role": "user", "content": self.question}]
        ask["input" if self.kind.method == RESPONSE else "messages"] = asked
        if self.kind.method == PARSE:
            ask["response_format"] = Answer
        if self.kind.stream and self.kind.method != HELPER:
            ask["stream"] = True
        return operator.attrgetter(self.kind.method)(self.client)(**ask)

    def _given(self, given: Any) -> Any:
        given = given.parse() if self.kind.method == RAW else given
        if self._leaves_by("hold", "read later"):
            self.held.append((self.kind, given))
        return nullcontext(given)

    def _leaves_by(self, *how: str) -> bool:
        return self.kind.leaves in how

    def _pieces(self) -> Iterator[str]:
        given = self._request()
        with given if self.kind.method == HELPER else self._given(given) as answer:
            if not self.kind.stream:
                yield text_of(answer)
            elif not self._leaves_by("unread", "read later"):
                for chunk in answer:
                    yield text_of(chunk)
                    if self._leaves_by("break", "close", "hold"):
                        break
            if self._leaves_by("close"):
                answer.close()

    async def _apieces(self) -> AsyncIterator[str]:
        given = self._request()
        async with given if self.kind.method == HELPER else self._given(await given) as answer:
            if not self.kind.stream:
                yield text_of(answer)
            elif not self._leaves_by("unread", "read later"):
                async for chunk in answer:
                    yield text_of(chunk)
                    if self._leaves_by("break", "close", "hold"):
                        break
            if self._leaves_by("close"):
                await answer.close()

    def _consume(self, pieces: Iterator[str]) -> str:
        text = ""
        for piece in pieces:
            text += piece
            if self._has_enough():
                break
        return text

    async def _aconsume(self, pieces: AsyncIterator[str]) -> str:
        text = ""
        async for piece in pieces:
            text += piece
            self.reached.set()
            if self._has_enough():
                break
        return text

    def _has_enough(self) -> bool:
        enough = self._leaves_by("consumer")
        if enough and self.kind.meets is not None:
            raise self.kind.meets
        return enough

    def make(self) -> None:
        """Make the call, by its way in."""
        if self.way == "function":
            trusted(Call._consume, self.mode)(self, self._pieces())
        elif self.way == "generator":
            self._consume(trusted(Call._pieces, self.mode)(self))
        else:
            with tt.trusted_span(mode=self.mode) if self.way == "block" else nullcontext():
                self._consume(self._pieces())

    async def amake(self) -> None:
        """Make the call, by its way in."""
        if self.way == "function":
            await trusted(Call._aconsume, self.mode)(self, self._apieces())
        elif self.way == "generator":
            await self._aconsume(trusted(Call._apieces, self.mode)(self))
        else:
            async with tt.trusted_span(mode=self.mode) if self.way == "block" else nullcontext():
                await self._aconsume(self._apieces())

    async def acancelled(self) -> None:
        """Be cancelled: in the middle of a stream, or before the answer."""
        task, middle = asyncio.create_task(self.amake()), asyncio.create_task(self.reached.wait())
        patience = None if self.kind.stream else 0.1
        await asyncio.wait({task, middle}, timeout=patience, return_when=asyncio.FIRST_COMPLETED)
        middle.cancel()
        task.cancel()
        await task


class Soak:
    """Makes calls, and notes what they leave behind."""

    def __init__(self, calls: int, seed: int, sandbox: Sandbox) -> None:
        self.made: Counter[str | None] = Counter()
        self.rows: list[dict[str, float]] = []
        self.wrong: Counter[str] = Counter()
        self._calls = calls
        self._random = random.Random(seed)
        self._sandbox = sandbox
        self._at_once = asyncio.Semaphore(AT_ONCE)

    async def run(self) -> None:
        """Make all calls, some at once, and measure after each lot."""
        started, pool = time.monotonic(), ThreadPoolExecutor(AT_ONCE)
        list(pool.map(lambda barrier: barrier.wait(), [threading.Barrier(AT_ONCE)] * AT_ONCE))
        asyncio.get_running_loop().set_default_executor(pool)
        print("  calls  seconds  calls/s  open spans  traces held  threads  fds   blocks  RSS MB")
        while self.made.total() < self._calls:
            begun = time.monotonic()
            lot = min(LOT, self._calls // 10)
            await self._make(lot, number=len(self.rows))
            rate = lot / (time.monotonic() - begun)
            await self._settle()
            seconds = time.monotonic() - started
            row = {"calls": self.made.total(), "seconds": seconds, "rate": rate, **measured()}
            self.rows.append(row)
            print(
                "{calls:7} {seconds:8.1f} {rate:8.1f} {open:11} {held:12} {threads:8} {fds:4} "
                "{blocks:8} {rss:7.1f}".format(**row),
                flush=True,
            )

    async def _make(self, lot: int, number: int) -> None:
        """Make calls at the same time, with clients that last as long as these calls."""
        ways = ["function", "generator", "block", "wrapped", "autolog"][: 4 + number % 2]
        tt.autolog(disable="autolog" not in ways, mode=MODES[number // 2 % 2])
        kinds = [kind for kind in KINDS for _ in range(kind.weight * lot // 100)]
        self._random.shuffle(kinds)
        held: list[tuple[Kind, Any]] = []
        async with AsyncExitStack() as stack:
            clients: dict[tuple[bool, str], Any] = {}
            for mode in ("bare", *MODES):
                sync = stack.enter_context(openai.OpenAI(max_retries=0))
                unsync = await stack.enter_async_context(openai.AsyncOpenAI(max_retries=0))
                for client in (sync, unsync) if mode in MODES else ():
                    tt.wrap_openai(client, mode=mode)
                clients |= {(True, mode): sync, (False, mode): unsync}
            calls = []
            for kind in kinds:
                is_sync = kind.meets is not CANCELLED and self._random.random() < 0.5
                way, mode = self._random.choice(ways), self._random.choice(MODES)
                client = clients[is_sync, mode if way == "wrapped" else "bare"]
                question = f"What is {self._random.randrange(10**6)} times two, and why?"
                call = Call(kind, way, mode, client, question, held)
                calls.append(self._go(call, is_sync=is_sync))
            await asyncio.gather(*calls)
            await self._come_back(held)

    async def _go(self, call: Call, *, is_sync: bool) -> None:
        async with self._at_once:
            with self._expecting(call.kind):
                if is_sync:
                    await asyncio.to_thread(call.make)
                else:
                    await (call.acancelled() if call.kind.meets is CANCELLED else call.amake())

    @contextmanager
    def _expecting(self, kind: Kind) -> Iterator[None]:
        self.made[kind.reason] += 1
        met = None
        try:
            yield
        except BaseException as error:
            met = error
        if not isinstance(met, kind.meets or type(None)):
            self.wrong[f"{kind} met {met!r}"] += 1

    async def _come_back(self, held: list[tuple[Kind, Any]]) -> None:
        """End the streams whose function or block is long over."""
        while held:
            kind, stream = held.pop()
            if kind.leaves == "hold":
                continue
            if isinstance(stream, openai.Stream):
                await asyncio.to_thread(list, stream)
            else:
                _ = [chunk async for chunk in stream]

    async def _settle(self) -> None:
        """Wait until all that is done later is done."""
        gc.collect()
        await asyncio.sleep(0.1)  # the loop closes dropped async generators in tasks of its own
        if not await asyncio.to_thread(tt.flush, 300):
            self.wrong["flush left something"] += 1
        # Kept-alive connections are as many as were once needed at the same time.
        self._sandbox.stop_side("tlm")
        self._sandbox.start_side("tlm")
        gc.collect()

    def judge(self, database: Path) -> None:
        """Compare what is counted, stored and left over with what has to be."""
        stats, calls, scored = tt.stats(), self.made.total(), self.made.pop(None)
        warm = self.rows[len(self.rows) // 5 - 1 :]
        checks: dict[str, tuple[Any, Any]] = {
            "reasons": (stats.unscored, dict(self.made)),
            "scored": (stats.scored, scored),
            "pending": (stats.pending, 0),
            "dropped": (stats.dropped, 0),
        }
        with closing(sqlite3.connect(database)) as connection:
            for name, query in QUERIES.items():
                found = connection.execute(f"select count(*) from {query}").fetchone()[0]
                wanted = {"calls": calls, "scored": scored}.get(name.split()[-1], 0)
                checks[name] = (found, wanted)
        for name in ("open", "held", "threads", "fds"):
            checks[f"growth of {name}"] = (warm[-1][name] - warm[0][name], 0)
        for name, (found, wanted) in checks.items():
            print(f"{name:34} {found}")
            self.wrong[f"{name}: {found} instead of {wanted}"] += found != wanted
        self._judge_memory("blocks", warm, SPARE_BLOCKS, BLOCKS_PER_CALL)
        self._judge_memory("rss", warm, SPARE_MEGABYTES, MEGABYTES_PER_CALL)

    def _judge_memory(
        self, name: str, rows: list[dict[str, float]], spare: float, per_call: float
    ) -> None:
        """Judge by the trend, because single readings come and go."""
        calls = [row["calls"] for row in rows]
        trend = statistics.linear_regression(calls, [row[name] for row in rows]).slope
        growth, most = (each * (calls[-1] - calls[0]) for each in (trend, per_call))
        text = f"{growth:.1f}, that is {1000 * trend:.2f} per 1,000 calls"
        print(f"{'growth of ' + name:34} {text}")
        self.wrong[f"growth of {name}: {text}"] += growth > spare + most


_LLM = "name in ('openai.chat.completions', 'openai.responses')"
_SPANS = "(select span_id from spans)"
_STATUS = "(select request_id from trace_tags where key = 'trust_status')"
QUERIES = {
    "traces of calls": "trace_info",
    "traces with an LLM span, of calls": f"(select distinct trace_id from spans where {_LLM})",
    "LLM spans of calls": f"spans where {_LLM}",
    "scoring spans of scored": "spans where name = 'tlm.trustworthiness'",
    "assessments of scored": "assessments",
    "traces in progress": "trace_info where status = 'IN_PROGRESS'",
    "spans without an end": "spans where end_time_unix_nano is null",
    "spans without their parent": f"spans where parent_span_id not in {_SPANS}",
    "traces without trust_status": f"trace_info where request_id not in {_STATUS}",
}


def measured() -> dict[str, float]:
    """What this process holds."""
    manager = InMemoryTraceManager.get_instance()  # type: ignore[no-untyped-call]
    with manager._lock:
        traces = list(manager._traces.values())
    spans = [span for trace in traces for span in trace.span_dict.values()]
    with suppress(AttributeError):  # only glibc has it: what it keeps for later is no growth
        ctypes.CDLL(None).malloc_trim(0)
    resident = re.findall(r"VmRSS:\s+(\d+)", Path("/proc/self/status").read_text())
    return {
        "open": sum(span.end_time_ns is None for span in spans),
        "held": len(traces),
        "threads": threading.active_count(),
        "fds": len(os.listdir("/proc/self/fd")),
        "blocks": sys.getallocatedblocks(),
        "rss": int(resident[0]) / 1024,
    }


def main() -> int:
    """Run the soak; gives the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--calls", type=int, default=10_000, help="a multiple of 1,000")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    if options.calls < 1000 or options.calls % 1000:
        parser.error("--calls must be a multiple of 1,000")
    complaints = logging.handlers.BufferingHandler(capacity=sys.maxsize)
    complaints.setLevel(logging.WARNING)
    # Python says so of async streams of bare clients, too, when the collector ends them.
    complaints.addFilter(lambda record: "closing of asynchronous gen" not in record.getMessage())
    for name in ("tlm_tracing", "mlflow", "asyncio"):
        logging.getLogger(name).addHandler(complaints)
    with tempfile.TemporaryDirectory() as folder, Sandbox(process=True) as sandbox:
        os.environ.update(sandbox.environment())
        database = Path(folder, "mlflow.db")
        mlflow.set_tracking_uri(f"sqlite:///{database}")
        mlflow.set_experiment("soak")
        tt.configure(scorer=HostedTLM())
        soak = Soak(options.calls, options.seed, sandbox)
        asyncio.run(soak.run())
        soak.judge(database)
    soak.wrong.update(f"{record.name}: {record.getMessage()}" for record in complaints.buffer)
    wrong = [f"{count} x {text}" for text, count in soak.wrong.items() if count]
    print("\n".join(["The soak failed:", *wrong] if wrong else ["The soak passed."]))
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
