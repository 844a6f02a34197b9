"""What a check finds, how long it may take, and what it may tell."""

from __future__ import annotations

import concurrent.futures
import contextlib
import errno
import logging
import re
import socket
import ssl
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal, TypeAlias, TypeVar

from tlm_tracing import _redacted, _threads

Status: TypeAlias = Literal["ok", "problem", "skipped"]
T = TypeVar("T")

_THREAD = "doctor"
# A check's own time runs out first, and it says more than that.
_GRACE = 1.0
_LONGEST = 200
_OTHERS = ("mlflow", "alembic", "urllib3", "openai", "httpx", "tlm_tracing")
_DATABASE_ERROR = re.compile(r"\([\w.]+Error\) [^\n]+")


@dataclass(frozen=True)
class Check:
    """What was found.

    Attributes:
        name: What was looked at.
        status: ``"ok"``, ``"problem"`` or ``"skipped"``.
        message: What was found, in one line.
        advice: What to do; None unless it is a problem.
    """

    name: str
    status: Status
    message: str
    advice: str | None = None


class Overdue(Exception):  # noqa: N818 - nothing has failed yet
    """A check has no result in time; what it does goes on."""


def ok(name: str, message: str) -> Check:
    """Nothing to do here."""
    return Check(name, "ok", message)


def problem(name: str, message: str, advice: str) -> Check:
    """Something to be put right, and how."""
    return Check(name, "problem", message, advice)


def skipped(name: str, message: str) -> Check:
    """Not looked at, and why."""
    return Check(name, "skipped", message)


def within(seconds: float, job: Callable[[], T]) -> T:
    """What a job gives, done in a thread that the process need not wait for.

    Raises:
        Overdue: If it takes longer. Otherwise whatever the job raises.
    """
    result: concurrent.futures.Future[T] = concurrent.futures.Future()

    def run() -> None:
        try:
            given = job()
        except BaseException as error:
            result.set_exception(error)
        else:
            result.set_result(given)

    _threads.start(_THREAD, run)
    if not concurrent.futures.wait([result], seconds + _GRACE).done:
        raise Overdue
    return result.result()


def is_unfinished() -> bool:
    """Whether a check still hangs in its thread."""
    return any(thread.name.endswith(f"-{_THREAD}") for thread in threading.enumerate())


class Log(logging.Handler):
    """Keeps what others log off the terminal; the last warning may be the reason for a silence.

    Attributes:
        last: That warning, fit to be shown.
    """

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.last: str | None = None

    def emit(self, record: logging.LogRecord) -> None:
        """Keep a warning."""
        with contextlib.suppress(Exception):
            self.last = one_line(record.getMessage())


@contextlib.contextmanager
def listening() -> Iterator[Log]:
    """Others log here inside, and nowhere else."""
    log = Log()
    loggers = [logging.getLogger(name) for name in _OTHERS]
    before = [(logger.handlers, logger.propagate) for logger in loggers]
    for logger in loggers:
        logger.handlers, logger.propagate = [log], False
    try:
        yield log
    finally:
        for logger, (handlers, propagates) in zip(loggers, before, strict=True):
            logger.handlers, logger.propagate = handlers, propagates


def one_line(text: str) -> str:
    """Somebody else's text in one line, without credentials."""
    found = _DATABASE_ERROR.search(text)
    short = " ".join(_redacted.redact(found[0] if found else text).split())
    return short if len(short) <= _LONGEST else f"{short[:_LONGEST]}..."


def told(error: BaseException) -> str:
    """An exception in one line, without credentials."""
    said = one_line(_redacted.said(error))
    return f"{type(error).__name__}: {said}" if said else type(error).__name__


def address(url: str) -> str:
    """A URL without credentials; a password may contain what ends the host in a URL."""
    return _redacted.address(_redacted.redact(url))


def lack_of_connection(error: BaseException) -> str | None:
    """Why there is no connection, in a few words; None if that is not what is the matter."""
    cause: BaseException | None = error
    while cause is not None:
        kinds = {kind.__name__ for kind in type(cause).__mro__}
        if isinstance(cause, OSError) and cause.errno == errno.ECONNREFUSED:
            return "the connection is refused"
        if isinstance(cause, socket.gaierror):
            return "the name of its host is not known"
        if isinstance(cause, ssl.SSLError):
            return "its certificate is not trusted, or it does not speak TLS"
        if kinds & {"UnsupportedProtocol", "InvalidURL", "InvalidUrlException", "MissingSchema"}:
            return "that is no http or https URL"
        if kinds & {"ProxyError"}:
            return "the proxy does not let it through"
        cause = cause.__cause__ or cause.__context__
    return None


def is_timeout(error: BaseException) -> bool:
    """Whether an exception or one behind it says that the time is over."""
    cause: BaseException | None = error
    while cause is not None:
        if any("Timeout" in kind.__name__ for kind in type(cause).__mro__):
            return True
        cause = cause.__cause__ or cause.__context__
    return False
