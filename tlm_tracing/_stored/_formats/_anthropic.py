"""Anthropic's messages, recorded by ``mlflow.anthropic.autolog()`` or MLflow's gateway.

Source: https://docs.anthropic.com/en/api/messages
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tlm_tracing._stored._formats._told import (
    Message,
    Rebuilt,
    Told,
    continued,
    exchange,
    function,
    mapping,
    mappings,
    reject,
    spoken,
    text_part,
    tool_call,
    tool_result,
    turn,
)

NAMES = frozenset({"anthropic"})

_THOUGHTS = frozenset({"thinking", "redacted_thinking"})
_REASONS: Mapping[str, str] = {
    "end_turn": "stop",
    "stop_sequence": "stop",
    "max_tokens": "length",
    "model_context_window_exceeded": "length",
    "tool_use": "tool_calls",
}


def fits(told: Told) -> bool:
    """Whether the answer is one of Anthropic's."""
    outputs = told.outputs
    return isinstance(outputs, Mapping) and outputs.get("type") == "message"


def read(told: Told) -> Rebuilt:
    """Rebuild a call.

    Raises:
        Unscorable: If it cannot be rebuilt as it was, or the model refused.
    """
    request, answer = mapping(told.inputs), mapping(told.outputs)
    messages = [
        message
        for given in (*_system(request), *mappings(request.get("messages")))
        for message in _turn(given)
    ]
    reason = answer.get("stop_reason")
    if reason is None:
        reject("partial_stream")
    if reason == "refusal":
        reject("refusal")
    if reason not in _REASONS:
        reject()
    message = continued(messages, _answer(mappings(answer.get("content"))))
    tools = [_tool(tool) for tool in mappings(request.get("tools") or [])]
    return exchange(told, messages, [(message, _REASONS[reason])], tools=tools)


def _system(request: Mapping[str, Any]) -> list[Message]:
    system = request.get("system")
    return [{"role": "system", "content": system}] if system else []


def _turn(message: Mapping[str, Any]) -> list[Message]:
    role, content = str(message.get("role")), message.get("content")
    if isinstance(content, str):
        return [{"role": role, "content": content}]
    parts, calls, results = [], [], []
    for block in mappings(content):
        kind = block.get("type")
        if kind == "tool_use":
            calls.append(tool_call(block.get("id"), block.get("name"), block.get("input")))
        elif kind == "tool_result":
            results.append(tool_result(block.get("tool_use_id"), _found(block.get("content"))))
        elif kind not in _THOUGHTS:
            parts.append(_part(block))
    return turn(role, parts, calls, results)


def _found(content: Any) -> Any:
    if content is None or isinstance(content, str):
        return content or ""
    return [_part(block) for block in mappings(content)]


def _part(block: Mapping[str, Any]) -> dict[str, Any]:
    """A part in which text is text; of an image or a file, the kind is told."""
    kind = block.get("type")
    if kind == "text":
        return text_part(block["text"])
    source = block.get("source")
    if kind == "document" and isinstance(source, Mapping) and source.get("type") == "text":
        return text_part(source["data"])
    return {"type": kind} if kind in ("image", "document") else reject()


def _answer(blocks: list[dict[str, Any]]) -> Message:
    texts, calls = [], []
    for block in blocks:
        kind = block.get("type")
        if kind == "text":
            texts.append(block["text"])
        elif kind == "tool_use":
            calls.append(tool_call(block.get("id"), block.get("name"), block.get("input")))
        elif kind not in _THOUGHTS:
            reject()
    return spoken(texts, calls)


def _tool(tool: Mapping[str, Any]) -> dict[str, Any]:
    return function(tool.get("name"), tool.get("description"), tool.get("input_schema"))
