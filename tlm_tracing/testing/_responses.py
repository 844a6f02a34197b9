"""Responses as OpenAI makes them, whole and in the events of a stream.

Source: https://platform.openai.com/docs/api-reference/responses
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Iterator, Mapping
from typing import Any

from tlm_tracing.testing._chat import (
    answer_to,
    called,
    counted,
    logprobs,
    model_of,
    question,
    split,
    tier_of,
)
from tlm_tracing.testing._state import Behaviour, State

Data = dict[str, Any]

# What a response repeats of its request, and what it says where the request is silent.
_REPEATED: Data = {
    "background": False,
    "instructions": None,
    "max_output_tokens": None,
    "max_tool_calls": None,
    "metadata": {},
    "parallel_tool_calls": True,
    "previous_response_id": None,
    "prompt": None,
    "prompt_cache_key": None,
    "safety_identifier": None,
    "store": True,
    "temperature": 1.0,
    "tool_choice": "auto",
    "tools": [],
    "top_logprobs": 0,
    "top_p": 1.0,
    "truncation": "disabled",
    "user": None,
}
_WITHOUT_INPUT = ("prompt", "previous_response_id", "conversation")
_CUT_SHORT = {"length": "max_output_tokens", "content_filter": "content_filter"}

# What the call of a built-in tool goes through.
_PHASES = {
    "web_search_call": ("in_progress", "searching", "completed"),
    "file_search_call": ("in_progress", "searching", "completed"),
    "code_interpreter_call": ("in_progress", "interpreting", "completed"),
    "mcp_call": ("in_progress", "completed"),
    "image_generation_call": ("in_progress", "generating", "completed"),
}
# The field of a call that is written piece by piece, and what the events of that are called.
_WRITTEN = {
    "function_call": ("arguments", "function_call_arguments"),
    "mcp_call": ("arguments", "mcp_call_arguments"),
    "code_interpreter_call": ("code", "code_interpreter_call_code"),
}
# What an item has not yet when it is begun.
_BEGUN: Data = {
    "status": "in_progress",
    "content": [],
    "summary": [],
    "arguments": "",
    "code": "",
    "output": None,
    "outputs": None,
    "result": None,
    "results": None,
}
_PAGE = {"type": "url_citation", "url": "https://example.com/sandbox", "title": "The Sandbox"}
_FILE = {"file_id": "file-sandbox", "filename": "sandbox.txt"}
_IMAGE = (
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAAAAAA6fptVAAAACklEQVR4nGNgAAAAAgABSK+kcQAAAABJRU5ErkJggg=="
)


def wrong(body: Any) -> str | None:
    """What is wrong with a request; None if nothing is."""
    if not isinstance(body, Mapping):
        return "The body is no JSON object."
    given = body.get("input")
    if given is None and any(body.get(name) for name in _WITHOUT_INPUT):
        return None
    if isinstance(given, str):
        return None
    if isinstance(given, list) and all(isinstance(item, Mapping) for item in given):
        return None
    return "'input' must be a text or a list of items."


def response(request: Mapping[str, Any], behaviour: Behaviour, state: State) -> Data:
    """The whole answer to a request."""
    status, now = _status(behaviour), int(time.time())
    output = [] if status == "failed" else _output(request, behaviour, state)
    repeated = {
        name: default if request.get(name) is None else request[name]
        for name, default in _REPEATED.items()
    }
    failure = {"code": "server_error", "message": "The model failed to generate a response."}
    cut_short = {"reason": _CUT_SHORT.get(behaviour.get("finish_reason", ""))}
    return {
        "id": f"resp_{uuid.uuid4().hex}",
        "object": "response",
        "created_at": now,
        "status": status,
        "completed_at": now if status == "completed" else None,
        "error": failure if status == "failed" else None,
        "incomplete_details": cut_short if status == "incomplete" else None,
        "model": model_of(request),
        "output": output,
        **repeated,
        "reasoning": {"effort": None, "summary": None, **(request.get("reasoning") or {})},
        "service_tier": tier_of(request),
        "text": {"format": {"type": "text"}, "verbosity": "medium", **(request.get("text") or {})},
        "usage": None if status == "failed" else _usage(request, output, behaviour),
    }


def events(request: Mapping[str, Any], answer: Data, behaviour: Behaviour) -> Iterator[Data]:
    """The same answer in the events of a stream.

    Args:
        request: What was asked; it changes nothing here.
        answer: A whole response.
        behaviour: ``chunks`` says in how many pieces each text comes.
    """
    for number, event in enumerate(_told(answer, behaviour.get("chunks"))):
        yield {"sequence_number": number, **event}


def error(message: str, sent: int) -> Data:
    """The event of an error after so many others."""
    told = {"code": "server_error", "message": message, "param": None}
    return {"type": "error", "sequence_number": sent, **told}


def _status(behaviour: Behaviour) -> str:
    if behaviour.get("failed"):
        return "failed"
    return "incomplete" if behaviour.get("finish_reason") in _CUT_SHORT else "completed"


def _usage(request: Mapping[str, Any], output: list[Data], behaviour: Behaviour) -> Data:
    parts = (part for item in output for part in item.get("content") or [])
    said = " ".join(part.get("text", "") for part in parts)
    tokens = counted(question(request.get("input")), said, behaviour)
    return {
        "input_tokens": tokens.sent,
        "input_tokens_details": {"cached_tokens": tokens.cached, "cache_write_tokens": 0},
        "output_tokens": tokens.made,
        "output_tokens_details": {"reasoning_tokens": tokens.reasoned},
        "total_tokens": tokens.sent + tokens.made,
    }


def _output(request: Mapping[str, Any], behaviour: Behaviour, state: State) -> list[Data]:
    tool = behaviour.get("builtin")
    items = []
    if "reasoning" in behaviour:
        summary = [{"type": "summary_text", "text": str(behaviour["reasoning"])}]
        items.append({"id": _id("rs"), "type": "reasoning", "summary": summary})
    if tool is not None:
        items.append(_builtin(tool, request))
    if tool == "computer":
        return items
    calls = _calls(request, behaviour)
    if "refusal" in behaviour:
        return [*items, _message({"type": "refusal", "refusal": behaviour["refusal"]}, behaviour)]
    if not behaviour.get("null_content") and ("content" in behaviour or not calls):
        items.append(_message(_text(request, behaviour, state), behaviour))
    return [*items, *calls]


def _message(part: Data, behaviour: Behaviour) -> Data:
    return {
        "id": _id("msg"),
        "type": "message",
        "role": "assistant",
        "status": _status(behaviour),
        "content": [part],
    }


def _text(request: Mapping[str, Any], behaviour: Behaviour, state: State) -> Data:
    wanted = (request.get("text") or {}).get("format") or {}
    schema = wanted.get("schema", {}) if wanted.get("type") == "json_schema" else None
    text = answer_to(question(request.get("input")), schema, behaviour, state)
    cited = {
        "web_search": [{**_PAGE, "start_index": 0, "end_index": len(text)}],
        "file_search": [{**_FILE, "type": "file_citation", "index": len(text)}],
    }
    return {
        "type": "output_text",
        "text": text,
        "annotations": cited.get(behaviour.get("builtin", ""), []),
        "logprobs": logprobs(text) if _includes(request, "message.output_text.logprobs") else [],
    }


def _calls(request: Mapping[str, Any], behaviour: Behaviour) -> list[Data]:
    tools = request.get("tools") or []
    names = [tool["name"] for tool in tools if tool.get("type") == "function"]
    choice = request.get("tool_choice")
    # What is chosen may be no function, but a built-in tool.
    chosen = choice.get("name") if isinstance(choice, Mapping) else None
    calls = called(names, choice, chosen if chosen in names else None, behaviour)
    return [
        {
            "id": _id("fc"),
            "type": "function_call",
            "status": _status(behaviour),
            "call_id": _id("call"),
            "name": name,
            "arguments": arguments,
        }
        for name, arguments in calls
    ]


def _builtin(tool: str, request: Mapping[str, Any]) -> Data:
    """The call of a built-in tool."""
    asked = question(request.get("input"))
    results = [{**_FILE, "attributes": {}, "score": 0.9, "text": "What the Sandbox knows."}]
    outputs = [{"type": "logs", "logs": "2\n"}]
    calls: dict[str, Data] = {
        "web_search": {
            "id": _id("ws"),
            "action": {"type": "search", "query": asked, "queries": [asked]},
        },
        "file_search": {
            "id": _id("fs"),
            "queries": [asked],
            "results": results if _includes(request, "file_search_call.results") else None,
        },
        "code_interpreter": {
            "id": _id("ci"),
            "code": "print(1 + 1)",
            "container_id": _id("cntr"),
            "outputs": outputs if _includes(request, "code_interpreter_call.outputs") else None,
        },
        "mcp": {
            "id": _id("mcp"),
            "approval_request_id": None,
            "arguments": '{"query": "sandbox"}',
            "error": None,
            "name": "lookup",
            "output": "What the Sandbox knows.",
            "server_label": "sandbox",
        },
        "image_generation": {
            "id": _id("ig"),
            "background": "opaque",
            "output_format": "png",
            "quality": "low",
            "result": _IMAGE,
            "revised_prompt": asked,
            "size": "1024x1024",
        },
        "computer": {
            "id": _id("cu"),
            "action": {"type": "click", "button": "left", "x": 10, "y": 20},
            "call_id": _id("call"),
            "pending_safety_checks": [],
        },
    }
    if tool not in calls:
        raise ValueError(f"There is no built-in tool {tool!r}; known are: {', '.join(calls)}.")
    return {"type": f"{tool}_call", "status": "completed", **calls[tool]}


def _includes(request: Mapping[str, Any], what: str) -> bool:
    return what in (request.get("include") or ())


def _id(kind: str) -> str:
    return f"{kind}_{uuid.uuid4().hex}"


def _told(answer: Data, chunks: int | None) -> Iterator[Data]:
    begun = {**answer, "status": "in_progress", "output": [], "usage": None}
    begun |= {"completed_at": None, "error": None, "incomplete_details": None}
    yield {"type": "response.created", "response": begun}
    yield {"type": "response.in_progress", "response": begun}
    for index, item in enumerate(answer["output"]):
        new = {name: _BEGUN.get(name, value) for name, value in item.items()}
        yield {"type": "response.output_item.added", "output_index": index, "item": new}
        for event in _written(item, chunks):
            place = {"output_index": index, "item_id": item["id"]}
            yield {**event, **place, "type": f"response.{event['type']}"}
        yield {"type": "response.output_item.done", "output_index": index, "item": item}
    yield {"type": f"response.{answer['status']}", "response": answer}


def _written(item: Data, chunks: int | None) -> Iterator[Data]:
    """What happens between an item's beginning and its end."""
    if item["type"] == "message":
        for index, part in enumerate(item["content"]):
            write = _texted if part["type"] == "output_text" else _refused
            for event in write(part, chunks):
                yield {**event, "content_index": index}
    elif item["type"] == "reasoning":
        for index, part in enumerate(item["summary"]):
            for event in _summed_up(part, chunks):
                yield {**event, "summary_index": index}
    else:
        yield from _ran(item)


def _texted(part: Data, chunks: int | None) -> Iterator[Data]:
    new = {**part, "text": "", "annotations": [], "logprobs": []}
    yield {"type": "content_part.added", "part": new}
    for piece in split(part["text"], chunks):
        sure = logprobs(piece) if part["logprobs"] else []
        yield {"type": "output_text.delta", "delta": piece, "logprobs": sure}
    for index, one in enumerate(part["annotations"]):
        yield {
            "type": "output_text.annotation.added",
            "annotation": one,
            "annotation_index": index,
        }
    yield {"type": "output_text.done", "text": part["text"], "logprobs": part["logprobs"]}
    yield {"type": "content_part.done", "part": part}


def _refused(part: Data, chunks: int | None) -> Iterator[Data]:
    yield {"type": "content_part.added", "part": {**part, "refusal": ""}}
    for piece in split(part["refusal"], chunks):
        yield {"type": "refusal.delta", "delta": piece}
    yield {"type": "refusal.done", "refusal": part["refusal"]}
    yield {"type": "content_part.done", "part": part}


def _summed_up(part: Data, chunks: int | None) -> Iterator[Data]:
    yield {"type": "reasoning_summary_part.added", "part": {**part, "text": ""}}
    for piece in split(part["text"], chunks):
        yield {"type": "reasoning_summary_text.delta", "delta": piece}
    yield {"type": "reasoning_summary_text.done", "text": part["text"]}
    yield {"type": "reasoning_summary_part.done", "part": part}


def _ran(item: Data) -> Iterator[Data]:
    phases = [{"type": f"{item['type']}.{phase}"} for phase in _PHASES.get(item["type"], ())]
    yield from phases[:1]
    if item["type"] in _WRITTEN:
        field, name = _WRITTEN[item["type"]]
        for piece in split(item[field]):
            yield {"type": f"{name}.delta", "delta": piece}
        called_as = {"name": item["name"]} if item["type"] == "function_call" else {}
        yield {"type": f"{name}.done", field: item[field], **called_as}
    yield from phases[1:]
