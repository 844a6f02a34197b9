"""The one interception point on openai: ``OpenAI.request`` and ``AsyncOpenAI.request``.

Every user-visible call passes it exactly once, on every route, and it leaves nothing behind.
Process-wide it is wrapped on the classes while somebody wants it; per client it is overridden
in a subclass that the client is moved to. ``_prepare_request``, which openai calls for each
attempt that ``request`` makes, tells of retries.
"""

from __future__ import annotations

import contextlib
import contextvars
import functools
import threading
from collections.abc import Iterator, Mapping
from typing import Any, TypeVar

import openai
from openai._legacy_response import LegacyAPIResponse

from tlm_tracing import (
    _bodies,
    _config,
    _endpoints,
    _ends,
    _patches,
    _pipeline,
    _record,
    _redacted,
    _scope,
    _streams,
    _turns,
)
from tlm_tracing.exceptions import ConfigurationError

ClientT = TypeVar("ClientT", bound="openai.OpenAI | openai.AsyncOpenAI")

_RAW = "X-Stainless-Raw-Response"
_RETRIES = "x-stainless-retry-count"
_SETTINGS = "_tlm_settings"

_lock = threading.Lock()
_process_settings: Mapping[str, Any] | None = None
_running: contextvars.ContextVar[_pipeline.Call | None] = contextvars.ContextVar(
    "tlm_tracing_call", default=None
)


def autolog(disable: bool = False, **settings: Any) -> None:
    """Record and score every OpenAI call of the process, whichever client makes it.

    Can be called again to change the settings, or after another tool was taken off that had
    wrapped the same methods before; ``disable=True`` takes it off without residue.

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
        patches.uninstall()
    elif not disable and not was_on:
        patches.install()
        _be_ready_for_the_end(settings)
    else:
        patches.renew()


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
    _be_ready_for_the_end(settings)
    return client


def _be_ready_for_the_end(settings: Mapping[str, Any]) -> None:
    """The calls may come from threads, which can't see to signals."""
    with contextlib.suppress(ConfigurationError):  # from the environment: told at the first call
        if _config.resolve(settings).enabled:
            _ends.handle_sigterm()


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
        "_prepare_request": _async_attempt(base) if is_async else _sync_attempt(base),
        "copy": _patches.like(base.copy)(copy),
        "with_options": _patches.like(base.copy)(copy),
    }
    return type(base.__name__, (base,), members)


def _sync_method(base: Any) -> Any:
    @_patches.like(base.request)
    def request(self: Any, *args: Any, **kwargs: Any) -> Any:
        return _request(functools.partial(base.request, self), self, args, kwargs)

    return request


def _async_method(base: Any) -> Any:
    @_patches.like(base.request)
    async def request(self: Any, *args: Any, **kwargs: Any) -> Any:
        return await _arequest(functools.partial(base.request, self), self, args, kwargs)

    return request


def _sync_attempt(base: Any) -> Any:
    @_patches.like(base._prepare_request)
    def _prepare_request(self: Any, request: Any) -> None:
        base._prepare_request(self, request)
        _attempted(request)

    return _prepare_request


def _async_attempt(base: Any) -> Any:
    @_patches.like(base._prepare_request)
    async def _prepare_request(self: Any, request: Any) -> None:
        await base._prepare_request(self, request)
        _attempted(request)

    return _prepare_request


def _of_class(wrapped: Any, client: Any, args: Any, kwargs: Any) -> Any:
    if hasattr(type(client), _SETTINGS):
        return wrapped(*args, **kwargs)
    return _request(wrapped, client, args, kwargs)


async def _of_async_class(wrapped: Any, client: Any, args: Any, kwargs: Any) -> Any:
    if hasattr(type(client), _SETTINGS):
        return await wrapped(*args, **kwargs)
    return await _arequest(wrapped, client, args, kwargs)


def _attempt_of_class(wrapped: Any, client: Any, args: Any, kwargs: Any) -> Any:
    wrapped(*args, **kwargs)
    if not hasattr(type(client), _SETTINGS):
        _attempted(*args, **kwargs)


async def _attempt_of_async_class(wrapped: Any, client: Any, args: Any, kwargs: Any) -> Any:
    await wrapped(*args, **kwargs)
    if not hasattr(type(client), _SETTINGS):
        _attempted(*args, **kwargs)


patches = _patches.Patches(
    {
        (openai.OpenAI, "request"): _of_class,
        (openai.AsyncOpenAI, "request"): _of_async_class,
        (openai.OpenAI, "_prepare_request"): _attempt_of_class,
        (openai.AsyncOpenAI, "_prepare_request"): _attempt_of_async_class,
    }
)


def _attempted(request: Any) -> None:
    call = _running.get()
    if call is not None and (number := request.headers.get(_RETRIES, "0")) != "0":
        call.retried(int(number))


def _request(wrapped: Any, client: Any, args: Any, kwargs: Any) -> Any:
    call = _begin(client, args, kwargs)
    if call is None:
        return wrapped(*args, **kwargs)
    heard = _Heard(call, args, kwargs)
    try:
        result = wrapped(*args, **heard.kwargs)
    except BaseException as error:
        call.failed(error)
        raise
    finally:
        _running.set(None)
    completion = heard.completion(result)
    if completion is None:
        return _replaceable(result, call)
    given = call.answered(completion)
    return given if result is completion else _replaced(result, call, given)


async def _arequest(wrapped: Any, client: Any, args: Any, kwargs: Any) -> Any:
    if _is_watched(client):
        await _turns.share()
    call = _begin(client, args, kwargs)
    if call is None:
        return await wrapped(*args, **kwargs)
    heard = _Heard(call, args, kwargs)
    try:
        result = await wrapped(*args, **heard.kwargs)
    except BaseException as error:
        call.failed(error)
        raise
    finally:
        _running.set(None)
    completion = heard.completion(result)
    if completion is None:
        return _replaceable(result, call)
    given = await call.aanswered(completion)
    return given if result is completion else _replaced(result, call, given)


def _replaceable(result: Any, call: _pipeline.Call) -> Any:
    """A stream as it is; a raw response that may still be replaced when it is read."""
    with _pipeline.guarded("preparing a raw response"):
        if call.may_replace:
            _bodies.make_replaceable(result)
    return result


def _replaced(raw: Any, call: _pipeline.Call, given: Any) -> Any:
    """A raw response whose parsing gives what the threshold made of the answer."""
    if not call.has_replaced:
        return raw
    with _pipeline.guarded("replacing a raw response"):
        return _bodies.replaced(raw, given)
    return given


def _is_watched(client: Any) -> bool:
    is_inside = _process_settings is not None or _scope.current() is not None
    return (is_inside or hasattr(client, _SETTINGS)) and not _scope.suppressed()


def _begin(client: Any, args: Any, kwargs: Any) -> _pipeline.Call | None:
    """Open the call; None if this request is none that is to be recorded."""
    if not _is_watched(client):
        return None
    own = getattr(client, _SETTINGS, None)
    scope = _scope.current()
    with _pipeline.guarded("opening a call"):
        options = _options(args, kwargs)
        endpoint = _endpoints.at(options.url) if options.method.lower() == "post" else None
        if endpoint is None or not isinstance(options.json_data, Mapping):
            return None
        config = _config.resolve(
            _process_settings or {},
            own or {},
            *(outer.settings for outer in (scope.chain() if scope else ())),
        )
        if config.enabled:
            _displace_autolog(options)
            _redacted.learn(_secrets(client, options))
            call = _pipeline.Call(
                _endpoints.known(endpoint, options.json_data),
                config,
                endpoint=endpoint,
                provider=_provider(client),
            )
            _running.set(call)
            return call
    return None


def _secrets(client: Any, options: Any) -> Iterator[Any]:
    """What this request may carry that no error is to be quoted with."""
    own = [getattr(client, name, None) for name in ("_custom_headers", "_custom_query")]
    yield client.api_key
    for values in (*own, options.headers, options.params):
        if isinstance(values, Mapping):
            yield from values.values()


def _options(args: Any, kwargs: Any) -> Any:
    return kwargs["options"] if "options" in kwargs else args[1]


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


class _Heard:
    """What comes back of a request, heard on its way to the caller.

    Attributes:
        kwargs: The request's arguments, by which a stream is made that can be listened to.
    """

    def __init__(self, call: _pipeline.Call, args: Any, kwargs: dict[str, Any]) -> None:
        self.kwargs = kwargs
        self._call = call
        self._hides_usage = False
        with _pipeline.guarded("preparing a stream"):
            if kwargs.get("stream") and kwargs.get("stream_cls") is not None:
                self.kwargs = {**kwargs, "stream_cls": _streams.traced(kwargs["stream_cls"])}
                self._hides_usage = call.wants_usage and _ask_for_usage(_options(args, kwargs))

    def completion(self, result: Any) -> Any:
        """The whole answer in a result; None if it comes later or never."""
        call = self._call
        with _pipeline.guarded("reading an answer"):
            if isinstance(result, (openai.Stream, openai.AsyncStream)):
                call.identified(result.response.headers)
                _streams.listen(result, call, hides_usage=self._hides_usage)
                return None
            response = getattr(result, "http_response", None)
            if response is None:
                return result
            call.identified(response.headers)
            call.stream_opened(result)
            if not response.is_closed or _bodies.is_event_stream(response):
                # The caller reads the body, if anybody does.
                _bodies.listen(response, call)
                return None
            return self._parsed(result)
        call.unobserved()
        return None

    def _parsed(self, raw: Any) -> Any:
        """The answer in a raw response: the very object that its caller gets by parsing it."""
        if isinstance(raw, LegacyAPIResponse):
            with contextlib.suppress(Exception):
                # A structured output that is cut short, say, is the caller's to meet.
                return raw.parse()
        return self._call.endpoint.construct(raw.http_response.json())


def _ask_for_usage(options: Any) -> bool:
    """Have a stream end with its usage; gives whether its caller did not ask for that."""
    body = options.json_data
    asked = body.get("stream_options") or {}
    is_raw = isinstance(options.headers, Mapping) and _RAW in options.headers
    if "messages" not in body or is_raw or asked.get("include_usage"):
        return False
    options.json_data = {**body, "stream_options": {**asked, "include_usage": True}}
    return True


def _provider(client: Any) -> str:
    azure = isinstance(client, (openai.AzureOpenAI, openai.AsyncAzureOpenAI))
    return "azure" if azure else "openai"
