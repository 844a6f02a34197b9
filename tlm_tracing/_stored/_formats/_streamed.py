"""Answers that ``mlflow.openai.autolog()`` has recorded piece by piece.

What it puts together of them itself lacks tool calls and refusals, mixes several choices into
one, and says of every end that it was a good one. The pieces are in the span's events, of which
MLflow keeps the newest 128.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any

from tlm_tracing._endpoints import chat, responses
from tlm_tracing._stored._formats._told import Told, mapping, mappings, reject

_CHUNK = "mlflow.chunk.item."
_VALUE = "mlflow.chunk.value"


def completion(told: Told, request: Mapping[str, Any]) -> Mapping[str, Any]:
    """A chat completion.

    Args:
        told: The span of a request with ``stream``.
        request: The request.

    Raises:
        Unscorable: If the stream broke off, or nobody can tell what was in it.
    """
    chunks, is_whole = _chunks(told)
    if is_whole and chunks:
        answer = chat.assemble(chunks)
        return answer if chat.is_whole(answer) else reject("partial_stream")
    if told.outputs is None:
        reject("partial_stream")
    answer = mapping(told.outputs)
    choices = mappings(answer.get("choices"))
    reason = _last_reason(chunks) if chunks else choices and choices[0].get("finish_reason")
    if not reason:
        reject("partial_stream")
    message = mapping(choices[0].get("message"))
    may_call = bool(request.get("tools") or request.get("functions"))
    if (request.get("n") or 1) != 1 or len(choices) != 1:
        reject()
    if message.get("tool_calls"):
        return answer
    if may_call or not message.get("content") or reason not in ("stop", "length"):
        reject()
    return {**answer, "choices": [{**choices[0], "finish_reason": reason}]}


def texts(told: Told) -> list[dict[str, Any]]:
    """The choices of a completion without roles."""
    chunks, is_whole = _chunks(told)
    if not chunks or not is_whole:
        reject("partial_stream" if told.outputs is None else "unsupported_content")
    found: dict[Any, dict[str, Any]] = {}
    for chunk in chunks:
        for choice in mappings(chunk.get("choices") or []):
            one = found.setdefault(choice.get("index"), {"text": "", "finish_reason": None})
            one["text"] += choice.get("text") or ""
            one["finish_reason"] = choice.get("finish_reason") or one["finish_reason"]
    choices = [found[index] for index in sorted(found)]
    if not choices or not all(one["finish_reason"] for one in choices):
        reject("partial_stream")
    return choices


def response(told: Told) -> Mapping[str, Any]:
    """A response: the last event has all of it."""
    outputs = told.outputs
    if isinstance(outputs, Mapping) and responses.is_whole(outputs):
        return outputs
    chunks, _ = _chunks(told)
    answer = responses.assemble(chunks)
    return answer if responses.is_whole(answer) else reject("partial_stream")


def _chunks(told: Told) -> tuple[list[dict[str, Any]], bool]:
    """The chunks that there are, and whether those are all."""
    events = [event for event in told.events if event.name.startswith(_CHUNK)]
    numbers = [int(event.name.removeprefix(_CHUNK)) for event in events]
    chunks = [mapping(json.loads(str(event.attributes[_VALUE]))) for event in events]
    return chunks, numbers == list(range(len(numbers)))


def _last_reason(chunks: Iterable[Mapping[str, Any]]) -> Any:
    reasons = [
        choice.get("finish_reason")
        for chunk in chunks
        for choice in mappings(chunk.get("choices") or [])
    ]
    return next(filter(None, reversed(reasons)), None)
