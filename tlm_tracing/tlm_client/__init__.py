"""``wrap_tlm``: the calls of one of Cleanlab's own TLM clients, traced."""

from __future__ import annotations

import copy
import functools
import inspect
import types
from collections.abc import Callable
from typing import Any, TypeVar, cast

from tlm_tracing import _config, _patches, _pipeline, _scope
from tlm_tracing.exceptions import ConfigurationError
from tlm_tracing.tlm_client._asked import Asked
from tlm_tracing.tlm_client._call import TLMCall
from tlm_tracing.tlm_client._kinds import METHODS, Kind
from tlm_tracing.tlm_client._seams import Bound, Watched, is_client

T = TypeVar("T")

_ASYNC = "_async"


def wrap_tlm(tlm: T) -> T:
    """Trace the calls of a TLM client: scores, answers and explanations, sync and async.

    One pair of prompt and response gives one span with inputs, score, explanation, error and
    duration. A list gives one span, and inside it one for each pair. The trace has the tags and
    assessments that OpenAI's calls have; the lowest score of a batch counts.

    Args:
        tlm: A client of cleanlab-tlm: ``TLM``, ``TrustworthyRAG``, ``TLMChatCompletion``,
            ``TLMResponses``, ``TLMLite``, ``TLMCalibrated``, or one derived from these.

    Returns:
        The same client to use, still an instance of its class. The one that was given is not
        touched, and its own calls are not traced. One that is wrapped already is given back.

    Raises:
        ConfigurationError: If it is no such client.
    """
    if isinstance(tlm, _TracedTLM):
        return tlm
    if not is_client(tlm):
        raise ConfigurationError(_advice(tlm))
    return cast(T, _TracedTLM(tlm))


def _advice(given: object) -> str:
    if isinstance(given, type):
        return f"wrap_tlm takes a client, not a class: wrap_tlm({given.__name__}(...))."
    kind = type(given)
    advice = f"wrap_tlm takes a client of cleanlab-tlm, such as cleanlab_tlm.TLM(), not {kind!r}."
    if kind.__module__.partition(".")[0] == "openai":
        return f"{advice} For a client of OpenAI's there is wrap_openai."
    return advice


class _TracedTLM(Bound):
    """A TLM client whose calls are traced; all else is the client's own."""

    def __getattr__(self, name: str) -> Any:
        found = super().__getattr__(name)
        kind = METHODS.get(name.removesuffix(_ASYNC))
        if kind is None or getattr(found, "__self__", None) is not self:
            return found
        return types.MethodType(_traced(found.__func__, kind), self)

    def __copy__(self) -> Any:
        return wrap_tlm(copy.copy(self.__wrapped__))

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        return wrap_tlm(copy.deepcopy(self.__wrapped__, memo))

    def __reduce__(self) -> Any:
        return wrap_tlm, (self.__wrapped__,)

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.__reduce__()

    def __repr__(self) -> str:
        return repr(self.__wrapped__)


@functools.lru_cache(maxsize=256)
def _traced(function: Callable[..., Any], kind: Kind) -> Callable[..., Any]:
    """A method of a client's class, traced; it looks as before."""
    wrap = _async_method if inspect.iscoroutinefunction(function) else _sync_method
    return _patches.like(function)(wrap(function, kind))


def _sync_method(function: Callable[..., Any], kind: Kind) -> Callable[..., Any]:
    def method(self: _TracedTLM, *args: Any, **kwargs: Any) -> Any:
        client = self.__wrapped__
        call = _begin(client, function, kind, args, kwargs)
        if call is None:
            return function(client, *args, **kwargs)
        try:
            result = function(Watched(client, call.rounds), *args, **kwargs)
        except BaseException as error:
            call.failed(error)
            raise
        call.returned(result)
        return result

    return method


def _async_method(function: Callable[..., Any], kind: Kind) -> Callable[..., Any]:
    async def method(self: _TracedTLM, *args: Any, **kwargs: Any) -> Any:
        client = self.__wrapped__
        call = _begin(client, function, kind, args, kwargs)
        if call is None:
            return await function(client, *args, **kwargs)
        try:
            result = await function(Watched(client, call.rounds), *args, **kwargs)
        except BaseException as error:
            call.failed(error)
            raise
        call.returned(result)
        return result

    return method


def _begin(
    client: Any, function: Callable[..., Any], kind: Kind, args: Any, kwargs: Any
) -> TLMCall | None:
    """Open the call; None if it is not to be recorded."""
    if _scope.suppressed():
        return None
    with _pipeline.guarded("opening a call of TLM's"):
        scopes = scope.chain() if (scope := _scope.current()) else []
        config = _config.resolve(*(outer.settings for outer in scopes))
        if config.enabled:
            return TLMCall(client, function, kind, Asked(function, args, kwargs), config, scopes)
    return None
