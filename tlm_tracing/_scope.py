"""What is in force here: the open trusted scopes, and whether tracing is suppressed.

An activation is a pointer to a scope that knows whether it is open, not a context variable's
token: a token cannot be reset from another context (an async generator closed by another task),
a closed scope is simply passed over.
"""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Iterator, Mapping
from typing import Any, Protocol

from tlm_tracing._data import Trust


class ScopedCall(Protocol):
    """A call that was made inside a scope."""

    @property
    def trust(self) -> Trust | None:
        """Its trust so far; None while it runs."""


class Scope:
    """One trusted function call or block while it is open."""

    def __init__(self, settings: Mapping[str, Any]) -> None:
        self.settings = settings
        self.open = True
        self.calls: list[ScopedCall] = []
        self._parent = current()

    def enter(self) -> Scope | None:
        """Make this the innermost scope of the current context; gives what was it before."""
        before = _current.get()
        _current.set(self)
        return before

    def leave(self, before: Scope | None) -> None:
        """Step back out, unless the context has moved on or is another one by now."""
        if _current.get() is self:
            _current.set(before)

    def chain(self) -> list[Scope]:
        """This scope and the open ones round it, the outermost first."""
        scopes: list[Scope] = []
        scope: Scope | None = self
        while scope is not None:
            if scope.open:
                scopes.append(scope)
            scope = scope._parent
        return scopes[::-1]

    @property
    def trusts(self) -> list[Trust]:
        """The trust of every call so far, in call order."""
        found = (call.trust for call in list(self.calls))
        return [trust for trust in found if trust is not None]


_current: contextvars.ContextVar[Scope | None] = contextvars.ContextVar(
    "tlm_tracing_scope", default=None
)
_suppressed: contextvars.ContextVar[bool] = contextvars.ContextVar(
    "tlm_tracing_suppressed", default=False
)


def current() -> Scope | None:
    """The innermost open scope of this context."""
    scope = _current.get()
    while scope is not None and not scope.open:
        scope = scope._parent
    return scope


def forget() -> None:
    """Be inside no scope in this context any more, so that it keeps none alive."""
    _current.set(None)


@contextlib.contextmanager
def entered(scope: Scope | None) -> Iterator[None]:
    """A scope that was made elsewhere is the innermost one inside."""
    if scope is None:
        yield
        return
    before = scope.enter()
    try:
        yield
    finally:
        scope.leave(before)


def suppressed() -> bool:
    """Whether calls in this context are to be left alone."""
    return _suppressed.get()


@contextlib.contextmanager
def suppression(value: bool) -> Iterator[None]:
    """Whether calls are to be left alone inside."""
    before = _suppressed.get()
    _suppressed.set(value)
    try:
        yield
    finally:
        # Not Token.reset: the block may be left in another context than it was entered in.
        _suppressed.set(before)
