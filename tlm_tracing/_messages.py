"""One normaliser: any chat request and answer become the prompt and response that TLM sees.

The text is that of ``cleanlab_tlm.utils.chat``, for which TLM is calibrated, wherever that
module gives one; it raises or loses content on a dozen ordinary inputs, where this goes on in
the same style.

Source: https://help.cleanlab.ai/tlm/api/python/utils.chat/
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

_SYSTEM_ROLES = ("system", "developer")
_PREFIXES = {"system": "System: ", "developer": "System: ", "user": "User: "}
_ASSISTANT = "Assistant: "

_TOOLS = (
    "You are an AI Assistant that can call provided tools (a.k.a. functions). "
    "The set of available tools is provided to you as function signatures within "
    "<tools> </tools> XML tags. "
    "You may call one or more of these functions to assist with the user query. "
    "If the provided functions are not helpful/relevant, "
    "then just respond in natural conversational language. "
    "After you choose to call a function, you will be provided with the function's results "
    "within <tool_response> </tool_response> XML tags.\n\n"
    "<tools>\n{signatures}\n</tools>\n\n"
    "For each function call return a JSON object, with the following pydantic model json schema:\n"
    "{{'name': <function-name>, 'arguments': <args-dict>}}\n"
    "Each function call should be enclosed within <tool_call> </tool_call> XML tags.\n"
    "Example:\n"
    "<tool_call>\n{{'name': <function-name>, 'arguments': <args-dict>}}\n</tool_call>\n"
    "Note: Function calls and their results may optionally include a call_id, "
    "which should be ignored."
)


class Unscorable(Exception):  # noqa: N818 - a finding, not an error
    """There is nothing in an exchange that a scorer could score.

    Attributes:
        reason: The word that says why, one of :data:`~tlm_tracing._data.REASONS`.
    """

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


def render(
    request: Mapping[str, Any], answer: Mapping[str, Any], choice: int = 0
) -> tuple[str, str]:
    """The texts to be scored.

    Args:
        request: The request body as sent: ``messages``, ``tools``, ...
        answer: A chat completion as plain data.
        choice: Which of its choices.

    Returns:
        Prompt and response, both of them valid UTF-8.

    Raises:
        Unscorable: If there is nothing to score; never anything else.
    """
    try:
        response = _response(answer, choice)
        return _clean(_prompt(request)), _clean(response)
    except Unscorable:
        raise
    except Exception:  # a shape that nobody has thought of must not cost the call its record
        raise Unscorable("unsupported_content") from None


def question(request: Mapping[str, Any]) -> str | None:
    """What the user asked last, as text; None if that can't be told.

    Args:
        request: As for :func:`render`.
    """
    with contextlib.suppress(Exception):  # a shape that nobody has thought of
        asked = [_plain(message) for message in _items(request.get("messages"))]
        said = [_text(one.get("content")) for one in asked if one.get("role", "user") == "user"]
        if said and said[-1].strip():
            return _clean(said[-1])
    return None


def _prompt(request: Mapping[str, Any]) -> str:
    messages = [_plain(message) for message in _items(request.get("messages"))]
    if not messages:
        raise Unscorable("unsupported_content")
    _refuse_a_question_without_text(messages)
    tools = [*_items(request.get("tools")), *_items(request.get("functions"))]
    if tools:
        signatures = "\n".join(_compact(_signature(_plain(tool))) for tool in tools)
        system = {"role": "system", "content": _TOOLS.format(signatures=signatures)}
        messages.insert(_first_system_block(messages), system)
    if len(messages) == 1 and messages[0].get("role") == "user":
        return _text(messages[0].get("content"))
    return (_conversation(messages) + _ASSISTANT).strip()


def _conversation(messages: Iterable[Mapping[str, Any]]) -> str:
    parts: list[str] = []
    names: dict[Any, str] = {}
    before: Any = None
    for message in messages:
        role = message.get("role", "user")
        if role == "assistant":
            parts.append(_ASSISTANT + _assistant(message, names))
        elif role in ("tool", "function"):
            parts.append(f"Tool: {_tool_response(message, names)}\n\n")
        else:
            parts.append(f"{_prefix(message, role, before)}{_text(message.get('content'))}\n\n")
            before = role
    return "".join(parts)


def _assistant(message: Mapping[str, Any], names: dict[Any, str]) -> str:
    blocks = [_text(message.get("content")) or str(message.get("refusal") or "")]
    for call in _calls(message):
        name, arguments = _called(call)
        names[call.get("id")] = name
        told = {"name": name, "arguments": arguments, "call_id": call.get("id")}
        blocks.append(_tagged("tool_call", told))
    return "".join(f"{block}\n\n" for block in blocks if block)


def _tool_response(message: Mapping[str, Any], names: Mapping[Any, str]) -> str:
    call_id = message.get("tool_call_id")
    name = names.get(call_id) or message.get("name") or "function"
    told = {"name": name, "call_id": call_id, "output": _text(message.get("content"))}
    return _tagged("tool_response", told)


def _prefix(message: Mapping[str, Any], role: Any, before: Any) -> str:
    speaker = str(message.get("name") or role)
    if speaker in _SYSTEM_ROLES and before in _SYSTEM_ROLES:
        return ""
    if speaker == "assistant":
        return _ASSISTANT
    return _PREFIXES.get(speaker, f"{speaker.capitalize()}: ")


def _first_system_block(messages: Sequence[Mapping[str, Any]]) -> int:
    """Where the first block of system messages ends."""
    for index, message in enumerate(messages):
        if message.get("role") not in _SYSTEM_ROLES:
            return index
    return len(messages)


def _signature(tool: Mapping[str, Any]) -> dict[str, Any]:
    kind = tool.get("type", "function")
    told = _plain(tool.get(kind, tool)) if kind in ("function", "custom") else tool
    return {
        "type": "function",
        "function": {
            "name": told.get("name") or kind,
            "description": told.get("description") or "",
            "parameters": told.get("parameters") or {},
        },
    }


def _response(answer: Mapping[str, Any], choice: int) -> str:
    choices = list(_items(answer.get("choices")))
    if choice >= len(choices):
        raise Unscorable("empty")
    chosen = _plain(choices[choice])
    message = _plain(chosen.get("message") or {})
    content = _text(message.get("content"))
    calls = [dict(zip(("name", "arguments"), _called(c), strict=True)) for c in _calls(message)]
    if calls:
        return "\n".join([content, *(_tagged("tool_call", call) for call in calls)]).strip()
    if content.strip():
        return content
    if message.get("refusal") or chosen.get("finish_reason") == "content_filter":
        raise Unscorable("refusal")
    if audio := message.get("audio"):
        if transcript := _plain(audio).get("transcript"):
            return str(transcript)
        raise Unscorable("unsupported_content")
    raise Unscorable("empty")


def _calls(message: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Tool calls, and what they were called before."""
    calls: list[Mapping[str, Any]] = [_plain(call) for call in _items(message.get("tool_calls"))]
    if function_call := message.get("function_call"):
        calls.append({"type": "function", "function": function_call})
    return calls


def _called(call: Mapping[str, Any]) -> tuple[str, Any]:
    """Name and arguments of a call; arguments that are no JSON stay text."""
    told = _plain(call.get("function") or call.get("custom") or {})
    arguments = told.get("arguments", told.get("input"))
    if isinstance(arguments, str):
        with contextlib.suppress(ValueError):
            arguments = json.loads(arguments) if arguments else {}
    return str(told.get("name") or "function"), {} if arguments is None else arguments


def _refuse_a_question_without_text(messages: Iterable[Mapping[str, Any]]) -> None:
    asked = [message for message in messages if message.get("role") == "user"]
    content = asked[-1].get("content") if asked else None
    if isinstance(content, Sequence) and not isinstance(content, str):
        parts = [_plain(part) for part in content]
        if parts and not any(_words(part).strip() for part in parts):
            raise Unscorable("unsupported_content")


def _text(content: Any) -> str:
    """A content as text; of what is no text, only its kind is told."""
    if content is None or isinstance(content, str):
        return content or ""
    if isinstance(content, Iterable) and not isinstance(content, Mapping):
        parts = (_plain(part) for part in content)
        return "\n".join(
            _words(part) or ("" if "text" in part else f"[{part.get('type', 'content')}]")
            for part in parts
        )
    return _text([content])


def _words(part: Mapping[str, Any]) -> str:
    words = part.get("text") or part.get("refusal")
    if words is None and isinstance(audio := part.get("input_audio"), Mapping):
        words = audio.get("transcript")
    return str(words or "")


def _plain(value: Any) -> dict[str, Any]:
    """A mapping, whatever kind of object it came as."""
    if isinstance(value, Mapping):
        return dict(value)
    if isinstance(value, str):
        return {"text": value}
    if dump := getattr(value, "model_dump", None):
        return dict(dump(mode="json", exclude_unset=True))
    raise Unscorable("unsupported_content")


def _items(value: Any) -> Iterable[Any]:
    """A list's items; a text or a mapping is no list."""
    if value is None:
        return ()
    if isinstance(value, (str, bytes, Mapping)) or not isinstance(value, Iterable):
        raise Unscorable("unsupported_content")
    return value


def _tagged(tag: str, told: Mapping[str, Any]) -> str:
    return f"<{tag}>\n{json.dumps(told, indent=2, default=str)}\n</{tag}>"


def _compact(value: Any) -> str:
    return json.dumps(value, separators=(",", ":"), default=str)


def _clean(text: str) -> str:
    # Half a surrogate pair can't be sent.
    return text.encode("utf-8", "replace").decode("utf-8")
