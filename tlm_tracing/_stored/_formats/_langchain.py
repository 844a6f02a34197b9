"""LangChain's messages, recorded by ``mlflow.langchain.autolog()``.

MLflow puts them into the form of chat completions where it can; what it cannot, and all before
MLflow 3.6, is LangChain's own: a list of conversations, each a list of messages.
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
    tells_end,
    tool_call,
)

NAMES = frozenset({"langchain"})

_ROLES = {"human": "user", "ai": "assistant", "system": "system", "tool": "tool"}
_THOUGHTS = frozenset({"thinking", "redacted_thinking", "reasoning", "reasoning_content"})
_CALLS = frozenset({"tool_use", "tool_call", "function_call"})
_TOKEN = "new_token"


def fits(told: Told) -> bool:
    """Whether it is LangChain's own form."""
    return isinstance(told.outputs, Mapping) and "generations" in told.outputs


def read(told: Told) -> Rebuilt:
    """Rebuild a call.

    Raises:
        Unscorable: If it cannot be rebuilt as it was, or is a batch of several.
    """
    tokens = [event for event in told.events if event.name == _TOKEN]
    if tokens and not any(
        tells_end(decoded(event.attributes.get("chunk"))) for event in reversed(tokens)
    ):
        reject("partial_stream")
    options = told.attribute("invocation_params")
    options = mapping(options) if isinstance(options, Mapping) else {}
    tools = [*(options.get("tools") or []), *(options.get("functions") or [])]
    form = options.get("response_format")
    return exchange(
        told,
        _messages(told.inputs),
        [(message, None) for message in _answers(told.outputs)],
        tools=[_tool(tool) for tool in mappings(tools)] or told.tools,
        response_format=form if isinstance(form, Mapping) else None,
    )


def _messages(inputs: Any) -> list[Message]:
    if isinstance(inputs, Mapping):
        return [_checked(message) for message in mappings(inputs.get("messages"))]
    if not isinstance(inputs, list) or len(inputs) != 1:
        reject()
    if isinstance(inputs[0], str):
        return [{"role": "user", "content": inputs[0]}]
    return [_own(message) for message in mappings(inputs[0])]


def _answers(outputs: Any) -> list[Message]:
    told = mapping(outputs)
    if "choices" in told:
        found = [_checked(mapping(one.get("message"))) for one in mappings(told["choices"])]
    else:
        generations = told.get("generations")
        if not isinstance(generations, list) or len(generations) != 1:
            reject()
        found = [
            _own(mapping(one["message"])) if one.get("message") else _spoken(one.get("text"))
            for one in mappings(generations[0])
        ]
    return [_answer(message) for message in found]


def _checked(message: Message) -> Message:
    """A message in the form of chat completions.

    Raises:
        Unscorable: If MLflow has lost a part of it: functions, before they were called tools.
    """
    if message.get("role") == "function":
        reject()
    if isinstance(content := message.get("content"), list):
        message["content"] = _parts(content)
    return message


def _own(message: Mapping[str, Any]) -> Message:
    """A message in LangChain's own form."""
    kind = message.get("type")
    role = message.get("role") if kind == "chat" else _ROLES.get(str(kind).removesuffix("Chunk"))
    more = mapping(message.get("additional_kwargs") or {})
    if not role or more.get("function_call"):
        reject()
    content = message.get("content")
    told: Message = {
        "role": role,
        "content": _parts(content) if isinstance(content, list) else content,
        **{key: message[key] for key in ("name", "tool_call_id") if message.get(key)},
    }
    given = [*(message.get("tool_calls") or []), *(message.get("invalid_tool_calls") or [])]
    calls = [tool_call(one.get("id"), one.get("name"), one.get("args")) for one in mappings(given)]
    if calls or more.get("tool_calls"):
        told["tool_calls"] = calls or mappings(more["tool_calls"])
    if more.get("refusal"):
        told["refusal"] = more["refusal"]
    return told


def _parts(content: list[Any]) -> list[dict[str, Any]]:
    """Parts without thoughts, and without calls, which messages have apart from them."""
    parts = [{"type": "text", "text": one} if isinstance(one, str) else one for one in content]
    return [part for part in mappings(parts) if part.get("type") not in _THOUGHTS | _CALLS]


def _answer(message: Message) -> Message:
    """An answer whose texts are pieces of one; of others, nobody knows what they are."""
    content = message.get("content")
    if isinstance(content, list):
        audio = any(part.get("type") == "input_audio" for part in content)
        texts = [part for part in content if part.get("type") == "text"]
        if len(texts) < len(content) and not (audio and len(texts) == 1):
            reject()
        message["content"] = "".join(str(part.get("text") or "") for part in texts)
    return message


def _spoken(text: Any) -> Message:
    return {"role": "assistant", "content": text if isinstance(text, str) else reject()}


def _tool(tool: Mapping[str, Any]) -> Mapping[str, Any]:
    """A tool as it was bound: OpenAI's, or Anthropic's."""
    if "input_schema" in tool:
        return function(tool.get("name"), tool.get("description"), tool["input_schema"])
    return tool
