"""The Responses API.

Source: https://platform.openai.com/docs/api-reference/responses
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping
from typing import Any

from tlm_tracing._endpoints import _items, _usage
from tlm_tracing._messages import Unscorable

NAME = "responses"
VERB = "response"

# What the prompt is made from.
_SCORED = frozenset(
    {
        "conversation",
        "input",
        "instructions",
        "model",
        "previous_response_id",
        "prompt",
        "stream",
        "text",
        "tools",
    }
)
_LAST_EVENTS = {
    "response.completed": "completed",
    "response.incomplete": "incomplete",
    "response.failed": "failed",
}
# What a delta makes longer: where in its item, by which of the event's indexes, under which key.
_DELTAS: Mapping[str, tuple[str | None, str | None, str]] = {
    "response.output_text.delta": ("content", "content_index", "text"),
    "response.refusal.delta": ("content", "content_index", "refusal"),
    "response.reasoning_text.delta": ("content", "content_index", "text"),
    "response.reasoning_summary_text.delta": ("summary", "summary_index", "text"),
    "response.function_call_arguments.delta": (None, None, "arguments"),
    "response.mcp_call_arguments.delta": (None, None, "arguments"),
    "response.custom_tool_call_input.delta": (None, None, "input"),
    "response.code_interpreter_call_code.delta": (None, None, "code"),
}
_PARTS = {
    "response.content_part.added": ("content", "content_index"),
    "response.reasoning_summary_part.added": ("summary", "summary_index"),
}


@functools.cache
def parameters() -> frozenset[str]:
    """By openai's own types; before 1.66 it has none, and only ``client.post`` leads here."""
    try:
        from openai.types.responses import response_create_params
    except ImportError:
        return _SCORED
    return frozenset(response_create_params.ResponseCreateParamsNonStreaming.__annotations__)


def assemble(events: Iterable[Any]) -> dict[str, Any]:
    """Put a response together from its stream's events.

    Args:
        events: ``ResponseStreamEvent`` objects, or the same as plain data.

    Returns:
        The response as plain data: the last event's own if the stream came to its end.
    """
    events = list(events)
    for event in reversed(events):
        if _kind(event) in _LAST_EVENTS:
            data = _dump(event)
            answer = {"status": _LAST_EVENTS[data["type"]], **data["response"]}
            if answer.get("output") is None:
                answer["output"] = _output(events)
            return answer
    answer = {}
    for event in events:
        if _kind(event) in ("response.created", "response.in_progress", "response.queued"):
            answer = _dump(event)["response"]
        elif _kind(event) == "error":
            told = _dump(event)
            told = told.get("data") or told
            answer["error"] = {"code": told.get("code"), "message": told.get("message")}
    return {"object": "response", **answer, "output": _output(events)}


def construct(answer: Mapping[str, Any]) -> Any:
    """The same as OpenAI's client gives it."""
    from openai.types.responses import Response

    return Response.construct(**answer)


def is_whole(answer: Mapping[str, Any]) -> bool:
    """Whether its last event has come."""
    return answer.get("status") in _LAST_EVENTS.values()


def kept(chunk: Any) -> Any:
    """An event as it is: what it tells is told once more at the end."""
    return chunk


def is_token(chunk: Any) -> bool:
    """The first events only tell that work has begun."""
    return str(_kind(chunk)).endswith(".delta")


def failure(answer: Mapping[str, Any]) -> str | None:
    """The error of a failed response, or of its stream."""
    error = answer.get("error")
    if error is None and answer.get("status") != "failed":
        return None
    told = error if isinstance(error, Mapping) else {}
    return f"{told.get('code') or 'failed'}: {told.get('message') or 'The response failed.'}"


def tools(request: Mapping[str, Any]) -> list[Any]:
    """Functions in the form of chat completions; built-in tools by their name."""
    return [
        {
            "type": "function",
            "function": {
                "name": tool.get("name") or tool.get("type"),
                **{key: tool[key] for key in ("description", "parameters") if tool.get(key)},
            },
        }
        for tool in request.get("tools") or ()
        if isinstance(tool, Mapping)
    ]


def attributes(answer: Mapping[str, Any]) -> dict[str, Any]:
    """By OpenTelemetry's GenAI conventions where they have a name, else OpenAI's."""
    incomplete = answer.get("incomplete_details")
    ended = incomplete.get("reason") if isinstance(incomplete, Mapping) else answer.get("status")
    return {
        **_usage.attributes(answer, "input", "output"),
        "gen_ai.response.finish_reasons": [ended] if is_whole(answer) else None,
        "openai.previous_response_id": answer.get("previous_response_id"),
    }


def response_format(request: Mapping[str, Any]) -> Any:
    """The text format; what chat completions nest under ``json_schema`` is flat here."""
    text = request.get("text")
    wanted = text.get("format") if isinstance(text, Mapping) else None
    if not isinstance(wanted, Mapping) or wanted.get("type") != "json_schema":
        return wanted
    schema = {key: value for key, value in wanted.items() if key != "type"}
    return {"type": "json_schema", "json_schema": schema}


def remember(request: Mapping[str, Any], answer: Mapping[str, Any]) -> None:
    """Keep this turn for a request that names it as its ``previous_response_id``."""
    output = [_items.plain(item) for item in answer.get("output") or ()]
    _items.turns.remember(
        request, answer, [*_items.messages(_items.input_of(request)), *_items.messages(output)]
    )


def as_chat(
    request: Mapping[str, Any], answer: Mapping[str, Any]
) -> tuple[Mapping[str, Any], Mapping[str, Any]]:
    """The exchange as one of chat completions.

    Earlier turns, which a request with ``previous_response_id`` leaves to OpenAI, are told as
    far as this process has seen them; ``"prompt_is_partial"`` says that there were others.

    Raises:
        Unscorable: If the response failed, or is an image.
    """
    output = [_items.plain(item) for item in answer.get("output") or ()]
    given = _items.last_run(output)
    before = output[: len(output) - len(given)]
    earlier, is_partial = _items.turns.before(request)
    if failure(answer) is not None:
        raise Unscorable("call_failed")
    if not given and any(item.get("type") == "image_generation_call" for item in output):
        raise Unscorable("unsupported_content")
    told = {
        "messages": [
            *_items.instructions(request, answer),
            *earlier,
            *_items.messages(_items.input_of(request)),
            *_items.messages(before, cited=given),
        ],
        "tools": tools(request),
        "prompt_is_partial": is_partial,
    }
    return told, {"choices": [_items.choice(given, answer)]}


def _kind(event: Any) -> Any:
    if isinstance(event, Mapping):
        return event.get("type")
    # openai before 1.99 gives an error as another kind of event, which has its kind elsewhere.
    return getattr(event, "type", None) or getattr(event, "event", None)


def _dump(event: Any) -> dict[str, Any]:
    if isinstance(event, Mapping):
        return dict(event)
    data: dict[str, Any] = event.model_dump(mode="json", exclude_unset=True, warnings=False)
    return data


def _output(events: Iterable[Any]) -> list[dict[str, Any]]:
    """The output as far as it has come."""
    items: dict[int, dict[str, Any]] = {}
    for event in events:
        kind = str(_kind(event))
        if kind in ("response.output_item.added", "response.output_item.done"):
            data = _dump(event)
            if isinstance(data.get("item"), Mapping):
                items[data.get("output_index", len(items))] = dict(data["item"])
        elif kind in _PARTS or kind in _DELTAS:
            _grow(items, kind, _dump(event))
    return [items[index] for index in sorted(items)]


def _grow(items: dict[int, dict[str, Any]], kind: str, data: Mapping[str, Any]) -> None:
    item = items.setdefault(data.get("output_index", 0), {"type": "message", "role": "assistant"})
    if kind in _PARTS:
        place, index = _PARTS[kind]
        _part(item, place, data.get(index, 0)).update(data.get("part") or {})
        return
    where, by, key = _DELTAS[kind]
    target = item if where is None else _part(item, where, data.get(str(by), 0))
    target[key] = (target.get(key) or "") + str(data.get("delta") or "")


def _part(item: dict[str, Any], place: str, index: int) -> dict[str, Any]:
    parts = item[place] = item.get(place) or []
    while len(parts) <= index:
        parts.append({"type": "summary_text" if place == "summary" else "output_text"})
    part: dict[str, Any] = parts[index]
    return part
