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
from typing import Any, NamedTuple

from tlm_tracing.testing._state import Behaviour, State

Data = dict[str, Any]

END = "[DONE]"
"""What a stream says last."""


def wrong(body: Any) -> str | None:
    """What is wrong with a request; None if nothing is."""
    messages = body.get("messages") if isinstance(body, Mapping) else None
    if isinstance(messages, list) and all(isinstance(one, Mapping) for one in messages):
        return None
    return "'messages' must be a list of messages."


def completion(request: Mapping[str, Any], behaviour: Behaviour, state: State) -> Data:
    """The whole answer to a request."""
    choices = [_choice(index, request, behaviour, state) for index in range(request.get("n") or 1)]
    said = " ".join(str(choice["message"].get("content") or "") for choice in choices)
    tokens = counted(question(request.get("messages")), said, behaviour)
    return {
        "id": f"chatcmpl-{uuid.uuid4().hex}",
        "object": "chat.completion",
        "created": int(time.time()),
        "model": model_of(request),
        "choices": [] if behaviour.get("no_choices") else choices,
        "usage": {
            "prompt_tokens": tokens.sent,
            "completion_tokens": tokens.made,
            "total_tokens": tokens.sent + tokens.made,
            "prompt_tokens_details": {"cached_tokens": tokens.cached, "audio_tokens": 0},
            "completion_tokens_details": {"reasoning_tokens": tokens.reasoned, "audio_tokens": 0},
        },
        "service_tier": tier_of(request),
        "system_fingerprint": "fp_sandbox",
    }


def pieces(request: Mapping[str, Any], answer: Data, behaviour: Behaviour) -> Iterator[Data]:
    """The same answer in the chunks of a stream, its choices interleaved.

    Args:
        request: Says whether the caller wants the chunk that tells the usage.
        answer: A whole completion.
        behaviour: ``chunks`` says in how many pieces the text comes.
    """
    shared = {key: answer[key] for key in ("id", "created", "model", "system_fingerprint")}
    shared |= {"object": "chat.completion.chunk", "service_tier": answer["service_tier"]}
    usage = (request.get("stream_options") or {}).get("include_usage")
    if usage:
        shared["usage"] = None
    for row in itertools.zip_longest(*(_deltas(one, behaviour) for one in answer["choices"])):
        for part in filter(None, row):
            yield {**shared, "choices": [part]}
    if usage:
        yield {**shared, "choices": [], "usage": answer["usage"]}


class Tokens(NamedTuple):
    """How many tokens a call took, a word being one."""

    sent: int
    cached: int
    made: int
    reasoned: int


def counted(asked: str, said: str, behaviour: Behaviour) -> Tokens:
    """The tokens of a question and its answer, those from the cache and of reasoning included."""
    cached, reasoned = (behaviour.get(f"{kind}_tokens", 0) for kind in ("cached", "reasoning"))
    return Tokens(len(asked.split()) + cached, cached, len(said.split()) + reasoned, reasoned)


def model_of(request: Mapping[str, Any]) -> str:
    """The model that answers, by its full name."""
    model = str(request.get("model", ""))
    return model if model.startswith("sandbox:") else f"{model}-2024-08-06"


def tier_of(request: Mapping[str, Any]) -> str:
    """The service tier that serves a request."""
    tier = request.get("service_tier")
    return "default" if tier in (None, "auto") else str(tier)


def question(messages: Any) -> str:
    """What the user asked last.

    Args:
        messages: The messages of a request in either API, or the bare text.
    """
    if isinstance(messages, str):
        return messages
    for message in reversed(messages or []):
        if message.get("role") == "user":
            content = message.get("content") or ""
            if isinstance(content, str):
                return content
            parts = (part for part in content if isinstance(part, Mapping))
            return "\n".join(str(part["text"]) for part in parts if part.get("text"))
    return ""


def answer_to(
    asked: str, schema: Mapping[str, Any] | None, behaviour: Behaviour, state: State
) -> str:
    """The text of an answer, as told, canned or made up.

    Args:
        asked: The question.
        schema: The JSON schema that it is to fit, if it is.
        behaviour: How to answer.
        state: Where canned answers are.
    """
    if behaviour.get("empty"):
        return ""
    if "content" in behaviour:
        return str(behaviour["content"])
    canned = state.canned(asked)
    if canned is not None:
        return canned.text
    if schema is not None:
        return json.dumps(_example(schema, schema))
    return f"The Sandbox's answer to: {asked}"


def called(
    names: list[str], choice: Any, chosen: str | None, behaviour: Behaviour
) -> list[tuple[str, str]]:
    """Names and arguments of the functions that an answer calls.

    Args:
        names: Those that it may call.
        choice: The request's ``tool_choice``.
        chosen: The function that this names, if it names one.
        behaviour: ``tools`` says how many, ``tool_args`` with what.
    """
    count = behaviour.get("tools", 1 if chosen or choice == "required" else 0)
    arguments = behaviour.get("tool_args", {"query": "sandbox"})
    written = arguments if isinstance(arguments, str) else json.dumps(arguments)
    among = [chosen] if chosen else names or ["lookup"]
    return [(among[number % len(among)], written) for number in range(count)]


def logprobs(text: str) -> list[Data]:
    """A log probability for each token of a text."""
    return [
        {"token": token, "logprob": -0.1, "bytes": list(token.encode()), "top_logprobs": []}
        for token in split(text)
    ]


def split(text: str, count: int | None = None) -> list[str]:
    """A text in so many pieces, or word by word."""
    if count is None:
        return re.findall(r"\s*\S+\s*$|\s*\S+|\s+$", text)
    size = max(1, -(-len(text) // count))
    return [text[start : start + size] for start in range(0, len(text), size)]


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
    wanted = (request.get("response_format") or {}).get("json_schema")
    schema = None if wanted is None else wanted.get("schema", {})
    text = answer_to(question(request.get("messages")), schema, behaviour, state)
    # What fits a schema, or is to be empty, must stay so.
    return f"{text} ({index})" if index and text and schema is None else text


def _tool_calls(request: Mapping[str, Any], behaviour: Behaviour) -> list[Data]:
    functions = [tool.get("function") or {} for tool in request.get("tools") or []]
    names = [function["name"] for function in functions if "name" in function]
    choice = request.get("tool_choice")
    chosen = choice.get("function", {}).get("name") if isinstance(choice, Mapping) else None
    calls = called(names, choice, chosen, behaviour)
    return [
        {
            "id": f"call_{number}",
            "type": "function",
            "function": {"name": name, "arguments": arguments},
        }
        for number, (name, arguments) in enumerate(calls)
    ]


def _logprobs(content: str | None) -> Data:
    return {"content": logprobs(content or ""), "refusal": None}


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
        for piece in split(message.get(key) or "", behaviour.get("chunks")):
            yield {key: piece}


def _tooled(message: Data) -> Iterator[Data]:
    if call := message.get("function_call"):
        yield {"function_call": {"name": call["name"], "arguments": ""}}
        for piece in split(call["arguments"]):
            yield {"function_call": {"arguments": piece}}
    calls = message.get("tool_calls") or []
    for index, call in enumerate(calls):
        function = {"name": call["function"]["name"], "arguments": ""}
        start = {"index": index, "id": call["id"], "type": "function", "function": function}
        yield {"tool_calls": [start]}
    arguments = (split(call["function"]["arguments"]) for call in calls)
    for row in itertools.zip_longest(*arguments):
        for index, piece in enumerate(row):
            if piece is not None:
                yield {"tool_calls": [{"index": index, "function": {"arguments": piece}}]}
