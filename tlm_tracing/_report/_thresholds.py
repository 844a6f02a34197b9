"""Thresholds: what each would flag, and how much of that is wrong.

An answer is flagged if its score is below the threshold. Precision is the share of wrong answers
among the flagged, recall the share of flagged answers among the wrong.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

if TYPE_CHECKING:
    Floats: TypeAlias = np.ndarray[Any, np.dtype[np.float64]]

_NEARLY_ALL = 0.9


@dataclass(frozen=True)
class Point:
    """What one threshold does.

    Attributes:
        threshold: The score below which an answer is flagged.
        count: How many answers are flagged.
        flagged: Their share of all.
        precision: Wrong among the flagged; None if none is flagged.
        recall: Flagged among the wrong; None if none is wrong.
        f1: The harmonic mean of both.
        missed: Wrong among those that are not flagged; None if all are flagged.
    """

    threshold: float
    count: int
    flagged: float
    precision: float | None
    recall: float | None
    f1: float
    missed: float | None


class Curve:
    """All thresholds for answers of which it is known whether they are right."""

    def __init__(self, scores: Floats, is_wrong: Floats) -> None:
        """Sort them.

        Args:
            scores: The scores, in [0, 1]; one or more.
            is_wrong: For each, 1 if the answer is wrong and 0 if it is right.
        """
        order = np.argsort(scores, kind="stable")
        self._scores = scores[order]
        # How many are wrong among the lowest 0, 1, 2, ...
        self._wrong = np.concatenate([[0], np.cumsum(is_wrong[order])]).astype("int64")

    @property
    def count(self) -> int:
        """How many answers."""
        return len(self._scores)

    @property
    def wrong(self) -> int:
        """How many of them are wrong."""
        return int(self._wrong[-1])

    def at(self, threshold: float) -> Point:
        """What a threshold does."""
        flagged = int(np.searchsorted(self._scores, threshold, side="left"))
        wrong, kept = int(self._wrong[flagged]), self.count - flagged
        return Point(
            threshold=threshold,
            count=flagged,
            flagged=flagged / self.count,
            precision=_share(wrong, flagged),
            recall=_share(wrong, self.wrong),
            f1=2 * wrong / (flagged + self.wrong) if flagged + self.wrong else 0.0,
            missed=_share(self.wrong - wrong, kept),
        )

    def best_f1(self) -> Point | None:
        """The threshold with the best F1; None if there is nothing to choose between."""
        steps = self._steps()
        return self._best(2 * self._wrong[steps] / np.maximum(steps + self.wrong, 1))

    def best_separation(self) -> Point | None:
        """The threshold with the best recall less the share of right answers that it flags.

        This is Youden's J. It does not depend on how many are wrong, as F1 does; None if there is
        nothing to choose between.
        """
        steps = self._steps()
        wrong, right = self._wrong[steps], steps - self._wrong[steps]
        rest = self.count - self.wrong
        return self._best(wrong / max(self.wrong, 1) - right / max(rest, 1))

    def suggested(self) -> Point | None:
        """The best F1, unless that flags nearly all, as it does where most answers are wrong."""
        best = self.best_f1()
        return self.best_separation() if best is not None and best.flagged > _NEARLY_ALL else best

    def _best(self, quality: Floats) -> Point | None:
        """The threshold of the step with the best quality; of equals, the lowest."""
        if self.wrong in (0, self.count) or not (quality > 0).any():
            return None
        step = int(self._steps()[int(np.argmax(quality))])
        below = float(self._scores[step - 1])
        above = float(self._scores[step]) if step < self.count else 1.0
        return self.at(_round_between(below, above))

    def steps(self) -> tuple[Floats, Floats, Floats]:
        """Thresholds in [0, 1] at which something changes, with precision and recall there."""
        steps = self._steps()
        steps = steps[steps > 0]
        precision = self._wrong[steps] / steps
        recall = self._wrong[steps] / max(self.wrong, 1)
        upper = np.append(self._scores, 1.0)[steps]
        return upper, precision, recall

    def ranking(self) -> float | None:
        """The chance that of a wrong and a right answer the wrong one has the lower score.

        This is the area under the ROC curve, in [0, 1]; None without answers of both kinds.
        """
        right = self.count - self.wrong
        if not right or not self.wrong:
            return None
        is_wrong = np.diff(self._wrong).astype(bool)
        bad, good = self._scores[is_wrong], self._scores[~is_wrong]
        above = right - np.searchsorted(good, bad, side="right")
        level = np.searchsorted(good, bad, side="right") - np.searchsorted(good, bad, side="left")
        return float((above + level / 2).sum() / (right * self.wrong))

    def _steps(self) -> Any:
        """How many are flagged by one threshold after another: the same score, the same fate."""
        inner = np.flatnonzero(np.diff(self._scores)) + 1
        last = [self.count] if self._scores[-1] < 1 else []
        return np.concatenate([[0] if self._scores[0] > 0 else [], inner, last]).astype("int64")


def _share(part: int, whole: int) -> float | None:
    return part / whole if whole else None


def _round_between(below: float, above: float) -> float:
    """The number with the fewest decimals that is above the one and not above the other."""
    for digits in (2, 3, 4):
        found = round((below + above) / 2, digits)
        if below < found <= above:
            return found
    return above
