"""Ended spans, on their way to the exporter.

In place of OpenTelemetry's processor, which MLflow has wake a thread every five spans, and which
forgets spans, and with them whole traces, when there are many.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
import weakref
from collections import deque
from typing import Any

from tlm_tracing import _outbox, _threads

# They are exported after so many seconds, while the application makes calls after some more, or
# when there are so many: MLflow has room for 1,000 traces, and loses the oldest.
_COLLECT = 0.5
_COLLECT_LATER = 5.0
_MANY = 700


class Batch:
    """Hands ended spans over to an exporter, many at a time; what MLflow's processors ask for."""

    def __init__(self, exporter: Any) -> None:
        """Nothing is started yet."""
        self._exporter = exporter
        self._begin()
        _batches.add(self)

    def _begin(self) -> None:
        self._spans: deque[Any] = deque()
        # A finalizer or a signal's handler may end or flush spans in the middle of either.
        self._exporting = threading.RLock()
        self._starting = threading.RLock()
        self._has_some = threading.Event()
        self._has_many = threading.Event()
        self._thread: threading.Thread | None = None
        self._is_over = False

    def on_end(self, span: Any) -> None:
        """Take a span."""
        self._spans.append(span)
        if self._thread is None:
            self._start()
        if not self._has_some.is_set():
            self._has_some.set()
        elif len(self._spans) >= _MANY:
            self._has_many.set()

    def force_flush(self, timeout_millis: float = 0) -> bool:
        """Hand over all there are, now and here."""
        with self._exporting:
            self._has_many.clear()
            spans = [self._spans.popleft() for _ in range(len(self._spans))]
            try:
                self._exporter.export(spans)
            except Exception:  # one of them cannot be exported, and must not cost the others
                for span in spans:
                    self._export_alone(span)
        return True

    def shutdown(self) -> None:
        """Hand over all there are, and be done."""
        self.force_flush()
        self._is_over = True
        self._has_some.set()

    def _export_alone(self, span: Any) -> None:
        try:
            self._exporter.export([span])
        except Exception as error:
            _outbox.lose(f"MLflow could not export it: {error}")

    def _start(self) -> None:
        # Too late for threads at the end of the process; the last flush hands over what is left.
        with self._starting, contextlib.suppress(RuntimeError):
            if self._thread is None:
                self._thread = _threads.start("export", self._run)

    def _run(self) -> None:
        while not self._is_over:
            self._has_some.wait()
            until = time.monotonic() + _COLLECT_LATER
            while not self._has_many.wait(_COLLECT):
                if not _outbox.is_called() or time.monotonic() >= until:
                    break
            self._has_some.clear()
            self.force_flush()


_batches: weakref.WeakSet[Batch] = weakref.WeakSet()


def _after_fork() -> None:
    """A forked child has none of its parent's threads, and its parent exports what is left."""
    for batch in list(_batches):
        batch._begin()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
