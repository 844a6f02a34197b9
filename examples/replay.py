"""Replays answered and scored questions through an instrumented application.

    python examples/replay.py FILE.jsonl [--tracking-uri URI] [--workers 8]

Each line of the file is an object with "prompt", "response" and "trustworthiness_score". The
Sandbox gives these answers and scores; the application, the clients, the traces and their tags
are real. At the end the traces are read back and compared with the file.
"""

import argparse
import json
import os
import sys
from collections import Counter
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ.setdefault("MLFLOW_LOGGING_LEVEL", "WARNING")
os.environ.setdefault("MLFLOW_MODEL_CATALOG_URI", "")

import mlflow
import openai
from rich.progress import track

import tlm_tracing as tt
from tlm_tracing.testing import Sandbox

BATCH = 250
NESTING = {
    "chat gpt-4o": None,
    "openai.chat.completions": "chat gpt-4o",
    "tlm.trustworthiness": "chat gpt-4o",
}


def replay(rows: list[dict[str, Any]], workers: int) -> None:
    """Ask every question, as an application would."""
    with Sandbox(process=True) as sandbox, ThreadPoolExecutor(workers) as pool:
        os.environ.update(sandbox.environment())
        sandbox.load({**row, "score": row["trustworthiness_score"]} for row in rows)
        client = tt.wrap_openai(openai.OpenAI())

        def ask(row: Mapping[str, Any]) -> None:
            client.chat.completions.create(
                model="gpt-4o", messages=[{"role": "user", "content": row["prompt"]}]
            )

        for start in track(range(0, len(rows), BATCH), "Replaying"):
            list(pool.map(ask, rows[start : start + BATCH]))
            # An application is faster than a store, and MLflow drops what its queue can't hold.
            if not tt.flush(120):
                sys.exit("Not everything could be written.")


def check(rows: Iterable[Mapping[str, Any]], experiment_id: str) -> Counter[str]:
    """Compare the stored traces with the file; knows nothing but the names in the trace."""
    traces = mlflow.search_traces(
        locations=[experiment_id], return_type="list", max_results=1_000_000
    )
    wanted = {row["prompt"]: f"{row['trustworthiness_score']:.4f}" for row in rows}
    found: Counter[str] = Counter(
        {
            "traces": len(traces),
            "missing": len(wanted),
            "crossed": 0,
            "without their three spans": 0,
        }
    )
    for trace in traces:
        if _nesting(trace.data.spans) != NESTING:
            found["without their three spans"] += 1
            continue
        question = trace.data.spans[0].inputs["messages"][-1]["content"]
        found["missing"] -= 1
        found["crossed"] += trace.info.tags.get("trust_score") != wanted[question]
    return found


def _nesting(spans: list[mlflow.entities.Span]) -> dict[str, str | None]:
    """The name of each span's parent."""
    names = {span.span_id: span.name for span in spans}
    return {span.name: names.get(span.parent_id) for span in spans}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("file", type=Path, metavar="FILE.jsonl")
    parser.add_argument("--tracking-uri", default="sqlite:///replay.db")
    parser.add_argument("--workers", type=int, default=8)
    options = parser.parse_args()
    rows = [json.loads(line) for line in options.file.read_text("utf-8").splitlines() if line]
    mlflow.set_tracking_uri(options.tracking_uri)
    experiment = mlflow.set_experiment(f"replay of {options.file.name} by {os.getpid()}")
    replay(rows, options.workers)
    found = check(rows, experiment.experiment_id)
    print(", ".join(f"{count} {name}" for name, count in found.items()))
    if found["traces"] != len(rows) or sum(found.values()) != len(rows):
        sys.exit("The traces are not what the file says.")


if __name__ == "__main__":
    main()
