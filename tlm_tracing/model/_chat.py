"""Chat completions in the words of the Responses API, for servers that know no other.

Source: https://platform.openai.com/docs/guides/migrate-to-responses
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from tlm_tracing._endpoints import Endpoint, chat, responses
from tlm_tracing.model import _answers

Data = dict[str, Any]

ENDPOINT: Endpoint = chat

# What has another name or shape there, or none at all.
_TOLD_OTHERWISE = frozenset(
    {
        "input",
        "instructions",
        "max_output_tokens",
        "reasoning",
        "text",
        "tool_choice",
        "tools",
        "truncation",
    }
)


def body(request: Mapping[str, Any]) -> Data:
    """The request as one of chat completions; parameters of its own are kept."""
    text, reasoning = request.get("text") or {}, request.get("reasoning") or {}
    told = {
        "messages": _messages(request),
        "max_completion_tokens": request.get("max_output_tokens"),
        "reasoning_effort": reasoning.get("effort"),
        "response_format": responses.response_format(request),
        "verbosity": text.get("verbosity") if isinstance(text, Mapping) else None,
        "tools": [_function(tool) for tool in request.get("tools") or ()] or None,
        "tool_choice": _function(request.get("tool_choice")),
    }
    own = {key: value for key, value in request.items() if key not in _TOLD_OTHERWISE}
    return {**own, **{key: value for key, value in told.items() if value is not None}}


def create(client: Any) -> Callable[..., Any]:
    """Its ``chat.completions.create``."""
    method: Callable[..., Any] = client.chat.completions.create
    return method


def events(stream: Iterable[Any]) -> Iterator[Data]:
    """The text as it comes, and the items when all has come."""
    chunks = []
    for chunk in stream:
        chunks.append(chunk)
        for choice in chunk.choices or ():
            if choice.index == 0 and choice.delta is not None and choice.delta.content:
                yield {
                    "type": "response.output_text.delta",
                    "item_id": chunk.id,
                    "delta": choice.delta.content,
                }
    yield from _answers.events(_answers.of_chat(chat.assemble(chunks)))


def _messages(request: Mapping[str, Any]) -> list[Data]:
    told: list[Data] = []
    if instructions := request.get("instructions"):
        told.append({"role": "system", "content": instructions})
    for item in request.get("input") or ():
        kind = item.get("type", "message")
        if kind == "message":
            told.append({"role": item["role"], "content": _content(item["content"])})
        elif kind == "function_call_output":
            output = item["output"]
            content = output if isinstance(output, str) else json.dumps(output)
            told.append({"role": "tool", "tool_call_id": item["call_id"], "content": content})
        elif kind == "function_call":
            _add_call(told, item)
    return told


def _add_call(told: list[Data], item: Mapping[str, Any]) -> None:
    """Calls that were made together are in one message there."""
    if not told or told[-1]["role"] != "assistant":
        told.append({"role": "assistant", "content": None})
    function = {"name": item["name"], "arguments": item["arguments"]}
    call = {"id": item["call_id"], "type": "function", "function": function}
    told[-1].setdefault("tool_calls", []).append(call)


def _content(content: Any) -> Any:
    return content if isinstance(content, str) else [_part(part) for part in content]


def _part(part: Mapping[str, Any]) -> Data:
    kind = part.get("type")
    if kind == "input_image":
        image = {"url": part.get("image_url"), "detail": part.get("detail")}
        known = {key: value for key, value in image.items() if value is not None}
        return {"type": "image_url", "image_url": known}
    if kind == "input_file":
        names = ("file_id", "file_data", "filename")
        return {"type": "file", "file": {key: part[key] for key in names if part.get(key)}}
    return {"type": "text", "text": part.get("text") or part.get("refusal") or ""}


def _function(tool: Any) -> Any:
    """A function, or the choice of one, nested as chat completions have it."""
    if not isinstance(tool, Mapping) or tool.get("type") != "function" or "function" in tool:
        return tool
    function = {key: value for key, value in tool.items() if key != "type"}
    return {"type": "function", "function": function}
