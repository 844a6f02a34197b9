"""Terminal: the least trustworthy answers as a table, and a few words on all of them."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from rich.console import Console, Group
from rich.table import Table
from rich.text import Text

from tlm_tracing._report import _page, _row, _said
from tlm_tracing._report._table import COLOURS, level, short

if TYPE_CHECKING:
    from tlm_tracing._report._answers import Answers
    from tlm_tracing._report._find import Found
    from tlm_tracing._report._row import Row


def show(found: Found, threshold: float | None, page: str | None) -> None:
    """Print the table, and what there is to say of all answers.

    Args:
        found: The answers.
        threshold: Count how many are below it.
        page: The file in which they are as a page.
    """
    console = Console(highlight=False)
    if len(found.answers.scores):
        console.print(_table(found.worst, found.uri))
        said = _summary(found.answers, threshold)
    else:
        said = [found.empty]
    if page is not None:
        said.append(f"The page is in {page}.")
    console.print("\n".join(said), soft_wrap=True, markup=False)


def as_json(found: Found, threshold: float | None) -> dict[str, Any]:
    """The same for programs, as plain data."""
    scores, curve = found.answers.scores, found.answers.curve()
    best = None if curve is None else curve.suggested()
    at = None if curve is None or threshold is None else curve.at(threshold)
    rows = _row.frame(found.worst)
    rows["timestamp"] = [_said.iso(row.seconds) for row in found.worst]
    return {
        "scored": len(scores),
        "unscored": found.answers.unscored.total(),
        "never_tried": found.answers.unseen,
        "median": float(np.median(scores)) if len(scores) else None,
        "below_threshold": None if threshold is None else int((scores < threshold).sum()),
        "at_threshold": None if at is None else dataclasses.asdict(at),
        "suggested": None if best is None else dataclasses.asdict(best),
        "worst": rows.astype(object).where(rows.notna(), None).to_dict("records"),
    }


def _table(worst: Sequence[Row], uri: str | None) -> Table:
    found = Table(show_lines=True, title="Least trustworthy first", expand=True)
    found.add_column("Trust", justify="right", no_wrap=True)
    found.add_column("Question, answer, explanation", ratio=1, overflow="fold")
    for row in worst:
        score = row.score or 0.0
        address = _page.link(uri, row.experiment_id, row.trace_id)
        style = COLOURS[level(score)] + (f" link {address}" if address else "")
        found.add_row(Text(f"{score:.4f}", style=style), Group(*_texts(row)))
    return found


def _texts(row: Row) -> list[Text]:
    facts = (row.trace_id, row.model, row.experiment, _said.moment(row.seconds))
    lines = (
        Text(short(row.prompt), "bold"),
        Text(short(row.response)),
        Text(short(row.explanation or ""), "italic"),
        Text("  ".join(fact for fact in facts if fact), "dim"),
    )
    return [line for line in lines if line]


def _summary(answers: Answers, threshold: float | None) -> list[str]:
    scores, curve = answers.scores, answers.curve()
    found = [f"{len(scores):,} scored answers, median {np.median(scores):.2f}."]
    if missing := answers.unscored.total() + answers.unseen:
        why = _said.unscored(answers)
        found.append(f"{missing:,} have no score{f': {why}' if why else ''}.")
    if threshold is not None:
        below = int((scores < threshold).sum())
        share = _said.percent(below / len(scores))
        found.append(f"{below:,} ({share}) are below {threshold:g}.")
    if curve is not None and (best := curve.suggested()) is not None:
        found.append(
            f"Of {curve.count:,} it is known whether they are right. A threshold of "
            f"{best.threshold:g} would flag {_said.percent(best.flagged)} of them: precision "
            f"{_said.percent(best.precision)}, recall {_said.percent(best.recall)}."
        )
    return found
