"""``trusted`` and ``trusted_span``: a function or a block whose OpenAI calls are trusted."""

from __future__ import annotations

import contextlib
import functools
import inspect
import logging
import sys
from collections.abc import (
    AsyncGenerator,
    Awaitable,
    Callable,
    Generator,
    Iterator,
    Mapping,
    Sequence,
)
from types import TracebackType
from typing import Any, ParamSpec, TypeVar, overload

from tlm_tracing import _config, _patches, _scope
from tlm_tracing._data import Trust
from tlm_tracing._scope import Retrieved, Scope, suppressed
from tlm_tracing.exceptions import ConfigurationError

_logger = logging.getLogger("tlm_tracing")

P = ParamSpec("P")
R = TypeVar("R")


class TrustedSpan:
    """An open trusted block, and what is known of the answers given inside it."""

    def __init__(
        self,
        name: str,
        settings: Mapping[str, Any],
        inputs: Any = None,
        retrieved: Retrieved | None = None,
    ) -> None:
        self._scope = Scope(settings)
        self._scope.retrieved = retrieved
        self._record: Any = None
        self._told_inputs = inputs is not None
        self._told_outputs = False
        try:
            config = _config.resolve(*(scope.settings for scope in self._scope.chain()))
        except ConfigurationError as error:
            # From the environment: keywords were checked where they were written.
            _logger.error("Nothing is recorded: %s", error)
        else:
            if config.enabled and not suppressed():
                self._open(name, inputs, config)

    @property
    def trust(self) -> Trust | None:
        """The lowest trust so far; None if no call has a score."""
        scored = [trust for trust in self.trusts if trust.score is not None]
        return min(scored, key=lambda trust: trust.score or 0.0, default=None)

    @property
    def trusts(self) -> list[Trust]:
        """The trust of every call so far, in call order."""
        return self._scope.trusts

    @property
    def trace_id(self) -> str | None:
        """Id of the MLflow trace; None if nothing is recorded."""
        record = self._record
        return None if record is None else record.trace_id

    def set_context(self, context: str | Sequence[str] | None, query: str | None = None) -> None:
        """Name what was retrieved for the calls that follow inside the block.

        Their answers are then scored by it, too: see :class:`trusted_span`. Questions that are
        answered at the same time need a block each.

        Args:
            context: As one text, or the documents as a list of texts; an empty list says that
                nothing was found. None takes back what was named.
            query: What it was retrieved for; by default what the user asks last in a call.

        Raises:
            ConfigurationError: If these are no texts, or empty ones.
        """
        self._scope.retrieved = _scope.retrieved(context, query)

    def set_inputs(self, value: Any) -> None:
        """Record what went into the block. Without it, it is the first call's request."""
        self._told_inputs = True
        self._tell("inputs", value)

    def set_outputs(self, value: Any) -> None:
        """Record what came out of the block. Without it, it is the last call's answer."""
        self._told_outputs = True
        self._tell("outputs", value)

    def _tell(self, what: str, value: Any) -> None:
        if self._record is None:
            return
        from tlm_tracing import _pipeline

        with _pipeline.guarded(f"recording the {what} of a block"):
            getattr(self._record, what)(value)

    def _open(self, name: str, inputs: Any, config: _config.Config) -> None:
        from tlm_tracing import _ends, _hook, _pipeline, _propagation, _record

        with _pipeline.guarded("opening a trusted block"):
            _ends.prepare()
            record = _record.BlockRecord(name, inputs, config)
            _hook.patches.install()
            _propagation.pools.install()
            self._record = record

    @contextlib.contextmanager
    def _active(self) -> Iterator[None]:
        entered = self._enter()
        try:
            yield
        finally:
            self._leave(entered)

    def _enter(self) -> tuple[Scope | None, Any]:
        before = self._scope.enter()
        return before, None if self._record is None else self._record.activate()

    def _leave(self, entered: tuple[Scope | None, Any]) -> None:
        before, token = entered
        if self._record is not None:
            self._record.deactivate(token)
        self._scope.leave(before)

    def _close(self, error: BaseException | None) -> None:
        if not self._scope.open:
            return
        self._scope.open = False
        if isinstance(error, GeneratorExit):
            error = None  # a consumer who has seen enough is no failure
        if self._record is None:
            return
        from tlm_tracing import _hook, _pipeline, _propagation

        with _pipeline.guarded("closing a trusted block"):
            _propagation.pools.uninstall()
            _hook.patches.uninstall()
            self._adopt_from_calls()
            self._record.close(error)

    def _adopt_from_calls(self) -> None:
        """A block has no arguments and no result of its own, yet its trace should read well."""
        calls: list[Any] = self._scope.calls
        if calls and not self._told_inputs:
            self._record.inputs(calls[0].request)
        if calls and not self._told_outputs and calls[-1].answer is not None:
            self._record.outputs(calls[-1].answer)


class trusted_span:  # noqa: N801 - used like a function
    """Record and score every OpenAI call made inside a block, whichever client makes it.

    Use it as ``with trusted_span() as span:`` or ``async with trusted_span() as span:``. After
    the block ``span.trust`` is the lowest :class:`~tlm_tracing.Trust` and ``span.trusts`` are
    all of them. In a generator use :func:`trusted` on the function instead: a block that stays
    open across a ``yield`` is active in the consumer, too.

    Where an answer is given by what was retrieved (RAG), name that as the context. Cleanlab then
    also scores whether the context suffices to answer, whether the response is grounded in it,
    how helpful the response and how easy the query is: ``Trust.evals``, and an assessment each.
    Of blocks inside each other, the innermost that names a context counts. What is retrieved
    inside of the block is named by :meth:`TrustedSpan.set_context`.

    Args:
        name: Name of the span in MLflow.
        query: What the context was retrieved for; by default what the user asks last in a call.
        context: What was retrieved, as one text, or the documents as a list of texts; an empty
            list says that nothing was found.
        **settings: Any of :class:`~tlm_tracing.Config`'s fields, for the calls inside.

    Raises:
        ConfigurationError: If a setting is unknown or its value cannot work, or query and
            context are no texts, or empty ones.
    """

    def __init__(
        self,
        name: str | None = None,
        *,
        query: str | None = None,
        context: str | Sequence[str] | None = None,
        **settings: Any,
    ) -> None:
        _config.check(settings)
        self._retrieved = _scope.retrieved(context, query)
        self._name = name or "trusted_span"
        self._settings = settings
        self._entered: list[tuple[TrustedSpan, Any]] = []

    def __enter__(self) -> TrustedSpan:
        span = TrustedSpan(self._name, self._settings, retrieved=self._retrieved)
        self._entered.append((span, span._enter()))
        return span

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        span, entered = self._entered.pop()
        span._leave(entered)
        span._close(error)

    async def __aenter__(self) -> TrustedSpan:
        return self.__enter__()

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.__exit__(kind, error, traceback)


def set_context(context: str | Sequence[str] | None, query: str | None = None) -> None:
    """Name what was retrieved for the calls that follow in the innermost trusted block.

    For functions under :func:`trusted`, and for whatever they call. Outside of all blocks it has
    no effect, and says so once.

    Args:
        context: As for :meth:`TrustedSpan.set_context`.
        query: Likewise.

    Raises:
        ConfigurationError: If these are no texts, or empty ones.
    """
    named = _scope.retrieved(context, query)
    scope = _scope.current()
    if scope is None:
        _warn_of_no_block()
    else:
        scope.retrieved = named


@functools.lru_cache(maxsize=1)
def _warn_of_no_block() -> None:
    _logger.warning(
        "set_context was called outside of a trusted block, so the context is not used. Call it "
        "inside of a function that is decorated with trusted, or of a trusted_span; in a thread "
        "that you start yourself, with target=tlm_tracing.propagate(function)."
    )


@overload
def trusted(function: Callable[P, R], /) -> Callable[P, R]: ...
@overload
def trusted(
    *, name: str | None = None, **settings: Any
) -> Callable[[Callable[P, R]], Callable[P, R]]: ...
def trusted(function: Any = None, /, *, name: str | None = None, **settings: Any) -> Any:
    """Record and score every OpenAI call that a function makes, whichever client makes it.

    Takes functions, coroutine functions, generators, async generators and methods, with or
    without ``@staticmethod`` and ``@classmethod``; what it gives has the same signature, is of
    the same kind and can be pickled.

    Args:
        function: The function, when used as ``@trusted`` without parentheses.
        name: Name of the span in MLflow; the function's name by default.
        **settings: Any of :class:`~tlm_tracing.Config`'s fields, for the calls inside.

    Raises:
        ConfigurationError: If a setting is unknown, its value cannot work, or what is decorated
            is no function.
    """
    if named := {"query", "context"} & settings.keys():
        raise ConfigurationError(
            f"trusted takes no {' and '.join(sorted(named))}, which each call of the function has "
            "anew: name them inside of it, by tlm_tracing.set_context(context, query=...)."
        )
    _config.check(settings)
    if function is None:
        return functools.partial(_decorate, name=name, settings=settings)
    return _decorate(function, name, settings)


def _decorate(function: Any, name: str | None, settings: Mapping[str, Any]) -> Any:
    if isinstance(function, (staticmethod, classmethod)):
        return type(function)(_decorate(function.__func__, name, settings))
    if not callable(function) or isinstance(function, type):
        raise ConfigurationError(f"trusted decorates functions and methods, not {function!r}.")
    span_name = name or str(getattr(function, "__name__", type(function).__name__))

    def open_span(args: Any, kwargs: Any) -> TrustedSpan:
        return TrustedSpan(span_name, settings, _arguments(function, args, kwargs))

    if inspect.isasyncgenfunction(function):
        return _async_generator(function, open_span)
    if inspect.isgeneratorfunction(function):
        return _generator(function, open_span)
    if inspect.iscoroutinefunction(function):
        return _coroutine(function, open_span)
    return _plain(function, open_span)


OpenSpan = Callable[[Any, Any], TrustedSpan]


def _plain(function: Callable[P, R], open_span: OpenSpan) -> Callable[P, R]:
    @_patches.like(function)
    def wrapper(*args: P.args, **kwargs: P.kwargs) -> R:
        span = open_span(args, kwargs)
        with _closing(span), span._active():
            result = function(*args, **kwargs)
            span.set_outputs(result)
            return result

    return wrapper


def _coroutine(function: Callable[P, Any], open_span: OpenSpan) -> Callable[P, Any]:
    @_patches.like(function)
    async def wrapper(*args: P.args, **kwargs: P.kwargs) -> Any:
        span = open_span(args, kwargs)
        with _closing(span), span._active():
            result = await function(*args, **kwargs)
            span.set_outputs(result)
            return result

    return wrapper


def _generator(function: Callable[P, Any], open_span: OpenSpan) -> Callable[P, Any]:
    """The span is active while the generator's own code runs, never in its consumer."""

    @_patches.like(function)
    def wrapper(*args: P.args, **kwargs: P.kwargs) -> Generator[Any, Any, Any]:
        span = open_span(args, kwargs)
        yielded = _Yielded()
        with _closing(span, yielded):
            steps = function(*args, **kwargs)
            step = functools.partial(steps.send, None)
            try:
                while True:
                    try:
                        with span._active():
                            item = step()
                    except StopIteration as end:
                        return end.value
                    yielded.add(item)
                    try:
                        step = functools.partial(steps.send, (yield item))
                    except BaseException as error:
                        step = functools.partial(steps.throw, error)
            finally:
                del step  # what was thrown would be held by its own traceback
                with span._active():
                    steps.close()

    return wrapper


def _async_generator(function: Callable[P, Any], open_span: OpenSpan) -> Callable[P, Any]:
    @_patches.like(function)
    async def wrapper(*args: P.args, **kwargs: P.kwargs) -> AsyncGenerator[Any, Any]:
        span = open_span(args, kwargs)
        yielded = _Yielded()
        with _closing(span, yielded):
            steps = function(*args, **kwargs)
            step = functools.partial(_first_step, steps)
            try:
                while True:
                    try:
                        with span._active():
                            item = await step()
                    except StopAsyncIteration:
                        return
                    yielded.add(item)
                    try:
                        step = functools.partial(steps.asend, (yield item))
                    except BaseException as error:
                        step = functools.partial(steps.athrow, error)
            finally:
                del step
                with span._active():
                    await steps.aclose()

    return wrapper


def _first_step(steps: AsyncGenerator[Any, Any]) -> Awaitable[Any]:
    """Begin without the event loop's knowledge, which would close both at its end.

    It knows of the generator round this one, which closes it.
    """
    hooks = sys.get_asyncgen_hooks()
    sys.set_asyncgen_hooks(None, None)
    try:
        return steps.asend(None)
    finally:
        sys.set_asyncgen_hooks(*hooks)


class _Yielded:
    """What a generator gave, if it is text: other items would be stored chunk by chunk."""

    def __init__(self) -> None:
        self.texts: list[str] | None = []

    def add(self, item: Any) -> None:
        if self.texts is not None and isinstance(item, str):
            self.texts.append(item)
        else:
            self.texts = None


@contextlib.contextmanager
def _closing(span: TrustedSpan, yielded: _Yielded | None = None) -> Iterator[None]:
    error: BaseException | None = None
    try:
        yield
    except BaseException as raised:
        error = raised
        raise
    finally:
        if yielded is not None and yielded.texts:
            span.set_outputs("".join(yielded.texts))
        span._close(error)
        del error  # which would be held by its own traceback


def _arguments(function: Any, args: Any, kwargs: Any) -> dict[str, Any]:
    """The call's arguments by name, without ``self`` and ``cls``."""
    try:
        bound = inspect.signature(function).bind(*args, **kwargs).arguments
    except (TypeError, ValueError):
        return dict(kwargs)
    return {name: value for name, value in bound.items() if name not in ("self", "cls")}
