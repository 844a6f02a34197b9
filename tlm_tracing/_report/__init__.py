"""The report: the least trustworthy answers, in the terminal and as a page."""

from __future__ import annotations

import importlib.util
import json
import os
import sys
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from tlm_tracing import _redacted
from tlm_tracing.exceptions import ConfigurationError

if TYPE_CHECKING:
    import pandas

    from tlm_tracing._report._find import Found
    from tlm_tracing._stored._search import Moment

_NEEDED = ("jinja2", "matplotlib", "numpy", "pandas")

__all__ = ["least_trustworthy", "report", "run"]


def report(
    scores: pandas.DataFrame | None = None,
    *,
    html: str | os.PathLike[str] | None = None,
    n: int = 20,
    experiment_ids: Iterable[str | int] | str | int | None = None,
    experiment_names: Iterable[str] | str | None = None,
    filter_string: str | None = None,
    since: Moment = None,
    until: Moment = None,
    reference: str | None = None,
    threshold: float | None = None,
) -> pandas.DataFrame:
    """Find the least trustworthy answers, and write a page on them and on all the others.

    The page is one file that opens without a network: the distribution of scores, scores over
    time, by model and by experiment, the least trustworthy answers, and, where it is known which
    answers are right, precision and recall over the threshold.

    An answer is right or wrong by a person's boolean feedback on its trace (``correct``, or the
    only one); else by an expectation (``expected_response``, ``expected_answer``, ``reference``,
    ``ground_truth``, or the only one), or by a column of the frame. A boolean says it; of a text,
    all words have to be found in the answer, whatever their case, punctuation and articles.

    Args:
        scores: What :func:`score_traces` or :func:`least_trustworthy` returned, as it is or merged
            with ``mlflow.search_traces()`` on ``trace_id``; may also have the columns
            ``reference``, ``model`` and ``experiment``. By default what is in MLflow.
        html: The file to write the page to.
        n: How many of the least trustworthy.
        experiment_ids: Where to search, if no scores are given.
        experiment_names: The same by name. Without both, the active experiment.
        filter_string: A filter of MLflow's, such as ``"trace.status = 'OK'"``.
        since: The earliest time at which a trace began: a datetime, how long ago (a timedelta, or
            ``"24h"``), ISO 8601, or seconds since 1970.
        until: The latest.
        reference: The column, or else the feedback or expectation, that tells what is right.
        threshold: A score in [0, 1] to mark.

    Returns:
        The ``n`` calls with the lowest scores, the lowest first, with the columns of
        ``score_traces``.

    Raises:
        ConfigurationError: If an argument can't be used; the message says what to do.
        OSError: If the page can't be written, or MLflow's server does not answer.
    """
    _check_packages()
    from tlm_tracing._report import _find, _page, _row

    threshold, n = _find.checked(threshold), _find.positive(n)
    asked = (experiment_ids, experiment_names, filter_string, since, until)
    if scores is None:
        found = _find.in_store(n, reference, *asked)
    elif all(one is None for one in asked):
        found = _find.in_frame(scores, n, reference)
    else:
        raise ConfigurationError("Give either scores or what to search for in MLflow, not both.")
    if html is not None:
        _page.write(html, found, threshold)
    return _row.frame(found.worst)


def least_trustworthy(
    n: int = 10,
    *,
    experiment_ids: Iterable[str | int] | str | int | None = None,
    experiment_names: Iterable[str] | str | None = None,
    filter_string: str | None = None,
    since: Moment = None,
    until: Moment = None,
) -> pandas.DataFrame:
    """The least trustworthy answers in MLflow.

    Args:
        n: How many.
        experiment_ids: Where to search.
        experiment_names: The same by name. Without both, the active experiment.
        filter_string: A filter of MLflow's.
        since: The earliest time at which a trace began, as for :func:`report`.
        until: The latest.

    Returns:
        The ``n`` calls with the lowest scores, the lowest first, with the columns of
        ``score_traces``.

    Raises:
        ConfigurationError: If an argument can't be used; the message says what to do.
        ConnectionError: If MLflow's server does not answer.
    """
    _check_packages()
    from tlm_tracing._report import _find, _row

    asked = (experiment_ids, experiment_names, filter_string, since, until)
    return _row.frame(_find.lowest_in_store(_find.positive(n), *asked))


def run(
    *,
    html: str | None = None,
    n: int = 20,
    experiment_ids: list[str] | None = None,
    experiment_names: list[str] | None = None,
    filter_string: str | None = None,
    since: str | None = None,
    until: str | None = None,
    threshold: float | None = None,
    as_json: bool = False,
    tracking_uri: str | None = None,
) -> int:
    """Print the report: ``tlm-tracing report``.

    Args:
        html: The file to write the page to.
        n: How many of the least trustworthy.
        experiment_ids: Where to search.
        experiment_names: The same by name.
        filter_string: A filter of MLflow's.
        since: The earliest time at which a trace began.
        until: The latest.
        threshold: A score to mark.
        as_json: Print one JSON object in place of the table.
        tracking_uri: MLflow's store; the one in force by default.

    Returns:
        The exit status: 0, or 2 if the report can't be made as asked.
    """
    asked = (experiment_ids, experiment_names, filter_string, since, until)
    try:
        _check_packages()
        found = _found(n, threshold, html, tracking_uri, asked)
    except (ConfigurationError, OSError) as error:
        print(f"tlm-tracing report: {error}", file=sys.stderr)
        return 2
    from tlm_tracing._report import _terminal

    if as_json:
        print(json.dumps(_terminal.as_json(found, threshold), indent=2))
    else:
        _terminal.show(found, threshold, html)
    return 0


def _found(
    n: int, threshold: float | None, html: str | None, tracking_uri: str | None, asked: Any
) -> Found:
    """What the command tells of, once it is on its page."""
    import mlflow

    from tlm_tracing._report import _find, _page

    threshold, n = _find.checked(threshold), _find.positive(n)
    if tracking_uri is not None:
        mlflow.set_tracking_uri(tracking_uri)
    try:
        found = _find.in_store(n, None, *asked)
    except mlflow.MlflowException as error:
        raise ConfigurationError(f"MLflow says: {_redacted.said(error)}") from error
    if html is not None:
        _page.write(html, found, threshold)
    return found


def _check_packages() -> None:
    """Say what to do where there is mlflow-tracing alone."""
    if missing := [name for name in _NEEDED if importlib.util.find_spec(name) is None]:
        raise ConfigurationError(
            f"Reports need {' and '.join(missing)}, which mlflow-tracing does without. Run: pip "
            "install mlflow"
        )
