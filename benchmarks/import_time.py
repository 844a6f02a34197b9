"""Import: what ``import tlm_tracing`` costs a fresh interpreter, beside one that does nothing.

Each import is made in interpreters of its own, in turns, with their bytecode written before.

    python benchmarks/import_time.py [--rounds 20] [--out FILE.json] [--markdown FILE.md]

The exit status is 1 if a goal is missed.
"""

from __future__ import annotations

import os
import random
import subprocess
import sys
import time

from _measure import Found, Rounds, Table, Verdict, about, at_most, parser, ratio, spread, tell

NOTHING, OURS = "pass", "import tlm_tracing"
IMPORTS = [
    NOTHING,
    OURS,
    "from tlm_tracing import trusted",
    "import openai",
    "import cleanlab_tlm",
    "import mlflow",
]
HEAVY = ("openai", "mlflow", "pandas", "aiohttp")
LISTED = f"import tlm_tracing, sys; print(*(set(sys.modules) & {set(HEAVY)!r}))"
MILLISECONDS = 30


def measured(program: str) -> Found:
    """Run a program; gives its time and CPU in milliseconds, and its peak of memory in MB."""
    # Where nothing is kept of a compiled module, its compilation would be measured.
    env = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    begun = time.perf_counter()
    child = subprocess.Popen([sys.executable, "-c", program], env=env)
    _, status, usage = os.wait4(child.pid, 0)
    seconds = time.perf_counter() - begun
    child.returncode = os.waitstatus_to_exitcode(status)
    if child.returncode:
        raise RuntimeError(f"{program!r} failed.")
    return {
        "ms": 1000 * seconds,
        "cpu": 1000 * (usage.ru_utime + usage.ru_stime),
        "megabytes": usage.ru_maxrss / 1024,
    }


def table(rounds: Rounds) -> Table:
    """All of it, beside the interpreter that does nothing."""
    found = Table(
        "A fresh interpreter: median over the rounds [quartiles]; beyond `pass` in the same round",
        ["program", "ms beyond pass", "CPU ms beyond pass", "times pass's", "ms", "peak MB"],
    )
    for program in rounds:
        beyond = (spread(rounds, program, name, beyond=NOTHING) for name in ("ms", "cpu"))
        times = ratio(rounds, program, "ms", to=NOTHING)
        own = (spread(rounds, program, name) for name in ("ms", "megabytes"))
        found.rows.append([f"`{program}`", *beyond, times, *own])
    return found


def verdicts(rounds: Rounds) -> list[Verdict]:
    """Compare with the goals."""
    beyond = spread(rounds, OURS, "ms", beyond=NOTHING)
    done = subprocess.run(
        [sys.executable, "-c", LISTED], capture_output=True, text=True, check=True
    )
    listed = done.stdout.split()
    goal = f"`{OURS}` imports none of {', '.join(HEAVY)}"
    return [
        at_most(f"`{OURS}` beyond `pass`", beyond, MILLISECONDS, "ms"),
        Verdict(goal, not listed, ", ".join(listed) or "none"),
    ]


def main() -> int:
    """Run the benchmark; gives the exit status."""
    options = parser(__doc__, rounds=20, ways=False).parse_args()
    where = about(rounds=options.rounds)
    for program in IMPORTS:
        measured(program)
    rounds: dict[str, list[Found]] = {program: [] for program in IMPORTS}
    turns = random.Random(0)
    for _ in range(options.rounds):
        for program in turns.sample(IMPORTS, len(IMPORTS)):
            rounds[program].append(measured(program))
    return tell(options, where, [table(rounds)], verdicts(rounds), rounds)


if __name__ == "__main__":
    sys.exit(main())
