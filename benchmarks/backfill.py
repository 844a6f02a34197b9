"""Backfill: tens of thousands of stored traces are scored, beside the notebook's way.

A real MLflow server, on SQLite or PostgreSQL, has traces as ``mlflow.openai.autolog()`` leaves
them. Each way of scoring them is a process of its own, with an experiment of its own that has the
same content, against the Sandbox in another process with a service time as of Cleanlab's:

- the notebook's way (https://github.com/cleanlab/cleanlab-tools, TLM-MLflow-Integration): search,
  one batch of ``TLM.get_trustworthiness_score``, two ``set_trace_tag`` for each trace. In three
  parts, before, between and after the others. Its rate does not depend on the number of traces;
- ``tt.iter_scores``, with tags and scoring span, with the assessments as well, and by several
  processes that share the work;
- each road alone: reading, asking TLM, writing spans and tags, writing assessments.

What was written is read back from the database, for each trace, and by MLflow's client for some.

    python benchmarks/backfill.py [--traces 20000] [--backend sqlite] [--data FILE.jsonl]
                                  [--notebook-traces 2000] [--latency 0.2] [--shards 8]
                                  [--concurrency N] [--workers N]
                                  [--out FILE.json] [--markdown FILE.md]

Without a data file, texts of usual lengths are made up. The MLflow server has its default number
of workers. Mind that with more than one it waits some 40 ms before each answer on a kept-alive
connection (its sockets have Nagle's algorithm on), which costs the notebook's way, one request
after the other, the most: ``--workers 1`` compares without that.

The exit status is 1 if a goal is missed. Runs on Linux; PostgreSQL has to be installed for its
back end.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, TypeAlias

from _measure import Verdict, about, cpu_seconds  # before MLflow, which it keeps quiet

# isort: split
import mlflow
from _stores import SCORING_SPAN, SYSTEM, Row, Server, Store, Stored, rows, stored

import tlm_tracing as tt
from tlm_tracing.testing import Sandbox
from tlm_tracing.testing._tracking import UnavailableError

NOTEBOOK_PARTS = 3
BATCH = 50  # traces that are written together when that is measured alone, as it is in tlm_tracing
END = 60.0  # seconds that a process may take to end, all being done
# The goals.
FASTER_WITH_TAGS, FASTER_WITH_ASSESSMENTS = 3.0, 2.0
DEARER = 1.25  # than the sum of the roads
GROWTH = 1.05  # of the peak of memory: what single readings differ by

Job: TypeAlias = Mapping[str, Any]
Work: TypeAlias = Callable[[], int]


# The ways, each in a process of its own. What is made before the work begins is not measured.


def notebook(job: Job) -> Work:
    """The notebook's cells."""
    from cleanlab_tlm import TLM

    def work() -> int:
        client = mlflow.MlflowClient()
        traces: Any = mlflow.search_traces(
            locations=[job["experiment_id"]], max_results=job["traces"], return_type="list"
        )
        prompts, responses = [], []
        for trace in traces:
            messages = json.loads(trace.data.request)["messages"]
            answer = json.loads(trace.data.response)
            prompts.append(messages[0]["content"] + "\n" + messages[1]["content"])
            responses.append(answer["choices"][0]["message"]["content"])
        tlm = TLM(options={"log": ["explanation"]})
        found: Any = tlm.get_trustworthiness_score(prompts, responses)
        for trace, told in zip(traces, found, strict=True):
            trace_id = trace.info.trace_id
            client.set_trace_tag(trace_id, "trust_score", str(told["trustworthiness_score"]))
            client.set_trace_tag(trace_id, "explanation", told["log"]["explanation"])
        return len(traces)

    return work


def ours(job: Job) -> Work:
    """Ours, with the settings of the package but for those that were asked for."""
    settings: dict[str, Any] = {"shard": job["shard"], "assessments": job["assessments"]}
    if job["concurrency"]:
        settings["max_concurrency"] = job["concurrency"]
    score = tt.iter_scores

    def work() -> int:
        return sum(
            call.status == "scored"
            for call in score(experiment_ids=[job["experiment_id"]], **settings)
        )

    return work


def reading(job: Job) -> Work:
    """Search, and the whole traces in bulk."""
    from mlflow.tracing.client import TracingClient

    from tlm_tracing._stored import _search

    def work() -> int:
        client = TracingClient()
        asked = _search.query([job["experiment_id"]])
        return sum(
            len(_search.traces(client, infos)) for infos in _search.newest_first(client, asked)
        )

    return work


def asking(job: Job) -> Work:
    """Requests to TLM, as many at once as were in flight in ours."""
    import aiohttp

    url = os.environ["CLEANLAB_API_BASE_URL"] + "/v0/trustworthy_llm/get_confidence_score"
    headers = {"Authorization": f"bearer {os.environ['CLEANLAB_TLM_API_KEY']}"}
    texts = iter(_stored(job))

    async def post(session: aiohttp.ClientSession) -> int:
        count = 0
        for one in texts:
            body = {
                "prompt": f"System: {SYSTEM}\n\nUser: {one.row.prompt}\n\nAssistant:",
                "response": {"response": one.row.response},
                "quality": "medium",
                "task": "default",
                "options": {"model": "gpt-4.1-mini", "log": ["explanation"]},
            }
            async with session.post(url, json=body, headers=headers) as response:
                response.raise_for_status()
                count += "confidence_score" in await response.json()
        return count

    async def post_all() -> int:
        connector = aiohttp.TCPConnector(limit=0)
        async with aiohttp.ClientSession(connector=connector) as session:
            return sum(await asyncio.gather(*(post(session) for _ in range(job["concurrency"]))))

    return lambda: asyncio.run(post_all())


def writing(job: Job) -> Work:
    """Spans and tags, those of many traces together."""
    return lambda: _write(job, _scored)


def assessing(job: Job) -> Work:
    """Assessments, one a request."""
    return lambda: _write(job, _assessed)


def _write(job: Job, made: Callable[[Any, Stored], dict[str, Any]]) -> int:
    from mlflow.entities import TraceInfo, TraceLocation, TraceState
    from mlflow.tracing.client import TracingClient

    from tlm_tracing import _bulk

    place = TraceLocation.from_experiment_id(job["experiment_id"])
    tags = {"mlflow.trace.spansLocation": "TRACKING_STORE"}
    store = _bulk.Store(TracingClient())
    traces, count = iter(_stored(job)), 0
    while some := list(islice(traces, BATCH)):
        infos = [TraceInfo(one.trace_id, place, 0, TraceState.OK, tags=tags) for one in some]
        store.write(
            [_bulk.Addition(info, **made(info, one)) for info, one in zip(infos, some, strict=True)]
        )
        count += len(some)
    store.close()
    return count


def _scored(info: Any, trace: Stored) -> dict[str, Any]:
    from mlflow.entities import Span

    row, began = trace.row, time.time_ns()
    attributes = {
        "mlflow.traceRequestId": info.trace_id,
        "mlflow.spanType": "EVALUATOR",
        "mlflow.spanInputs": {"prompt": f"{SYSTEM}{row.prompt}", "response": row.response},
        "mlflow.spanOutputs": {
            "trust_score": row.score,
            "explanation": row.explanation,
            "status": "scored",
        },
        "mlflow.chat.tokenUsage": {"input_tokens": 0, "output_tokens": 0, "total_tokens": 0},
        "tlm.trustworthiness_score": row.score,
        "tlm.status": "scored",
        "tlm.scorer": "cleanlab-tlm/medium",
        "tlm.seconds": 0.2,
        "tlm.scored_at": "2026-01-01T00:00:00+00:00",
    }
    span = {
        "trace_id": info.trace_id,
        "span_id": f"{int(trace.span_id, 16) ^ 1:016x}",
        "parent_span_id": trace.span_id,
        "name": SCORING_SPAN,
        "start_time_unix_nano": began,
        "end_time_unix_nano": began + 200_000_000,
        "events": [],
        "status": {"code": "OK", "message": ""},
        "attributes": {key: json.dumps(value) for key, value in attributes.items()},
    }
    tags = {
        "trust_score": f"{row.score:.4f}",
        "explanation": row.explanation,
        "trust_status": "scored",
    }
    return {"spans": [Span.from_dict(span)], "tags": tags}


def _assessed(info: Any, trace: Stored) -> dict[str, Any]:
    from mlflow.entities import AssessmentSource, Feedback

    feedback = Feedback(
        name="trustworthiness",
        value=trace.row.score,
        rationale=trace.row.explanation,
        source=AssessmentSource(source_type="LLM_JUDGE", source_id="cleanlab-tlm/medium"),
        metadata={"mlflow.scorer.framework": "cleanlab-tlm", "preset": "medium"},
        trace_id=info.trace_id,
        span_id=trace.span_id,
    )
    feedback.assessment_id = f"a-{trace.trace_id.removeprefix('tr-')}"
    return {"assessments": [feedback]}


def _stored(job: Job) -> list[Stored]:
    data = None if job["data"] is None else Path(job["data"])
    return list(stored(job["experiment"], job["traces"], rows(data)))


WAYS: Mapping[str, Callable[[Job], Work]] = {
    way.__name__: way for way in (notebook, ours, reading, asking, writing, assessing)
}


def serve(way: str, job: Job) -> None:
    """Be a process that goes one way, when a line comes in."""
    work = WAYS[way](job)
    print(flush=True)
    sys.stdin.readline()
    cpu, begun = time.process_time(), time.perf_counter()
    count = work()
    seconds, cpu = time.perf_counter() - begun, time.process_time() - cpu
    # Not getrusage, in which a process begins with the peak of the one that started it.
    peak = re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())
    megabytes = 0.0 if peak is None else int(peak[1]) / 1024
    told = {"traces": count, "seconds": seconds, "cpu": cpu, "megabytes": megabytes}
    print(json.dumps(told), flush=True)


class Client:
    """Such a process, seen from the benchmark."""

    def __init__(self, way: str, job: Job) -> None:
        self._child = subprocess.Popen(
            [sys.executable, __file__, "--way", way, "--job", json.dumps(job)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: object) -> None:
        self._child.kill()
        self._child.communicate()

    def until_ready(self) -> None:
        """Wait until it can begin."""
        assert self._child.stdout is not None
        if not self._child.stdout.readline():
            raise RuntimeError("A client ended before it began.")

    def go(self) -> None:
        """Have it begin."""
        assert self._child.stdin is not None
        self._child.stdin.write("\n")
        self._child.stdin.flush()

    def result(self) -> dict[str, Any]:
        """Wait for its end; gives what it tells."""
        assert self._child.stdout is not None
        line = self._child.stdout.readline()
        if not line:
            raise RuntimeError("A client failed.")
        self._child.wait(END)
        return dict(json.loads(line))


# What is measured.

PARTS = ("client", "server", "database")


@dataclass
class Measured:
    """What one way took.

    Attributes:
        name: Which.
        traces: How many it was.
        seconds: From the first line of work to the last; no start of a process, no imports.
        cpu: Seconds of CPU by part: client, server, database, sandbox.
        megabytes: The client's largest resident memory; of several clients, the largest.
        requests: How many came to TLM.
        in_flight: How many of them at once, at most.
        faults: What is not as it should be in the store afterwards.
    """

    name: str
    traces: int
    seconds: float
    cpu: dict[str, float]
    megabytes: float
    requests: int
    in_flight: int
    faults: list[str] = field(default_factory=list)

    @property
    def rate(self) -> float:
        """Traces a second."""
        return self.traces / self.seconds

    def milliseconds(self, *parts: str) -> float:
        """CPU for each trace; of client, server and database unless others are named."""
        return 1000 * sum(self.cpu[part] for part in parts or PARTS) / self.traces


HEAD = (
    "| way | traces | seconds | traces/s | CPU ms/trace | client | server | database | sandbox "
    "| peak MB | TLM requests | in flight | faults |\n"
    "|---|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|---|"
)


def line(one: Measured) -> str:
    """A row of the table."""
    shown = [
        one.name,
        str(one.traces),
        f"{one.seconds:.1f}",
        f"{one.rate:.1f}",
        f"{one.milliseconds():.2f}",
        *(f"{one.milliseconds(part):.2f}" for part in (*PARTS, "sandbox")),
        f"{one.megabytes:.0f}",
        str(one.requests),
        str(one.in_flight),
        "; ".join(one.faults).replace("|", "/") or "none",
    ]
    return f"| {' | '.join(shown)} |"


@dataclass(frozen=True)
class Plan:
    """An experiment, and the way that goes through it.

    Attributes:
        name: For the table.
        way: One of ``WAYS``.
        experiment: The experiment's name.
        traces: How many of its traces are scored.
        shards: By how many clients at the same time.
        assessments: Whether assessments are written.
    """

    name: str
    way: str
    experiment: str
    traces: int
    shards: int | None = None
    assessments: bool = False


TAGS, FULL = "ours, tags and span", "ours, with assessments"
READING, ASKING = "reading alone", "asking TLM alone"
WRITING, ASSESSING = "writing spans and tags alone", "writing assessments alone"
ROADS = {TAGS: [READING, ASKING, WRITING], FULL: [READING, ASKING, WRITING, ASSESSING]}


def plans(options: argparse.Namespace) -> list[Plan]:
    """What is measured, in this order, the notebook's way before, between and after the others."""
    count, part = options.traces, max(1, options.notebook_traces // NOTEBOOK_PARTS)
    beside = [
        Plan(f"notebook {number}", "notebook", f"notebook-{number}", part)
        for number in range(1, NOTEBOOK_PARTS + 1)
    ]
    few = max(1, count // 4)
    return [
        beside[0],
        Plan(READING, "reading", "roads", count),
        Plan(TAGS, "ours", "tags", count),
        Plan(ASKING, "asking", "roads", count),
        beside[1],
        Plan(FULL, "ours", "full", count, assessments=True),
        Plan(WRITING, "writing", "roads", count),
        Plan(ASSESSING, "assessing", "roads", count),
        beside[2],
        Plan(f"ours, with assessments, {few} traces", "ours", "few", few, assessments=True),
        Plan(
            f"ours, with assessments, {options.shards} processes",
            *("ours", "shards", count, options.shards),
            assessments=True,
        ),
    ]


class Benchmark:
    """Goes all the ways."""

    def __init__(
        self, sandbox: Sandbox, server: Server, made_of: Sequence[Row], options: argparse.Namespace
    ) -> None:
        self.store = Store(server)
        self.filled: dict[str, Any] = {}
        self._sandbox, self._server = sandbox, server
        self._made_of, self._options = made_of, options
        self._experiments: dict[str, str] = {}
        self._concurrency = options.concurrency or tt.Config().max_concurrency

    def fill(self, wanted: Sequence[Plan]) -> None:
        """Make the traces of all experiments."""
        begun = time.monotonic()
        template = self.store.template(self._sandbox)
        sizes = {plan.experiment: plan.traces for plan in wanted}
        for experiment, count in sizes.items():
            self._experiments[experiment] = self.store.fill(
                template, experiment, count, self._made_of
            )
        self.store.settle()
        self.filled = {"traces": sum(sizes.values()), "seconds": time.monotonic() - begun}

    def measure(self, plan: Plan) -> Measured:
        """Go a way, and look at what it has left."""
        self._prepare_sandbox()
        with ExitStack() as stack:
            clients = [stack.enter_context(Client(plan.way, job)) for job in self._jobs(plan)]
            for client in clients:
                client.until_ready()
            before = self._cpu()
            for client in clients:
                client.go()
            told = [client.result() for client in clients]
            cpu = {part: after - before[part] for part, after in self._cpu().items()}
        arrived = [request.json for request in self._sandbox.requests("tlm")]
        found = Measured(
            plan.name,
            sum(one["traces"] for one in told),
            max(one["seconds"] for one in told),
            {"client": sum(one["cpu"] for one in told), **cpu},
            max(one["megabytes"] for one in told),
            len(arrived),
            self._sandbox.max_in_flight("tlm"),
        )
        found.faults = list(self._faults(plan, found, arrived))
        if plan.way == "ours" and plan.shards is None:
            self._concurrency = found.in_flight
        return found

    def _jobs(self, plan: Plan) -> Iterator[dict[str, Any]]:
        data = self._options.data
        is_ours = plan.way == "ours"
        for part in range(1, (plan.shards or 1) + 1):
            yield {
                "experiment": plan.experiment,
                "experiment_id": self._experiments[plan.experiment],
                "traces": plan.traces,
                "shard": None if plan.shards is None else (part, plan.shards),
                "assessments": plan.assessments,
                "concurrency": self._options.concurrency if is_ours else self._concurrency,
                "data": None if data is None else str(data),
            }

    def _prepare_sandbox(self) -> None:
        self._sandbox.clear()
        self._sandbox.default("tlm", delay=self._options.latency)
        self._sandbox.load(
            {**asdict(row), "prompt": prompt}
            for row in self._made_of
            for prompt in (row.prompt, f"{SYSTEM}\n{row.prompt}")
        )

    def _cpu(self) -> dict[str, float]:
        server, database = self._server.pids()
        child: Any = self._sandbox._running
        pids = {"server": server, "database": database, "sandbox": child._child.pid}
        return {part: cpu_seconds(pid) for part, pid in pids.items()}

    def _faults(self, plan: Plan, found: Measured, arrived: Sequence[Any]) -> Iterator[str]:
        expected = list(stored(plan.experiment, plan.traces, self._made_of))
        if found.traces != plan.traces:
            yield f"{found.traces} instead of {plan.traces} traces"
        if plan.way in ("notebook", "ours", "asking"):
            # Each trace once: so often is each answer to be scored.
            sent = Counter(_text(body["response"]) for body in arrived)
            wanted = Counter(one.row.response for one in expected)
            if sent != wanted:
                more, less = (sent - wanted).total(), (wanted - sent).total()
                yield f"{more} requests too many, {less} missing"
        if plan.way in ("notebook", "ours"):
            yield from self.store.faults(
                self._experiments[plan.experiment],
                expected,
                spans=plan.way == "ours",
                assessments=plan.assessments,
            )
        if plan.way == "ours":
            yield from self.store.faults_as_read(expected, assessments=plan.assessments)


def _text(response: Any) -> str:
    return str(response["response"] if isinstance(response, Mapping) else response)


# The verdict.


def verdicts(measured: Sequence[Measured]) -> list[Verdict]:
    """Compare what was measured with the goals."""
    by_name = {one.name: one for one in measured}
    beside = [one for one in measured if one.name.startswith("notebook")]
    usual = sum(one.traces for one in beside) / sum(one.seconds for one in beside)
    goals = {TAGS: FASTER_WITH_TAGS, FULL: FASTER_WITH_ASSESSMENTS}
    found = [_speed(by_name[name], usual, goal) for name, goal in goals.items()]
    for name, alone in ROADS.items():
        found.append(_cost(by_name[name], sum(by_name[one].milliseconds() for one in alone)))
    few, shards = measured[-2:]
    found.append(_memory(few, by_name[FULL]))
    for one in (by_name[TAGS], by_name[FULL], few, shards):
        goal = f"{one.name}: each of {one.traces} traces scored once, with the right score"
        found.append(Verdict(goal, not one.faults, "; ".join(one.faults) or "so it is"))
    return found


def _speed(one: Measured, usual: float, goal: float) -> Verdict:
    times = one.rate / usual
    return Verdict(
        f"{one.name}, at least {goal:g} times as fast as the notebook's way",
        times >= goal,
        f"{times:.2f} times ({one.rate:.1f} and {usual:.1f} traces/s)",
    )


def _cost(one: Measured, alone: float) -> Verdict:
    times = one.milliseconds() / alone
    return Verdict(
        f"{one.name}, at most {DEARER:g} times the CPU of its roads alone",
        times <= DEARER,
        f"{times:.2f} times ({one.milliseconds():.2f} and {alone:.2f} ms/trace)",
    )


def _memory(few: Measured, many: Measured) -> Verdict:
    times = many.megabytes / few.megabytes
    return Verdict(
        f"the peak of memory does not grow from {few.traces} to {many.traces} traces "
        f"(at most {GROWTH:g} times)",
        times <= GROWTH,
        f"{times:.2f} times ({few.megabytes:.0f} and {many.megabytes:.0f} MB)",
    )


def machine(store: Store, options: argparse.Namespace) -> dict[str, Any]:
    """Where this was measured, with what."""
    return about(
        ("aiohttp", "sqlalchemy"),
        database=store.version,
        server=f"mlflow server, workers: {options.workers or 'as many as is its default'}",
        data="given" if options.data else "made up",
        latency=f"{options.latency:g} s",
    )


def account(measured: Sequence[Measured]) -> list[str]:
    """Where the CPU goes: ours beside the sum of its roads, as a table."""
    by_name = {one.name: one for one in measured}
    lines = [
        "| CPU ms/trace | client | server | database | sum |",
        "|---|--:|--:|--:|--:|",
    ]
    for name, alone in ROADS.items():
        ours = [by_name[name].milliseconds(part) for part in PARTS]
        roads = [sum(by_name[one].milliseconds(part) for one in alone) for part in PARTS]
        for what, costs in ((name, ours), (" + ".join(alone), roads)):
            shown = " | ".join(f"{cost:.2f}" for cost in (*costs, sum(costs)))
            lines.append(f"| {what} | {shown} |")
    return lines


def told(one: Any) -> dict[str, Any]:
    """What is kept in the JSON file of a measurement or verdict."""
    more = {"rate": one.rate} if isinstance(one, Measured) else {}
    return asdict(one) | more


def markdown(
    where: Mapping[str, Any], measured: Sequence[Measured], found: Sequence[Verdict]
) -> str:
    """The note."""
    return "\n".join(
        [
            *(f"- {name}: {value}" for name, value in where.items()),
            "",
            HEAD,
            *map(line, measured),
            "",
            *account(measured),
            "",
            *(f"- {verdict}" for verdict in found),
            "",
        ]
    )


def run(options: argparse.Namespace) -> tuple[dict[str, Any], list[Measured], list[Verdict]]:
    """Go all the ways; gives where, what was measured, and the verdicts."""
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        sandbox = stack.enter_context(Sandbox(process=True))
        server = Server(options.backend, folder=folder)
        server.workers = options.workers
        stack.enter_context(server)
        os.environ.update(sandbox.environment(), MLFLOW_TRACKING_URI=server.uri)
        mlflow.set_tracking_uri(server.uri)
        benchmark = Benchmark(sandbox, server, rows(options.data), options)
        wanted = plans(options)
        benchmark.fill(wanted)
        where = {**machine(benchmark.store, options), "filled": benchmark.filled}
        print("\n".join(f"{name}: {value}" for name, value in where.items()))
        print(HEAD, flush=True)
        measured: list[Measured] = []
        for plan in wanted:
            measured.append(benchmark.measure(plan))
            print(line(measured[-1]), flush=True)
    return where, measured, verdicts(measured)


def main() -> int:
    """Run the benchmark; gives the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--traces", type=int, default=20_000)
    parser.add_argument("--backend", choices=["sqlite", "postgresql"], default="sqlite")
    parser.add_argument("--data", type=Path, metavar="FILE.jsonl")
    parser.add_argument("--notebook-traces", type=int, default=2000)
    parser.add_argument("--latency", type=float, default=0.2, help="of TLM, in seconds")
    parser.add_argument("--shards", type=int, default=8)
    parser.add_argument("--concurrency", type=int, help="scores in flight; ours by default")
    parser.add_argument("--workers", type=int, help="of the MLflow server; its own by default")
    parser.add_argument("--out", type=Path, metavar="FILE.json")
    parser.add_argument("--markdown", type=Path, metavar="FILE.md")
    parser.add_argument("--way", choices=WAYS, help=argparse.SUPPRESS)
    parser.add_argument("--job", type=json.loads, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.way:
        serve(options.way, options.job)
        return 0
    try:
        where, measured, found = run(options)
    except UnavailableError as error:
        parser.error(str(error))
    print("\n".join(["", *account(measured), "", *map(str, found)]))
    if options.out:
        result = {"about": where, "measured": measured, "verdicts": found}
        options.out.write_text(json.dumps(result, default=told, indent=1) + "\n")
    if options.markdown:
        options.markdown.write_text(markdown(where, measured, found))
    return 0 if all(verdict.is_met for verdict in found) else 1


if __name__ == "__main__":
    sys.exit(main())
