"""The one interception point on openai: ``OpenAI.request`` and ``AsyncOpenAI.request``.

Every user-visible call passes it exactly once, on every route, and it leaves nothing behind.
Process-wide it is wrapped on the classes while somebody wants it; per client it is overridden
in a subclass that the client is moved to.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Mapping
from typing import Any, TypeVar

import openai
import wrapt

from tlm_tracing import _config, _pipeline, _record, _scope, _streams
from tlm_tracing.exceptions import ConfigurationError

ClientT = TypeVar("ClientT", bound="openai.OpenAI | openai.AsyncOpenAI")

# Where a request body goes, and what OpenAI calls that operation.
_OPERATIONS = {"/chat/completions": "chat.completions"}

_RAW_HEADER = "X-Stainless-Raw-Response"
_SETTINGS = "_tlm_settings"

_lock = threading.RLock()
_users = 0
_process_settings: Mapping[str, Any] | None = None


def autolog(disable: bool = False, **settings: Any) -> None:
    """Record and score every OpenAI call of the process, whichever client makes it.

    Can be called again to change the settings; ``disable=True`` takes it off without residue.

    Args:
        disable: Take it off.
        **settings: Any of :class:`~tlm_tracing.Config`'s fields, for these calls.

    Raises:
        ConfigurationError: If a setting is unknown or its value cannot work.
    """
    global _process_settings
    _config.check(settings)
    with _lock:
        was_on = _process_settings is not None
        _process_settings = None if disable else dict(settings)
    if disable and was_on:
        uninstall()
    elif not disable and not was_on:
        install()


def wrap_openai(client: ClientT, **settings: Any) -> ClientT:
    """Record and score every call of one client.

    Args:
        client: An ``OpenAI`` or ``AsyncOpenAI`` client, Azure's included.
        **settings: Any of :class:`~tlm_tracing.Config`'s fields, for this client's calls.

    Returns:
        The same client, still an instance of its class. Its copies, also by
        ``with_options()``, are traced as well; other clients are not touched.

    Raises:
        ConfigurationError: If it is no OpenAI client, or a setting cannot work.
    """
    if not isinstance(client, (openai.OpenAI, openai.AsyncOpenAI)):
        raise ConfigurationError(
            f"wrap_openai takes an openai.OpenAI or openai.AsyncOpenAI client, not a "
            f"{type(client).__name__}."
        )
    _config.check(settings)
    if not hasattr(type(client), _SETTINGS):
        client.__class__ = traced_class(type(client))  # type: ignore[arg-type]
    object.__setattr__(client, _SETTINGS, dict(settings))
    return client


@functools.cache
def traced_class(base: Any) -> Any:
    """The subclass of a client class whose instances are recorded.

    Single inheritance on purpose: with a mixin CPython refuses to move an instance to it.
    """
    is_async = issubclass(base, openai.AsyncOpenAI)

    def copy(self: Any, **kwargs: Any) -> Any:
        twin = base.copy(self, **kwargs)
        object.__setattr__(twin, _SETTINGS, getattr(self, _SETTINGS))
        return twin

    members = {
        "__module__": base.__module__,
        "__qualname__": base.__qualname__,
        "__doc__": base.__doc__,
        _SETTINGS: {},
        "request": _async_method(base) if is_async else _sync_method(base),
        "copy": functools.wraps(base.copy)(copy),
        "with_options": functools.wraps(base.copy)(copy),
    }
    return type(base.__name__, (base,), members)


def _sync_method(base: Any) -> Any:
    @functools.wraps(base.request)
    def request(self: Any, *args: Any, **kwargs: Any) -> Any:
        return _request(functools.partial(base.request, self), self, args, kwargs)

    return request


def _async_method(base: Any) -> Any:
    @functools.wraps(base.request)
    async def request(self: Any, *args: Any, **kwargs: Any) -> Any:
        return await _arequest(functools.partial(base.request, self), self, args, kwargs)

    return request


def install() -> None:
    """Wrap the two classes, unless they are; each install is undone by one uninstall."""
    global _users
    with _lock:
        _users += 1
        for cls, wrapper in _WRAPPERS.items():
            if not _leads_to_ours(cls):
                wrapt.wrap_function_wrapper(cls, "request", wrapper)


def uninstall() -> None:
    """Take the wrappers off when nobody wants them any more."""
    global _users
    with _lock:
        _users -= 1
        if _users:
            return
        for cls in _WRAPPERS:
            method = vars(cls).get("request")
            if not _is_ours(method):
                continue  # under another tool's: it stays, and does nothing
            delattr(cls, "request")
            if cls.request is not method.__wrapped__:
                cls.request = method.__wrapped__


def _of_class(wrapped: Any, client: Any, args: Any, kwargs: Any) -> Any:
    if hasattr(type(client), _SETTINGS):
        return wrapped(*args, **kwargs)
    return _request(wrapped, client, args, kwargs)


async def _of_async_class(wrapped: Any, client: Any, args: Any, kwargs: Any) -> Any:
    if hasattr(type(client), _SETTINGS):
        return await wrapped(*args, **kwargs)
    return await _arequest(wrapped, client, args, kwargs)


_WRAPPERS: Mapping[Any, Any] = {
    openai.OpenAI: _of_class,
    openai.AsyncOpenAI: _of_async_class,
}


def _is_ours(method: Any) -> bool:
    return getattr(method, "_self_wrapper", None) in _WRAPPERS.values()


def _leads_to_ours(cls: Any) -> bool:
    """Whether ours is there, if need be under what other tools have put on top."""
    method = vars(cls).get("request")
    while method is not None:
        if _is_ours(method):
            return True
        method = getattr(method, "__wrapped__", None)
    return False


def _request(wrapped: Any, client: Any, args: Any, kwargs: Any) -> Any:
    call = _begin(client, args, kwargs)
    if call is None:
        return wrapped(*args, **kwargs)
    try:
        result = wrapped(*args, **_heard(kwargs))
    except BaseException as error:
        call.failed(error)
        raise
    completion = _completion(call, result)
    if completion is None:
        return result
    given = call.answered(completion)
    return result if given is completion else given


async def _arequest(wrapped: Any, client: Any, args: Any, kwargs: Any) -> Any:
    call = _begin(client, args, kwargs)
    if call is None:
        return await wrapped(*args, **kwargs)
    try:
        result = await wrapped(*args, **_heard(kwargs))
    except BaseException as error:
        call.failed(error)
        raise
    completion = _completion(call, result)
    if completion is None:
        return result
    given = await call.aanswered(completion)
    return result if given is completion else given


def _begin(client: Any, args: Any, kwargs: Any) -> _pipeline.Call | None:
    """Open the call; None if this request is none that is to be recorded."""
    own = getattr(client, _SETTINGS, None)
    scope = _scope.current()
    if (own is None and scope is None and _process_settings is None) or _scope.suppressed():
        return None
    with _pipeline.guarded("opening a call"):
        options = kwargs["options"] if "options" in kwargs else args[1]
        operation = _OPERATIONS.get(options.url) if options.method.lower() == "post" else None
        if operation is None or not isinstance(options.json_data, Mapping):
            return None
        config = _config.resolve(
            _process_settings or {},
            own or {},
            *(outer.settings for outer in (scope.chain() if scope else ())),
        )
        if config.enabled:
            _displace_autolog(options)
            return _pipeline.Call(
                dict(options.json_data),
                config,
                operation=operation,
                provider=_provider(client),
            )
    return None


def _displace_autolog(options: Any) -> None:
    """With MLflow's own autologging on as well, a call has one LLM span still: ours."""
    if not isinstance(options.headers, Mapping):
        return
    traceparent = options.headers.get("traceparent")
    with _pipeline.guarded("looking for MLflow's own span"):
        if traceparent and _record.displace(traceparent):
            options.headers = {
                name: value for name, value in options.headers.items() if name != "traceparent"
            }


def _heard(kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments that make a stream one that can be listened to."""
    with _pipeline.guarded("preparing a stream"):
        if kwargs.get("stream") and kwargs.get("stream_cls") is not None:
            return {**kwargs, "stream_cls": _streams.traced(kwargs["stream_cls"])}
    return kwargs


def _completion(call: _pipeline.Call, result: Any) -> Any:
    """The whole answer in a result; None if it comes later or never."""
    with _pipeline.guarded("reading an answer"):
        if isinstance(result, (openai.Stream, openai.AsyncStream)):
            _streams.listen(result, call)
            return None
        if not hasattr(result, "http_response"):
            return result
        if type(result).__name__ != "LegacyAPIResponse":
            call.unobserved()  # with_streaming_response: the body is the caller's to read
            return None
        if isinstance(result.http_response.headers.get("content-type"), str) and (
            "event-stream" in result.http_response.headers["content-type"]
        ):
            _streams.listen_when_parsed(result.http_response, call)
            return None
        return _parsed(result)
    call.unobserved()
    return None


def _parsed(raw: Any) -> Any:
    """The answer in a raw response: the very object that its caller gets by parsing it, too."""
    try:
        return raw.parse()
    except Exception:
        # A structured output that is cut short, say: the caller's to meet when they parse.
        return openai.types.chat.ChatCompletion.construct(**raw.http_response.json())


def _provider(client: Any) -> str:
    azure = isinstance(client, (openai.AzureOpenAI, openai.AsyncAzureOpenAI))
    return "azure" if azure else "openai"
