"""The least trustworthy answers first, in the terminal."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from rich.table import Table
from rich.text import Text

from tlm_tracing._data import Trust

_LONGEST = 400
COLOURS = {"low": "red", "middle": "yellow", "high": "green"}


@dataclass(frozen=True)
class Line:
    """One answered question.

    Attributes:
        question: What was asked.
        answer: What was answered.
        trust: How far the answer can be trusted.
    """

    question: str
    answer: str
    trust: Trust


def by_trust(lines: Iterable[Line]) -> list[Line]:
    """Sort from least to most trustworthy; the unscored come first, nobody knows of them."""
    return sorted(lines, key=lambda line: -1.0 if line.trust.score is None else line.trust.score)


def table(lines: Iterable[Line]) -> Table:
    """A table of questions, answers, scores and explanations, the least trustworthy first."""
    found = Table(show_lines=True, title="Least trustworthy first")
    found.add_column("Trust", justify="right", no_wrap=True)
    found.add_column("Question", ratio=3)
    found.add_column("Answer", ratio=3)
    found.add_column("Explanation", ratio=4)
    for line in by_trust(lines):
        score, explanation = line.trust.score, line.trust.explanation
        shown = str(line.trust.reason) if score is None else f"{score:.4f}"
        found.add_row(
            Text(shown, style=_colour(score)),
            Text(line.question),
            Text(line.answer),
            Text(explanation or ""),
        )
    return found


def short(text: str) -> str:
    """A text on one line, without what a terminal would obey, and not too long for a table."""
    text = " ".join("".join(one if one.isprintable() else " " for one in text).split())
    return text if len(text) <= _LONGEST else f"{text[: _LONGEST - 1]}…"


def level(score: float) -> str:
    """How a score is shown: as ``"low"``, ``"middle"`` or ``"high"``."""
    return "low" if score < 0.5 else "middle" if score < 0.8 else "high"


def _colour(score: float | None) -> str:
    return "dim" if score is None else COLOURS[level(score)]
