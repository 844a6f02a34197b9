"""Answers: what a report needs of all rows, without their texts, and the worst of them whole."""

from __future__ import annotations

import heapq
from array import array
from collections import Counter
from typing import TYPE_CHECKING, Any

import numpy as np

from tlm_tracing._report._row import UNSEEN, Row
from tlm_tracing._report._thresholds import Curve

if TYPE_CHECKING:
    from tlm_tracing._report._thresholds import Floats

_UNKNOWN, _WRONG = -1, 1


class Answers:
    """Some numbers of each scored row, counts of the unscored, and the least trustworthy rows.

    Attributes:
        unscored: How many rows have no score, by reason; None for those that don't say.
        unseen: How many traces nobody has tried to score.
        how: How many verdicts there are of each kind.
    """

    def __init__(self, n: int) -> None:
        """Start with none.

        Args:
            n: How many of the least trustworthy to keep.
        """
        self.unscored: Counter[str | None] = Counter()
        self.unseen = 0
        self.how: Counter[str] = Counter()
        self._n = n
        self._worst: list[tuple[float, int, Row]] = []
        self._scores = array("d")
        self._seconds = array("d")
        self._verdicts = array("b")
        self._models = _Names()
        self._experiments = _Names()

    def add(self, row: Row) -> None:
        """Take a row in."""
        if row.status == UNSEEN:
            self.unseen += 1
            return
        if row.score is None:
            self.unscored[row.reason] += 1
            return
        self._scores.append(row.score)
        self._seconds.append(float("nan") if row.seconds is None else row.seconds)
        self._models.append(row.model)
        self._experiments.append(row.experiment)
        verdict = row.verdict
        self._verdicts.append(_UNKNOWN if verdict is None else int(not verdict.is_right))
        if verdict is not None:
            self.how[verdict.how] += 1
        self._keep(row, row.score)

    def _keep(self, row: Row, score: float) -> None:
        item = (-score, -len(self._scores), row)  # of equals, the first
        if len(self._worst) < self._n:
            heapq.heappush(self._worst, item)
        elif self._worst and item > self._worst[0]:
            heapq.heapreplace(self._worst, item)

    def worst(self) -> list[Row]:
        """The rows with the lowest scores, the lowest first."""
        return [row for *_, row in sorted(self._worst, key=lambda item: item[:2], reverse=True)]

    @property
    def scores(self) -> Floats:
        """Every score."""
        return np.array(self._scores)

    @property
    def seconds(self) -> Floats:
        """For each score when, in seconds since 1970; NaN if that is not known."""
        return np.array(self._seconds)

    def by_model(self) -> dict[str | None, Floats]:
        """The scores of each LLM; of those that don't say, under None."""
        return self._models.split(self.scores)

    def by_experiment(self) -> dict[str | None, Floats]:
        """The scores of each experiment."""
        return self._experiments.split(self.scores)

    def verdicts(self) -> tuple[Floats, Any]:
        """The scores of answers that are known to be right or wrong; which of them are wrong."""
        verdicts = np.array(self._verdicts)
        is_known = verdicts != _UNKNOWN
        return self.scores[is_known], verdicts[is_known] == _WRONG

    def curve(self) -> Curve | None:
        """All thresholds, if of any answer it is known whether it is right."""
        scores, is_wrong = self.verdicts()
        return Curve(scores, is_wrong) if len(scores) else None


class _Names:
    """A name for each row, kept once."""

    def __init__(self) -> None:
        self._numbers: dict[str | None, int] = {}
        self._rows = array("l")

    def append(self, name: str | None) -> None:
        self._rows.append(self._numbers.setdefault(name, len(self._numbers)))

    def split(self, values: Floats) -> dict[str | None, Floats]:
        rows = np.array(self._rows)
        return {name: values[rows == number] for name, number in self._numbers.items()}
