"""Bedrock's Converse API, recorded by ``mlflow.bedrock.autolog()``.

Source: https://docs.aws.amazon.com/bedrock/latest/APIReference/API_runtime_Converse.html
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
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

NAMES = frozenset({"bedrock"})

_UNTOLD = frozenset({"reasoningContent", "cachePoint"})
_MEDIA = frozenset({"image", "document", "video", "audio"})
_REASONS: Mapping[str, str] = {
    "end_turn": "stop",
    "stop_sequence": "stop",
    "max_tokens": "length",
    "model_context_window_exceeded": "length",
    "tool_use": "tool_calls",
}


def fits(told: Told) -> bool:
    """Whether the answer is one of Converse's."""
    return isinstance(told.outputs, Mapping) and "stopReason" in told.outputs


def read(told: Told) -> Rebuilt:
    """Rebuild a call.

    Raises:
        Unscorable: If it cannot be rebuilt as it was, or a guardrail stepped in.
    """
    request, answer = mapping(told.inputs), mapping(told.outputs)
    reason = answer.get("stopReason")
    if reason is None:
        reject("partial_stream")
    if reason in ("guardrail_intervened", "content_filtered"):
        reject("refusal")
    if reason not in _REASONS:
        reject()
    messages = [] if not request.get("system") else _turn("system", request["system"])
    for message in mappings(request.get("messages")):
        messages += _turn(str(message.get("role")), message.get("content"))
    message = continued(messages, _answer(_content(told, request, answer)))
    tools = mapping(request.get("toolConfig") or {}).get("tools") or []
    return exchange(
        told,
        messages,
        [(message, _REASONS[reason])],
        tools=[_tool(tool) for tool in mappings(tools) if "cachePoint" not in tool],
    )


def _turn(role: str, content: Any) -> list[Message]:
    parts, calls, results = [], [], []
    for block in mappings(content):
        if "toolUse" in block:
            calls.append(_call(block["toolUse"]))
        elif "toolResult" in block:
            result = mapping(block["toolResult"])
            found = [_part(one) for one in mappings(result.get("content") or [])]
            results.append(tool_result(result.get("toolUseId"), found))
        elif not _UNTOLD & block.keys():
            parts.append(_part(block))
    return turn(role, parts, calls, results)


def _part(block: Mapping[str, Any]) -> dict[str, Any]:
    if "text" in block:
        return text_part(block["text"])
    if "json" in block:
        return text_part(json.dumps(block["json"]))
    kind = next((key for key in block if key in _MEDIA), None)
    return {"type": kind} if kind else reject()


def _content(
    told: Told, request: Mapping[str, Any], answer: Mapping[str, Any]
) -> list[dict[str, Any]]:
    """The blocks of the answer; of a stream's, MLflow keeps one tool call only."""
    if not told.name.endswith("_stream"):
        message = mapping(mapping(answer.get("output")).get("message"))
        return mappings(message.get("content"))
    events = [(event.name, event.attributes.get("json")) for event in told.events]
    if events and events[0][0] == "messageStart":
        return _blocks((name, mapping(json.loads(str(event)))) for name, event in events)
    if request.get("toolConfig"):
        reject()
    message = mapping(mapping(answer.get("output")).get("message"))
    return mappings(message.get("content"))


def _blocks(events: Iterable[tuple[str, Mapping[str, Any]]]) -> list[dict[str, Any]]:
    blocks: dict[Any, dict[str, Any]] = {}
    for name, event in events:
        block = blocks.setdefault(event.get("contentBlockIndex"), {})
        if name == "contentBlockStart" and "toolUse" in event.get("start", {}):
            block["toolUse"] = {**event["start"]["toolUse"], "input": ""}
        elif name == "contentBlockDelta":
            delta = mapping(event.get("delta"))
            if "text" in delta:
                block["text"] = block.get("text", "") + delta["text"]
            elif "toolUse" in delta:
                block["toolUse"]["input"] += delta["toolUse"]["input"]
            elif not _UNTOLD & delta.keys():
                reject()
    return [block for index, block in sorted(_numbered(blocks)) if block]


def _numbered(blocks: Mapping[Any, dict[str, Any]]) -> list[tuple[int, dict[str, Any]]]:
    return [(index, block) for index, block in blocks.items() if isinstance(index, int)]


def _answer(blocks: Iterable[Mapping[str, Any]]) -> Message:
    texts, calls = [], []
    for block in blocks:
        if "text" in block:
            texts.append(block["text"])
        elif "toolUse" in block:
            calls.append(_call(block["toolUse"]))
        elif not _UNTOLD & block.keys():
            reject()
    return spoken(texts, calls)


def _call(use: Any) -> dict[str, Any]:
    told = mapping(use)
    return tool_call(told.get("toolUseId"), told.get("name"), told.get("input"))


def _tool(tool: Mapping[str, Any]) -> dict[str, Any]:
    spec = mapping(tool.get("toolSpec"))
    schema = mapping(spec.get("inputSchema") or {}).get("json")
    return function(spec.get("name"), spec.get("description"), schema)
