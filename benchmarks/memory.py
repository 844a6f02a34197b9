"""Memory: whether a process that makes call after call keeps growing.

A process each for the bare client, ours and MLflow's autolog makes its calls in lots, in turns with
the others. After each lot all that was recorded is written or dropped, garbage is collected, and
the resident memory read. The first fifth of the calls is warm-up.

    python benchmarks/memory.py [--calls 100000] [--lot 10000] [--export off|sqlite|server]
                                [--backend postgresql] [--workers N] [--only WAY ...]
                                [--out FILE.json] [--markdown FILE.md]

The exit status is 1 if a goal is missed.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import statistics
import sys
from collections.abc import Sequence
from contextlib import suppress
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
    parser,
    resident_megabytes,
    serve,
    take_turns,
    tell,
)
from _rivals import chosen, watch

COMPARED = ["bare", "ours, recorded", "ours, background", "autolog"]
ROUND = 10_000
MEGABYTES = 1.0  # that it may grow by for each 10,000 calls


def caller(job: Job) -> Any:
    """What a variant's process does: lots of calls."""
    import openai

    client = openai.OpenAI(max_retries=0)
    drain = watch(job["way"], client, export=job["export"], experiment=job["experiment"])
    number = 0

    def lot(calls: int) -> Found:
        nonlocal number
        for _ in range(calls):
            number += 1
            question = {"role": "user", "content": f"What is {number} times two, and why?"}
            client.chat.completions.create(model="gpt-4o", messages=[question])
        drain()
        gc.collect()
        with suppress(AttributeError):  # only glibc has it: what it keeps for later is no growth
            ctypes.CDLL(None).malloc_trim(0)
        return {
            "calls": number,
            "megabytes": resident_megabytes(),
            "blocks": sys.getallocatedblocks(),
        }

    return lot


def growth(lots: Sequence[Found], name: str) -> float:
    """How much a number grows with 10,000 calls, by its trend after the warm-up."""
    warm = lots[len(lots) // 5 :]
    if len(warm) < 2:
        return 0.0
    calls, values = [one["calls"] for one in warm], [one[name] for one in warm]
    return statistics.linear_regression(calls, values).slope * ROUND


def tables(rounds: Rounds) -> list[Table]:
    """The memory after each lot, and how it grows."""
    calls = [one["calls"] for one in next(iter(rounds.values()))]
    readings = Table("Resident memory in MB, after so many calls", ["way", *map(str, calls)])
    grown = Table(
        "Growth with 10,000 calls, by the trend after the warm-up", ["way", "MB", "objects"]
    )
    for name, lots in rounds.items():
        readings.rows.append([name, *(f"{one['megabytes']:.1f}" for one in lots)])
        by = (growth(lots, what) for what in ("megabytes", "blocks"))
        grown.rows.append([name, *(f"{one:.2f}" for one in by)])
    return [readings, grown]


def verdicts(rounds: Rounds) -> list[Verdict]:
    """Compare with the goal."""
    return [
        Verdict(
            f"{name}: memory is flat, at most {MEGABYTES:g} MB more with 10,000 calls",
            (by := growth(lots, "megabytes")) <= MEGABYTES,
            f"{by:.2f} MB",
        )
        for name, lots in rounds.items()
        if name.startswith("ours")
    ]


def run(options: argparse.Namespace) -> dict[str, list[Found]]:
    """Let the variants take turns; gives what they measured after each lot."""
    lot = min(options.lot, options.calls)
    rounds: dict[str, list[Found]] = {}
    with Stage(__file__, options) as stage:
        children = {
            way.name: stage.child(
                way.name,
                {"way": way.name},
                export=options.export if way.exports else "off",
            )
            for way in chosen(COMPARED, options.only)
        }
        for _ in range(options.calls // lot):
            for name, found in take_turns(children, 1, calls=lot).items():
                rounds.setdefault(name, []).extend(found)
                stage.sandbox.clear()  # it keeps all requests
    return rounds


def main() -> int:
    """Run the benchmark; gives the exit status."""
    options_of = parser(__doc__)
    options_of.add_argument("--calls", type=int, default=100_000)
    options_of.add_argument("--lot", type=int, default=ROUND)
    options_of.add_argument("--export", choices=["off", "sqlite", "server"], default="off")
    add_server_options(options_of)
    options = options_of.parse_args()
    if options.serve:
        serve(caller(options.serve))
        return 0
    where = about(calls=options.calls, export=options.export)
    rounds = run(options)
    return tell(options, where, tables(rounds), verdicts(rounds), rounds)


if __name__ == "__main__":
    sys.exit(main())
