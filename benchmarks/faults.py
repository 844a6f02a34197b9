"""A fault drill: thousands of calls, while Cleanlab and MLflow fail in every way they can.

The application is a process of its own. It makes sync and async calls, plain and streamed, one in
nine of which the LLM itself refuses, against the Sandbox in another process and a real MLflow
server that is killed, paused, locked and cut off. A third of the calls is made before a fault
begins, a third while it lasts, a third after its end. Each call has to give what a bare client
gives, hardly later, and each has to be one trace with a score or the reason for none.

    python benchmarks/faults.py [--calls 2000] [--backend sqlite] [--mode both]
                                [--only NAME ...] [--json FILE] [--markdown FILE]

The exit status is 1 if a promise is broken. Runs on Linux and macOS; PostgreSQL has to be
installed for its back end.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import logging
import os
import queue
import re
import sqlite3
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import AsyncExitStack, ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

# Before MLflow is imported: no call to the outside.
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ.setdefault("MLFLOW_MODEL_CATALOG_URI", "")

import mlflow
import openai

import tlm_tracing as tt
from tlm_tracing.scorers import HostedTLM
from tlm_tracing.testing import Sandbox
from tlm_tracing.testing._tracking import Postgres, TrackingServer, UnavailableError, Wire

MODES = ("inline", "background")
AT_ONCE = 8
TIMEOUT = 2.0  # of a score
SPARE = 2.0  # what a call may take longer than a bare one, beside the score
FIRST_CALL = 15.0  # the same for the first ones, if MLflow is away from the start
END = 20.0  # what the end of a process may take
CATCH_UP = 180.0  # what it may take to write what was kept
REFUSED_BY_LLM = 9  # one call in so many


# The application.


class Application:
    """What runs in the process of its own: makes calls as it is told, one line of JSON each."""

    def __init__(self, mode: str) -> None:
        self._mode = mode

    def prepare(self, experiment: str | None) -> None:
        """Have a scorer of which nothing bad is known, and an experiment."""
        tt.configure(scorer=HostedTLM(), timeout=TIMEOUT, mode=self._mode)
        if experiment is not None:
            mlflow.set_experiment(experiment)

    def calls(self, first: int, count: int, traced: bool) -> list[tuple[float, str | None]]:
        """Make calls, and wait for their scores.

        Returns:
            For each the seconds without that wait, and what was wrong with what it gave.
        """
        given: list[Any] = []
        made = asyncio.run(self._calls(range(first, first + count), given, traced=traced))
        until = time.monotonic() + 2 * TIMEOUT
        for trust in filter(None, map(tt.trust, given)):
            trust.wait(max(0.0, until - time.monotonic()))
        return made

    def flush(self, timeout: float) -> bool:
        """Wait until all is written."""
        return tt.flush(timeout)

    def dropped(self) -> int:
        """How much was given up."""
        return tt.stats().dropped

    async def _calls(
        self, numbers: range, given: list[Any], *, traced: bool
    ) -> list[tuple[float, str | None]]:
        at_once = asyncio.Semaphore(AT_ONCE)
        async with AsyncExitStack() as stack:
            sync: Any = stack.enter_context(openai.OpenAI(max_retries=0))
            unsync: Any = await stack.enter_async_context(openai.AsyncOpenAI(max_retries=0))
            if traced:
                sync, unsync = tt.wrap_openai(sync), tt.wrap_openai(unsync)

            async def timed(number: int) -> tuple[float, str | None]:
                async with at_once:
                    started = time.monotonic()
                    wrong = await _wrong(number, sync, unsync, given)
                    return time.monotonic() - started, wrong

            return await asyncio.gather(*(timed(number) for number in numbers))


async def _wrong(number: int, sync: Any, unsync: Any, given: list[Any]) -> str | None:
    """Make a call; gives what differs from a bare client's, None if nothing does."""
    refused = number % REFUSED_BY_LLM == 0
    question = f"What is {number} times two, and why?"
    request: dict[str, Any] = {
        "model": "sandbox:status=400" if refused else "gpt-4o",
        "messages": [{"role": "user", "content": question}],
        "stream": number // 2 % 2 == 1,
    }
    try:
        if number % 2:
            answer = await asyncio.to_thread(sync.chat.completions.create, **request)
            text = await asyncio.to_thread(_text, answer)
        else:
            answer = await unsync.chat.completions.create(**request)
            text = await _atext(answer)
        given.append(answer)
    except openai.BadRequestError as error:
        return None if refused else repr(error)
    except BaseException as error:
        return repr(error)
    expected = f"The Sandbox's answer to: {question}"
    return None if not refused and text == expected else f"The answer was {text!r}"


def _text(given: Any) -> str:
    return _joined(list(given) if isinstance(given, openai.Stream) else [given])


async def _atext(given: Any) -> str:
    is_stream = isinstance(given, openai.AsyncStream)
    return _joined([chunk async for chunk in given] if is_stream else [given])


def _joined(pieces: Sequence[Any]) -> str:
    choices = [piece.choices[0] for piece in pieces if piece.choices]
    said = [getattr(choice, "delta", None) or choice.message for choice in choices]
    return "".join(one.content or "" for one in said)


def serve(mode: str) -> None:
    """Be the application, until the standard input ends."""
    logging.basicConfig(format="%(name)s|%(message)s")
    application = Application(mode)
    print(json.dumps(None), flush=True)
    for line in sys.stdin:
        name, *arguments = json.loads(line)
        print(json.dumps(getattr(application, name)(*arguments)), flush=True)


class Child:
    """The application, seen from the drill."""

    def __init__(self, mode: str, folder: Path, uri: str, **environment: str) -> None:
        self._log = folder / f"application-{time.monotonic_ns()}.log"
        self._replies: queue.Queue[Any] = queue.Queue()
        with self._log.open("w") as log:
            self._process = subprocess.Popen(
                [sys.executable, __file__, "--application", mode],
                env={**os.environ, "MLFLOW_TRACKING_URI": uri, **environment},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
            )
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        self._replies.get(timeout=120)

    def do(self, name: str, *arguments: Any) -> Any:
        """Have it do something; gives what that gave."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps([name, *arguments]) + "\n")
        self._process.stdin.flush()
        return self._replies.get(timeout=600)

    def end(self) -> tuple[float, int | None, list[str]]:
        """Let it end; gives the seconds, its status, and what it said could not be delivered."""
        assert self._process.stdin is not None
        started, status = time.monotonic(), None
        self._process.stdin.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            status = self._process.wait(3 * END)
        seconds = time.monotonic() - started
        self.kill()
        lines = self._log.read_text("utf-8", "replace").splitlines()
        told = [line for line in lines if "could not be delivered" in line]
        return seconds, status, told

    def kill(self) -> None:
        """End it, if it has not ended."""
        self._process.kill()
        self._process.wait()
        self._reader.join()

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self._replies.put(json.loads(line))
        self._process.stdout.close()


# The faults.


@dataclass
class Scene:
    """Where faults happen."""

    sandbox: Sandbox
    server: TrackingServer
    wire: Wire
    lock: ExitStack = field(default_factory=ExitStack)

    @property
    def database(self) -> Postgres:
        """The PostgreSQL behind the server."""
        assert self.server.database is not None
        return self.server.database

    def lock_database(self) -> None:
        """Another process writes, and is not done."""
        self.lock.enter_context(
            _lock_file(self.server.folder / "mlflow.db")
            if self.server.database is None
            else _lock_tables(self.server.database.port)
        )


@contextlib.contextmanager
def _lock_file(path: Path) -> Iterator[None]:
    with contextlib.closing(sqlite3.connect(path, timeout=60, isolation_level=None)) as connection:
        connection.execute("BEGIN EXCLUSIVE")
        yield
        connection.execute("ROLLBACK")


@contextlib.contextmanager
def _lock_tables(port: int) -> Iterator[None]:
    import psycopg2  # type: ignore[import-untyped]

    connection = psycopg2.connect(host="127.0.0.1", port=port, user="mlflow", dbname="postgres")
    with contextlib.closing(connection), connection.cursor() as cursor:
        cursor.execute("LOCK TABLE trace_info, spans, experiments IN ACCESS EXCLUSIVE MODE")
        yield
        connection.rollback()


Act = Callable[[Scene], Any]
UNAVAILABLE, ERROR, LATE = "scorer_unavailable", "scorer_error", "timeout"


@dataclass(frozen=True)
class Fault:
    """Something that goes wrong.

    Attributes:
        name: What.
        begin: Has it begin.
        end: Has it end.
        reasons: Why calls may be unscored; all others have a score.
        limit: The seconds that a call may take longer in inline mode.
        from_start: Whether it lasts already when the application starts.
        outlasts: Whether it lasts until the application has ended, so that traces are lost.
        only: The back end that can have it; None for any.
        survivable: Whether the scorer's own retries may give every call its score.
    """

    name: str
    begin: Act
    end: Act
    reasons: frozenset[str] = frozenset()
    limit: float = SPARE
    from_start: bool = False
    outlasts: bool = False
    only: str | None = None
    survivable: bool = False

    @property
    def is_alone(self) -> bool:
        """Whether it needs an application of its own."""
        return self.from_start or self.outlasts


def heal(scene: Scene) -> None:
    """Have Cleanlab work again."""
    scene.sandbox.clear()


def of_tlm(name: str, *reasons: str, **behaviour: Any) -> Fault:
    """A fault of Cleanlab's."""
    # Once it is known to be away, Cleanlab is left alone for a while.
    known = {UNAVAILABLE, *reasons} if reasons else ()
    return Fault(
        f"TLM: {name}",
        lambda scene: scene.sandbox.default("tlm", **behaviour),
        heal,
        frozenset(known),
        limit=TIMEOUT + SPARE,
    )


def of_mlflow(name: str, begin: Act, end: Act, **more: Any) -> Fault:
    """A fault of MLflow's, which costs no score."""
    return Fault(f"MLflow: {name}", begin, end, **more)


def mend(scene: Scene) -> None:
    """Have the network work again."""
    scene.wire.mend()


FAULTS = (
    Fault("none", lambda scene: None, lambda scene: None),
    Fault(
        "TLM: refused",
        lambda scene: scene.sandbox.stop_side("tlm"),
        heal,
        frozenset({UNAVAILABLE, LATE}),
        limit=TIMEOUT + SPARE,
    ),
    of_tlm("slow", delay=0.5),
    of_tlm("too slow", LATE, delay=2 * TIMEOUT),
    of_tlm("hang", LATE, hang=True),
    of_tlm("429", LATE, status=429),
    of_tlm("429 and Retry-After", LATE, status=429, retry_after=1),
    Fault(
        "TLM: a burst of 500",
        lambda scene: scene.sandbox.script("tlm", *[{"status": 500}] * 20),
        heal,
        frozenset({UNAVAILABLE, LATE}),
        survivable=True,
        limit=TIMEOUT + SPARE,
    ),
    of_tlm("503 and a page", LATE, status=503, html=True),
    of_tlm("401", LATE, status=401),
    of_tlm("rubbish", LATE, garbage=True),
    of_tlm("null", ERROR, score=None),
    of_tlm("NaN", ERROR, score="nan"),
    of_tlm("disconnect", LATE, disconnect=True),
    of_tlm("disconnect in the body", LATE, disconnect="mid"),
    of_mlflow(
        "killed, restarted", lambda scene: scene.server.kill(), lambda scene: scene.server.start()
    ),
    of_mlflow("paused", lambda scene: scene.server.pause(), lambda scene: scene.server.resume()),
    of_mlflow("black hole", lambda scene: scene.wire.swallow(), mend),
    of_mlflow("connections reset", lambda scene: scene.wire.reset(), mend),
    of_mlflow("503", lambda scene: scene.wire.answer(503), mend),
    of_mlflow("429 and Retry-After", lambda scene: scene.wire.answer(429, retry_after=1), mend),
    of_mlflow("slow network", lambda scene: scene.wire.slow(0.2), mend),
    of_mlflow("database locked", Scene.lock_database, lambda scene: scene.lock.close()),
    of_mlflow(
        "database killed, restarted",
        lambda scene: scene.database.kill(),
        lambda scene: scene.database.start(),
        only="postgresql",
    ),
    of_mlflow(
        "killed before the start, restarted",
        lambda scene: scene.server.kill(),
        lambda scene: scene.server.start(),
        limit=FIRST_CALL,
        from_start=True,
    ),
    of_mlflow(
        "black hole before the start",
        lambda scene: scene.wire.swallow(),
        mend,
        limit=FIRST_CALL,
        from_start=True,
    ),
    of_mlflow(
        "killed for good",
        lambda scene: scene.server.kill(),
        lambda scene: scene.server.start(),
        outlasts=True,
    ),
)


# The drill.


@dataclass
class Row:
    """What a fault did.

    Attributes:
        fault: Which.
        mode: How calls were scored.
        calls: How many were made.
        errors: How many gave what a bare client's would not have.
        slowest: The seconds that the slowest took longer than a bare one.
        traces: How many are in the store.
        scored: How many have a score.
        reasons: How many have a reason for none.
        lost: How many are missing, or incomplete.
        told: How many of those the application said it had not delivered.
        catch_up: The seconds from the end of the fault until all was written.
        broken: The promises that were not kept.
    """

    fault: str
    mode: str
    calls: int = 0
    errors: int = 0
    slowest: float = 0.0
    traces: int = 0
    scored: int = 0
    reasons: int = 0
    lost: int = 0
    told: int = 0
    catch_up: float = 0.0
    broken: list[str] = field(default_factory=list)

    def expect(self, name: str, found: Any, wanted: Any) -> None:
        """Note a broken promise, if it is one."""
        if found != wanted:
            self.broken.append(f"{name}: {found} instead of {wanted}")


HEAD = (
    "| fault | mode | calls | errors | slowest extra s | traces | scored | with reason | lost "
    "| told | caught up s | broken |\n|---|---|--:|--:|--:|--:|--:|--:|--:|--:|--:|---|"
)
LINE = (
    "| {fault} | {mode} | {calls} | {errors} | {slowest:.2f} | {traces} | {scored} | {reasons} "
    "| {lost} | {told} | {catch_up:.1f} | {why} |"
)


def line(row: Row) -> str:
    """A row of the table."""
    return LINE.format(**asdict(row), why="; ".join(row.broken).replace("|", "/"))


class Drill:
    """Goes through the faults."""

    def __init__(self, scene: Scene, folder: Path, calls_each: int) -> None:
        self.rows: list[Row] = []
        self._scene = scene
        self._folder = folder
        self._lots = [calls_each // 3, calls_each // 3, calls_each - 2 * (calls_each // 3)]
        self._next = 1
        self._bare = 0.0

    def run(self, faults: Sequence[Fault], mode: str) -> None:
        """Go through faults, with one application for all that do not need their own."""
        shared = [fault for fault in faults if not fault.is_alone]
        alone = [fault for fault in faults if fault.is_alone]
        if shared:
            with self._child(mode) as child:
                for fault in shared:
                    self._note(self._meet(fault, Row(fault.name, mode), child))
                self._end(self.rows[-1], child)
        for fault in alone:
            self._note(self._meet_alone(fault, Row(fault.name, mode)))

    def _note(self, row: Row) -> None:
        self.rows.append(row)
        print(line(row), flush=True)

    @contextlib.contextmanager
    def _child(self, mode: str, **environment: str) -> Iterator[Child]:
        child = Child(mode, self._folder, self._scene.wire.uri, **environment)
        try:
            yield child
        finally:
            child.kill()

    def _meet(self, fault: Fault, row: Row, child: Child) -> Row:
        """An application meets a fault that begins and ends while it runs."""
        child.do("prepare", _experiment(row))
        before = child.do("dropped")
        self._measure_bare(child)
        first, second, third = self._lots
        self._call(row, child, first, SPARE)
        fault.begin(self._scene)
        try:
            self._call(row, child, second, fault.limit if row.mode == "inline" else SPARE)
        finally:
            fault.end(self._scene)
        self._recover(row, child, third, before)
        return self._judged(fault, row)

    def _meet_alone(self, fault: Fault, row: Row) -> Row:
        """A fault is there before its application, or lasts longer than that."""
        first, second, third = self._lots
        try:
            if fault.from_start:
                fault.begin(self._scene)
            with self._child(row.mode, MLFLOW_EXPERIMENT_NAME=_experiment(row)) as child:
                child.do("prepare", None)
                self._measure_bare(child)
                if fault.from_start:
                    self._call(row, child, AT_ONCE, fault.limit)
                    self._call(row, child, first + second - AT_ONCE, SPARE)
                    fault.end(self._scene)
                    self._recover(row, child, third, 0)
                else:
                    self._call(row, child, first, SPARE)
                    row.expect("written before the fault", child.do("flush", CATCH_UP), True)
                    fault.begin(self._scene)
                    self._call(row, child, second + third, SPARE)
                self._end(row, child, loses=not fault.from_start)
        finally:
            fault.end(self._scene)
        return self._judged(fault, row)

    def _measure_bare(self, child: Child) -> None:
        calls = child.do("calls", self._next, 2 * AT_ONCE, False)
        self._bare = statistics.median(seconds for seconds, _ in calls)

    def _call(self, row: Row, child: Child, count: int, limit: float) -> None:
        made = child.do("calls", self._next, count, True)
        self._next += count
        wrong = [text for _, text in made if text is not None]
        slowest = max(seconds for seconds, _ in made) - self._bare
        row.calls += count
        row.errors += len(wrong)
        row.slowest = max(row.slowest, slowest)
        if wrong:
            row.broken.append(f"{len(wrong)} callers met {wrong[0]}")
        if slowest > limit:
            row.broken.append(f"a call took {slowest:.1f} s longer, {limit:g} allowed")

    def _recover(self, row: Row, child: Child, count: int, dropped: int) -> None:
        """The fault is over: all goes well again, and what was kept is written."""
        started = time.monotonic()
        self._call(row, child, count, TIMEOUT + SPARE)
        row.expect("flushed", child.do("flush", CATCH_UP), True)
        row.catch_up = time.monotonic() - started
        row.expect("dropped", child.do("dropped") - dropped, 0)

    def _end(self, row: Row, child: Child, *, loses: bool = False) -> None:
        seconds, status, told = child.end()
        row.expect("exit status", status, 0)
        row.expect("lines on what was not delivered", len(told), int(loses))
        if seconds > END:
            row.broken.append(f"the end took {seconds:.0f} s")
        for number in re.findall(r"\b\d+\b", " ".join(told))[:1]:
            row.told = int(number)

    def _judged(self, fault: Fault, row: Row) -> Row:
        """Compare what is in the store with what was called."""
        reasons: Counter[str] = Counter()
        complete = 0
        for trace in stored(self._scene.server.uri, _experiment(row)):
            row.traces += 1
            (call,) = (span for span in trace.data.spans if span.parent_id is None)
            reason = call.attributes.get("tlm.reason")
            has_score = "trust_score" in trace.info.tags and len(trace.info.assessments) == 1
            row.scored += has_score
            reasons[str(reason)] += reason is not None
            complete += has_score != (reason is not None)
        row.reasons = reasons.total()
        row.lost = row.calls - complete
        refused = sum(
            number % REFUSED_BY_LLM == 0 for number in range(self._next - row.calls, self._next)
        )
        healthy = 0 if fault.from_start else self._lots[0]
        if row.scored < healthy - healthy // REFUSED_BY_LLM - 1:
            row.broken.append("calls before the fault have no score")
        if fault.reasons and not fault.survivable and not fault.reasons & set(+reasons):
            row.broken.append("no call met the fault")
        if not fault.outlasts:
            row.expect("traces", row.traces, row.calls)
            row.expect("lost", row.lost, 0)
            row.expect("refused by the LLM", reasons["call_failed"], refused)
        elif row.told < row.lost:
            row.broken.append(f"{row.lost} lost, but {row.told} told")
        if unexpected := set(+reasons) - fault.reasons - {"call_failed"}:
            row.broken.append(f"unscored for {', '.join(sorted(unexpected))}")
        return row


def _experiment(row: Row) -> str:
    return f"{row.fault} ({row.mode})"


def stored(uri: str, experiment: str) -> Iterator[mlflow.entities.Trace]:
    """The traces of an experiment."""
    client = mlflow.MlflowClient(tracking_uri=uri)
    found = client.get_experiment_by_name(experiment)
    token = None
    while found is not None:
        page = client.search_traces(
            locations=[found.experiment_id], max_results=100, page_token=token
        )
        yield from page
        token = page.token
        if not token:
            return


def drill(options: argparse.Namespace) -> Drill:
    """Go through all faults."""
    modes = MODES if options.mode == "both" else (options.mode,)
    faults = [
        fault
        for fault in FAULTS
        if fault.only in (None, options.backend)
        and (not options.only or any(text in fault.name for text in options.only))
    ]
    each = max(3 * AT_ONCE, options.calls // len(modes) // len(faults))
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        sandbox = stack.enter_context(Sandbox(process=True))
        server = stack.enter_context(TrackingServer(options.backend, folder=folder))
        wire = stack.enter_context(Wire(server.port))
        os.environ.update(sandbox.environment())
        result = Drill(Scene(sandbox, server, wire), folder, each)
        print(HEAD, flush=True)
        for mode in modes:
            result.run(faults, mode)
    return result


def main() -> int:
    """Run the drill; gives the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--calls", type=int, default=2000, help="in all, at least 24 a fault")
    parser.add_argument("--backend", choices=["sqlite", "postgresql"], default="sqlite")
    parser.add_argument("--mode", choices=[*MODES, "both"], default="both")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="faults with this in the name")
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--markdown", type=Path, metavar="FILE")
    parser.add_argument("--application", choices=MODES, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.application:
        serve(options.application)
        return 0
    try:
        rows = drill(options).rows
    except UnavailableError as error:
        parser.error(str(error))
    if options.json:
        options.json.write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n")
    if options.markdown:
        options.markdown.write_text("\n".join([HEAD, *map(line, rows)]) + "\n")
    calls, broken = sum(row.calls for row in rows), sum(len(row.broken) for row in rows)
    print(f"\n{calls} calls: {f'{broken} promises were broken' if broken else 'all kept'}.")
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
