"""A server that is stopped: what its model has not written yet is written first."""

from __future__ import annotations

import signal
import threading
from types import FrameType
from typing import Any

from tlm_tracing import _ends, _pipeline, _threads

_UVICORN = "uvicorn.server"
_GRACE = 10.0


def prepare() -> None:
    """Have a server that runs this model end as a program does that is done.

    MLflow's servers are uvicorn's, which shuts down when it gets the signal, and then sends it to
    itself to end by it, on the spot; and the model has no say in what is done before.
    """
    if threading.current_thread() is not threading.main_thread():
        return
    _ends.handle_sigterm()
    before: Any = signal.getsignal(signal.SIGTERM)
    if getattr(before, "__module__", None) == _UVICORN:
        # One of several workers: they load their model when they are running already.
        signal.signal(signal.SIGTERM, _Worker(before))
    elif before is _ends._on_sigterm:
        signal.signal(signal.SIGTERM, _on_sigterm)


def _on_sigterm(number: int, frame: FrameType | None) -> None:
    is_shut_down = frame is not None and frame.f_globals.get("__name__") == _UVICORN
    if not is_shut_down:
        _ends._on_sigterm(number, frame)


class _Worker:
    """What one of several workers does when it is to stop.

    Its server gets the signal from the process above, and often a second time with its group. It
    writes first, while it can be told twice; then it stops as by Ctrl-C, which uvicorn outlives.
    """

    def __init__(self, handle_exit: Any) -> None:
        self._handle_exit = handle_exit
        self._is_stopping = False

    def __call__(self, number: int, frame: FrameType | None) -> None:
        if not self._is_stopping:
            self._is_stopping = True
            _threads.run_beside("sigterm", self._stop)

    def _stop(self) -> None:
        _pipeline.flush(_GRACE)
        self._handle_exit(signal.SIGINT, None)
