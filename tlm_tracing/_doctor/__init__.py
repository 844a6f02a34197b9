"""The doctor: is all there that tracing needs, does it answer, and what is to be done if not."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import math
import os
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator

from rich.console import Console
from rich.text import Text

from tlm_tracing._doctor import _local
from tlm_tracing._doctor._check import Check, is_unfinished, listening, problem, skipped, told

__all__ = ["Check", "end", "run", "status"]

_NEEDED = ("mlflow", "mlflow-tracing", "openai")
_BEYOND = ("LLM endpoint", "Cleanlab", "MLflow store", "MLflow trace")
_COLOURS = {"ok": "green", "problem": "red", "skipped": "yellow"}


def run(
    *,
    tracking_uri: str | None = None,
    timeout: float = 10.0,
    score: bool = True,
    as_json: bool = False,
) -> list[Check]:
    """Check all that tracing needs, and say what is found.

    Args:
        tracking_uri: The MLflow store to check; the one in force by default.
        timeout: Seconds that each check may take.
        score: Whether Cleanlab is asked for a score, which it bills.
        as_json: Print one JSON object at the end, not a line for each check.

    Returns:
        What was found.
    """
    console = Console(highlight=False)
    found: list[Check] = []
    for check in _checks(tracking_uri, timeout, score, found):
        found.append(check)
        if not as_json:
            console.print(_line(check), soft_wrap=True)
    if as_json:
        checks = [dataclasses.asdict(check) for check in found]
        print(json.dumps({"ok": status(found) == 0, "checks": checks}, indent=2))
    else:
        console.print(_summary(found), soft_wrap=True)
    return found


def status(found: Iterable[Check]) -> int:
    """The exit status: 1 if there is any problem, else 0."""
    return int(any(check.status == "problem" for check in found))


def end(status: int) -> int:
    """Leave without waiting for what hangs; otherwise gives the status back."""
    if is_unfinished():
        # MLflow would hold up a normal end for minutes.
        sys.stdout.flush()
        os._exit(status)
    logging.getLogger("mlflow").setLevel(logging.WARNING)  # it announces its last flush
    return status


def _checks(
    tracking_uri: str | None, timeout: float, score: bool, found: list[Check]
) -> Iterator[Check]:
    """Each as soon as it is known."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield from _local.versions()  # imports MLflow, which sets its logging up anew
        yield from _local.settings()
        yield from _local.switches()
        yield from _local.keys()
        if any(check.status == "problem" and check.name in _NEEDED for check in found):
            for name in _BEYOND:
                yield skipped(name, "the packages have to be right first")
            return
        from tlm_tracing._doctor import _services, _store

        with listening() as log:
            yield _guarded("LLM endpoint", lambda: _services.llm_endpoint(timeout, found))
            yield _guarded("Cleanlab", lambda: _services.cleanlab(timeout, found, score=score))
            with _environment(timeout):
                yield _guarded("MLflow store", lambda: _store.store(timeout, log, tracking_uri))
                yield _guarded("MLflow trace", lambda: _store.trace(timeout, log, found))


def _guarded(name: str, check: Callable[[], Check]) -> Check:
    try:
        return check()
    except Exception as error:
        return problem(name, f"The check itself failed. {told(error)}", "Please report it.")


@contextlib.contextmanager
def _environment(timeout: float) -> Iterator[None]:
    """MLflow asks once and soon, and its trace is recorded whatever the switches say."""
    before = dict(os.environ)
    for name in before:
        if name.startswith("TLM_TRACING_") or name == "MLFLOW_TRACE_SAMPLING_RATIO":
            del os.environ[name]
    os.environ["MLFLOW_HTTP_REQUEST_MAX_RETRIES"] = "0"
    os.environ["MLFLOW_HTTP_REQUEST_TIMEOUT"] = str(math.ceil(timeout))
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def _line(check: Check) -> Text:
    said = " ".join(filter(None, (check.message, check.advice)))
    return Text.assemble(
        (f"{check.status:<9}", _COLOURS[check.status]), (f"{check.name:<21} ", "bold"), said
    )


def _summary(found: list[Check]) -> str:
    count = sum(check.status == "problem" for check in found)
    return "No problems." if not count else f"{count} problem{'s' if count > 1 else ''}."
