"""Whether MLflow's store answers, and gives a trace back as it was written."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib
import os
import re
from typing import Any

import mlflow
from mlflow.exceptions import MlflowException
from mlflow.tracing.client import TracingClient
from mlflow.version import IS_TRACING_SDK_ONLY

import tlm_tracing as tt
from tlm_tracing import _annotate
from tlm_tracing._data import Trust
from tlm_tracing._doctor._check import (
    Check,
    Log,
    Overdue,
    address,
    is_timeout,
    lack_of_connection,
    ok,
    problem,
    skipped,
    told,
    within,
)

TRACE = "tlm-tracing doctor"

_STORE = "MLflow store"
_WRITING = "MLflow trace"
_STATUS = re.compile(r"failed with error code (\d+)|too many (\d+) error responses")
_TRUST = Trust(score=1.0, explanation="Written by tlm-tracing doctor.", scorer=TRACE)
# Of SQLAlchemy's drivers, those that are not called like their modules.
_PACKAGES = {
    "MySQLdb": "mysqlclient",
    "psycopg": '"psycopg[binary]"',
    "psycopg2": "psycopg2-binary",
}
_LONGER = "If it is only slow, as a new database is at first, a longer --timeout helps."


def store(timeout: float, log: Log, tracking_uri: str | None) -> Check:
    """Have MLflow look for a trace in the experiment in force.

    Args:
        timeout: Seconds that it may take.
        log: What MLflow says meanwhile.
        tracking_uri: The store; MLflow's own choice by default.
    """
    try:
        if tracking_uri is not None:
            mlflow.set_tracking_uri(tracking_uri)
        uri = mlflow.get_tracking_uri()
        where = address(uri)
        if not uri.startswith(("http", "databricks")):
            with contextlib.suppress(ImportError):
                # Or it would be imported at the check's expense, which takes seconds.
                importlib.import_module("mlflow.store.tracking.sqlalchemy_store")
        within(timeout, _look)
    except Overdue:
        why = f" {log.last}" if log.last else ""
        return problem(
            _STORE,
            f"{where} does not answer within {timeout:g} s.{why}",
            f"Check that it runs and is to be reached. {_LONGER}",
        )
    except ModuleNotFoundError as error:
        return _lacking(error)
    except Exception as error:
        return _failed(where, error)
    return ok(_STORE, f"{where} answers{'' if _is_chosen(tracking_uri) else ' (by default)'}")


def _look() -> None:
    if IS_TRACING_SDK_ONLY:
        # The small package records nothing, unless told where to, and doesn't read it itself.
        name, number = (os.environ.get(f"MLFLOW_EXPERIMENT_{what}") for what in ("NAME", "ID"))
        mlflow.set_experiment(name, None if name else number or "0")
    mlflow.search_traces(max_results=1, return_type="list", include_spans=False)


def _is_chosen(tracking_uri: str | None) -> bool:
    return tracking_uri is not None or "MLFLOW_TRACKING_URI" in os.environ


def _too_small() -> Check:
    return problem(
        _STORE,
        "mlflow-tracing knows no store but an MLflow server.",
        "Set MLFLOW_TRACKING_URI to a server's address, or run: pip install mlflow",
    )


def _lacking(error: ModuleNotFoundError) -> Check:
    if IS_TRACING_SDK_ONLY:
        return _too_small()
    module = str(error.name)
    return problem(
        _STORE,
        f"needs a module that is not installed: {module}.",
        f"Run: pip install {_PACKAGES.get(module, module)}",
    )


def _failed(where: str, error: Exception) -> Check:
    if IS_TRACING_SDK_ONLY and not where.startswith(("http", "databricks")):
        return _too_small()
    check = functools.partial(problem, _STORE)
    uri = "Check MLFLOW_TRACKING_URI (or --tracking-uri)"
    if reason := lack_of_connection(error):
        return check(f"{where} does not answer: {reason}.", f"{uri}, and that the server runs.")
    if is_timeout(error):
        return check(f"{where} does not answer in time.", f"Check that it works. {_LONGER}")
    status = _status(error)
    if status in (401, 403):
        return check(
            f"{where} refuses access ({status}).",
            "Check MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or "
            "MLFLOW_TRACKING_TOKEN, and what they permit.",
        )
    if status is not None:
        return check(
            f"{where} answers {status}.", f"{uri}: is that an MLflow server? Look into its log."
        )
    return check(f"{where} can't be used. {told(error)}", f"{uri}, and MLFLOW_EXPERIMENT_NAME.")


def _status(error: Exception) -> int | None:
    """The HTTP status behind MLflow's error, if it is none of MLflow's own words."""
    if found := _STATUS.search(str(error)):
        return int(found[1] or found[2])
    code = error.error_code if isinstance(error, MlflowException) else None
    return {"UNAUTHENTICATED": 401, "PERMISSION_DENIED": 403}.get(str(code))


def trace(timeout: float, log: Log, found: list[Check]) -> Check:
    """Write a trace, read it back and delete it.

    Args:
        timeout: Seconds that it may take.
        log: What MLflow says meanwhile.
        found: What is known already: without a store there is nothing to write to.
    """
    if any(check.name == _STORE and check.status == "problem" for check in found):
        return skipped(_WRITING, "the store has to be right first")
    log.last = None
    try:
        return within(timeout, functools.partial(_round_trip, log))
    except Overdue:
        return _unwritten(f"It is not written and read within {timeout:g} s.", log)
    except Exception as error:
        return problem(
            _WRITING, f"It can't be read back. {told(error)}", "Check the store and its log."
        )


def _round_trip(log: Log) -> Check:
    trace_id = _write()
    if trace_id is None:
        return _unwritten("MLflow records nothing.", log)
    tt.flush()
    client = TracingClient()
    try:
        stored: Any = client.get_trace(trace_id)
    except MlflowException:
        return _unwritten("It is not in the store.", log)
    names = {span.name for span in stored.data.spans}
    if TRACE not in names or stored.info.tags.get(_annotate.SCORE_TAG) != "1.0000":
        return _unwritten("It comes back without its span or its tags.", log)
    number = stored.info.experiment_id
    deleted = 0
    with contextlib.suppress(Exception):  # a store may not allow it
        deleted = client.delete_traces(number, trace_ids=[trace_id])
    done = "and deleted" if deleted else "and stays there: it can't be deleted"
    return ok(_WRITING, f"written and read back in experiment {number}, {done}")


def _write() -> str | None:
    with tt.trusted_span(TRACE) as span:
        span.set_inputs({"check": TRACE})
        span.set_outputs("This trace is to be deleted again.")
        if span.trace_id is not None:
            trust = dataclasses.replace(_TRUST, trace_id=span.trace_id)
            _annotate.annotate_live(trust, _annotate.Notes())
    return span.trace_id


def _unwritten(what: str, log: Log) -> Check:
    advice = f"Check that the store can be written to. {_LONGER}"
    if any(name.startswith("OTEL_EXPORTER_OTLP") for name in os.environ):
        advice = (
            "OTEL_EXPORTER_OTLP_... sends MLflow's traces elsewhere: unset it, or set "
            "MLFLOW_TRACE_ENABLE_OTLP_DUAL_EXPORT=true."
        )
    return problem(_WRITING, f"{what} {log.last}" if log.last else what, advice)
