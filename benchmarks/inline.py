"""Inline: what a scored call takes beyond the two services themselves.

An LLM that takes 50 ms, and TLM, which takes 200 ms, asked one after the other:

- bare: by the two SDKs, openai and cleanlab_tlm, with nothing recorded;
- notebook: as in Cleanlab's published notebook, call by call: ``mlflow.openai.autolog()`` records
  the call, ``TLM.get_trustworthiness_score`` scores it, two ``set_trace_tag`` in sequence write
  score and explanation on the trace. A tag that MLflow refuses, because the trace is not written
  yet, is counted as lost;
- ours: one call by the wrapped client.

CPU is of the whole process until all is written.

    python benchmarks/inline.py [--calls 20] [--rounds 10] [--llm 0.05] [--tlm 0.2]
                                [--backend postgresql] [--workers N]
                                [--out FILE.json] [--markdown FILE.md]

The exit status is 1 if a goal is missed.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from typing import Any, TypeAlias

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
    serve,
    spread,
    take_turns,
    tell,
)
from _rivals import Drain, watch

SYSTEM, QUESTION = "You are a trivia master.", "What is the capital of France?"
ASK: dict[str, Any] = {
    "model": "gpt-4o",
    "messages": [{"role": "system", "content": SYSTEM}, {"role": "user", "content": QUESTION}],
}
BARE, NOTEBOOK, OURS = "bare", "notebook", "ours"
MILLISECONDS = 6

Scored: TypeAlias = Callable[[], int]
"""Makes a call and has it scored; gives how many tags were lost."""


def bare(client: Any, job: Job) -> tuple[Scored, Drain]:
    """The two SDKs, one after the other."""
    from cleanlab_tlm import TLM

    tlm = TLM(options={"log": ["explanation"]})

    def scored() -> int:
        answer = client.chat.completions.create(**ASK).choices[0].message.content
        tlm.get_trustworthiness_score(f"{SYSTEM}\n{QUESTION}", answer)
        return 0

    return scored, watch("bare", client, export="off", experiment=job["experiment"])


def notebook(client: Any, job: Job) -> tuple[Scored, Drain]:
    """The notebook's cells, for one call."""
    import mlflow
    from cleanlab_tlm import TLM

    drain = watch("autolog", client, export=job["export"], experiment=job["experiment"])
    tlm, store = TLM(options={"log": ["explanation"]}), mlflow.MlflowClient()

    def lost(trace_id: Any, key: str, value: str) -> int:
        try:
            store.set_trace_tag(trace_id, key, value)
        except mlflow.MlflowException:
            return 1
        return 0

    def scored() -> int:
        answer = client.chat.completions.create(**ASK).choices[0].message.content
        trace_id = mlflow.get_last_active_trace_id()
        told: Any = tlm.get_trustworthiness_score(f"{SYSTEM}\n{QUESTION}", answer)
        score, explanation = str(told["trustworthiness_score"]), told["log"]["explanation"]
        return lost(trace_id, "trust_score", score) + lost(trace_id, "explanation", explanation)

    return scored, drain


def ours(client: Any, job: Job) -> tuple[Scored, Drain]:
    """One call."""
    import tlm_tracing as tt

    drain = watch("ours, inline", client, export=job["export"], experiment=job["experiment"])

    def scored() -> int:
        trust = tt.trust(client.chat.completions.create(**ASK))
        if trust is None or trust.score is None:
            raise RuntimeError(f"Not scored: {trust}")
        return 0

    return scored, drain


WAYS = {BARE: bare, NOTEBOOK: notebook, OURS: ours}


def caller(job: Job) -> Any:
    """What a variant's process does: bursts of scored calls."""
    import openai

    client = openai.OpenAI(max_retries=0)
    scored, drain = WAYS[job["way"]](client, job)

    def burst(calls: int) -> Found:
        scored()  # the connection may have been closed since the last burst
        drain()
        seconds, lost = [], 0
        cpu = time.process_time()
        for _ in range(calls):
            begun = time.perf_counter()
            lost += scored()
            seconds.append(time.perf_counter() - begun)
        drain()
        return {
            "p50": 1000 * percentile(seconds, 0.5),
            "p95": 1000 * percentile(seconds, 0.95),
            "cpu": 1000 * (time.process_time() - cpu) / calls,
            "lost": lost,
        }

    return burst


def table(rounds: Rounds, services: float) -> Table:
    """All of it, beside the two SDKs."""
    found = Table(
        f"A scored call, in milliseconds, of which the services take {services:g}: median over "
        "the rounds [quartiles]; beyond bare in the same round",
        [
            *("way", "p50 beyond bare", "p95 beyond bare", "CPU beyond bare"),
            *("p50", "p95", "CPU", "tags lost"),
        ],
    )
    names = ("p50", "p95", "cpu")
    for way, one in rounds.items():
        beyond = (spread(rounds, way, name, beyond=BARE) for name in names)
        own = (spread(rounds, way, name) for name in names)
        found.rows.append([way, *beyond, *own, sum(each["lost"] for each in one)])
    return found


def verdicts(rounds: Rounds) -> list[Verdict]:
    """Compare ours with the goals."""
    if OURS not in rounds:
        return []
    beyond = spread(rounds, OURS, "p50", beyond=BARE)
    found = [at_most("p50 beyond the two SDKs bare", beyond, MILLISECONDS, "ms")]
    for name in ("p50", "p95", "cpu") if NOTEBOOK in rounds else ():
        mine, theirs = (spread(rounds, way, name) for way in (OURS, NOTEBOOK))
        is_met = mine.median < theirs.median
        found.append(Verdict(f"{name} below the notebook's", is_met, f"{mine} and {theirs} ms"))
    return found


def run(options: argparse.Namespace) -> dict[str, list[Found]]:
    """Let the ways take turns; gives what they measured."""
    with Stage(__file__, options) as stage:
        stage.sandbox.default("openai", delay=options.llm)
        stage.sandbox.default("tlm", delay=options.tlm)
        children = {
            way: stage.child(way, {"way": way}, export="off" if way == BARE else options.export)
            for way in WAYS
            if not options.only or way in (BARE, *options.only)
        }
        take_turns(children, 1, calls=min(5, options.calls))
        return take_turns(children, options.rounds, calls=options.calls)


def main() -> int:
    """Run the benchmark; gives the exit status."""
    options_of = parser(__doc__, rounds=10, calls=20)
    options_of.add_argument("--llm", type=float, default=0.05, help="seconds that it takes")
    options_of.add_argument("--tlm", type=float, default=0.2, help="seconds that it takes")
    options_of.add_argument("--export", choices=["off", "sqlite", "server"], default="server")
    add_server_options(options_of)
    options = options_of.parse_args()
    if options.serve:
        serve(caller(options.serve))
        return 0
    to = options.backend if options.export == "server" else ""
    where = about(
        calls=options.calls, rounds=options.rounds, export=f"{options.export} {to}".strip()
    )
    rounds = run(options)
    services = 1000 * (options.llm + options.tlm)
    return tell(options, where, [table(rounds, services)], verdicts(rounds), rounds)


if __name__ == "__main__":
    sys.exit(main())
