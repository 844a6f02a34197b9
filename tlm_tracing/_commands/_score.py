"""The command ``tlm-tracing score``."""

from __future__ import annotations

import contextlib
import dataclasses
import heapq
import json
import sys
from collections import Counter
from collections.abc import Mapping
from typing import Any

from mlflow.exceptions import MlflowException
from rich.console import Console
from rich.live import Live
from rich.text import Text

from tlm_tracing._commands._asked import INTERRUPTED, asked, console, stoppable
from tlm_tracing._data import Trust
from tlm_tracing._report._table import Line, short, table
from tlm_tracing._stored._plan import Plan, plan
from tlm_tracing._stored._rows import Progress, ScoredCall
from tlm_tracing._stored._run import Run
from tlm_tracing.exceptions import ConfigurationError, TLMTracingError

_SAY_EVERY = 10.0
# Of those that another run may well score.
_FAILED = ("scorer_unavailable", "scorer_error", "timeout", "queue_full")


class Tally:
    """What the calls of a run came to; keeps only the least trustworthy."""

    def __init__(self, worst: int) -> None:
        """Nothing is counted yet.

        Args:
            worst: How many of the least trustworthy are kept.
        """
        self.scored = 0
        self.pending = 0
        self.unscored: Counter[str] = Counter()
        self._worst = worst
        self._heap: list[tuple[float, int, ScoredCall]] = []

    @property
    def failed(self) -> int:
        """Calls without a score that another run may give one."""
        return sum(self.unscored[reason] for reason in _FAILED)

    @property
    def least_trustworthy(self) -> list[ScoredCall]:
        """The lowest score first."""
        return [row for _, _, row in sorted(self._heap, key=lambda one: (-one[0], one[1]))]

    def take(self, running: Run) -> None:
        """Count all that a run gives, until its end."""
        while (rows := running.next()) is not None:
            for row in rows:
                self.add(row)

    def add(self, row: ScoredCall) -> None:
        """Count a call."""
        if row.status == "unscored":
            self.unscored[str(row.reason)] += 1
        elif row.trust_score is None:
            self.pending += 1
        else:
            self.scored += 1
            heapq.heappush(self._heap, (-row.trust_score, self.scored, row))
            if len(self._heap) > self._worst:
                heapq.heappop(self._heap)


def run(options: Mapping[str, Any]) -> int:
    """Score stored traces.

    Args:
        options: Those of the command line, by name.

    Returns:
        The exit status: 0, 1 if something could not be scored or written, 2 if it can't be done
        as asked for, 130 if it was stopped.
    """
    said = console(quiet=options["quiet"])
    show = _Shown(said)
    try:
        made = plan(**asked(options), progress=None if options["quiet"] else show)
    except (ConfigurationError, MlflowException) as error:
        print(f"tlm-tracing score: {error}", file=sys.stderr)
        return 2
    tally = Tally(options["n"])
    with stoppable(), show:
        status, running = _go(made, tally, said)
    if status == 2:
        return status
    if status in (0, 1):
        status = int(bool(tally.failed) or running.is_outage or status == 1)
    _tell(options, made, tally, running.progress, said, is_stopped=status == INTERRUPTED)
    return status


def _go(made: Plan, tally: Tally, said: Console) -> tuple[int, Run]:
    running = Run(made).start()
    status = 0
    try:
        try:
            tally.take(running)
        except KeyboardInterrupt:
            status = INTERRUPTED
            running.stop()
            said.print("Stopping: what was sent is waited for and written. Again to stop at once.")
            with contextlib.suppress(KeyboardInterrupt):
                tally.take(running)
    except (TLMTracingError, MlflowException) as error:
        print(f"tlm-tracing score: {error}", file=sys.stderr)
        status = status or (2 if isinstance(error, ConfigurationError) else 1)
    return status, running


def _tell(
    options: Mapping[str, Any],
    made: Plan,
    tally: Tally,
    progress: Progress,
    said: Console,
    *,
    is_stopped: bool,
) -> None:
    if options["json"]:
        print(json.dumps(_as_data(made, tally, progress, is_stopped=is_stopped)))
        return
    if tally.least_trustworthy:
        Console(highlight=False).print(table(_line(row) for row in tally.least_trustworthy))
    for sentence in _sentences(made, tally, progress):
        print(sentence)
    if is_stopped or tally.failed:
        said.print("The same command again goes on from here.")


def _sentences(made: Plan, tally: Tally, progress: Progress) -> list[str]:
    if not progress.traces:
        found = ["Nothing to score: no trace without a score was found."]
    elif made.dry_run:
        found = [
            f"Would score {tally.pending:,} calls in {progress.traces:,} traces: "
            f"{progress.characters:,} characters would be sent. Nothing was sent or written."
        ]
    else:
        found = [
            f"Scored {tally.scored:,} calls in {progress.traces:,} traces, in "
            f"{_duration(progress.seconds)} ({progress.rate:.0f} traces a second)."
        ]
        if tally.pending:
            found.append(f"{tally.pending:,} are not finished yet.")
    if tally.unscored:
        reasons = ", ".join(f"{count:,} {reason}" for reason, count in tally.unscored.most_common())
        found.append(f"Unscored: {reasons}.")
    return found


def _as_data(made: Plan, tally: Tally, progress: Progress, *, is_stopped: bool) -> dict[str, Any]:
    return {
        "dry_run": made.dry_run,
        "stopped": is_stopped,
        "traces": progress.traces,
        "scored": tally.scored,
        "pending": tally.pending,
        "unscored": dict(tally.unscored),
        "characters": progress.characters,
        "seconds": round(progress.seconds, 3),
        "traces_per_second": round(progress.rate, 1),
        "least_trustworthy": [
            {**dataclasses.asdict(row), "timestamp": row.timestamp.isoformat()}
            for row in tally.least_trustworthy
        ],
    }


def _line(row: ScoredCall) -> Line:
    trust = Trust(score=row.trust_score, explanation=row.explanation)
    return Line(short(row.prompt or ""), short(row.response or ""), trust)


class _Shown:
    """Shows how far a run is: one line that changes on a terminal, else one now and then."""

    def __init__(self, said: Console) -> None:
        self._said = said
        self._live = Live(console=said, transient=True, auto_refresh=False)
        self._last = 0.0

    def __enter__(self) -> None:
        if self._said.is_terminal:
            self._live.start()

    def __exit__(self, *_: object) -> None:
        self._live.stop()

    def __call__(self, progress: Progress) -> None:
        if self._said.is_terminal:
            self._live.update(Text(_how_far(progress)), refresh=True)
        elif progress.seconds - self._last >= _SAY_EVERY:
            self._last = progress.seconds
            self._said.print(_how_far(progress))


def _how_far(progress: Progress) -> str:
    of = "" if progress.total is None else f" of {progress.total:,}"
    left = progress.seconds_left
    parts = [
        f"{progress.traces:,}{of} traces",
        f"{progress.scored:,} scored",
        f"{progress.unscored:,} not",
        f"{progress.rate:.0f} a second",
        "" if left is None else f"{_duration(left)} left",
    ]
    return ", ".join(part for part in parts if part)


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes:02} min"
    return f"{minutes} min {seconds:02} s" if minutes else f"{seconds} s"
