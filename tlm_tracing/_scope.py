"""What is in force here: the open trusted scopes, what was retrieved, and what is suppressed.

An activation is a pointer to a scope that knows whether it is open, not a context variable's
token: a token cannot be reset from another context (an async generator closed by another task),
a closed scope is simply passed over.
"""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

from tlm_tracing._data import Trust
from tlm_tracing.exceptions import ConfigurationError

_BETWEEN_DOCUMENTS = "\n\n"


class ScopedCall(Protocol):
    """A call that was made inside a scope."""

    @property
    def trust(self) -> Trust | None:
        """Its trust so far; None while it runs."""


class Retrieved(NamedTuple):
    """What answers are to be judged by.

    Attributes:
        context: What was retrieved, as one text; empty if nothing was found.
        query: What it was retrieved for; None means what the user asked last.
    """

    context: str
    query: str | None = None


class Scope:
    """One trusted function call or block while it is open.

    Attributes:
        settings: Those of its own.
        open: Whether it is.
        calls: Those made inside so far.
        retrieved: The context that is named for the calls that follow.
    """

    def __init__(self, settings: Mapping[str, Any]) -> None:
        self.settings = settings
        self.open = True
        self.calls: list[ScopedCall] = []
        self.retrieved: Retrieved | None = None
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


def retrieved(context: Any, query: Any = None) -> Retrieved | None:
    """What a user has named, checked; None if that is nothing.

    Args:
        context: A text, or the documents as a list of texts; an empty list says that nothing
            was found.
        query: A text.

    Raises:
        ConfigurationError: If they can't be meant.
    """
    if context is None:
        if query is not None:
            raise ConfigurationError(
                "A query without a context says nothing about an answer. Name both when the "
                "context is known: trusted_span(query=..., context=...), or inside of the block "
                "span.set_context(context, query=...)."
            )
        return None
    return Retrieved(_context(context), None if query is None else _text("query", query))


def retrieved_for(scopes: Iterable[Scope]) -> Retrieved | None:
    """What is named for a call: the innermost scope that names a context counts.

    Args:
        scopes: Those round the call, the outermost first.
    """
    named = [scope.retrieved for scope in scopes if scope.retrieved is not None]
    return named[-1] if named else None


def _context(value: Any) -> str:
    if isinstance(value, str):
        return _text("context", value)
    if not isinstance(value, Sequence) or not all(isinstance(one, str) for one in value):
        raise ConfigurationError(
            f"context must be a text or a list of texts, not {_kind(value)}. Of documents, give "
            "what the LLM gets to read of them: [document.page_content for document in found]."
        )
    # A document without text is none.
    return _BETWEEN_DOCUMENTS.join(_encodable(one) for one in value if one.strip())


def _text(name: str, value: Any) -> str:
    if not isinstance(value, str):
        raise ConfigurationError(f"{name} must be a text, not {_kind(value)}.")
    if not value.strip():
        ways = {
            "context": "If nothing was retrieved, say so by an empty list, context=[].",
            "query": "Leave it out to mean what the user asked last.",
        }
        raise ConfigurationError(f"{name} is empty. {ways[name]}")
    return _encodable(value)


def _kind(value: Any) -> str:
    """What a value is, without telling any of it."""
    if isinstance(value, (list, tuple)) and value:
        inside = " and ".join(sorted({type(one).__name__ for one in value}))
        return f"{type(value).__name__} of {inside}"
    return type(value).__name__


def _encodable(text: str) -> str:
    # Half a surrogate pair can't be sent.
    return text.encode("utf-8", "replace").decode("utf-8")


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
