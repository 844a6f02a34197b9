"""Charts: what the page shows of many answers at once."""

from __future__ import annotations

from datetime import datetime, timezone
from typing import TYPE_CHECKING, Any

import matplotlib.dates
import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator, PercentFormatter, StrMethodFormatter

from tlm_tracing._report import _svg

if TYPE_CHECKING:
    from tlm_tracing._report._thresholds import Curve, Floats

_BINS = 20
_MOST_GROUPS = 12
_LONGEST_NAME = 30
_MOST_POINTS = 400
_STEPS = (60, 300, 900, 3_600, 10_800, 21_600, 86_400, 604_800, 2_592_000, 31_536_000)
_MOST_STEPS = 40


def distribution(scores: Floats, is_wrong: Any, threshold: float | None) -> _svg.Chart:
    """How many answers have which score.

    Args:
        scores: Every score.
        is_wrong: The scores of wrong answers, as far as they are known.
        threshold: Where to draw a line, if anywhere.
    """

    def draw(axes: Axes) -> None:
        bins = list(np.linspace(0, 1, _BINS + 1))
        axes.hist(scores, bins, color=_svg.MAIN, rwidth=0.88, label="all answers")
        if len(is_wrong):
            axes.hist(is_wrong, bins, color=_svg.BAD, rwidth=0.88, label="known to be wrong")
            _legend(axes)
        _mark(axes, threshold)
        _score_axis(axes)
        axes.yaxis.set_major_locator(MaxNLocator(4, integer=True))
        axes.yaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
        axes.set_ylabel("answers")
        axes.grid(axis="y")

    low, middle, high = np.quantile(scores, (0.25, 0.5, 0.75))
    told = (
        f"{_count(scores)}. The median score is {middle:.2f}; half of the scores are "
        f"between {low:.2f} and {high:.2f}."
    )
    return _svg.chart("distribution", "Distribution of scores", told, draw)


def over_time(scores: Floats, seconds: Floats, threshold: float | None) -> _svg.Chart | None:
    """Median score over time; None if no time is known."""
    is_known = np.isfinite(seconds)
    scores, seconds = scores[is_known], seconds[is_known]
    if not len(scores):
        return None
    middle_times, middles, lows, highs = _over_time(scores, seconds)

    def draw(axes: Axes) -> None:
        if len(scores) <= _MOST_POINTS:
            axes.plot(_times(seconds), scores, ".", color=_svg.MAIN, alpha=0.45, ms=6, mew=0)
        times = _times(middle_times)
        axes.fill_between(
            times, lows, highs, color=_svg.MAIN, alpha=0.18, lw=0, label="middle half"
        )
        axes.plot(times, middles, color=_svg.MAIN, lw=2, marker="o", ms=4, label="median")
        if threshold is not None:
            axes.axhline(threshold, color=_svg.MARK, lw=1.5, ls=(0, (4, 3)))
        axes.set_ylim(0, 1.02)
        margin = max(30.0, 0.02 * float(seconds.max() - seconds.min()))
        axes.set_xlim(*_times(np.array([seconds.min() - margin, seconds.max() + margin])))
        dates: Any = matplotlib.dates
        locator = dates.AutoDateLocator(minticks=3, maxticks=6)
        axes.xaxis.set_major_locator(locator)
        axes.xaxis.set_major_formatter(dates.ConciseDateFormatter(locator))
        axes.set_ylabel("score")
        axes.set_xlabel("time (UTC)")
        axes.grid(axis="y")
        _legend(axes)

    told = (
        f"{_count(scores)} from {_day(seconds.min())} to {_day(seconds.max())}. The median "
        f"score begins at {middles[0]:.2f} and ends at {middles[-1]:.2f}; it is lowest with "
        f"{middles.min():.2f} and highest with {middles.max():.2f}."
    )
    return _svg.chart("time", "Score over time", told, draw)


def by_group(name: str, title: str, groups: dict[str | None, Floats]) -> _svg.Chart | None:
    """A strip for each group, the lowest median first; None if no group has a name.

    Args:
        name: A word for the chart.
        title: What it shows.
        groups: The scores of each group; None stands for those that are in none.
    """
    if not any(groups):
        return None
    shown = _largest(groups)

    def draw(axes: Axes) -> None:
        for place, (label, scores) in enumerate(shown):
            low, first, middle, third, high = np.quantile(scores, (0.1, 0.25, 0.5, 0.75, 0.9))
            axes.plot([0, 1], [place, place], color=_svg.GRID, lw=1, zorder=0)
            axes.plot([low, high], [place, place], color=_svg.MAIN, lw=3, alpha=0.35)
            axes.plot([first, third], [place, place], color=_svg.MAIN, lw=9, alpha=0.55)
            axes.plot([middle], [place], "o", color=_svg.MAIN, ms=10, mec=_svg.CARD, mew=2)
            _name(axes, 0, place, label, "left", _svg.INK)
            _name(axes, 1, place, f"{middle:.2f}, {_count(scores)}", "right", _svg.SOFT)
        _score_axis(axes)
        axes.set_ylim(len(shown) - 0.5, -0.75)
        axes.set_yticks([])

    told = "; ".join(
        f"{label}: median {np.median(scores):.2f}, {_count(scores)}" for label, scores in shown
    )
    return _svg.chart(name, title, f"{told}.", draw, height=70 + 46 * len(shown))


def thresholds(curve: Curve, threshold: float | None) -> _svg.Chart:
    """Precision, recall and the share of flagged answers over the threshold."""

    def draw(axes: Axes) -> None:
        at, precision, recall = curve.steps()
        grid = np.linspace(0, 1, 201)
        flagged = [curve.at(float(one)).flagged for one in grid]
        axes.plot(at, precision, color=_svg.BAD, lw=2, drawstyle="steps-pre", label="precision")
        axes.plot(at, recall, color=_svg.MAIN, lw=2, drawstyle="steps-pre", label="recall")
        axes.plot(grid, flagged, color=_svg.SOFT, lw=1.5, ls=(0, (1, 1.5)), label="flagged")
        _mark(axes, threshold)
        _score_axis(axes, "threshold")
        axes.set_ylim(0, 1.02)
        axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
        axes.grid(axis="y")
        _legend(axes)

    told = f"Precision and recall of {curve.count:,} answers, {curve.wrong:,} of which are wrong."
    return _svg.chart("thresholds", "Precision and recall over the threshold", told, draw)


def _score_axis(axes: Axes, label: str = "score") -> None:
    axes.set_xlim(-0.01, 1.01)
    axes.set_xticks([0, 0.25, 0.5, 0.75, 1], ["0", "0.25", "0.5", "0.75", "1"])
    axes.set_xlabel(label)


def _mark(axes: Axes, threshold: float | None) -> None:
    if threshold is not None:
        axes.axvline(threshold, color=_svg.MARK, lw=1.5, ls=(0, (4, 3)))


def _legend(axes: Axes) -> None:
    axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=3, borderaxespad=0, fontsize=11)


def _name(axes: Axes, x: float, y: float, text: str, side: Any, colour: str) -> None:
    """A name above its strip. It is others' text: a dollar sign in it begins no formula."""
    axes.annotate(
        text,
        (x, y),
        (0, 12),
        textcoords="offset points",
        ha=side,
        va="bottom",
        color=colour,
        parse_math=False,
    )


def _largest(groups: dict[str | None, Floats]) -> list[tuple[str, Floats]]:
    """The largest groups and the rest as one, by median."""
    ordered = sorted(groups.items(), key=lambda item: (item[0] is None, -len(item[1])))
    shown = [(_short(name), scores) for name, scores in ordered[:_MOST_GROUPS]]
    if rest := ordered[_MOST_GROUPS:]:
        shown.append((f"{len(rest)} others", np.concatenate([scores for _, scores in rest])))
    return sorted(shown, key=lambda item: float(np.median(item[1])))


def _count(scores: Floats) -> str:
    return f"{len(scores):,} answer{'s' if len(scores) > 1 else ''}"


def _short(name: str | None) -> str:
    if name is None:
        return "unknown"
    text = " ".join("".join(one if one.isprintable() else " " for one in name).split())
    return text if len(text) <= _LONGEST_NAME else f"{text[: _LONGEST_NAME - 1]}…"


def _over_time(scores: Floats, seconds: Floats) -> tuple[Floats, Floats, Floats, Floats]:
    """Median time, median score and quartiles of each step of time that has answers."""
    span = float(seconds.max() - seconds.min())
    step = next((one for one in _STEPS if span / one <= _MOST_STEPS), _STEPS[-1])
    number = np.floor(seconds / step)
    parts = [number == one for one in np.unique(number)]
    quartiles = np.array([np.quantile(scores[part], (0.5, 0.25, 0.75)) for part in parts])
    times = np.array([np.median(seconds[part]) for part in parts])
    return times, quartiles[:, 0], quartiles[:, 1], quartiles[:, 2]


def _times(seconds: Floats) -> Any:
    return (seconds * 1000).astype("datetime64[ms]")


def _day(seconds: float) -> str:
    return f"{datetime.fromtimestamp(float(seconds), timezone.utc):%Y-%m-%d}"
