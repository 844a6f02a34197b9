"""The OpenAI side of the Sandbox: chat completions, plain and streamed, models, embeddings."""

from __future__ import annotations

import asyncio
import itertools
import json
import uuid
from collections.abc import Mapping
from typing import Any

from aiohttp import web

from tlm_tracing.testing import _chat
from tlm_tracing.testing._serving import Hold, application, body_of, drop, fault
from tlm_tracing.testing._state import Behaviour, State


def openai_side(state: State, hold: Hold) -> web.Application:
    """The application that answers for ``api.openai.com``."""

    async def chat(request: web.Request) -> web.StreamResponse:
        body = await body_of(request)
        if not _has_messages(body):
            return _refused("'messages' must be a list of messages.")
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
        answer = _chat.completion(body, behaviour, state)
        if body.get("stream"):
            usage = bool((body.get("stream_options") or {}).get("include_usage"))
            return await _stream(request, answer, behaviour, usage=usage)
        return await _whole(request, answer, behaviour)

    return application(
        "openai",
        state,
        {
            "POST /v1/chat/completions": chat,
            "POST /openai/deployments/{deployment}/chat/completions": chat,
            "POST /v1/openai/deployments/{deployment}/chat/completions": chat,
            "POST /v1/embeddings": _embeddings,
            "GET /v1/models": _models,
            "GET /v1/models/{model}": _model,
            "* /{anything:.*}": _not_found,
        },
    )


def _has_messages(body: Any) -> bool:
    messages = body.get("messages") if isinstance(body, Mapping) else None
    return isinstance(messages, list) and all(isinstance(one, Mapping) for one in messages)


def _refused(message: str) -> web.Response:
    return web.json_response(_error(message), status=400, headers=_headers())


async def _garbled(request: web.Request) -> web.StreamResponse:
    response = await _opened(request)
    await response.write(_event("this is { not JSON"))
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
    request: web.Request, answer: dict[str, Any], behaviour: Behaviour, *, usage: bool
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
    chunks = _chat.pieces(answer, behaviour, usage=usage)
    for chunk in itertools.islice(chunks, stop_after):
        await response.write(_event(json.dumps(chunk)))
        await asyncio.sleep(behaviour.get("chunk_delay", 0))
    if "disconnect" in behaviour:
        return drop(request)
    if "stream_error" in behaviour:
        await response.write(_event(json.dumps(_error("The server had an error."))))
    elif "truncate" not in behaviour:
        await response.write(_event("[DONE]"))
    await response.write_eof()
    return response


def _event(data: str) -> bytes:
    return f"data: {data}\n\n".encode()


def _headers() -> dict[str, str]:
    return {"x-request-id": f"req_{uuid.uuid4().hex}", "openai-processing-ms": "1"}


def _error(message: str) -> dict[str, Any]:
    return {
        "error": {"message": message, "type": "sandbox_error", "param": None, "code": "sandbox"}
    }


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
