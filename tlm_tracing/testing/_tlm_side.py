"""The TLM side of the Sandbox: Cleanlab's scoring and explanation endpoints.

Source: the wire format of cleanlab-tlm 1.1.39.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping
from typing import Any

from aiohttp import web

from tlm_tracing.testing import _chat, _rag
from tlm_tracing.testing._serving import Handler, Hold, application, body_of, drop, fault
from tlm_tracing.testing._state import Behaviour, Row, State


def tlm_side(state: State, hold: Hold) -> web.Application:
    """The application that answers for ``api.cleanlab.ai``."""

    def endpoint(answer: Any) -> Handler:
        async def handle(request: web.Request) -> web.StreamResponse:
            body = await body_of(request)
            key = request.headers.get("Authorization", "").split(" ")[-1]
            if key in ("", "invalid"):
                refused = {"code": "invalid_api_key", "description": "Invalid API key."}
                return web.json_response(refused, status=401)
            if not isinstance(body, Mapping):
                return web.json_response({"error": "The body is no JSON object."}, status=400)
            behaviour = state.behaviour("tlm", request.path, await request.read(), "")
            if answer in _OWN_FAULTS:
                behaviour |= behaviour.get(_OWN_FAULTS[answer]) or {}
            trouble = await fault(behaviour, hold, _error(behaviour))
            if trouble is not None:
                return trouble
            try:
                given = answer(body, behaviour, state)
            except (AttributeError, LookupError, TypeError, ValueError) as error:
                message = f"The request is not as this endpoint expects it: {error!r}"
                return web.json_response({"error": message}, status=400)
            return await _given(request, given, behaviour)

        return handle

    return application(
        "tlm",
        state,
        {
            "POST /api/v0/trustworthy_llm/get_confidence_score": endpoint(_score),
            "POST /api/v0/trustworthy_llm/prompt": endpoint(_prompt),
            "POST /api/v1/tlm_explanation/get_explanation": endpoint(_explain),
            "POST /api/v1/openai_trustworthy_llm/score": endpoint(_openai_score),
            "POST /api/v1/rag_trustworthy_llm/score": endpoint(_rag_score),
            "POST /api/v1/rag_trustworthy_llm/generate": endpoint(_rag_generate),
            "* /{anything:.*}": _not_found,
        },
    )


Body = Mapping[str, Any]


def _score(body: Body, behaviour: Behaviour, state: State) -> dict[str, Any]:
    told = _told(body["prompt"], _text(body["response"]), behaviour, state)
    return _logged({"confidence_score": told.score, "deberta_success": True}, body, told, behaviour)


def _prompt(body: Body, behaviour: Behaviour, state: State) -> dict[str, Any]:
    response = _answered(body["prompt"], state)
    told = _told(body["prompt"], response, behaviour, state)
    answer = {"response": response, "confidence_score": told.score, "deberta_success": True}
    return _logged(answer, body, told, behaviour)


def _explain(body: Body, behaviour: Behaviour, state: State) -> dict[str, Any]:
    told = _told(body["prompt"], _text(body["response"]), behaviour, state)
    return {"explanation": told.explanation}


def _openai_score(body: Body, behaviour: Behaviour, state: State) -> dict[str, Any]:
    response = body["response"]["choices"][0]["message"].get("content") or ""
    asked = _chat.question(body.get("messages"))
    told = _told(asked, response, behaviour, state)
    answer = _logged({"trustworthiness_score": told.score}, {"options": body}, told, behaviour)
    if "log" in answer and "per_field_score" in (body.get("log") or ()):
        answer["log"]["per_field_score"] = _field_scores(asked, response, behaviour, state)
    return answer


def _field_scores(asked: str, response: str, behaviour: Behaviour, state: State) -> dict[str, Any]:
    """A score for each field of an answer that is a JSON object."""
    try:
        fields = json.loads(response)
    except ValueError:
        fields = None
    if not isinstance(fields, dict):
        return {"error": "The response is no JSON object."}
    made_up = {
        field: state.score(f"{asked}\x1f{field}", json.dumps(value)).score
        for field, value in fields.items()
    }
    given = behaviour.get("field_scores") or {}
    return {
        field: {"score": given.get(field, score), "explanation": f"Why {field} has its score."}
        for field, score in made_up.items()
    }


def _rag_score(body: Body, behaviour: Behaviour, state: State) -> dict[str, Any]:
    _rag.check(body)
    response = body["response"]["response"]
    asked = body["query"] if state.canned(body["query"]) else body["prompt"]
    told = _told(asked, response, behaviour, state)
    given = behaviour.get("eval_scores") or {}
    made_up = _rag.scores(body, response, state)
    evals = {name: {"score": given.get(name, score)} for name, score in made_up.items()}
    return {"trustworthiness": _logged({"score": told.score}, body, told, behaviour), **evals}


def _rag_generate(body: Body, behaviour: Behaviour, state: State) -> dict[str, Any]:
    response = _answered(body["query"], state)
    scored = _rag_score({**body, "response": {"response": response}}, behaviour, state)
    return {"response": response, **scored}


# The behaviour that is a fault of one endpoint alone.
_OWN_FAULTS = {_openai_score: "field_fault", _rag_score: "eval_fault"}


def _answered(question: str, state: State) -> str:
    canned = state.canned(question)
    return canned.text if canned else f"The Sandbox's answer to: {question}"


def _text(response: Any) -> str:
    return str(response["response"] if isinstance(response, Mapping) else response)


def _told(prompt: str, response: str, behaviour: Behaviour, state: State) -> Row:
    """The canned or made-up score, and what a behaviour makes of it."""
    found = state.score(prompt, response)
    score = behaviour.get("score", found.score)
    explanation = behaviour.get("explanation", found.explanation)
    return Row(response, float("nan") if score == "nan" else score, explanation)


def _logged(answer: dict[str, Any], body: Body, told: Row, behaviour: Behaviour) -> dict[str, Any]:
    if behaviour.get("no_score"):
        answer = {key: value for key, value in answer.items() if "score" not in key}
    if behaviour.get("no_log"):
        return answer
    asked = "explanation" in ((body.get("options") or {}).get("log") or ())
    return {**answer, "log": {"explanation": told.explanation} if asked else {}}


async def _given(
    request: web.Request, answer: dict[str, Any], behaviour: Behaviour
) -> web.StreamResponse:
    content = b"" if behaviour.get("empty_body") else json.dumps(answer).encode()
    if behaviour.get("disconnect") is not None and behaviour["disconnect"] != "mid":
        return drop(request)
    if not {"partial", "drip", "disconnect"} & behaviour.keys():
        return web.Response(body=content, content_type="application/json")
    response = web.StreamResponse(headers={"Content-Type": "application/json"})
    await response.prepare(request)
    if "drip" in behaviour:
        for start in range(len(content)):
            await response.write(content[start : start + 1])
            await asyncio.sleep(behaviour["drip"])
    else:
        await response.write(content[: len(content) // 2])
    if "disconnect" in behaviour:
        return drop(request)
    await response.write_eof()
    return response


def _error(behaviour: Behaviour) -> dict[str, Any]:
    if "code" in behaviour:
        return {"code": behaviour["code"], "description": "The Sandbox was told to fail."}
    return {"error": "The Sandbox was told to fail."}


async def _not_found(request: web.Request) -> web.Response:
    return web.json_response({"error": f"Nothing at {request.path}."}, status=404)
