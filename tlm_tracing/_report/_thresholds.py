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
# More decimals would tell of chance only.
_GRID = np.arange(1, 1001) / 1000


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
        flagged = int(self._flagged(np.array(threshold)))
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
        flagged = self._flagged(_GRID)
        return self._best(2 * self._wrong[flagged] / np.maximum(flagged + self.wrong, 1))

    def best_separation(self) -> Point | None:
        """The threshold with the largest recall less the share of right answers that it flags.

        This is Youden's J. It does not depend on how many are wrong, as F1 does; None if there is
        nothing to choose between.
        """
        flagged = self._flagged(_GRID)
        wrong = self._wrong[flagged]
        right = self.count - self.wrong
        return self._best(wrong / max(self.wrong, 1) - (flagged - wrong) / max(right, 1))

    def suggested(self) -> Point | None:
        """The best F1, unless that flags nearly all, as it does where most answers are wrong."""
        best = self.best_f1()
        return self.best_separation() if best is not None and best.flagged > _NEARLY_ALL else best

    def _best(self, quality: Floats) -> Point | None:
        """The threshold in the middle of those with the best quality, as round as may be."""
        if self.wrong in (0, self.count) or quality.max() <= 0:
            return None
        equals = np.flatnonzero(np.isclose(quality, quality.max(), rtol=0, atol=1e-12))
        run = equals[: int(np.argmax(np.append(np.diff(equals), 2) > 1)) + 1]
        low, high = float(_GRID[run[0]]), float(_GRID[run[-1]])
        rounded = (round((low + high) / 2, digits) for digits in (1, 2, 3))
        return self.at(next((one for one in rounded if low <= one <= high), low))

    def steps(self) -> tuple[Floats, Floats, Floats]:
        """Thresholds in [0, 1] at which something changes, with precision and recall there."""
        upper = np.unique(np.append(self._scores, 1.0))
        flagged = self._flagged(upper)
        upper, flagged = upper[flagged > 0], flagged[flagged > 0]
        wrong = self._wrong[flagged]
        return upper, wrong / flagged, wrong / max(self.wrong, 1)

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

    def _flagged(self, thresholds: Floats) -> Any:
        """How many each threshold flags."""
        return np.searchsorted(self._scores, thresholds, side="left")


def _share(part: int, whole: int) -> float | None:
    return part / whole if whole else None
