"""The Responses API.

For scoring an exchange is told as one of chat completions: what the model was given before it
answered, its instructions, earlier turns and the results of built-in tools included, is the
prompt; what it then gave is the answer.

Source: https://platform.openai.com/docs/api-reference/responses
"""

from __future__ import annotations

import json
import threading
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from tlm_tracing._messages import Unscorable

NAME = "responses"
VERB = "response"

Message = dict[str, Any]

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

# Tools that OpenAI runs itself, in the middle of an answer.
_SERVED = frozenset(
    {
        "web_search_call",
        "file_search_call",
        "code_interpreter_call",
        "image_generation_call",
        "mcp_call",
        "mcp_list_tools",
    }
)
_UNTOLD = frozenset({"reasoning", "item_reference", "compaction", "mcp_list_tools"})
_RESULTS = ("results", "outputs", "output", "result", "error")
_NOT_ARGUMENTS = frozenset({"id", "type", "status", "call_id", "name", "container_id", *_RESULTS})
# Cleanlab's own words for pages that it cannot show.
_NOT_SHOWN = (
    "Response is not shown, but the LLM can still access it. "
    "Assume that whatever the LLM references in this URL is true."
)
_MOST_CHARACTERS = 10_000_000


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
                answer["output"] = _items(events)
            return answer
    answer = {}
    for event in events:
        if _kind(event) in ("response.created", "response.in_progress", "response.queued"):
            answer = _dump(event)["response"]
        elif _kind(event) == "error":
            told = _dump(event)
            answer["error"] = {"code": told.get("code"), "message": told.get("message")}
    return {"object": "response", **answer, "output": _items(events)}


def construct(answer: Mapping[str, Any]) -> Any:
    """The same as OpenAI's client gives it."""
    from openai.types.responses import Response

    return Response.construct(**answer)


def is_whole(answer: Mapping[str, Any]) -> bool:
    """Whether its last event has come."""
    return answer.get("status") in _LAST_EVENTS.values()


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
    usage = answer.get("usage")
    incomplete = answer.get("incomplete_details")
    ended = incomplete.get("reason") if isinstance(incomplete, Mapping) else answer.get("status")
    return {
        "mlflow.chat.tokenUsage": _usage(usage) if isinstance(usage, Mapping) else None,
        "gen_ai.usage.reasoning.output_tokens": _detail(
            usage, "output_tokens_details", "reasoning_tokens"
        ),
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
    output = [_plain(item) for item in answer.get("output") or ()]
    _turns.remember(request, answer, [*_messages(_input(request)), *_messages(output)])


def as_chat(
    request: Mapping[str, Any], answer: Mapping[str, Any]
) -> tuple[Mapping[str, Any], Mapping[str, Any]]:
    """The exchange as one of chat completions.

    Earlier turns, which a request with ``previous_response_id`` leaves to OpenAI, are told as
    far as this process has seen them; ``"prompt_is_partial"`` says that there were others.

    Raises:
        Unscorable: If the response failed, or is an image.
    """
    output = [_plain(item) for item in answer.get("output") or ()]
    given = _last_run(output)
    before = output[: len(output) - len(given)]
    earlier, is_partial = _turns.before(request)
    if failure(answer) is not None:
        raise Unscorable("call_failed")
    if not given and any(item.get("type") == "image_generation_call" for item in output):
        raise Unscorable("unsupported_content")
    told = {
        "messages": [
            *_instructions(request, answer),
            *earlier,
            *_messages(_input(request)),
            *_messages(before, cited=given),
        ],
        "tools": tools(request),
        "prompt_is_partial": is_partial,
    }
    return told, {"choices": [_choice(given, answer)]}


def _kind(event: Any) -> Any:
    return event.get("type") if isinstance(event, Mapping) else getattr(event, "type", None)


def _dump(event: Any) -> dict[str, Any]:
    if isinstance(event, Mapping):
        return dict(event)
    data: dict[str, Any] = event.model_dump(mode="json", exclude_unset=True, warnings=False)
    return data


def _items(events: Iterable[Any]) -> list[dict[str, Any]]:
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


def _usage(usage: Mapping[str, Any]) -> dict[str, int]:
    counts = {
        "input_tokens": usage.get("input_tokens"),
        "output_tokens": usage.get("output_tokens"),
        "total_tokens": usage.get("total_tokens"),
        "cache_read_input_tokens": _detail(usage, "input_tokens_details", "cached_tokens"),
    }
    return {key: count for key, count in counts.items() if isinstance(count, int)}


def _detail(usage: Any, group: str, name: str) -> Any:
    details = usage.get(group) if isinstance(usage, Mapping) else None
    return details.get(name) if isinstance(details, Mapping) else None


# The exchange as one of chat completions.


def _input(request: Mapping[str, Any]) -> list[dict[str, Any]]:
    given = request.get("input")
    if isinstance(given, str):
        return [{"role": "user", "content": given}]
    return [_plain(item) for item in given or ()]


def _instructions(request: Mapping[str, Any], answer: Mapping[str, Any]) -> list[Message]:
    """The request's own, or those that a stored prompt template amounted to."""
    given = request.get("instructions")
    if given is None and request.get("prompt"):
        given = answer.get("instructions")
    if not given:
        return []
    if isinstance(given, str):
        return [{"role": "system", "content": given}]
    return _messages([_plain(item) for item in given])


def _last_run(output: Sequence[Mapping[str, Any]]) -> Sequence[Mapping[str, Any]]:
    """The answer proper: what followed the last tool that OpenAI ran itself."""
    start = len(output)
    while start and output[start - 1].get("type") not in _SERVED:
        start -= 1
    return output[start:]


def _choice(run: Iterable[Mapping[str, Any]], answer: Mapping[str, Any]) -> dict[str, Any]:
    message: Message = {"role": "assistant", "content": [], "tool_calls": []}
    for item in run:
        if item.get("type") == "message":
            for part in _parts(item.get("content")):
                if "refusal" in part:
                    message["refusal"] = part["refusal"]
                else:
                    message["content"].append(part)
        elif item.get("type") not in _UNTOLD:
            message["tool_calls"].append(_call(item))
    incomplete = answer.get("incomplete_details")
    ended = incomplete.get("reason") if isinstance(incomplete, Mapping) else "stop"
    return {"index": 0, "message": message, "finish_reason": ended}


def _messages(
    items: Iterable[Mapping[str, Any]], cited: Iterable[Mapping[str, Any]] = ()
) -> list[Message]:
    """Items as messages of a chat, with nothing in them but text.

    Args:
        items: Input or output items.
        cited: What follows them; its citations tell what a web search has found.
    """
    messages: list[Message] = []
    pages = sorted({url for item in cited for url in _citations(item)})
    for item in items:
        kind = item.get("type", "message")
        if kind in _UNTOLD:
            continue
        if kind == "message":
            messages.append(
                {"role": item.get("role", "user"), "content": _content(item.get("content"))}
            )
        elif kind.endswith("_output"):
            messages.append(_result(item.get("call_id"), item.get("output")))
        else:
            if not messages or messages[-1]["role"] != "assistant":
                messages.append({"role": "assistant", "content": None})
            messages[-1].setdefault("tool_calls", []).append(_call(item))
            if kind in _SERVED:
                messages.append(_result(_call_id(item), _found(item, pages)))
    return messages


def _call(item: Mapping[str, Any]) -> Message:
    kind = str(item.get("type"))
    name = item.get("name") or kind.removesuffix("_call")
    arguments = item.get("arguments", item.get("input"))
    if arguments is None:
        arguments = {key: item[key] for key in item if key not in _NOT_ARGUMENTS}
        arguments = arguments.get("action", arguments)
        if isinstance(arguments, Mapping):
            arguments = {key: value for key, value in arguments.items() if key != "sources"}
    return {"id": _call_id(item), "function": {"name": name, "arguments": arguments}}


def _call_id(item: Mapping[str, Any]) -> Any:
    return item.get("call_id") or item.get("id")


def _result(call_id: Any, output: Any) -> Message:
    content = output if isinstance(output, str) else _content(output)
    return {"role": "tool", "tool_call_id": call_id, "content": content}


def _found(item: Mapping[str, Any], pages: Iterable[str]) -> str:
    """What a built-in tool found, as far as the response tells."""
    if item.get("type") == "web_search_call":
        action = item.get("action")
        sources = action.get("sources") if isinstance(action, Mapping) else None
        urls = [one["url"] for one in sources or () if isinstance(one, Mapping) and "url" in one]
        return json.dumps([{"url": url, "content": _NOT_SHOWN} for url in urls or pages])
    found = {key: item[key] for key in _RESULTS if item.get(key)}
    if not found or item.get("type") == "image_generation_call":
        return _NOT_SHOWN.replace("this URL", "it")
    return json.dumps(next(iter(found.values())), default=str)


def _citations(item: Mapping[str, Any]) -> Iterator[str]:
    content = item.get("content")
    for part in content if isinstance(content, list) else ():
        for annotation in _plain(part).get("annotations") or ():
            if url := _plain(annotation).get("url"):
                yield str(url)


def _content(content: Any) -> Any:
    return content if isinstance(content, str) else _parts(content)


def _parts(content: Any) -> list[dict[str, Any]]:
    """Parts without what is no text: images and files are neither kept nor sent."""
    if isinstance(content, str):
        return [{"type": "text", "text": content}]
    if isinstance(content, Mapping):
        content = [content]
    plain = (_plain(part) for part in content or ())
    return [
        {key: part[key] for key in ("type", "text", "refusal") if part.get(key) is not None}
        for part in plain
    ]


def _plain(value: Any) -> dict[str, Any]:
    if isinstance(value, Mapping):
        return dict(value)
    raise Unscorable("unsupported_content")


class _Turns:
    """The turns that went through this process, by the id of the response that ended them.

    A request with ``previous_response_id`` carries none of them. Text alone is kept, and of
    that the newest 10 million characters.
    """

    def __init__(self) -> None:
        self._known: OrderedDict[str, tuple[Any, list[Message], int]] = OrderedDict()
        self._characters = 0
        self._lock = threading.Lock()

    def before(self, request: Mapping[str, Any]) -> tuple[list[Message], bool]:
        """The turns before a request, the oldest first, and whether some are unknown."""
        turns: dict[Any, list[Message]] = {}
        previous: Any = request.get("previous_response_id")
        with self._lock:
            while previous in self._known and previous not in turns:
                before, turns[previous], _ = self._known[previous]
                previous = before
        is_partial = previous is not None or request.get("conversation") is not None
        oldest_first = reversed(list(turns.values()))
        return [message for turn in oldest_first for message in turn], is_partial

    def remember(
        self, request: Mapping[str, Any], answer: Mapping[str, Any], messages: list[Message]
    ) -> None:
        """Keep a turn."""
        if not isinstance(answer.get("id"), str):
            return
        size = len(json.dumps(messages, default=str))
        with self._lock:
            *_, known = self._known.pop(answer["id"], (None, [], 0))
            self._known[answer["id"]] = (request.get("previous_response_id"), messages, size)
            self._characters += size - known
            while self._characters > _MOST_CHARACTERS:
                _, (*_, oldest) = self._known.popitem(last=False)
                self._characters -= oldest


_turns = _Turns()
