"""The command ``tlm-tracing watch``: new traces are scored as they arrive."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Mapping
from typing import Any

from mlflow.exceptions import MlflowException

from tlm_tracing._commands._asked import asked, console, stoppable
from tlm_tracing._commands._score import Tally
from tlm_tracing._stored._plan import Plan, plan
from tlm_tracing._stored._run import Run
from tlm_tracing.exceptions import ConfigurationError, TLMTracingError

# The ids of traces without anything to score; beyond that the oldest may be read once more.
_MOST_KNOWN = 200_000
_LONGEST_PAUSE = 60.0


def run(options: Mapping[str, Any]) -> int:
    """Score new traces until SIGTERM or Ctrl-C.

    Args:
        options: Those of the command line, by name.

    Returns:
        The exit status: 0, or 2 if it can't be done as asked for.
    """
    said = console(quiet=options["quiet"])
    given = asked(options)
    try:
        plan(**given)
    except (ConfigurationError, MlflowException) as error:
        print(f"tlm-tracing watch: {error}", file=sys.stderr)
        return 2
    tally = Tally(0)
    said.print(f"Watching. New traces are looked for every {options['interval']:g} s.")
    try:
        with stoppable(), contextlib.suppress(KeyboardInterrupt):
            _watch(given, options["interval"], tally, said)
    except ConfigurationError as error:  # a filter that only MLflow can read
        print(f"tlm-tracing watch: {error}", file=sys.stderr)
        return 2
    said.print(f"Stopped. Scored {tally.scored:,} calls.")
    return 0


def _watch(given: dict[str, Any], interval: float, tally: Tally, said: Any) -> None:
    done: set[str] = set()
    pause = interval
    while True:
        began = time.monotonic()
        before = tally.scored
        try:
            _once(plan(**given), tally, done)
        except ConfigurationError:
            raise
        except (TLMTracingError, MlflowException, OSError) as error:
            pause = min(2 * pause, max(_LONGEST_PAUSE, interval))
            said.print(f"MLflow can't be read or written now: {error}. Next try in {pause:g} s.")
        else:
            pause = interval
        if tally.scored > before:
            seconds = time.monotonic() - began
            said.print(f"Scored {tally.scored - before:,} calls in {seconds:.1f} s.")
        if len(done) > _MOST_KNOWN:
            done.clear()
        time.sleep(pause)


def _once(made: Plan, tally: Tally, done: set[str]) -> None:
    running = Run(made, done).start()
    try:
        tally.take(running)
    except KeyboardInterrupt:
        running.stop()
        tally.take(running)  # what was sent is waited for and written
        raise
