"""The end of the process: what is pending is settled and written first, within bounds.

A normal end is seen by a thread that the interpreter waits for, before anything is torn down;
SIGTERM, which would end the process on the spot, by a handler where the application has none.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Callable
from types import FrameType

from tlm_tracing import _outbox, _ready, _record, _scoring, _threads

_EXIT_GRACE = 5.0
_LAST_WORDS = 2.0
_START_GRACE = 10.0

_lock = threading.Lock()
_last_chores: set[Callable[[], None]] = set()
_is_watched = False
_is_handled = False


def prepare(last_chore: Callable[[], None] | None = None) -> None:
    """Be ready for the end of the process.

    Args:
        last_chore: Done then, before the last scores are waited for; given again, done once.
    """
    global _is_watched
    if last_chore is not None:
        _last_chores.add(last_chore)
    if not _is_watched:
        with _lock:
            if not _is_watched:
                _is_watched = True
                # Not atexit: threads that are no daemons are waited for before MLflow's own
                # flush at exit, which must come after the last score. A first call at exit is
                # too late for a thread.
                with contextlib.suppress(RuntimeError):
                    _threads.start("exit", _see_out, daemon=False)
    handle_sigterm()


def handle_sigterm() -> None:
    """Be ready for SIGTERM, if this is the main thread and the application is not."""
    global _is_handled
    if _is_handled or threading.current_thread() is not threading.main_thread():
        return
    _is_handled = True
    if signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:
        signal.signal(signal.SIGTERM, _on_sigterm)


def _on_sigterm(number: int, frame: FrameType | None) -> None:
    """Die of the signal as ever, but not before what is pending is written.

    Elsewhere, as the main thread may have been interrupted in any lock. A second signal ends the
    process at once.
    """
    signal.signal(signal.SIGTERM, signal.SIG_DFL)

    def die() -> None:
        try:
            _wind_up(is_killed=True)
        finally:
            os.kill(os.getpid(), signal.SIGTERM)

    _threads.run_beside("sigterm", die)


def _see_out() -> None:
    threading.main_thread().join()
    _wind_up(is_killed=False)
    _scoring.close_scorers()


def _wind_up(*, is_killed: bool) -> None:
    """Settle the last scores, and write all that is left."""
    for last_chore in list(_last_chores):
        last_chore()
    if not _scoring.drain(_EXIT_GRACE):
        _scoring.give_up()
        _scoring.drain(_LAST_WORDS)
    _outbox.end(is_killed=is_killed)
    _ready.flush(_LAST_WORDS if _ready.last_error() else _START_GRACE)
    _record.flush()
    _outbox.flush()
    _outbox.report(_ready.unwritten(), _ready.last_error())


def _after_fork() -> None:
    global _is_watched, _lock
    _lock = threading.Lock()
    _is_watched = False


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
