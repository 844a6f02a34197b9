"""LlamaIndex's messages and blocks, recorded by ``mlflow.llama_index.autolog()``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tlm_tracing._endpoints import chat
from tlm_tracing._stored._formats._told import (
    Message,
    Rebuilt,
    Told,
    exchange,
    mapping,
    mappings,
    reject,
    spoken,
    tells_end,
    text_part,
    tool_call,
    turn,
)

NAMES = frozenset({"llamaindex"})

# LlamaIndex's other methods of an LLM prepare these, or lead to them.
_ASKING = frozenset({"chat", "complete", "stream_chat", "stream_complete"})
_ROLES = {"chatbot": "assistant", "model": "assistant"}


def fits(told: Told) -> bool:
    """Never by shape: MLflow has always named this format."""
    return False


def read(told: Told) -> Rebuilt | None:
    """Rebuild a call.

    Returns:
        None if it is another method of an LLM than one that asks it.

    Raises:
        Unscorable: If it cannot be rebuilt as it was.
    """
    method = told.name.rpartition(".")[2]
    if method.removeprefix("a") not in _ASKING:
        return None
    inputs, outputs = mapping(told.inputs), mapping(told.outputs)
    raw = outputs.get("raw")
    if "stream" in method and not _is_whole(raw):
        reject("partial_stream")
    options = {**inputs, **mapping(inputs.get("kwargs") or {})}
    rebuilt = exchange(
        told,
        _messages(told, inputs),
        [_choice(outputs)],
        tools=mappings(options.get("tools") or told.tools),
        response_format=options.get("response_format"),
    )
    if isinstance(raw, Mapping) and raw.get("object") == "chat.completion":
        mappings(raw.get("choices"))
        return Rebuilt(chat, rebuilt.request, raw)
    return rebuilt


def _is_whole(raw: Any) -> bool:
    """Whether a stream's last chunk tells of the end; OpenAI's may be that of the usage."""
    return tells_end(raw) or (isinstance(raw, Mapping) and raw.get("choices") == [])


def _messages(told: Told, inputs: Mapping[str, Any]) -> list[Message]:
    if "messages" in inputs:
        given = inputs["messages"]
    else:
        given = inputs.get("prompt", inputs.get("args"))
        if isinstance(given, list) and len(given) == 1:
            given = given[0]
        if isinstance(given, str):
            return [{"role": "user", "content": given}]
    return [message for one in mappings(given) for message in _turn(one)]


def _turn(message: Mapping[str, Any]) -> list[Message]:
    role = str(message.get("role"))
    more = mapping(message.get("additional_kwargs") or {})
    parts, calls = _read(message)
    named = {key: more[key] for key in ("tool_call_id", "name") if more.get(key)}
    return [{**one, **named} for one in turn(_ROLES.get(role, role), parts, calls)]


def _choice(outputs: Mapping[str, Any]) -> tuple[Message, None]:
    if "message" not in outputs:
        return spoken([outputs["text"]]), None
    parts, calls = _read(mapping(outputs["message"]))
    return spoken((part["text"] for part in parts), calls), None


def _read(message: Mapping[str, Any]) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The parts and the tool calls of a message."""
    parts, calls = [], []
    if "blocks" not in message:
        return [text_part(message.get("content") or "")], _kept_calls(message)
    for block in mappings(message["blocks"]):
        kind = block.get("block_type")
        if kind == "text":
            parts.append(text_part(block.get("text") or ""))
        elif kind == "tool_call":
            arguments = block.get("tool_kwargs")
            calls.append(tool_call(block.get("tool_call_id"), block.get("tool_name"), arguments))
        elif kind in ("image", "audio", "video", "document"):
            parts.append({"type": kind})
        elif kind not in ("thinking", "cache"):
            reject()
    return parts, calls or _kept_calls(message)


def _kept_calls(message: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Tool calls as OpenAI has given them."""
    more = mapping(message.get("additional_kwargs") or {})
    calls = []
    for call in mappings(more.get("tool_calls") or []):
        told = mapping(call.get("function"))
        calls.append(tool_call(call.get("id"), told.get("name"), told.get("arguments")))
    return calls
