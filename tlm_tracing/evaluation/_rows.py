"""Rows: what goes in and what comes out of an application, read as a request and its answer."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from typing import Any

from mlflow.entities import Trace

from tlm_tracing._endpoints import chat, known, responses
from tlm_tracing._messages import Unscorable
from tlm_tracing._returned import plain
from tlm_tracing._stored._formats import Rebuilt


def exchange(inputs: Any, outputs: Any) -> Rebuilt:
    """The exchange that a row of an evaluation tells of.

    Args:
        inputs: A text, messages, a request of OpenAI's, or a mapping: with one value, that is
            the prompt; several are told by their names.
        outputs: A text, a message, messages of which the last is the answer, an answer of
            OpenAI's, or anything else, which is told as JSON.

    Raises:
        Unscorable: If there is no prompt, or no answer.
    """
    given, answer = _data(inputs), _answer(_data(outputs))
    if "choices" in answer and not _is_for_responses(given):
        return Rebuilt(chat, _chat_request(given), answer)
    if "choices" in answer:
        answer = _as_response(answer)
    return Rebuilt(responses, _responses_request(given), answer)


def told(data: Any) -> Iterator[tuple[Any, Any, Trace | None]]:
    """Inputs, outputs and trace of each row that is there before an evaluation.

    Args:
        data: A frame, rows or traces, as an evaluation takes them.
    """
    for row in data.to_dict("records") if hasattr(data, "columns") else data:
        trace = row if isinstance(row, Trace) else row.get("trace")
        if isinstance(trace, str):
            trace = Trace.from_json(trace)
        if isinstance(trace, Trace):
            root = next((span for span in trace.data.spans if span.parent_id is None), None)
            yield (root.inputs, root.outputs, trace) if root else (None, None, trace)
        elif row.get("outputs") is not None:
            yield row.get("inputs"), row["outputs"], None


def _data(value: Any) -> Any:
    if hasattr(value, "model_dump"):
        return plain(value)
    is_missing = isinstance(value, float) and math.isnan(value)  # a frame's way to have nothing
    return None if is_missing else value


def _chat_request(given: Any) -> Mapping[str, Any]:
    if isinstance(given, Mapping) and _are_messages(given.get("messages")):
        return known(chat, given)
    return {"messages": _messages(given)}


def _responses_request(given: Any) -> Mapping[str, Any]:
    if _is_for_responses(given):
        return known(responses, given)
    request = _chat_request(given)
    return {**known(responses, request), "input": request["messages"]}


def _is_for_responses(given: Any) -> bool:
    if not isinstance(given, Mapping):
        return False
    items = given.get("input")
    if isinstance(items, list):
        return bool(items) and all(isinstance(item, Mapping) for item in items)
    return isinstance(items, str) and "instructions" in given


def _messages(given: Any) -> list[Any]:
    if _are_messages(given):
        return list(given)
    text = _text(given)
    if not text.strip():
        raise Unscorable("unsupported_content")
    return [{"role": "user", "content": text}]


def _answer(given: Any) -> Mapping[str, Any]:
    if isinstance(given, Mapping):
        if isinstance(given.get("choices"), list) or isinstance(given.get("output"), list):
            return given
        if _are_messages(given.get("messages")):
            given = given["messages"]
    if _are_messages(given):
        given = given[-1]
    if not _is_message(given):
        given = {"role": "assistant", "content": _text(given)}
    choice = {"index": 0, "message": dict(given), "finish_reason": "stop"}
    return {"object": "chat.completion", "choices": [choice]}


def _as_response(answer: Mapping[str, Any]) -> Mapping[str, Any]:
    message = answer["choices"][0]["message"]
    content = [{"type": "output_text", "text": _text(message.get("content"))}]
    item = {"type": "message", "role": "assistant", "content": content}
    return {"object": "response", "status": "completed", "output": [item]}


def _text(value: Any) -> str:
    if value is None or isinstance(value, str):
        return value or ""
    if isinstance(value, Mapping):
        told = {str(name): item for name, item in value.items() if item is not None}
        if len(told) == 1:
            return _text(*told.values())
        return "\n\n".join(f"{name}: {_text(item)}" for name, item in told.items())
    if hasattr(value, "tolist"):
        value = value.tolist()  # numpy's
    return json.dumps(value, ensure_ascii=False, default=str)


def _are_messages(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(_is_message(one) for one in value)


def _is_message(value: Any) -> bool:
    is_told = isinstance(value, Mapping) and isinstance(value.get("role"), str)
    return is_told and ("content" in value or "tool_calls" in value)
