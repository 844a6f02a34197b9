"""Overhead: what watching a call costs it, in time and CPU.

An LLM that answers at once, so that nothing hides the cost. Each way of watching makes short
bursts of calls, one call after the other, in a process of its own:

- latency: of a call, as its caller sees it;
- CPU of the call: of the whole process, what is done later and elsewhere included (scores,
  export), divided by the calls;
- CPU of the caller: of the thread that makes the calls.

"ours, outside" is instrumented by a trusted block in another thread. "ours, recorded" has
``mode="off"``; the other two have a score from TLM, which answers at once, too.

    python benchmarks/overhead.py [--calls 50] [--rounds 20] [--export off sqlite server]
                                  [--answer CHARACTERS] [--backend postgresql] [--workers N]
                                  [--only WAY ...] [--out FILE.json] [--markdown FILE.md]

The exit status is 1 if a goal is missed.
"""

from __future__ import annotations

import argparse
import sys
import time
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
from _rivals import FROZEN, PACKAGES, WAYS, chosen, watch

QUESTION = "What is the 3rd month of the year in alphabetical order?"
ASK: dict[str, Any] = {
    "model": "gpt-4o",
    "messages": [
        {"role": "system", "content": "You are a trivia master."},
        {"role": "user", "content": QUESTION},
    ],
}
BARE, AUTOLOG = "bare", "autolog"
OUTSIDE, RECORDED, BACKGROUND = "ours, outside", "ours, recorded", "ours, background"
# The goals.
OUTSIDE_CPU = 1.02
RECORDED_CPU = 0.6
WARM_UP = 50


def caller(job: Job) -> Any:
    """What a variant's process does: bursts of calls."""
    import openai

    client = openai.OpenAI(max_retries=0)
    drain = watch(job["way"], client, export=job["export"], experiment=job["experiment"])
    create = client.chat.completions.create

    def burst(calls: int) -> Found:
        create(**ASK)  # the connection may have been closed since the last burst
        drain()
        seconds = []
        wall, cpu, own = time.perf_counter(), time.process_time(), time.thread_time()
        for _ in range(calls):
            begun = time.perf_counter()
            create(**ASK)
            seconds.append(time.perf_counter() - begun)
        own, asked = time.thread_time() - own, time.perf_counter() - wall
        drain()
        return {
            "p50": 1000 * percentile(seconds, 0.5),
            "p95": 1000 * percentile(seconds, 0.95),
            "cpu": 1000 * (time.process_time() - cpu) / calls,
            "caller cpu": 1000 * own / calls,
            "drain": 1000 * (time.perf_counter() - wall - asked),
        }

    return burst


def label(way: str, export: str) -> str:
    """A variant's name."""
    return way if export == "off" else f"{way}, {export}"


def table(rounds: Rounds) -> Table:
    """All of it, what is beyond the bare client first."""
    found = Table(
        "Each call, in milliseconds: median over the rounds [quartiles]; beyond bare in the same "
        "round",
        [
            *("way, export", "p50 beyond bare", "p95 beyond bare", "CPU beyond bare"),
            *("caller's CPU beyond bare", "p50", "p95", "CPU", "caller's CPU", "drain ms/burst"),
        ],
    )
    names = ("p50", "p95", "cpu", "caller cpu")
    for variant in rounds:
        beyond = [spread(rounds, variant, name, beyond=BARE) for name in names]
        found.rows.append(
            [
                variant,
                *beyond,
                *(spread(rounds, variant, name) for name in (*names, "drain")),
            ]
        )
    return found


def verdicts(rounds: Rounds) -> list[Verdict]:
    """Compare those that there are with the goals."""
    found = []
    if OUTSIDE in rounds:
        times = ratio(rounds, OUTSIDE, "cpu", to=BARE)
        found.append(at_most("outside, CPU beside bare", times, OUTSIDE_CPU))
    for goal, ours, name, most in (
        ("recorded, extra CPU", RECORDED, "cpu", RECORDED_CPU),
        ("recorded, extra latency (p50)", RECORDED, "p50", 1.0),
        ("background, extra CPU of the caller", BACKGROUND, "caller cpu", 1.0),
    ):
        if {ours, AUTOLOG} <= rounds.keys():
            extra = [spread(rounds, one, name, beyond=BARE).median for one in (ours, AUTOLOG)]
            found.append(_beside_autolog(goal, *extra, most))
    return found


def _beside_autolog(goal: str, ours: float, theirs: float, most: float) -> Verdict:
    limit = f"at most {most:g} times" if most != 1 else "at most"
    shown = f"{ours:.2f} and {theirs:.2f} ms"
    if theirs > 0:
        shown += f", that is {ours / theirs:.2f} times"
    return Verdict(f"{goal}, {limit} autolog's", ours <= most * theirs, shown)


def run(options: argparse.Namespace) -> dict[str, list[Found]]:
    """Let the variants take turns; gives what they measured."""
    known = [name for name in WAYS if name != FROZEN]
    ways = chosen(known, options.only and [BARE, *options.only])
    with Stage(__file__, options) as stage:
        if options.answer:
            stage.sandbox.default("openai", content="word " * (options.answer // 5))
        children = {
            label(way.name, export): stage.child(
                label(way.name, export), {"way": way.name}, export=export
            )
            for export in options.export
            for way in ways
            if export == "off" or way.exports
        }
        take_turns(children, 1, calls=min(WARM_UP, options.calls))
        return take_turns(children, options.rounds, calls=options.calls)


def main() -> int:
    """Run the benchmark; gives the exit status."""
    options_of = parser(__doc__, rounds=20, calls=50)
    where = ["off", "sqlite", "server"]
    options_of.add_argument("--export", nargs="+", choices=where, default=where)
    options_of.add_argument("--answer", type=int, help="its length in characters; short by default")
    add_server_options(options_of)
    options = options_of.parse_args()
    if options.serve:
        serve(caller(options.serve))
        return 0
    options.export = ["off", *(one for one in options.export if one != "off")]
    where_measured = about(PACKAGES, calls=options.calls, rounds=options.rounds)
    rounds = run(options)
    return tell(options, where_measured, [table(rounds)], verdicts(rounds), rounds)


if __name__ == "__main__":
    sys.exit(main())
