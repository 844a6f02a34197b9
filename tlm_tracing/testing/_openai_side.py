"""The OpenAI side of the Sandbox: chat completions, responses, models, embeddings."""

from __future__ import annotations

import asyncio
import itertools
import json
import uuid
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from aiohttp import web

from tlm_tracing.testing import _chat, _responses
from tlm_tracing.testing._serving import Handler, Hold, application, body_of, drop, fault
from tlm_tracing.testing._state import Behaviour, State

Data = dict[str, Any]


@dataclass(frozen=True)
class _Api:
    """One of the two APIs that answer questions.

    Attributes:
        wrong: What is wrong with a body; None if nothing is.
        answer: The whole answer to a request.
        events: The same answer in the events of a stream.
        error: The event of an error after so many others.
        end: What a stream says last.
    """

    wrong: Callable[[Any], str | None]
    answer: Callable[[Data, Behaviour, State], Data]
    events: Callable[[Data, Data, Behaviour], Iterable[Data]]
    error: Callable[[str, int], Data]
    end: str | None = None


def openai_side(state: State, hold: Hold) -> web.Application:
    """The application that answers for ``api.openai.com``."""

    def endpoint(api: _Api) -> Handler:
        async def handle(request: web.Request) -> web.StreamResponse:
            body = await body_of(request)
            wrong = api.wrong(body)
            if wrong is not None:
                return _refused(wrong)
            model = str(body.get("model", ""))
            try:
                behaviour = state.behaviour("openai", request.path, await request.read(), model)
            except ValueError as error:
                return _refused(str(error))
            if body.get("stream") and behaviour.get("garbage"):
                return await _garbled(request)
            trouble = await fault(behaviour, hold, _error("The Sandbox was told to fail."))
            if trouble is not None:
                return trouble
            try:
                answer = api.answer(body, behaviour, state)
            except ValueError as error:
                return _refused(str(error))
            except (AttributeError, LookupError, TypeError) as error:
                return _refused(f"The request is not as this endpoint expects it: {error!r}")
            if body.get("stream"):
                return await _stream(request, api, api.events(body, answer, behaviour), behaviour)
            return await _whole(request, answer, behaviour)

        return handle

    chat, responses = endpoint(_CHAT), endpoint(_RESPONSES)
    return application(
        "openai",
        state,
        {
            "POST /v1/chat/completions": chat,
            "POST /openai/deployments/{deployment}/chat/completions": chat,
            "POST /v1/openai/deployments/{deployment}/chat/completions": chat,
            "POST /v1/responses": responses,
            "POST /openai/responses": responses,
            "POST /openai/v1/responses": responses,
            "POST /v1/openai/responses": responses,
            "POST /v1/embeddings": _embeddings,
            "GET /v1/models": _models,
            "GET /v1/models/{model}": _model,
            "* /{anything:.*}": _not_found,
        },
    )


def _refused(message: str) -> web.Response:
    return web.json_response(_error(message), status=400, headers=_headers())


async def _garbled(request: web.Request) -> web.StreamResponse:
    response = await _opened(request)
    await response.write(_line("this is { not JSON"))
    await response.write_eof()
    return response


async def _opened(request: web.Request) -> web.StreamResponse:
    response = web.StreamResponse(headers={"Content-Type": "text/event-stream", **_headers()})
    await response.prepare(request)
    return response


async def _whole(
    request: web.Request, answer: dict[str, Any], behaviour: Behaviour
) -> web.StreamResponse:
    if "disconnect" not in behaviour:
        return web.json_response(answer, headers=_headers())
    if not behaviour["disconnect"]:
        return drop(request)
    response = web.StreamResponse(headers={"Content-Type": "application/json", **_headers()})
    await response.prepare(request)
    await response.write(json.dumps(answer).encode()[:20])
    return drop(request)


async def _stream(
    request: web.Request, api: _Api, events: Iterable[Data], behaviour: Behaviour
) -> web.StreamResponse:
    if behaviour.get("disconnect") == 0:
        return drop(request)
    response = await _opened(request)
    stop_after = next(
        (
            behaviour[name]
            for name in ("disconnect", "truncate", "stream_error")
            if name in behaviour
        ),
        None,
    )
    sent = list(itertools.islice(events, stop_after))
    for event in sent:
        await response.write(_event(event))
        await asyncio.sleep(behaviour.get("chunk_delay", 0))
    if "disconnect" in behaviour:
        return drop(request)
    if "stream_error" in behaviour:
        await response.write(_event(api.error("The server had an error.", len(sent))))
    elif "truncate" not in behaviour and api.end is not None:
        await response.write(_line(api.end))
    await response.write_eof()
    return response


def _event(event: Data) -> bytes:
    # Of the two APIs only one gives its events a type, and only that one names them.
    name = f"event: {event['type']}\n" if "type" in event else ""
    return name.encode() + _line(json.dumps(event))


def _line(data: str) -> bytes:
    return f"data: {data}\n\n".encode()


def _headers() -> dict[str, str]:
    return {"x-request-id": f"req_{uuid.uuid4().hex}", "openai-processing-ms": "1"}


def _error(message: str) -> dict[str, Any]:
    return {
        "error": {"message": message, "type": "sandbox_error", "param": None, "code": "sandbox"}
    }


_CHAT = _Api(
    wrong=_chat.wrong,
    answer=_chat.completion,
    events=_chat.pieces,
    error=lambda message, _: _error(message),
    end=_chat.END,
)
_RESPONSES = _Api(
    wrong=_responses.wrong,
    answer=_responses.response,
    events=_responses.events,
    error=_responses.error,
)


async def _embeddings(request: web.Request) -> web.Response:
    body = await body_of(request)
    if not isinstance(body, Mapping):
        return _refused("The body is no JSON object.")
    given = body.get("input", "")
    inputs = given if isinstance(given, list) else [given]
    data = [
        {"object": "embedding", "index": index, "embedding": [0.25, 0.5, 0.75]}
        for index, _ in enumerate(inputs)
    ]
    usage = {"prompt_tokens": len(inputs), "total_tokens": len(inputs)}
    answer = {"object": "list", "data": data, "model": body.get("model"), "usage": usage}
    return web.json_response(answer, headers=_headers())


def _described(model: str) -> dict[str, Any]:
    return {"id": model, "object": "model", "created": 0, "owned_by": "sandbox"}


async def _models(request: web.Request) -> web.Response:
    answer = {"object": "list", "data": [_described("gpt-4o")]}
    return web.json_response(answer, headers=_headers())


async def _model(request: web.Request) -> web.Response:
    return web.json_response(_described(request.match_info["model"]), headers=_headers())


async def _not_found(request: web.Request) -> web.Response:
    message = f"The Sandbox has nothing at {request.method} {request.path}."
    return web.json_response(_error(message), status=404, headers=_headers())
