"""Whatever a call gave, as a response of the Responses API in plain data."""

from __future__ import annotations

import time
import uuid
from collections.abc import Iterator, Mapping
from typing import Any

from tlm_tracing._returned import plain

Data = dict[str, Any]

_ENDINGS = ("incomplete", "failed")
_CUT_SHORT = {"length": "max_output_tokens", "content_filter": "content_filter"}


def of(given: Any) -> Data:
    """A response, a chat completion or a text as a response.

    Raises:
        TypeError: If it is none of them; the ``on_low`` of a model has to give an answer.
    """
    if isinstance(given, str):
        return {**_new(), "status": "completed", "output": [_message("output_text", given)]}
    answer = plain(given)
    if isinstance(answer, Mapping) and "choices" in answer:
        return of_chat(answer)
    if isinstance(answer, Mapping) and "output" in answer:
        return dict(answer)
    raise TypeError(
        f"on_low gave a {type(given).__name__}; the fallback of a model must give a response, a "
        "chat completion or a text."
    )


def of_chat(answer: Mapping[str, Any]) -> Data:
    """A chat completion as a response; of several choices the first."""
    choice: Mapping[str, Any] = next(iter(answer.get("choices") or ()), {})
    message = choice.get("message") or {}
    identity = answer.get("id") or _new()["id"]
    parts = {"output_text": message.get("content"), "refusal": message.get("refusal")}
    output = [_message(kind, text, identity) for kind, text in parts.items() if text]
    output += [_call(call) for call in message.get("tool_calls") or () if call.get("function")]
    ended = choice.get("finish_reason")
    is_cut_short = ended is None or ended in _CUT_SHORT
    return {
        "id": identity,
        "object": "response",
        "created_at": answer.get("created"),
        "model": answer.get("model"),
        "status": "incomplete" if is_cut_short else "completed",
        "incomplete_details": {"reason": _CUT_SHORT[ended]} if ended in _CUT_SHORT else None,
        "output": output,
        "usage": _usage(answer.get("usage")),
    }


def withheld(answer: Any, why: str) -> Data:
    """The response in place of an answer that its caller is not to see."""
    return {
        **(_new() if answer is None else of(answer)),
        "status": "incomplete",
        "incomplete_details": {"reason": "content_filter"},
        "output": [_message("refusal", why)],
    }


def events(answer: Mapping[str, Any]) -> Iterator[Data]:
    """The last events of a stream that gives this response."""
    for index, item in enumerate(answer["output"]):
        yield {"type": "response.output_item.done", "output_index": index, "item": item}
    status = answer.get("status")
    ending = status if status in _ENDINGS else "completed"
    yield {"type": f"response.{ending}", "response": answer}


def _new() -> Data:
    return {"id": f"resp_{uuid.uuid4().hex}", "object": "response", "created_at": time.time()}


def _message(kind: str, text: str, identity: str | None = None) -> Data:
    return {
        "type": "message",
        "id": identity or f"msg_{uuid.uuid4().hex}",
        "role": "assistant",
        "status": "completed",
        "content": [{"type": kind, "refusal" if kind == "refusal" else "text": text}],
    }


def _call(call: Mapping[str, Any]) -> Data:
    function = call["function"]
    return {
        "type": "function_call",
        "id": call.get("id"),
        "call_id": call.get("id"),
        "name": function.get("name"),
        "arguments": function.get("arguments") or "{}",
        "status": "completed",
    }


def _usage(usage: Any) -> Data | None:
    if not isinstance(usage, Mapping):
        return None
    sent, made = usage.get("prompt_tokens") or 0, usage.get("completion_tokens") or 0
    cached = (usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0
    reasoned = (usage.get("completion_tokens_details") or {}).get("reasoning_tokens") or 0
    return {
        "input_tokens": sent,
        "input_tokens_details": {"cached_tokens": cached},
        "output_tokens": made,
        "output_tokens_details": {"reasoning_tokens": reasoned},
        "total_tokens": usage.get("total_tokens") or sent + made,
    }
