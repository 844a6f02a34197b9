"""Said: what a page says of all answers, in words, numbers and charts."""

from __future__ import annotations

import dataclasses
from datetime import datetime, timezone
from typing import TYPE_CHECKING, Any

import numpy as np

from tlm_tracing._report import _charts

if TYPE_CHECKING:
    from tlm_tracing._report._answers import Answers
    from tlm_tracing._report._svg import Chart
    from tlm_tracing._report._thresholds import Curve, Point

_USUAL = 0.5
_ROWS = tuple(number / 10 for number in range(1, 10))
_HOW = {
    "human": "{} by a person's feedback",
    "boolean": "{} by an expectation or reference that says true or false",
    "text": "{} by a right answer in words",
}
_IN_WORDS = (
    "Where there is a right answer in words, an answer counts as right if these words are found "
    "in it, whatever their case, punctuation and articles; one that says the same in other words "
    "counts as wrong."
)


def overview(answers: Answers, threshold: float | None) -> dict[str, Any]:
    """What the page shows above the single answers.

    Args:
        answers: One or more.
        threshold: The threshold to mark; the suggested one by default, if there is one.
    """
    curve = answers.curve()
    best = None if curve is None else curve.suggested()
    mark = best.threshold if threshold is None and best is not None else threshold
    return {
        "figures": _figures(answers, curve, mark),
        "charts": _overview_charts(answers, mark),
        "truth": None if curve is None else _truth(answers, curve, threshold, mark),
    }


def subtitle(answers: Answers) -> str:
    """Which answers these are."""
    names = sorted(name for name in answers.by_experiment() if name)
    where = names[0] if len(names) == 1 else f"{len(names):,} experiments"
    times = answers.seconds[np.isfinite(answers.seconds)]
    parts = [where] if names else []
    if len(times):
        first, last = moment(times.min()), moment(times.max())
        parts.append(f"{first} to {last} UTC" if first != last else f"{first} UTC")
    return ", ".join(parts) or "How far the answers can be trusted"


def moment(seconds: float | None) -> str | None:
    """A time to the minute, in UTC."""
    if seconds is None or seconds != seconds:
        return None
    return f"{datetime.fromtimestamp(float(seconds), timezone.utc):%Y-%m-%d %H:%M}"


def iso(seconds: float | None) -> str | None:
    """A time in ISO 8601, in UTC."""
    if seconds is None or seconds != seconds:
        return None
    return datetime.fromtimestamp(seconds, timezone.utc).isoformat(timespec="milliseconds")


def percent(share: float | None) -> str:
    """A share in [0, 1], with a decimal where it is small; a dash if there is none."""
    if share is None:
        return "—"
    if 0 < share < 0.0005:
        return "<0.1%"
    return f"{share:.1%}" if 0 < share < 0.0995 else f"{share:.0%}"


def unscored(answers: Answers) -> str:
    """How many have no score, and why, as far as that is known."""
    reasons = [f"{count:,} {reason}" for reason, count in answers.unscored.items() if reason]
    unseen = [f"{answers.unseen:,} never tried"] if answers.unseen else []
    return ", ".join([*reasons, *unseen])


def _figures(
    answers: Answers, curve: Curve | None, mark: float | None
) -> list[tuple[str, str, str]]:
    """The large numbers: label, value, note."""
    scores = answers.scores
    low, middle, high = np.quantile(scores, (0.25, 0.5, 0.75))
    at = _USUAL if mark is None else mark
    below = int((scores < at).sum())
    missing = answers.unscored.total() + answers.unseen
    found = [
        ("Scored answers", f"{len(scores):,}", f"{missing:,} without a score" if missing else ""),
        ("Median score", f"{middle:.2f}", f"half of them {low:.2f} to {high:.2f}"),
        (f"Below {at:g}", percent(below / len(scores)), f"{below:,} answers"),
    ]
    if curve is not None:
        note = f"{curve.wrong:,} of {curve.count:,} known"
        found.append(("Known to be wrong", percent(curve.wrong / curve.count), note))
    elif missing:
        found.append(("Without a score", f"{missing:,}", unscored(answers)))
    return found


def _overview_charts(answers: Answers, mark: float | None) -> list[Chart]:
    scores, is_wrong = answers.verdicts()
    found = (
        _charts.distribution(answers.scores, scores[is_wrong], mark),
        _charts.over_time(answers.scores, answers.seconds, mark),
        _charts.by_group("models", "By model", answers.by_model()),
        _charts.by_group("experiments", "By experiment", answers.by_experiment()),
    )
    return [chart for chart in found if chart is not None]


def _truth(
    answers: Answers, curve: Curve, threshold: float | None, mark: float | None
) -> dict[str, Any]:
    """What is said about thresholds where it is known which answers are right."""
    how = ", ".join(_HOW[key].format(f"{count:,}") for key, count in answers.how.most_common())
    found: dict[str, Any] = {
        "known": f"It is known whether an answer is right for {curve.count:,} of "
        f"{len(answers.scores):,}: {how}. Wrong are {curve.wrong:,} "
        f"({percent(curve.wrong / curve.count)}).",
        "how": _IN_WORDS if answers.how["text"] else "",
        "advice": _advice(curve),
        "chart": None,
    }
    if 0 < curve.wrong < curve.count:
        points = [curve.at(number / 100) for number in range(101)]
        found |= {
            "chart": _charts.thresholds(curve, mark),
            "rows": _rows(curve, threshold),
            "points": [dataclasses.asdict(point) for point in points],
            "start": round(100 * (_USUAL if mark is None else mark)),
        }
    return found


def _rows(curve: Curve, threshold: float | None) -> list[dict[str, Any]]:
    """The table's: tenths, and what is worth a mark."""
    marks: dict[float, list[str]] = {at: [] for at in _ROWS}
    for mark, point in (("best F1", curve.best_f1()), ("best split", curve.best_separation())):
        if point is not None:
            marks.setdefault(point.threshold, []).append(mark)
    if threshold is not None:
        marks.setdefault(threshold, []).append("yours")
    return [_row(curve.at(at), ", ".join(mark)) for at, mark in sorted(marks.items())]


def _row(point: Point, mark: str) -> dict[str, Any]:
    shares = (point.flagged, point.precision, point.recall)
    cells = [*map(percent, shares), f"{point.f1:.2f}", percent(point.missed)]
    return {"threshold": f"{point.threshold:.10g}", "mark": mark, "cells": cells}


def _advice(curve: Curve) -> list[str]:
    """Which threshold is suggested, why, and how far to trust that."""
    best, f1, ranking = curve.suggested(), curve.best_f1(), curve.ranking()
    if best is None or f1 is None or ranking is None:
        return ["No threshold is suggested: that takes right answers as well as wrong ones."]
    why = f"which has the best F1 ({best.f1:.2f}) on these answers"
    if best != f1:
        why = (
            "which parts wrong from right best (the largest recall less the share of right answers "
            f"flagged); the best F1, at {f1.threshold:g}, would flag {percent(f1.flagged)}"
        )
    return [
        f"Suggested is {best.threshold:g}, {why}. It flags {percent(best.flagged)} of the answers; "
        f"{percent(best.precision)} of the flagged are wrong, and {percent(best.recall)} of the "
        "wrong are flagged. Where a wrong answer costs more than a second look, take a higher one.",
        "How well the scores tell right from wrong: of a wrong and a right answer, the wrong one "
        f"has the lower score in {percent(ranking)} of the cases (the area under the ROC curve).",
    ]
