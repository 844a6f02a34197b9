"""Messages of Vercel's AI SDK, as MLflow takes them from its OpenTelemetry spans.

Source: https://ai-sdk.dev/docs/ai-sdk-core/telemetry
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tlm_tracing._stored._formats._told import (
    Message,
    Rebuilt,
    Told,
    decoded,
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

NAMES = frozenset({"vercel_ai"})

_REASONS = {"tool-calls": "tool_calls", "content-filter": "content_filter"}


def fits(told: Told) -> bool:
    """Never by shape: MLflow names this format."""
    return False


def read(told: Told) -> Rebuilt:
    """Rebuild a call.

    Raises:
        Unscorable: If it cannot be rebuilt as it was.
    """
    inputs, outputs = mapping(told.inputs), mapping(told.outputs)
    if not (reason := outputs.get("finishReason")):
        reject("partial_stream")
    messages = [message for one in mappings(inputs.get("messages")) for message in _turn(one)]
    calls = [_call(one) for one in mappings(decoded(outputs.get("toolCalls")) or [])]
    if outputs.get("object") is not None or outputs.get("files"):
        reject()
    answer = spoken([outputs.get("text") or ""], calls)
    tools = [_tool(tool) for tool in mappings(inputs.get("tools") or [])]
    return exchange(told, messages, [(answer, _REASONS.get(reason, reason))], tools=tools)


def _turn(message: Mapping[str, Any]) -> list[Message]:
    role, content = str(message.get("role")), message.get("content")
    if isinstance(content, str):
        return [{"role": role, "content": content}]
    parts, calls, results = [], [], []
    for part in mappings(content):
        kind = part.get("type")
        if kind == "text":
            parts.append(text_part(part["text"]))
        elif kind == "tool-call":
            calls.append(_call(part))
        elif kind == "tool-result":
            results.append(tool_result(part.get("toolCallId"), _found(part), part.get("toolName")))
        elif kind in ("image", "file"):
            parts.append({"type": kind})
        elif kind != "reasoning":
            reject()
    return turn(role, parts, calls, results)


def _found(part: Mapping[str, Any]) -> Any:
    """What a tool has found; from version 5 on, with its kind beside it."""
    if "output" not in part:
        return part.get("result")
    output = mapping(part["output"])
    return output["value"] if output.get("type") in ("text", "json") else reject()


def _call(part: Mapping[str, Any]) -> dict[str, Any]:
    arguments = part.get("input", part.get("args"))
    return tool_call(part.get("toolCallId"), part.get("toolName"), arguments)


def _tool(tool: Mapping[str, Any]) -> dict[str, Any]:
    schema = tool.get("inputSchema", tool.get("parameters"))
    return function(tool.get("name"), tool.get("description"), schema)
