"""Gemini's contents and parts, recorded by ``mlflow.gemini.autolog()``.

Source: https://ai.google.dev/api/generate-content
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from tlm_tracing._stored._formats._told import (
    Message,
    Rebuilt,
    Told,
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

NAMES = frozenset({"gemini"})

_CAPITAL = re.compile(r"(?<=[a-z])(?=[A-Z])")
_REASONS: Mapping[str, str] = {"STOP": "stop", "MAX_TOKENS": "length"}
_REFUSALS = frozenset({"SAFETY", "RECITATION", "BLOCKLIST", "PROHIBITED_CONTENT", "SPII"})
_MEDIA = frozenset({"inline_data", "file_data"})


def fits(told: Told) -> bool:
    """Whether the answer is one of Gemini's."""
    return isinstance(told.outputs, Mapping) and "candidates" in told.outputs


def read(told: Told) -> Rebuilt | None:
    """Rebuild a call.

    Returns:
        None if it only counts tokens.

    Raises:
        Unscorable: If it cannot be rebuilt as it was, or the model refused.
    """
    if told.name.endswith("count_tokens"):
        return None
    request, answer = _fields(told.inputs), _fields(told.outputs)
    config = _fields(request.get("config") or request.get("generation_config") or {})
    if config.get("cached_content"):
        reject()  # most of the prompt is at Google
    system = config.get("system_instruction") or request.get("system_instruction")
    messages = [] if not system else _turns(system, "system")
    messages += _turns(request.get("contents"), "user")
    candidates = [_fields(one) for one in mappings(answer.get("candidates") or [])]
    choices = [_choice(one) for one in candidates]
    return exchange(told, messages, choices, tools=_tools(told, config, request))


def _fields(value: Any) -> dict[str, Any]:
    """Fields by their names in Python, without those that are not set."""
    return {
        _CAPITAL.sub("_", str(key)).lower(): item
        for key, item in mapping(value).items()
        if item is not None
    }


def _turns(contents: Any, role: str) -> list[Message]:
    """Contents: a text, a part, a whole content, or a list of them."""
    turns: list[Message] = []
    loose: list[Any] = []
    for one in contents if isinstance(contents, list) else [contents]:
        if isinstance(one, Mapping) and "parts" in one:
            turns += _turn(role, loose) if loose else []
            loose = []
            told = role if role == "system" else str(one.get("role") or role)
            turns += _turn(told, one["parts"])
        else:
            loose.append(one)
    return [*turns, *(_turn(role, loose) if loose else [])]


def _turn(role: str, given: Any) -> list[Message]:
    parts, calls, results = [], [], []
    for one in given if isinstance(given, list) else [given]:
        part = {"text": one} if isinstance(one, str) else _fields(one)
        if part.get("thought"):
            continue
        if call := part.get("function_call"):
            calls.append(_call(call))
        elif result := part.get("function_response"):
            told = _fields(result)
            results.append(
                tool_result(told.get("id"), told.get("response") or {}, told.get("name"))
            )
        elif "text" in part:
            parts.append(text_part(part["text"]))
        else:
            parts.append(_media(part))
    return turn("assistant" if role == "model" else role, parts, calls, results)


def _media(part: Mapping[str, Any]) -> dict[str, Any]:
    if not _MEDIA & part.keys():
        reject()
    kind = str(_fields(part.get("inline_data") or part.get("file_data")).get("mime_type"))
    return {"type": kind.partition("/")[0]}


def _choice(candidate: Mapping[str, Any]) -> tuple[Message, str | None]:
    reason = str(candidate.get("finish_reason") or "").rpartition(".")[2]
    if reason in _REFUSALS:
        reject("refusal")
    if reason not in _REASONS or candidate.get("grounding_metadata"):
        reject("unsupported_content" if reason else "partial_stream")
    texts, calls = [], []
    for one in mappings(_fields(candidate.get("content") or {}).get("parts") or []):
        part = _fields(one)
        if part.get("thought"):
            continue
        if call := part.get("function_call"):
            calls.append(_call(call))
        elif "text" in part:
            texts.append(part["text"])
        else:
            reject()
    return spoken(texts, calls), "tool_calls" if calls else _REASONS[reason]


def _call(call: Any) -> dict[str, Any]:
    told = _fields(call)
    return tool_call(told.get("id"), told.get("name"), told.get("args"))


def _tools(told: Told, config: Mapping[str, Any], request: Mapping[str, Any]) -> list[Any]:
    given = config.get("tools") or request.get("tools") or []
    if not given or told.tools:
        return told.tools
    return [
        _function(declared)
        for tool in mappings(given)
        for declared in mappings(_fields(tool).get("function_declarations"))
    ]


def _function(declared: Mapping[str, Any]) -> dict[str, Any]:
    fields = _fields(declared)
    schema = fields.get("parameters_json_schema") or fields.get("parameters")
    return function(fields.get("name"), fields.get("description"), schema)
