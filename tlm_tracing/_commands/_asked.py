"""What the commands have in common: to be stopped, to be refused, and to say what happens."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator, Mapping
from typing import Any

import mlflow
from rich.console import Console

INTERRUPTED = 130
"""The exit status of who was stopped, as shells have it."""

PLAN = (
    "experiment_ids",
    "experiment_names",
    "filter_string",
    "since",
    "until",
    "limit",
    "rescore",
    "dry_run",
    "shard",
    "assessments",
)
SETTINGS = ("max_scores_per_minute", "max_concurrency", "sample_rate", "timeout")


def asked(options: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of ``score_traces`` that the options of a command amount to."""
    given = {name: options[name] for name in PLAN if name in options}
    given |= {name: options[name] for name in SETTINGS if options.get(name) is not None}
    if options.get("tracking_uri") is not None:
        mlflow.set_tracking_uri(options["tracking_uri"])
    return given


def console(*, quiet: bool) -> Console:
    """Where it is said what happens, beside the results."""
    return Console(stderr=True, quiet=quiet, highlight=False)


@contextlib.contextmanager
def stoppable() -> Iterator[None]:
    """Inside, SIGTERM stops like Ctrl-C."""

    def stop(number: int, frame: Any) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
