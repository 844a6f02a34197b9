"""Messages of parts, by OpenTelemetry's conventions for generative AI.

Source: https://opentelemetry.io/docs/specs/semconv/gen-ai/gen-ai-spans/
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

NAMES: frozenset[str] = frozenset()

_THOUGHTS = frozenset({"reasoning", "thinking"})
_MEDIA = frozenset({"blob", "file", "uri"})
_REASONS = {"tool_call": "tool_calls", "error": None}


def fits(told: Told) -> bool:
    """Whether it is a list of messages with parts."""
    inputs = told.inputs
    return isinstance(inputs, list) and any(
        isinstance(one, Mapping) and isinstance(one.get("parts"), list) for one in inputs
    )


def read(told: Told) -> Rebuilt:
    """Rebuild a call.

    Raises:
        Unscorable: If it cannot be rebuilt as it was.
    """
    system = decoded(told.attribute("gen_ai.system_instructions")) or []
    messages = [] if not system else _turn("system", mappings(system))
    for message in mappings(told.inputs):
        messages += _turn(str(message.get("role")), mappings(message.get("parts")))
    tools = decoded(told.attribute("gen_ai.tool.definitions")) or told.tools
    return exchange(
        told,
        messages,
        [_choice(one) for one in mappings(told.outputs)],
        tools=[_tool(decoded(tool)) for tool in tools],
    )


def _turn(role: str, given: list[dict[str, Any]]) -> list[Message]:
    parts, calls, results = [], [], []
    for part in given:
        kind = part.get("type")
        if kind == "text":
            parts.append(text_part(part["content"]))
        elif kind == "tool_call":
            calls.append(_call(part))
        elif kind == "tool_call_response":
            found = part.get("response", part.get("result"))
            results.append(tool_result(part.get("id"), found, part.get("name")))
        elif kind in _MEDIA:
            parts.append({"type": part.get("modality") or kind})
        elif kind not in _THOUGHTS:
            reject()
    return turn(role, parts, calls, results)


def _choice(message: Mapping[str, Any]) -> tuple[Message, str | None]:
    texts, calls = [], []
    for part in mappings(message.get("parts")):
        if part.get("type") == "text":
            texts.append(part["content"])
        elif part.get("type") == "tool_call":
            calls.append(_call(part))
        elif part.get("type") not in _THOUGHTS:
            reject()
    reason = message.get("finish_reason")
    return spoken(texts, calls), _REASONS.get(str(reason), reason)


def _call(part: Mapping[str, Any]) -> dict[str, Any]:
    return tool_call(part.get("id"), part.get("name"), part.get("arguments"))


def _tool(tool: Any) -> dict[str, Any]:
    told = mapping(tool)
    if isinstance(told.get("function"), Mapping):
        return told
    return function(told.get("name"), told.get("description"), told.get("parameters"))
