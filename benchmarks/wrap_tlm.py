"""wrap_tlm: what it costs a batch that Cleanlab's own client scores to be traced, pair by pair.

TLM takes 100 ms for a pair, in the Sandbox in a process of its own. The same client, bare and
wrapped, scores the same batch: they take turns, each in a process of its own, and the one that is
wrapped first waits until all it has recorded is written. So it is with

- a new client for each batch, which begins with four requests at once and asks for more as it goes,
  as the client of a script that scores one batch;
- the same client for all batches, which asks for all pairs at once after some of them; a batch then
  takes little longer than one pair, so that there is hardly a time to record in meanwhile: what it
  costs is told, without a goal;
- its async method, with a task beside it that sleeps 5 ms again and again: how late it wakes up is
  the stall of the event loop.

At the end every trace is read back by MLflow's client: it has to have a span for the batch and one
for each pair, with the pair's own texts, score and explanation, and an assessment for each.

    python benchmarks/wrap_tlm.py [--pairs 200] [--rounds 15] [--tlm 0.1]
                                  [--export sqlite|server] [--backend postgresql] [--workers N]
                                  [--only WAY ...] [--out FILE.json] [--markdown FILE.md]

The exit status is 1 if a goal is missed.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

from _measure import (
    Found,
    Job,
    Rounds,
    Stage,
    Table,
    Verdict,
    about,
    add_server_options,
    at_most,
    parser,
    percentile,
    ratio,
    serve,
    spread,
    take_turns,
    tell,
)

NEW, USED, ASYNC = "a new client", "a used client", "async, a new client"
BARE, WRAPPED = "bare", "wrapped"
TICK = 0.005
WARM_UP = 3
# The goals.
COST = 1.1


def caller(job: Job) -> Callable[..., Found]:
    """What a variant's process does: score a batch, or read back what has become of all."""
    import mlflow
    from cleanlab_tlm import TLM

    import tlm_tracing as tt
    from tlm_tracing.tlm_client import wrap_tlm

    mlflow.set_experiment(job["experiment"])
    rows = job["rows"]
    prompts, responses = [row["prompt"] for row in rows], [row["response"] for row in rows]
    late: list[float] = []

    def client() -> Any:
        tlm = TLM(options={"log": ["explanation"]}, verbose=False)
        return wrap_tlm(tlm) if job["way"] == WRAPPED else tlm

    used = client()

    async def tick() -> None:
        while True:
            begun = time.perf_counter()
            await asyncio.sleep(TICK)
            late.append(time.perf_counter() - begun - TICK)

    async def beside(tlm: Any) -> Any:
        ticking = asyncio.create_task(tick())
        found = await tlm.get_trustworthiness_score_async(prompts, responses)
        ticking.cancel()
        return found

    def work(*, is_over: bool = False) -> Found:
        if is_over:
            return {"faults": faults(rows, job) if job["way"] == WRAPPED else []}
        late.clear()
        tlm = used if job["how"] == USED else client()
        cpu, begun = time.process_time(), time.perf_counter()
        if job["how"] == ASYNC:
            found = asyncio.run(beside(tlm))
        else:
            found = tlm.get_trustworthiness_score(prompts, responses)
        seconds, asked_cpu = time.perf_counter() - begun, time.process_time() - cpu
        assert [one["trustworthiness_score"] for one in found] == [row["score"] for row in rows]
        tt.flush()
        return {
            "ms": 1000 * seconds,
            "cpu": 1000 * asked_cpu,
            "cpu in all": 1000 * (time.process_time() - cpu),
            "written": 1000 * (time.perf_counter() - begun),
            "stall": 1000 * percentile(late, 0.99),
        }

    return work


def faults(rows: list[dict[str, Any]], job: Job) -> list[str]:
    """What is not as it should be of a variant's traces."""
    import mlflow

    client, found = mlflow.MlflowClient(), []
    experiment = client.get_experiment_by_name(job["experiment"]).experiment_id
    traces = client.search_traces(locations=[experiment], max_results=500, include_spans=False)
    if len(traces) != job["batches"]:
        found.append(f"{len(traces)} traces of {job['batches']}")
    for number, info in enumerate(one.info for one in traces):
        trace = client.get_trace(info.trace_id)
        if len(trace.data.spans) != len(rows) + 1:
            found.append(f"trace {number}: {len(trace.data.spans)} spans")
        pairs = {span.inputs["prompt"]: span for span in trace.data.spans if span.parent_id}
        valued = {one.span_id: (one.value, one.rationale) for one in trace.info.assessments}
        for row in rows:
            span = pairs[row["prompt"]]
            told = (span.outputs["trustworthiness_score"], span.outputs["log"]["explanation"])
            wanted = (row["score"], row["explanation"])
            if (span.inputs["response"], told, valued.get(span.span_id)) != (
                *(row["response"], wanted, wanted),
            ):
                found.append(f"trace {number}: the pair of {row['prompt'][:40]!r}")
    return found


def label(how: str, way: str) -> str:
    """A variant's name."""
    return f"{how}, {way}"


def table(rounds: Rounds, pairs: int) -> Table:
    """What was measured."""
    found = Table(
        f"A batch of {pairs} pairs: median over the rounds [quartiles]",
        ["client", "times bare's ms", "ms", "CPU ms", "CPU ms in all", "ms until written", "stall"],
    )
    for variant in rounds:
        how, _, way = variant.rpartition(", ")
        names = ("ms", "cpu", "cpu in all", "written")
        stall = spread(rounds, variant, "stall") if how == ASYNC else ""
        found.rows.append(
            [
                variant,
                "" if way == BARE else ratio(rounds, variant, "ms", to=label(how, BARE)),
                *(spread(rounds, variant, name) for name in names),
                stall,
            ]
        )
    return found


def verdicts(rounds: Rounds, wrong: list[str], batches: int, pairs: int) -> list[Verdict]:
    """Compare with the goals."""
    found = []
    for how in (NEW, ASYNC):
        bare, wrapped = label(how, BARE), label(how, WRAPPED)
        if wrapped in rounds:
            found.append(
                at_most(f"{how}: time of a batch", ratio(rounds, wrapped, "ms", to=bare), COST)
            )
    goal = f"each of {batches} traces has {pairs + 1} spans with {pairs} right scores"
    return [*found, Verdict(goal, not wrong, "; ".join(wrong[:5]) or "so it is")]


def run(options: argparse.Namespace) -> tuple[dict[str, list[Found]], list[str]]:
    """Let the variants take turns; gives what they measured, and what is wrong in the store."""
    from _stores import rows

    made = [asdict(row) for row in rows(None)[: options.pairs]]
    with Stage(__file__, options) as stage:
        stage.sandbox.load(made)
        stage.sandbox.default("tlm", delay=options.tlm)
        batches = WARM_UP + options.rounds
        children = {
            label(how, way): stage.child(
                label(how, way),
                {"how": how, "way": way, "rows": made, "batches": batches},
                export=options.export,
            )
            for how in (NEW, USED, ASYNC)
            if not options.only or how in options.only
            for way in (BARE, WRAPPED)
        }
        take_turns(children, WARM_UP)
        rounds = take_turns(children, options.rounds)
        wrong = [fault for child in children.values() for fault in child.do(is_over=True)["faults"]]
    return rounds, wrong


def main() -> int:
    """Run the benchmark; gives the exit status."""
    options_of = parser(__doc__, rounds=15)
    options_of.add_argument("--pairs", type=int, default=200, help="of a batch")
    options_of.add_argument("--tlm", type=float, default=0.1, help="seconds that TLM takes")
    options_of.add_argument("--export", choices=["sqlite", "server"], default="sqlite")
    add_server_options(options_of)
    options = options_of.parse_args()
    if options.serve:
        serve(caller(options.serve))
        return 0
    where = about(
        ["aiohttp", "wrapt"],
        pairs=options.pairs,
        rounds=options.rounds,
        TLM=f"{1000 * options.tlm:g} ms",
        export=options.export,
    )
    rounds, wrong = run(options)
    batches = sum(len(found) for name, found in rounds.items() if name.endswith(WRAPPED))
    batches += WARM_UP * sum(name.endswith(WRAPPED) for name in rounds)
    judged = verdicts(rounds, wrong, batches, options.pairs)
    return tell(options, where, [table(rounds, options.pairs)], judged, rounds)


if __name__ == "__main__":
    sys.exit(main())
