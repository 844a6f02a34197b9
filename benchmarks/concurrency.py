"""Concurrency: many calls at once, exported to an MLflow server, and what becomes of their traces.

An LLM that takes 50 ms is asked by 64 tasks of an event loop, or by 32 threads, as fast as it goes.
Each way of watching has a process of its own; they take turns, and each first waits until all it
has recorded is exported. Told are

- calls a second, and the latency of a call;
- the stall of the event loop: how late a task wakes up that sleeps 5 ms again and again;
- the traces that are in the store afterwards: whole, that is with all their spans, and if they are
  to be scored with tags and assessment; and those that are lost;
- traces a second from the first call until the last trace is written.

Once more with as many calls as ``--many`` says, without pause, once for each way.

    python benchmarks/concurrency.py [--calls 800] [--rounds 5] [--many 6000]
                                     [--export server|sqlite|off] [--backend postgresql]
                                     [--workers N] [--only WAY ...]
                                     [--out FILE.json] [--markdown FILE.md]

The exit status is 1 if a goal is missed.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from _measure import (
    Child,
    Found,
    Job,
    Rounds,
    Stage,
    Table,
    Verdict,
    about,
    add_server_options,
    at_least,
    at_most,
    parser,
    percentile,
    ratio,
    serve,
    spread,
    take_turns,
    tell,
)
from _rivals import FROZEN, chosen, watch

BARE = "bare"
COMPARED = [BARE, "ours, recorded", FROZEN, "ours, background", "autolog"]
# The spans of a whole trace.
SPANS = {"ours, recorded": 2, FROZEN: 2, "ours, background": 3, "autolog": 1}
SCORED = "ours, background"
TASKS, THREADS = 64, 32
TICK = 0.005
# The goals.
RATE = 0.7
STALL = 1.3


def caller(job: Job) -> Any:
    """What a variant's process does: many calls at once."""
    import openai

    kind = openai.AsyncOpenAI if job["how"] == "tasks" else openai.OpenAI
    client = kind(max_retries=0, timeout=300)
    drain = watch(job["way"], client, export=job["export"], experiment=job["experiment"])
    seconds: list[float] = []
    late: list[float] = []

    def ask(number: int) -> Any:
        question = {"role": "user", "content": f"What is {number} times two, and why?"}
        return client.chat.completions.create(model="gpt-4o", messages=[question])

    async def task(numbers: Iterator[int]) -> None:
        for number in numbers:
            begun = time.perf_counter()
            await ask(number)
            seconds.append(time.perf_counter() - begun)

    def thread(number: int) -> None:
        begun = time.perf_counter()
        ask(number)
        seconds.append(time.perf_counter() - begun)

    async def tick(is_over: asyncio.Event) -> None:
        while not is_over.is_set():
            begun = time.perf_counter()
            await asyncio.sleep(TICK)
            late.append(time.perf_counter() - begun - TICK)

    async def in_tasks(calls: int) -> None:
        numbers, is_over = iter(range(calls)), asyncio.Event()
        ticking = asyncio.create_task(tick(is_over))
        await asyncio.gather(*(task(numbers) for _ in range(TASKS)))
        is_over.set()
        await ticking

    pool = ThreadPoolExecutor(THREADS)
    # One loop for all rounds: a client's connections belong to theirs.
    loop = asyncio.new_event_loop()

    def burst(calls: int) -> Found:
        seconds.clear()
        late.clear()
        cpu, begun = time.process_time(), time.perf_counter()
        if job["how"] == "tasks":
            loop.run_until_complete(in_tasks(calls))
        else:
            list(pool.map(thread, range(calls)))
        asked, asked_cpu = time.perf_counter() - begun, time.process_time() - cpu
        drain()
        written = time.perf_counter() - begun
        return {
            "calls": calls,
            "rate": calls / asked,
            "p50": 1000 * percentile(seconds, 0.5),
            "p99": 1000 * percentile(seconds, 0.99),
            **({"stall": 1000 * percentile(late, 0.99)} if late else {}),
            "cpu": 1000 * asked_cpu / calls,
            "cpu in all": 1000 * (time.process_time() - cpu) / calls,
            "drain": written - asked,
            "end to end": calls / written,
        }

    return burst


def table(title: str, rounds: Rounds, kept: Mapping[str, int]) -> Table:
    """What was measured with so many calls, and what is in the store."""
    stalls = "stall" in rounds[BARE][0]
    found = Table(
        f"{title}: median over the rounds [quartiles]",
        [
            *("way", "times bare's calls/s", "calls/s", "p50 ms", "p99 ms"),
            *(("times bare's stall", "stall p99 ms") if stalls else ()),
            *("CPU ms/call", "until written", "traces/s end to end"),
            *("calls", "whole traces", "lost"),
        ],
    )
    for way, bursts in rounds.items():
        row: list[object] = [way, ratio(rounds, way, "rate", to=BARE)]
        row += [spread(rounds, way, name) for name in ("rate", "p50", "p99")]
        if stalls:
            row += [ratio(rounds, way, "stall", to=BARE), spread(rounds, way, "stall")]
        row += [spread(rounds, way, name) for name in ("cpu", "cpu in all", "end to end")]
        calls = sum(one["calls"] for one in bursts)
        row += [calls, kept[way], calls - kept[way]] if way in kept else [calls, "", ""]
        found.rows.append(row)
    return found


def verdicts(title: str, rounds: Rounds, kept: Mapping[str, int]) -> list[Verdict]:
    """Compare ours with the goals."""
    found = []
    for way in (one for one in rounds if one.startswith("ours")):
        calls = sum(one["calls"] for one in rounds[way])
        about_it = f"{title}, {way}"
        rate = ratio(rounds, way, "rate", to=BARE)
        found.append(at_least(f"{about_it}: calls a second beside bare's", rate, RATE))
        if "stall" in rounds[way][0]:
            stall = ratio(rounds, way, "stall", to=BARE)
            found.append(at_most(f"{about_it}: p99 of the stall beside bare's", stall, STALL))
        if way in kept:
            goal = f"{about_it}: every one of {calls} traces is whole in the store"
            found.append(Verdict(goal, kept[way] == calls, f"{kept[way]}"))
    return found


def measured(
    stage: Stage, title: str, options: argparse.Namespace, calls: int, rounds: int
) -> tuple[str, dict[str, list[Found]], dict[str, int]]:
    """Let the ways take turns with so many calls; gives what they measured, and what is stored."""
    how = title.split()[1].rstrip(",")
    exports: dict[str, str] = {}
    children: dict[str, Child] = {}
    names: dict[str, str] = {}
    for way in chosen(COMPARED, options.only and [BARE, *options.only]):
        exports[way.name] = options.export if way.exports else "off"
        names[way.name] = f"{way.name}, {title}"
        children[way.name] = stage.child(
            names[way.name], {"way": way.name, "how": how}, export=exports[way.name]
        )
    warm_up = min(TASKS, calls)
    take_turns(children, 1, calls=warm_up)
    found = take_turns(children, rounds, calls=calls)
    kept = {
        way: stage.whole_traces(names[way], SPANS[way], export=export, is_scored=way == SCORED)
        - warm_up
        for way, export in exports.items()
        if export != "off"
    }
    for child in children.values():
        child.end()
    stage.sandbox.clear()
    stage.sandbox.default("openai", delay=options.llm)
    return title, found, kept


def main() -> int:
    """Run the benchmark; gives the exit status."""
    options_of = parser(__doc__, rounds=5, calls=800)
    options_of.add_argument("--many", type=int, default=6000, help="calls; 0 leaves that out")
    options_of.add_argument("--llm", type=float, default=0.05, help="seconds that it takes")
    options_of.add_argument("--export", choices=["off", "sqlite", "server"], default="server")
    add_server_options(options_of)
    options = options_of.parse_args()
    if options.serve:
        serve(caller(options.serve))
        return 0
    to = options.backend if options.export == "server" else ""
    where = about(export=f"{options.export} {to}".strip(), llm=f"{options.llm:g} s")
    sizes = [(options.calls, options.rounds, "tasks"), (options.calls, options.rounds, "threads")]
    if options.many:
        sizes.append((options.many, 1, "tasks"))
    with Stage(__file__, options) as stage:
        stage.sandbox.default("openai", delay=options.llm)
        found = [
            measured(
                *(stage, f"{TASKS if how == 'tasks' else THREADS} {how}, {calls} calls"),
                *(options, calls, rounds),
            )
            for calls, rounds, how in sizes
        ]
    tables = [table(*one) for one in found]
    judged = [each for one in found for each in verdicts(*one)]
    kept = [dict(zip(("title", "rounds", "whole"), one, strict=True)) for one in found]
    return tell(options, where, tables, judged, kept)


if __name__ == "__main__":
    sys.exit(main())
