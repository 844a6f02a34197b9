"""The items of the Responses API, told as messages of a chat for scoring.

What the model was given before it answered, its instructions, earlier turns and the results of
built-in tools included, is the prompt; what it then gave is the answer.
"""

from __future__ import annotations

import json
import re
import threading
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from tlm_tracing._messages import Unscorable

Message = dict[str, Any]

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
_OVERHEAD = 1_000


def input_of(request: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The input items of a request; a text alone is a message, too."""
    given = request.get("input")
    if isinstance(given, str):
        return [{"role": "user", "content": given}]
    return [plain(item) for item in given or ()]


def instructions(request: Mapping[str, Any], answer: Mapping[str, Any]) -> list[Message]:
    """The request's own, or those that a stored prompt template amounted to."""
    given = request.get("instructions")
    if given is None and request.get("prompt"):
        given = answer.get("instructions")
    if not given:
        return []
    if isinstance(given, str):
        return [{"role": "system", "content": given}]
    return messages([plain(item) for item in given])


def last_run(output: Sequence[Mapping[str, Any]]) -> Sequence[Mapping[str, Any]]:
    """The answer proper: what followed the last tool that OpenAI ran itself."""
    start = len(output)
    while start and output[start - 1].get("type") not in _SERVED:
        start -= 1
    return output[start:]


def choice(run: Iterable[Mapping[str, Any]], answer: Mapping[str, Any]) -> dict[str, Any]:
    """The answer proper as the choice of a chat completion."""
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


def messages(
    items: Iterable[Mapping[str, Any]], cited: Iterable[Mapping[str, Any]] = ()
) -> list[Message]:
    """Items as messages of a chat, with nothing in them but text.

    Args:
        items: Input or output items.
        cited: What follows them; its citations tell what a web search has found.
    """
    told: list[Message] = []
    pages = sorted({url for item in cited for url in _citations(item)})
    for item in items:
        kind = item.get("type", "message")
        if kind in _UNTOLD:
            continue
        if kind == "message":
            told.append(
                {"role": item.get("role", "user"), "content": _content(item.get("content"))}
            )
        elif kind.endswith("_output"):
            told.append(_result(item.get("call_id"), item.get("output")))
        else:
            if not told or told[-1]["role"] != "assistant":
                told.append({"role": "assistant", "content": None})
            told[-1].setdefault("tool_calls", []).append(_call(item))
            if kind in _SERVED:
                told.append(_result(_call_id(item), _found(item, pages)))
    return told


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
    return re.sub(r'"data:[^"]*"', '"[not shown]"', json.dumps(next(iter(found.values()))))


def _citations(item: Mapping[str, Any]) -> Iterator[str]:
    content = item.get("content")
    for part in content if isinstance(content, list) else ():
        for annotation in plain(part).get("annotations") or ():
            if url := plain(annotation).get("url"):
                yield str(url)


def _content(content: Any) -> Any:
    return content if isinstance(content, str) else _parts(content)


def _parts(content: Any) -> list[dict[str, Any]]:
    """Parts without what is no text: images and files are neither kept nor sent."""
    if isinstance(content, str):
        return [{"type": "text", "text": content}]
    if isinstance(content, Mapping):
        content = [content]
    return [
        {key: part[key] for key in ("type", "text", "refusal") if part.get(key) is not None}
        for part in map(plain, content or ())
    ]


def plain(value: Any) -> dict[str, Any]:
    """An item or a part of one.

    Raises:
        Unscorable: If it is none.
    """
    if isinstance(value, Mapping):
        return dict(value)
    raise Unscorable("unsupported_content")


class Turns:
    """The turns that went through this process, by the id of the response that ended them.

    A request with ``previous_response_id`` carries none of them. Text alone is kept, and of
    that the newest 10 million characters, each turn counted as 1,000 more.
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
        size = _OVERHEAD + len(json.dumps(messages, default=str))
        with self._lock:
            *_, known = self._known.pop(answer["id"], (None, [], 0))
            self._known[answer["id"]] = (request.get("previous_response_id"), messages, size)
            self._characters += size - known
            while self._characters > _MOST_CHARACTERS:
                _, (*_, oldest) = self._known.popitem(last=False)
                self._characters -= oldest


turns = Turns()
