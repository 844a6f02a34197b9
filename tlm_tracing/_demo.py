"""A little application to try tlm_tracing with, on canned answers or on the real services."""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import track

from tlm_tracing._data import Trust
from tlm_tracing._report._table import Line, table

EXPERIMENT = "tlm-tracing demo"
MODEL = "gpt-4o"
SYSTEM = "You are a trivia master."
KEYS = ("OPENAI_API_KEY", "CLEANLAB_TLM_API_KEY")

_FINE = "Did not find a reason to doubt trustworthiness."
CANNED = (
    {
        "prompt": "What is the 3rd month of the year in alphabetical order?",
        "response": "The 3rd month of the year in alphabetical order is March.",
        "score": 0.1386,
        "explanation": "In alphabetical order the months begin with April, August and December, "
        "so the third is December. March is the third month of the calendar.",
    },
    {
        "prompt": "What is the capital of France?",
        "response": "The capital of France is Paris.",
        "score": 0.9874,
        "explanation": _FINE,
    },
    {
        "prompt": "How many seconds are in 100 years?",
        "response": "There are 3,153,600,000 seconds in 100 years.",
        "score": 0.6127,
        "explanation": "The number leaves out leap days. With the 24 or 25 of them that 100 years "
        "have, it is about 3,155,700,000.",
    },
    {
        "prompt": "Alice, Bob, and Charlie went to a café. Alice paid twice as much as Bob, and "
        "Bob paid three times as much as Charlie. If the total bill was $72, how much did each "
        "person pay?",
        "response": "Charlie paid $7.20, Bob paid $21.60 and Alice paid $43.20.",
        "score": 0.9512,
        "explanation": _FINE,
    },
    {
        "prompt": "When was the Declaration of Independence signed?",
        "response": "The Declaration of Independence was signed on July 4, 1776.",
        "score": 0.7435,
        "explanation": "It was adopted on July 4, 1776, but most delegates signed it on "
        "August 2, 1776.",
    },
)


def missing_keys() -> list[str]:
    """The environment variables that a live run needs and does not have."""
    return [name for name in KEYS if not os.environ.get(name)]


def run(*, live: bool = False, tracking_uri: str | None = None) -> list[Line]:
    """Ask five questions, and show how far the answers can be trusted.

    Args:
        live: Ask the real services, with the keys of the environment, not the Sandbox.
        tracking_uri: Where MLflow keeps the traces; ``mlflow.db`` in this directory by default.

    Returns:
        What was shown, read back from MLflow.
    """
    console = Console()
    store = tracking_uri or f"sqlite:///{(Path.cwd() / 'mlflow.db').as_posix()}"
    _quieten_mlflow(live=live)
    console.print(f"Preparing the MLflow store {store} ...", soft_wrap=True)
    _prepare(store)
    with contextlib.nullcontext() if live else _sandbox():
        trace_ids = _ask_all(console)
    lines = [_read_back(trace_id) for trace_id in trace_ids]
    console.print(table(lines))
    if not live:
        console.print(
            "[bold]These answers and scores are canned:[/] they come from the Sandbox, a server "
            "on this machine. The clients, the traces and their tags are real.\n"
            f"For real ones set {' and '.join(KEYS)}, and run: tlm-tracing demo --live"
        )
    console.print(
        f'\nThe traces are in MLflow, experiment "{EXPERIMENT}". To see them run\n\n'
        f'  {_mlflow()} ui --backend-store-uri "{store}"\n\n'
        "and open http://127.0.0.1:5000",
        soft_wrap=True,
    )
    return lines


def _mlflow() -> str:
    """MLflow's command as this shell finds it: its environment may not be activated."""
    beside = Path(sys.executable).with_name("mlflow")
    if not beside.exists() or shutil.which("mlflow") == str(beside):
        return "mlflow"
    here = Path.cwd()
    return str(beside.relative_to(here) if beside.is_relative_to(here) else beside)


def _ask_all(console: Console) -> list[str]:
    import openai

    import tlm_tracing as tt

    client = openai.OpenAI()

    def answer_question(question: str) -> str | None:
        completion = client.chat.completions.create(
            model=MODEL,
            messages=[
                {"role": "system", "content": SYSTEM},
                {"role": "user", "content": question},
            ],
        )
        return completion.choices[0].message.content

    trace_ids: list[str] = []
    for row in track(CANNED, "Asking and scoring", console=console):
        with tt.trusted_span("answer_question") as span:
            span.set_inputs({"question": row["prompt"]})
            try:
                span.set_outputs(answer_question(str(row["prompt"])))
            except openai.OpenAIError as error:
                raise SystemExit(f"OpenAI did not answer: {error}") from None
        trace_ids.append(str(span.trace_id))
    tt.flush(30)
    return trace_ids


@contextlib.contextmanager
def _sandbox() -> Iterator[None]:
    """The application's world without keys: its environment points to the Sandbox."""
    from tlm_tracing.testing import Sandbox

    with Sandbox() as sandbox:
        sandbox.load(CANNED)
        before = dict(os.environ)
        os.environ.update(sandbox.environment())
        try:
            yield
        finally:
            os.environ.clear()
            os.environ.update(before)


def _quieten_mlflow(*, live: bool) -> None:
    # Read by MLflow when it is imported.
    os.environ.setdefault("MLFLOW_LOGGING_LEVEL", "WARNING")
    logging.getLogger("alembic").setLevel(logging.WARNING)
    if not live:
        # A demo without keys shall do without a network: no telemetry, no list of prices.
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
        os.environ.setdefault("MLFLOW_MODEL_CATALOG_URI", "")


def _prepare(store: str) -> None:
    import mlflow

    mlflow.set_tracking_uri(store)
    mlflow.set_experiment(EXPERIMENT)


def _read_back(trace_id: str) -> Line:
    import mlflow

    import tlm_tracing as tt

    span: Any = mlflow.get_trace(trace_id).data.spans[0]
    trust = tt.trust(trace_id) or Trust.unscored("off")
    return Line(str(span.inputs["question"]), str(span.outputs), trust)
