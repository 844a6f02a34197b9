"""Chat completions as OpenAI makes them, whole and in pieces.

Source: https://platform.openai.com/docs/api-reference/chat
"""

from __future__ import annotations

import itertools
import json
import re
import time
import uuid
from collections.abc import Iterator, Mapping
from typing import Any

from tlm_tracing.testing._state import Behaviour, State

Data = dict[str, Any]


def completion(request: Mapping[str, Any], behaviour: Behaviour, state: State) -> Data:
    """The whole answer to a request."""
    model = str(request.get("model", ""))
    choices = [_choice(index, request, behaviour, state) for index in range(request.get("n") or 1)]
    asked = len(question(request).split())
    said = sum(len(str(choice["message"].get("content") or "").split()) for choice in choices)
    return {
        "id": f"chatcmpl-{uuid.uuid4().hex}",
        "object": "chat.completion",
        "created": int(time.time()),
        "model": model if model.startswith("sandbox:") else f"{model}-2024-08-06",
        "choices": [] if behaviour.get("no_choices") else choices,
        "usage": {
            "prompt_tokens": asked,
            "completion_tokens": said,
            "total_tokens": asked + said,
            "prompt_tokens_details": {"cached_tokens": 0, "audio_tokens": 0},
            "completion_tokens_details": {"reasoning_tokens": 0, "audio_tokens": 0},
        },
        "service_tier": "default",
        "system_fingerprint": "fp_sandbox",
    }


def pieces(answer: Data, behaviour: Behaviour, *, usage: bool) -> Iterator[Data]:
    """The same answer in the chunks of a stream, its choices interleaved.

    Args:
        answer: A whole completion.
        behaviour: ``chunks`` says in how many pieces the text comes.
        usage: Whether the caller asked for the chunk that tells the usage.
    """
    shared = {key: answer[key] for key in ("id", "created", "model", "system_fingerprint")}
    shared |= {"object": "chat.completion.chunk", "service_tier": answer["service_tier"]}
    if usage:
        shared["usage"] = None
    for row in itertools.zip_longest(*(_deltas(one, behaviour) for one in answer["choices"])):
        for part in filter(None, row):
            yield {**shared, "choices": [part]}
    if usage:
        yield {**shared, "choices": [], "usage": answer["usage"]}


def _choice(index: int, request: Mapping[str, Any], behaviour: Behaviour, state: State) -> Data:
    message: Data = {"role": "assistant", "content": None, "refusal": None, "annotations": []}
    finish = "stop"
    tools = _tool_calls(request, behaviour)
    if "reasoning" in behaviour:
        message["reasoning_content"] = behaviour["reasoning"]
    if "refusal" in behaviour:
        message["refusal"] = behaviour["refusal"]
    elif tools:
        message["tool_calls"], finish = tools, "tool_calls"
        message["content"] = behaviour.get("content")
    elif behaviour.get("function_call"):
        message["function_call"] = {"name": "lookup", "arguments": '{"query": "sandbox"}'}
        finish = "function_call"
    elif not behaviour.get("null_content"):
        message["content"] = _content(index, request, behaviour, state)
    return {
        "index": index,
        "message": message,
        "logprobs": _logprobs(message["content"]) if request.get("logprobs") else None,
        "finish_reason": behaviour.get("finish_reason", finish),
    }


def _content(index: int, request: Mapping[str, Any], behaviour: Behaviour, state: State) -> str:
    if behaviour.get("empty"):
        return ""
    asked = question(request)
    canned = state.canned(asked)
    schema = (request.get("response_format") or {}).get("json_schema")
    if "content" in behaviour:
        text = str(behaviour["content"])
    elif canned is not None:
        text = canned.text
    elif schema:
        return json.dumps(_example(schema.get("schema", {}), schema.get("schema", {})))
    else:
        text = f"The Sandbox's answer to: {asked}"
    return text if index == 0 else f"{text} ({index})"


def question(request: Mapping[str, Any]) -> str:
    """What the user asked last."""
    for message in reversed(request.get("messages") or []):
        if message.get("role") == "user":
            content = message.get("content") or ""
            if isinstance(content, str):
                return content
            parts = (part for part in content if isinstance(part, Mapping))
            return "\n".join(str(part["text"]) for part in parts if part.get("text"))
    return ""


def _tool_calls(request: Mapping[str, Any], behaviour: Behaviour) -> list[Data]:
    names = [tool.get("function", {}).get("name") for tool in request.get("tools") or []]
    wanted = request.get("tool_choice")
    count = behaviour.get("tools", 1 if wanted == "required" else 0)
    if isinstance(wanted, Mapping):
        names, count = [wanted["function"]["name"]], count or 1
    arguments = behaviour.get("tool_args", '{"query": "sandbox"}')
    return [
        {
            "id": f"call_{number}",
            "type": "function",
            "function": {
                "name": names[number % len(names)] if names else "lookup",
                "arguments": arguments if isinstance(arguments, str) else json.dumps(arguments),
            },
        }
        for number in range(count)
    ]


def _logprobs(content: str | None) -> Data:
    return {
        "content": [
            {"token": token, "logprob": -0.1, "bytes": list(token.encode()), "top_logprobs": []}
            for token in _split(content or "")
        ],
        "refusal": None,
    }


def _example(schema: Mapping[str, Any], root: Mapping[str, Any]) -> Any:
    """A value that fits a JSON schema."""
    if "$ref" in schema:
        return _example(root["$defs"][schema["$ref"].rpartition("/")[2]], root)
    for key in ("anyOf", "oneOf", "allOf"):
        if key in schema:
            return _example(schema[key][0], root)
    if "enum" in schema:
        return schema["enum"][0]
    if schema.get("type") == "object":
        return {name: _example(one, root) for name, one in schema.get("properties", {}).items()}
    if schema.get("type") == "array":
        return [_example(schema.get("items", {}), root)]
    return {"integer": 1, "number": 0.5, "boolean": True, "null": None}.get(
        schema.get("type", "string"), "text"
    )


def _deltas(choice: Data, behaviour: Behaviour) -> Iterator[Data]:
    message = choice["message"]
    content = message["content"]
    first = {"role": "assistant", "content": None if content is None else "", "refusal": None}
    for delta in itertools.chain([first], _worded(message, behaviour), _tooled(message)):
        part = {"index": choice["index"], "delta": delta, "finish_reason": None}
        logprobs = choice["logprobs"] is not None and delta.get("content")
        yield {**part, "logprobs": _logprobs(delta["content"]) if logprobs else None}
    yield {
        "index": choice["index"],
        "delta": {},
        "finish_reason": choice["finish_reason"],
        "logprobs": None,
    }


def _worded(message: Data, behaviour: Behaviour) -> Iterator[Data]:
    for key in ("reasoning_content", "content", "refusal"):
        for piece in _split(message.get(key) or "", behaviour.get("chunks")):
            yield {key: piece}


def _tooled(message: Data) -> Iterator[Data]:
    if call := message.get("function_call"):
        yield {"function_call": {"name": call["name"], "arguments": ""}}
        for piece in _split(call["arguments"]):
            yield {"function_call": {"arguments": piece}}
    calls = message.get("tool_calls") or []
    for index, call in enumerate(calls):
        function = {"name": call["function"]["name"], "arguments": ""}
        start = {"index": index, "id": call["id"], "type": "function", "function": function}
        yield {"tool_calls": [start]}
    arguments = (_split(call["function"]["arguments"]) for call in calls)
    for row in itertools.zip_longest(*arguments):
        for index, piece in enumerate(row):
            if piece is not None:
                yield {"tool_calls": [{"index": index, "function": {"arguments": piece}}]}


def _split(text: str, count: int | None = None) -> list[str]:
    if count is None:
        return re.findall(r"\s*\S+\s*$|\s*\S+|\s+$", text)
    size = max(1, -(-len(text) // count))
    return [text[start : start + size] for start in range(0, len(text), size)]
