"""Streams: what watching costs their first token and each chunk, and what is stored of them.

Each way of watching, in a process of its own, reads one stream after the other to its end:

- at full speed: 2,000 chunks, as fast as they come. CPU is of the whole process, what is done
  later and elsewhere included; "caller" is the time between the chunks, as their reader sees it;
- paced: the first chunk after 50 ms, another every 5 ms, as of an LLM. It tells the time to the
  first token as users have it; at full speed that is the cost of opening a call alone;
- stored: of one stream at full speed, what a trace of it takes, and its span events. Of MLflow's
  as they are read back from a database, of others as they would be sent.

    python benchmarks/stream.py [--chunks 2000] [--rounds 15] [--only WAY ...]
                                [--out FILE.json] [--markdown FILE.md]

The exit status is 1 if a goal is missed.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Mapping
from typing import Any

from _measure import (
    Found,
    Job,
    Rounds,
    Stage,
    Table,
    Verdict,
    about,
    at_most,
    parser,
    ratio,
    serve,
    spread,
    take_turns,
    tell,
)
from _rivals import FROZEN, LAST, PACKAGES, RIVALS, WAYS, chosen, watch

ASK: dict[str, Any] = {
    "model": "gpt-4o",
    "messages": [{"role": "user", "content": "Tell me a long story."}],
    "stream": True,
}
BARE, RECORDED, BACKGROUND = "bare", "ours, recorded", "ours, background"
NOT_COMPARED = ("bare, MLflow imported", "ours, inline", FROZEN)
COMPARED = [name for name in WAYS if name not in NOT_COMPARED]
PACED = {"delay": 0.05, "chunks": 40, "chunk_delay": 0.005}
# The goals.
FIRST_TOKEN = 1.02
MICROSECONDS = 15


def reader(job: Job) -> Any:
    """What a variant's process does: streams, and a look at what is stored of one."""
    import openai

    client = openai.OpenAI(max_retries=0)
    drain = watch(job["way"], client, export=job["export"], experiment=job["experiment"])

    def read() -> Found:
        chunks, first = 0, 0.0
        cpu, begun = time.process_time(), time.perf_counter()
        for chunk in client.chat.completions.create(**ASK):
            if chunk.choices[0].delta.content:
                first = first or time.perf_counter()
                chunks += 1
        ended = time.perf_counter()
        drain()
        cpu = time.process_time() - cpu
        return {
            "chunks": chunks,
            "first": 1000 * (first - begun),
            "whole": 1000 * (ended - begun),
            "caller": 1e6 * (ended - first) / chunks,
            "cpu": 1e6 * cpu / chunks,
        }

    def work(store: bool = False) -> Found:
        found = read()
        if store:
            found |= stored(job["experiment"]) if WAYS[job["way"]].exports else dropped()
        return found

    return work


def stored(experiment: str) -> Found:
    """What MLflow has of the last stream."""
    import mlflow

    known = mlflow.get_experiment_by_name(experiment)
    assert known is not None
    traces: Any = mlflow.search_traces(
        locations=[known.experiment_id], max_results=1, return_type="list"
    )
    spans = traces[0].data.spans
    return {
        "bytes": sum(len(json.dumps(span.to_dict(), ensure_ascii=False)) for span in spans),
        "spans": len(spans),
        "events": sum(len(span.events) for span in spans),
    }


def dropped() -> Found:
    """What another tool would have sent of it."""
    if not LAST:
        return {"bytes": 0, "spans": 0, "events": 0}
    last = LAST[0]
    if isinstance(last, Mapping):
        told = json.dumps(last, default=str)
        return {"bytes": len(told), "spans": 1, "events": len(last.get("events") or ())}
    return {"bytes": len(last.to_json(indent=None)), "spans": 1, "events": len(last.events)}


def tables(fast: Rounds, paced: Rounds, kept: Mapping[str, Found]) -> list[Table]:
    """At full speed, paced, and what is stored."""
    chunks = fast[BARE][0]["chunks"]
    speed = Table(
        f"{chunks} chunks at full speed: median over the rounds [quartiles]; beyond bare in the "
        "same round",
        [
            *("way", "µs CPU/chunk beyond bare", "µs of the caller/chunk beyond bare"),
            *("µs CPU/chunk", "µs of the caller/chunk", "whole stream ms", "first token ms"),
        ],
    )
    for name in fast:
        beyond = (spread(fast, name, what, beyond=BARE) for what in ("cpu", "caller"))
        own = (spread(fast, name, what) for what in ("cpu", "caller", "whole", "first"))
        speed.rows.append([name, *beyond, *own])
    pace = Table(
        "Paced: the first chunk after 50 ms",
        ["way", "first token ms", "beyond bare ms", "times bare's", "whole stream ms"],
    )
    for name in paced:
        first, whole = spread(paced, name, "first"), spread(paced, name, "whole")
        beyond_bare = spread(paced, name, "first", beyond=BARE)
        times = ratio(paced, name, "first", to=BARE)
        pace.rows.append([name, first, beyond_bare, f"{times.median:.3f}", whole])
    size = Table(f"A trace of {chunks} chunks", ["way", "spans", "span events", "bytes"])
    for name, one in kept.items():
        size.rows.append([name, one["spans"], one["events"], f"{one['bytes']:,}"])
    return [speed, pace, size]


def verdicts(fast: Rounds, paced: Rounds, kept: Mapping[str, Found]) -> list[Verdict]:
    """Compare those of ours that there are with the goals."""
    found = []
    for name in (one for one in (RECORDED, BACKGROUND) if one in fast):
        times = ratio(paced, name, "first", to=BARE).median
        goal = f"{name}: time to first token beside bare's, at most {FIRST_TOKEN:g} times"
        found.append(Verdict(goal, times <= FIRST_TOKEN, f"{times:.3f} times"))
        beyond = spread(fast, name, "cpu", beyond=BARE)
        found.append(at_most(f"{name}: CPU a chunk beyond bare", beyond, MICROSECONDS, "µs"))
        for rival in (one for one in RIVALS if one in fast):
            theirs = spread(fast, rival, "cpu", beyond=BARE).median
            goal, shown = f"{name}: CPU a chunk below {rival}'s", f"{theirs:.1f} µs"
            is_met = beyond.median < theirs
            found.append(Verdict(goal, is_met, f"{beyond.median:.1f} and {shown}"))
        events = kept[name]["events"]
        found.append(Verdict(f"{name}: no events of chunks stored", events == 0, str(events)))
    return found


def run(
    options: argparse.Namespace,
) -> tuple[dict[str, list[Found]], dict[str, list[Found]], dict[str, Found]]:
    """Let the variants take turns; gives what they measured at each pace, and what is stored."""
    ways = chosen(COMPARED, options.only and [BARE, *options.only])
    story = "word " * options.chunks
    with Stage(__file__, options) as stage:
        children = {way.name: stage.child(way.name, {"way": way.name}) for way in ways}
        stage.sandbox.default("openai", content=story, chunks=options.chunks)
        take_turns(children, 1)
        fast = take_turns(children, options.rounds)
        kept = {
            way.name: (
                stage.child(f"{way.name}, stored", {"way": way.name}, export="sqlite")
                if way.exports
                else children[way.name]
            ).do(store=True)
            for way in ways
            if way.exports or way.package
        }
        stage.sandbox.default("openai", content=story, **PACED)
        take_turns(children, 1)
        paced = take_turns(children, options.rounds)
    return fast, paced, kept


def main() -> int:
    """Run the benchmark; gives the exit status."""
    options_of = parser(__doc__, rounds=15)
    options_of.add_argument("--chunks", type=int, default=2000)
    options = options_of.parse_args()
    if options.serve:
        serve(reader(options.serve))
        return 0
    where = about(PACKAGES, chunks=options.chunks, rounds=options.rounds)
    found = run(options)
    measured = dict(zip(("fast", "paced", "stored"), found, strict=True))
    return tell(options, where, tables(*found), verdicts(*found), measured)


if __name__ == "__main__":
    sys.exit(main())
