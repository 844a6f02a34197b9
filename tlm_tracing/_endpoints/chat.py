"""Chat completions.

Source: https://platform.openai.com/docs/api-reference/chat
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from tlm_tracing._endpoints import _usage

NAME = "chat.completions"
VERB = "chat"

_JOINED = frozenset({"content", "refusal", "reasoning_content", "reasoning", "arguments", "input"})
_AUDIO = frozenset({"data", "transcript"})
_WORDS = {"content"}
_PADDING = {"obfuscation"}


@functools.cache
def parameters() -> frozenset[str]:
    """By openai's own types."""
    from openai.types.chat import completion_create_params

    return frozenset(completion_create_params.CompletionCreateParamsNonStreaming.__annotations__)


def assemble(chunks: Iterable[Any]) -> dict[str, Any]:
    """Put a chat completion together from its chunks.

    OpenAI's own ``ChatCompletionStreamState`` raises on ``finish_reason="length"`` and on
    several orders of chunks that servers do send.

    Args:
        chunks: ``ChatCompletionChunk`` objects, the same as plain data, or the next words.

    Returns:
        The completion as plain data, ``choices`` in the order of their indexes.
    """
    answer: dict[str, Any] = {}
    choices: dict[int, dict[str, Any]] = {}
    for chunk in _words_joined(chunks):
        data = chunk if isinstance(chunk, Mapping) else _dump(chunk)
        for choice in data.get("choices") or []:
            _add_choice(choices, choice)
        answer.update(
            (key, value)
            for key, value in data.items()
            if key not in ("choices", "object") and value is not None
        )
    answer["object"] = "chat.completion"
    answer["choices"] = [_finished(choices[index]) for index in sorted(choices)]
    return answer


def _words_joined(chunks: Iterable[Any]) -> Iterator[Any]:
    for is_text, some in itertools.groupby(chunks, lambda chunk: isinstance(chunk, str)):
        if is_text:
            yield {"choices": [{"index": 0, "delta": {"content": "".join(some)}}]}
        else:
            yield from some


def construct(answer: Mapping[str, Any]) -> Any:
    """The same as OpenAI's client gives it."""
    from openai.types.chat import ChatCompletion

    return ChatCompletion.construct(**answer)


def is_whole(answer: Mapping[str, Any]) -> bool:
    """Whether every choice was finished."""
    reasons = [choice.get("finish_reason") for choice in _choices(answer)]
    return bool(reasons) and all(reasons)


def kept(chunk: Any) -> Any:
    """What is kept of a chunk: of one that only tells the next words, these.

    Thousands of objects that are kept cost their garbage collection over and over. A piece of a
    tool call becomes plain data: some readers add the later pieces to the first.
    """
    try:
        choices = chunk.choices
        if len(choices) == 1:
            choice = choices[0]
            delta = choice.delta
            # Asked of each chunk, so without pydantic's properties for the same.
            if (
                delta.__pydantic_fields_set__ == _WORDS
                and type(delta.content) is str
                and choice.finish_reason is None
                and choice.index == 0
                and choice.logprobs is None
                and not choice.__pydantic_extra__
                and chunk.usage is None
                and (not (more := chunk.__pydantic_extra__) or more.keys() == _PADDING)
            ):
                return delta.content
        is_call = any(choice.delta.tool_calls for choice in choices)
    except (AttributeError, TypeError):  # an odd shape
        return chunk
    return _dump(chunk) if is_call else chunk


def is_token(chunk: Any) -> bool:
    """Chat begins to answer with its first chunk."""
    return True


def failure(answer: Mapping[str, Any]) -> None:
    """A chat completion tells of no failure."""


def tools(request: Mapping[str, Any]) -> list[Any]:
    """The tools as they are."""
    given = request.get("tools")
    return list(given) if isinstance(given, (list, tuple)) else []


def attributes(answer: Mapping[str, Any]) -> dict[str, Any]:
    """By OpenTelemetry's GenAI conventions where they have a name, else OpenAI's."""
    return {
        **_usage.attributes(answer, "prompt", "completion"),
        "gen_ai.response.finish_reasons": [
            reason for one in _choices(answer) if (reason := one.get("finish_reason"))
        ],
        "openai.response.system_fingerprint": answer.get("system_fingerprint"),
    }


def response_format(request: Mapping[str, Any]) -> Any:
    """The format as it is."""
    return request.get("response_format")


def remember(request: Mapping[str, Any], answer: Mapping[str, Any]) -> None:
    """A request of chat completions carries everything."""


def as_chat(
    request: Mapping[str, Any], answer: Mapping[str, Any]
) -> tuple[Mapping[str, Any], Mapping[str, Any]]:
    """It is one already."""
    return request, answer


def _choices(answer: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    return [one for one in answer.get("choices") or () if isinstance(one, Mapping)]


def _dump(chunk: Any) -> dict[str, Any]:
    data: dict[str, Any] = chunk.model_dump(mode="json", exclude_unset=True, warnings=False)
    return data


def _add_choice(choices: dict[int, dict[str, Any]], new: Mapping[str, Any]) -> None:
    index = new.get("index") or 0
    choice = choices.setdefault(
        index, {"index": index, "message": {}, "logprobs": None, "finish_reason": None}
    )
    for key, value in new.items():
        if value is None or key == "index":
            continue
        if key == "delta":
            _add_delta(choice["message"], value)
        elif key == "logprobs":
            choice["logprobs"] = _add(choice["logprobs"], value)
        else:
            choice[key] = value


def _add_delta(message: dict[str, Any], delta: Mapping[str, Any]) -> None:
    for key, value in delta.items():
        if value is None:
            continue
        if key == "tool_calls":
            calls = message.setdefault("tool_calls", {})
            for call in value:
                _add_tool_call(calls, call)
        elif key == "audio":
            message[key] = _add(message.get(key), value, joined=_AUDIO)
        else:
            message[key] = _add(message.get(key), value, joined=_JOINED, key=key)


def _add_tool_call(calls: dict[int, dict[str, Any]], new: Mapping[str, Any]) -> None:
    """Servers that leave the index out begin a call with its id."""
    index = new.get("index")
    if index is None:
        index = len(calls) if new.get("id") or not calls else max(calls)
    call = calls.setdefault(index, {})
    for key, value in new.items():
        if value and key != "index":
            call[key] = _add(call.get(key), value, joined=_JOINED, key=key)


def _add(
    old: Any, new: Any, *, joined: frozenset[str] = frozenset(), key: str | None = None
) -> Any:
    """Texts that come in pieces are joined, lists grow, and of all else the last word counts."""
    if isinstance(new, Mapping):
        merged = dict(old) if isinstance(old, Mapping) else {}
        for name, value in new.items():
            if value is not None:
                merged[name] = _add(merged.get(name), value, joined=joined, key=name)
        return merged
    if isinstance(new, list):
        return [*old, *new] if isinstance(old, list) else list(new)
    if isinstance(new, str) and isinstance(old, str) and key in joined:
        return old + new
    return new


def _finished(choice: dict[str, Any]) -> dict[str, Any]:
    message = choice["message"]
    calls = message.get("tool_calls")
    if calls is not None:
        message["tool_calls"] = [calls[index] for index in sorted(calls)]
    message.setdefault("role", "assistant")
    message.setdefault("content", None)
    return choice
