"""Evaluation: MLflow's evaluation of rows that are there, beside a scorer that asks TLM row by row.

``mlflow.genai.evaluate`` over questions and answers, with TLM taking 200 ms:

- mlflow: a scorer that gives a constant, so all of it is MLflow's own work;
- ours: ``TLMTrustworthiness()``;
- shared client: a plain ``@scorer`` that asks one ``cleanlab_tlm.TLM`` once a row. That client can
  be used by one thread at a time, so there is a lock around it;
- client a row: the same with a client made for each row, which needs no lock.

Each once as MLflow is by default, which admits 10 to 20 rows a second to a scorer, and once
without that limit, by MLflow's own settings ``MLFLOW_GENAI_EVAL_SCORER_RATE_LIMIT=0``,
``MLFLOW_GENAI_EVAL_PREDICT_RATE_LIMIT=0`` and ``MLFLOW_GENAI_EVAL_MAX_WORKERS``. The requests that
reached TLM and the scores that MLflow has stored are counted.

    python benchmarks/evaluation.py [--rows 500] [--rounds 3] [--latency 0.2] [--data FILE.jsonl]
                                    [--backend postgresql] [--workers N] [--max-workers 32]
                                    [--only WAY ...]
                                    [--out FILE.json] [--markdown FILE.md]

Without a data file, texts of usual lengths are made up. The exit status is 1 if a goal is missed.
"""

from __future__ import annotations

import argparse
import os
import threading
import time
from collections.abc import Callable, Mapping
from itertools import product
from pathlib import Path
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
    at_least,
    parser,
    ratio,
    serve,
    spread,
    take_turns,
    tell,
)
from _stores import Row, rows

MLFLOW, OURS, SHARED, EACH = "mlflow", "ours", "shared client", "client a row"
DEFAULT, OPEN = "by default", "without limit"
LIMITS: Mapping[str, dict[str, str]] = {
    DEFAULT: {},
    OPEN: {
        "MLFLOW_GENAI_EVAL_SCORER_RATE_LIMIT": "0",
        "MLFLOW_GENAI_EVAL_PREDICT_RATE_LIMIT": "0",
    },
}
FASTER = 4.0


def constant() -> Any:
    """A scorer that costs nothing."""
    from mlflow.genai.scorers import scorer

    @scorer(name="trustworthiness")
    def score(outputs: str) -> float:
        return 0.5

    return score


def ours() -> Any:
    """Ours, as it is by default."""
    from tlm_tracing.evaluation import TLMTrustworthiness

    return TLMTrustworthiness()


def shared() -> Any:
    """A plain scorer with one client for all rows."""
    from cleanlab_tlm import TLM

    tlm, lock = TLM(options={"log": ["explanation"]}), threading.Lock()

    def ask(prompt: str, response: str) -> Any:
        with lock:
            return tlm.get_trustworthiness_score(prompt, response)

    return _plain(ask)


def each() -> Any:
    """A plain scorer with a client for each row."""
    from cleanlab_tlm import TLM

    def ask(prompt: str, response: str) -> Any:
        return TLM(options={"log": ["explanation"]}).get_trustworthiness_score(prompt, response)

    return _plain(ask)


def _plain(ask: Callable[[str, str], Any]) -> Any:
    from mlflow.entities import Feedback
    from mlflow.genai.scorers import scorer

    @scorer(name="trustworthiness")
    def score(inputs: dict[str, str], outputs: str) -> Feedback:
        told = ask(inputs["question"], outputs)
        return Feedback(value=told["trustworthiness_score"], rationale=told["log"]["explanation"])

    return score


WAYS = {MLFLOW: constant, OURS: ours, SHARED: shared, EACH: each}


def evaluator(job: Job) -> Any:
    """What a variant's process does: evaluations of all rows."""
    import mlflow

    mlflow.set_experiment(job["experiment"])
    made_of = _rows(job)
    data = [{"inputs": {"question": one.prompt}, "outputs": one.response} for one in made_of]
    wanted = sorted(one.score for one in made_of)
    make = WAYS[job["way"]]

    def evaluate() -> Found:
        if job["way"] == OURS:
            _forget()
        scorer = make()
        mlflow.genai.evaluate(data=data[:1], scorers=[constant()])  # the first one imports
        cpu, begun = time.process_time(), time.perf_counter()
        result = mlflow.genai.evaluate(data=data, scorers=[scorer])
        seconds, cpu = time.perf_counter() - begun, time.process_time() - cpu
        stored = mlflow.search_traces(run_id=result.run_id, return_type="list")
        told = sorted(one.value for trace in stored for one in trace.info.assessments)
        return {
            "seconds": seconds,
            "cpu": cpu,
            "rate": len(data) / seconds,
            "stored": len(told),
            "is right": told == wanted or job["way"] == MLFLOW,
        }

    return evaluate


def _rows(job: Job) -> list[Row]:
    """Questions and answers, each once."""
    found = {one.prompt: one for one in rows(None if job["data"] is None else Path(job["data"]))}
    return list(found.values())[: job["rows"]]


def _forget() -> None:
    """Have no score known: each round is to ask for all of them."""
    from tlm_tracing import _cache

    _cache._cache = _cache._Cache()


def measure(options: argparse.Namespace) -> int:
    """Have the variants take turns, and tell."""
    data = None if options.data is None else str(options.data.resolve())
    job = {"rows": options.rows, "data": data}
    with Stage(__file__, options) as stage:
        stage.sandbox.load(asdict_row(one) for one in _rows(job))
        stage.sandbox.default("tlm", delay=options.latency)
        children = {}
        for name, (way, limit) in variants(options).items():
            settings = LIMITS[limit] | (
                {"MLFLOW_GENAI_EVAL_MAX_WORKERS": str(options.max_workers)} if limit == OPEN else {}
            )
            os.environ.update(settings)  # that the child begins with
            children[name] = stage.child(name, {**job, "way": way}, export="server")
            for setting in settings:
                del os.environ[setting]

        def gauge() -> dict[str, float]:
            return {"asked": len(stage.sandbox.requests("tlm"))} | stage.gauge()

        rounds = take_turns(children, options.rounds, gauge=gauge)
        where = about(
            ["sqlalchemy"],
            store=f"MLflow server on {options.backend}",
            rows=options.rows,
            TLM=f"{options.latency:g} s",
        )
    return tell(options, where, [table(rounds)], verdicts(rounds, options), rounds)


def variants(options: argparse.Namespace) -> dict[str, tuple[str, str]]:
    """By name, the way and the limit."""
    found = {f"{way}, {limit}": (way, limit) for limit, way in product(LIMITS, WAYS)}
    return {name: one for name, one in found.items() if not options.only or one[0] in options.only}


def asdict_row(row: Row) -> dict[str, Any]:
    """A row as the Sandbox takes it."""
    return {
        "prompt": row.prompt,
        "response": row.response,
        "score": row.score,
        "explanation": row.explanation,
    }


def table(rounds: Rounds) -> Table:
    """All of it."""
    found = Table(
        "Evaluations: median over the rounds [quartiles]",
        ["way", "seconds", "rows a second", "its CPU", "TLM asked", "scores stored"],
    )
    for name, measured in rounds.items():
        found.rows.append(
            [
                name,
                *(spread(rounds, name, what) for what in ("seconds", "rate", "cpu")),
                max(one["asked"] for one in measured),
                min(one["stored"] for one in measured),
            ]
        )
    return found


def verdicts(rounds: Rounds, options: argparse.Namespace) -> list[Verdict]:
    """The goals."""
    found = []
    for name, measured in rounds.items():
        if not name.startswith(OURS):
            continue
        asked = {one["asked"] for one in measured}
        found.append(
            Verdict(f"{name}: TLM is asked once a row", asked == {options.rows}, f"{asked}")
        )
        right = all(one["is right"] for one in measured)
        found.append(Verdict(f"{name}: each score is stored, and right", right, f"{right}"))
        limit = name.removeprefix(OURS)
        for other in (SHARED, EACH):
            if f"{other}{limit}" in rounds:
                faster = ratio(rounds, f"{other}{limit}", "seconds", to=name)
                found.append(at_least(f"{name}: faster than {other}", faster, FASTER))
    return found


def main() -> int:
    """Measure, and tell."""
    found = parser(__doc__, rounds=3)
    add_server_options(found)
    found.add_argument("--rows", type=int, default=500)
    found.add_argument("--latency", type=float, default=0.2, help="of TLM, in seconds")
    found.add_argument("--data", type=Path, metavar="FILE.jsonl")
    found.add_argument("--max-workers", type=int, default=32, help="of MLflow, without limit")
    options = found.parse_args()
    if options.serve is not None:
        serve(evaluator(options.serve))
        return 0
    return measure(options)


if __name__ == "__main__":
    raise SystemExit(main())
