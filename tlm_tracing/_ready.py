"""MLflow's start, off the caller's path.

The first span makes MLflow open its store and look up the experiment, which takes seconds on a
new database and minutes without a server. So that is done in a thread, for which a caller waits
a few seconds at most. What is recorded until it is done are spans of our own, which become
MLflow's as soon as it is.
"""

from __future__ import annotations

import contextlib
import contextvars
import logging
import os
import threading
import time
from collections.abc import Callable
from typing import Any

import mlflow
from mlflow.entities import LiveSpan, NoOpSpan
from mlflow.entities.span import NO_OP_SPAN_TRACE_ID
from mlflow.environment_variables import MLFLOW_EXPERIMENT_ID, MLFLOW_EXPERIMENT_NAME
from mlflow.exceptions import MlflowException
from mlflow.tracing.client import TracingClient
from mlflow.tracing.context import _USER_TRACE_CONTEXT
from mlflow.tracing.provider import (
    _MLFLOW_TRACE_USER_DESTINATION,
    _get_tracer,
    get_current_otel_span,
    provider,
)
from mlflow.tracking import fluent

from tlm_tracing import _exporter, _live, _outbox, _threads, _tracking
from tlm_tracing._light import LightSpan

_logger = logging.getLogger("tlm_tracing")

_PATIENCE = 10.0
_FIRST_PAUSE = 0.5
_LONGEST_PAUSE = 10.0
_MOST = 1000

Place = Callable[[str, str], None]
"""Told the ids of the trace and the span."""


class LaterSpan:
    """A span of ours that becomes one of MLflow's when MLflow is ready.

    It takes what an MLflow span takes, and has its times; it has no trace id yet.
    """

    trace_id = NO_OP_SPAN_TRACE_ID

    def __init__(
        self, name: str, kind: str, parent: LaterSpan | None, start_time_ns: int | None = None
    ) -> None:
        self.parent_id = None if parent is None else id(parent)
        self.start_time_ns = start_time_ns or time.time_ns()
        self.end_time_ns: int | None = None
        self._name = name
        self._kind = kind
        self._told: list[tuple[str, tuple[Any, ...], dict[str, Any]]] = []
        self._placed: list[Place] = []
        self._children: list[LaterSpan] = []
        self._root: LaterSpan = self if parent is None else parent._root
        self._open = 0
        self._root._open += 1
        if parent is not None:
            parent._children.append(self)

    def __getattr__(self, name: str) -> Any:
        """Methods of a span that tell it something: told again, later."""
        if not name.startswith(("set_", "add_", "record_")):
            raise AttributeError(name)

        def tell(*args: Any, **kwargs: Any) -> None:
            self._told.append((name, args, kwargs))

        return tell

    def when_placed(self, place: Place) -> None:
        """Have something done when the span has its ids, before it ends."""
        self._placed.append(place)

    def end(self, end_time_ns: int | None = None) -> None:
        """End the span; with the last one the trace is whole."""
        if self.end_time_ns is None:
            self.end_time_ns = end_time_ns or time.time_ns()
            self._root._open -= 1
            if not self._root._open:
                _start.keep(self._root)

    @property
    def is_over(self) -> bool:
        """Whether its trace is whole, and takes no further span."""
        return not self._root._open

    def become(self, parent: LiveSpan | NoOpSpan | None = None) -> None:
        """Make the span, and those inside it, MLflow's."""
        span = start(self._name, self._kind, parent, self.start_time_ns)
        for name, args, kwargs in self._told:
            getattr(span, name)(*args, **kwargs)
        for child in self._children:
            child.become(span)
        if span.trace_id != NO_OP_SPAN_TRACE_ID:
            for place in self._placed:
                place(span.trace_id, span.span_id)
        span.end(end_time_ns=self.end_time_ns or time.time_ns())


_current: contextvars.ContextVar[LaterSpan | None] = contextvars.ContextVar(
    "tlm_tracing_later", default=None
)


def current() -> LaterSpan | None:
    """The span of ours that is active in this context; None if there is none."""
    span = _current.get()
    return None if span is None or span.is_over else span


def activate(span: LaterSpan | None) -> LaterSpan | None:
    """Make a span active in this context; gives the one that was."""
    before = _current.get()
    _current.set(span)
    return before


class _Start:
    """How far MLflow's start has come in this process."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None
        self._tried = threading.Event()
        self._done = threading.Event()
        self._is_late = False
        self.last_error: Exception | None = None
        self._kept: list[LaterSpan] = []
        self._experiments: dict[tuple[str, str], str] = {}

    def experiment_id(self) -> str | None:
        """The experiment that the environment names; None if MLflow knows it by itself.

        Raises:
            LookupError: If its id is not known yet.
        """
        if (
            fluent._active_experiment_id
            or _MLFLOW_TRACE_USER_DESTINATION.get()
            or fluent._get_latest_active_run()  # type: ignore[no-untyped-call]
        ):
            return None
        name, number = _by_environment()
        if name is None:
            return number
        return self._experiments[mlflow.get_tracking_uri(), name]

    def is_done(self) -> bool:
        """Whether MLflow would start a span without opening or asking its store."""
        if not getattr(provider.once, "_done", True):
            return False
        with contextlib.suppress(LookupError):
            self.experiment_id()
            return True
        return False

    def wait(self) -> bool:
        """Whether MLflow is ready; the first callers wait a few seconds for it."""
        if self.is_done():
            return True
        with self._lock:
            if self._thread is None:
                self._tried.clear()
                self._done.clear()
                self._thread = _threads.start("mlflow", self._run)
        if not self._is_late:
            self._tried.wait(_PATIENCE)
            if not self.is_done():
                self._say_that_it_is_late()
        return self.is_done()

    def _say_that_it_is_late(self) -> None:
        with self._lock:
            first, self._is_late = not self._is_late, True
        if first:
            _logger.warning(
                "MLflow is not ready: %s. Calls go on; at most %d are kept to be recorded "
                "when it is.",
                self.last_error or f"it has not started within {_PATIENCE:g} seconds",
                _MOST,
            )

    def keep(self, root: LaterSpan) -> None:
        """Have the spans become MLflow's as soon as it is ready."""
        with self._lock:
            if len(self._kept) >= _MOST:
                _outbox.lose(f"MLflow is not ready, and {_MOST} calls wait for it already")
                return
            self._kept.append(root)
            if self._thread is not None:
                return
        self._let_become()

    def unwritten(self) -> int:
        """How many calls are kept."""
        return len(self._kept)

    def flush(self, timeout: float | None) -> bool:
        """Wait until none is kept."""
        return not self._kept or (self._done.wait(timeout) and not self._kept)

    def _run(self) -> None:
        pause = _FIRST_PAUSE
        while True:
            try:
                self._open()
            except Exception as error:
                self.last_error = error
                self._tried.set()
                time.sleep(pause)
                pause = min(2 * pause, _LONGEST_PAUSE)
                continue
            self._tried.set()
            self._let_become()
            with self._lock:
                if not self._kept:
                    self._thread = None
                    self._is_late = False
                    self._done.set()
                    return

    def _open(self) -> None:
        _get_tracer(__name__)
        _exporter.adopt()
        with contextlib.suppress(LookupError):
            self.experiment_id()
            return
        client, name = TracingClient(), str(_by_environment()[0])
        with _tracking.at_store(client):
            self._experiments[mlflow.get_tracking_uri(), name] = _experiment(client.store, name)

    def _let_become(self) -> None:
        while self._kept:
            with self._lock:
                root = self._kept[0] if self._kept else None
            if root is not None:
                with contextlib.suppress(Exception):
                    # Under no span that happens to be active here.
                    contextvars.Context().run(root.become)
                with self._lock:
                    self._kept.remove(root)


def _by_environment() -> tuple[str | None, str | None]:
    """The experiment's name and id in the environment."""
    name, number = MLFLOW_EXPERIMENT_NAME, MLFLOW_EXPERIMENT_ID
    return name.get(), number.get()  # type: ignore[no-untyped-call]


def _experiment(store: Any, name: str) -> str:
    """The experiment's id; made if there is none, as MLflow does."""
    found = store.get_experiment_by_name(name)
    if found is None:
        try:
            return str(store.create_experiment(name))
        except MlflowException:
            found = store.get_experiment_by_name(name)  # another process was faster
            if found is None:
                raise
    return str(found.experiment_id)


def wait() -> bool:
    """Whether MLflow is ready to start spans; waits for it, a few seconds and once only."""
    return _start.wait()


def start(
    name: str,
    kind: str,
    parent: LiveSpan | NoOpSpan | None,
    start_time_ns: int | None = None,
) -> LiveSpan:
    """Start a span of MLflow's, which is ready."""
    experiment_id = None
    if parent is None and not _is_span(get_current_otel_span()):
        experiment_id = _start.experiment_id()
    span = mlflow.start_span_no_context(
        name,
        span_type=kind,
        parent_span=parent,  # type: ignore[arg-type] # a NoOpSpan has children of its kind
        experiment_id=experiment_id,
        start_time_ns=start_time_ns,
    )
    if parent is None:
        _exporter.adopt()
    return span


def start_light(name: str, kind: str, active: Any) -> LightSpan | NoOpSpan | None:
    """Start a light span where :func:`start` would start a live one, of MLflow's, which is ready.

    Args:
        name: Its name.
        kind: Its type, as MLflow has it.
        active: OpenTelemetry's active span.

    Returns:
        The span; one that does nothing if the trace is not sampled, None if it has to be live.
    """
    alone, told = _exporter.alone(), _USER_TRACE_CONTEXT.get()
    if alone is None or (told is not None and told.enabled is False):
        return None
    if not _is_span(active):
        with contextlib.suppress(Exception):  # which MLflow tells of when it starts a live one
            return _live.start_trace(name, kind, *alone, _start.experiment_id())
        return None
    parent = mlflow.get_current_active_span()
    if not isinstance(parent, LiveSpan):
        return None
    return _live.start_light(name, kind, parent, processor=alone[0])


def _is_span(active: Any) -> bool:
    context = active and active.get_span_context()
    return context is not None and context.is_valid


def unwritten() -> int:
    """How many calls wait for MLflow to be ready."""
    return _start.unwritten()


def last_error() -> Exception | None:
    """Why MLflow was not ready, when it was not."""
    return _start.last_error


def flush(timeout: float | None) -> bool:
    """Wait until no call waits for MLflow to be ready.

    Args:
        timeout: Seconds to wait at most; None waits for as long as it takes.
    """
    return _start.flush(timeout)


def _after_fork() -> None:
    global _start
    _start = _Start()


_start = _Start()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
