"""Find: the answers that a report is about, in MLflow or in a frame."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from tlm_tracing._report import _frame
from tlm_tracing._report._answers import Answers
from tlm_tracing._report._row import Row
from tlm_tracing._report._store import Store
from tlm_tracing._stored import _search
from tlm_tracing.exceptions import ConfigurationError

if TYPE_CHECKING:
    import pandas

    from tlm_tracing._stored._search import Moment

_MOST_NAMED = 10
_EMPTY_FRAME = (
    "There are no scores in the frame. Traces get theirs by tlm_tracing.score_traces(), or on the "
    "command line by: tlm-tracing score"
)


@dataclass(frozen=True)
class Found:
    """What a report is about.

    Attributes:
        answers: All of the answers.
        worst: The least trustworthy of them, the lowest score first.
        uri: MLflow's tracking URI.
        empty: What to say if there are no scores.
    """

    answers: Answers
    worst: Sequence[Row]
    uri: str
    empty: str = ""


def in_store(
    n: int,
    reference: str | None = None,
    experiment_ids: Iterable[str | int] | str | int | None = None,
    experiment_names: Iterable[str] | str | None = None,
    filter_string: str | None = None,
    since: Moment = None,
    until: Moment = None,
) -> Found:
    """The answers in MLflow, arguments as for :func:`tlm_tracing.report`."""
    store, answers = Store(reference), Answers(n)
    store.reach()
    asked = _search.query(experiment_ids, experiment_names, filter_string, since, until)
    for row in store.rows(asked):
        answers.add(row)
    empty = "" if len(answers.scores) else _empty(store, asked, answers)
    return Found(answers, store.whole(answers.worst()), store.uri, empty)


def in_frame(scores: pandas.DataFrame, n: int, reference: str | None = None) -> Found:
    """The answers in a frame, arguments as for :func:`tlm_tracing.report`."""
    store, answers = Store(reference), Answers(n)
    for row in _frame.rows(scores, reference):
        answers.add(row)
    worst = answers.worst()
    if store.uri.startswith("http"):
        worst = store.located(worst)
    return Found(answers, worst, store.uri, _EMPTY_FRAME)


def lowest_in_store(
    n: int,
    experiment_ids: Iterable[str | int] | str | int | None = None,
    experiment_names: Iterable[str] | str | None = None,
    filter_string: str | None = None,
    since: Moment = None,
    until: Moment = None,
) -> list[Row]:
    """The ``n`` lowest alone, which MLflow finds without reading all."""
    store, answers = Store(), Answers(n)
    store.reach()
    asked = _search.query(experiment_ids, experiment_names, filter_string, since, until)
    for row in store.lowest(asked, n):
        answers.add(row)
    return store.whole(answers.worst())


def checked(threshold: float | None) -> float | None:
    """A threshold.

    Raises:
        ConfigurationError: If it is not in [0, 1].
    """
    if threshold is not None and not 0 <= threshold <= 1:
        raise ConfigurationError(f"threshold must be a score in [0, 1], not {threshold!r}.")
    return threshold


def positive(n: int) -> int:
    """How many.

    Raises:
        ConfigurationError: If it is less than 1.
    """
    if n < 1:
        raise ConfigurationError(f"n must be 1 or more, not {n!r}.")
    return n


def _empty(store: Store, asked: _search.Query, answers: Answers) -> str:
    """What to do if there are no scores."""
    where = ", ".join(map(repr, store.names(asked)))
    missing = answers.unseen + answers.unscored.total()
    said = [f"There are no scores in {where}{' for this search' if asked.filter() else ''}."]
    if missing:
        said.append(f"{missing:,} traces have none. To score them run: tlm-tracing score")
    others = [name for name in store.scored_experiments() if name not in store.names(asked)]
    if others:
        named = ", ".join(map(repr, others[:_MOST_NAMED]))
        said.append(f"There are scores in {named}; name an experiment with --experiment.")
    elif not missing:
        said.append("To score traces that are there already run: tlm-tracing score")
    return "\n".join(said)
