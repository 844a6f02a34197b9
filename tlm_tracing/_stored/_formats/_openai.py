"""OpenAI's own shapes, which Groq, Mistral, LiteLLM and others share."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from tlm_tracing._endpoints import Endpoint, chat, known, responses
from tlm_tracing._stored._formats import _streamed
from tlm_tracing._stored._formats._told import (
    Message,
    Rebuilt,
    Told,
    completion,
    exchange,
    is_text_of_object,
    mapping,
    mappings,
    reject,
)

NAMES = frozenset({"openai", "groq", "mistral", "litellm", "crewai"})

_TRANSPORT = frozenset({"extra_headers", "extra_query", "extra_body", "timeout"})
# Where a message has what is said in it; one that has none of them is of another format.
_SAID = frozenset({"content", "tool_calls", "function_call", "refusal", "audio"})
_THOUGHTS = frozenset({"thinking", "reasoning"})
# Of a call through LiteLLM, which puts streams together faithfully.
_LITELLM = "litellm_call_id"
# What is stored of a parameter that was not given.
_NOT_GIVEN = re.compile(r"NOT_GIVEN|<openai\.[\w.]+ object at 0x[0-9a-f]+>")


def fits(told: Told) -> bool:
    """Whether it has messages, an input or a prompt."""
    if isinstance(told.inputs, Mapping):
        return any(name in told.inputs for name in ("messages", "input", "prompt"))
    return _are_messages(told.inputs)


def read(told: Told) -> Rebuilt | None:
    """Rebuild a call of chat completions, of the older completions, or of the Responses API.

    Returns:
        None if it makes embeddings, images or transcripts.

    Raises:
        Unscorable: If the call cannot be rebuilt as it was.
    """
    inputs, outputs = told.inputs, told.outputs
    if isinstance(inputs, list) and _are_messages(inputs):
        inputs = {"messages": inputs}
    given = {key: item for key, item in mapping(inputs).items() if not _is_not_given(item)}
    answered = outputs if isinstance(outputs, Mapping) else {}
    if "file" in given or ("data" in answered and "choices" not in answered):
        return None
    if "messages" in given:
        return _chat(told, given)
    if isinstance(given.get("prompt"), (str, list)):
        return _completion(told, given)
    return _response(told, given)


def _chat(told: Told, given: Mapping[str, Any]) -> Rebuilt:
    request = _request(chat, told, given)
    if not all(_SAID & message.keys() for message in mappings(request.get("messages"))):
        reject()
    if not request.get("tools") and not request.get("functions") and told.tools:
        request["tools"] = told.tools
    for name in ("tools", "functions"):
        mappings(request.get(name) or [])
    if not isinstance(request.get("response_format"), Mapping):
        request.pop("response_format", None)
    if request.get("stream") is True and not told.attribute(_LITELLM):
        return Rebuilt(chat, request, _streamed.completion(told, request))
    return Rebuilt(chat, request, _completed(told, request))


def _completed(told: Told, request: Mapping[str, Any]) -> Mapping[str, Any]:
    outputs = told.outputs
    if isinstance(outputs, Mapping) and "choices" in outputs:
        choices = mappings(outputs["choices"])
        read = [{**one, "message": _said(mapping(one.get("message")))} for one in choices]
        return {**outputs, "choices": read}
    if isinstance(outputs, list) and len(outputs) == 1:
        outputs = outputs[0]
    if isinstance(outputs, Mapping) and outputs.get("role") == "assistant":
        message = _said(mapping(outputs))
    elif (
        isinstance(outputs, str)
        and not is_text_of_object(outputs)
        and not (request.get("tools") or request.get("functions"))
    ):
        message = {"role": "assistant", "content": outputs}
    else:
        reject()
    return completion(told, [(message, None)])


def _said(message: Message) -> Message:
    """A message without the thoughts that led to it."""
    if isinstance(content := message.get("content"), list):
        message["content"] = [part for part in mappings(content) if not _is_thought(part)]
    return message


def _completion(told: Told, given: Mapping[str, Any]) -> Rebuilt:
    """A prompt without roles is a question."""
    prompt = given["prompt"]
    if isinstance(prompt, list) and len(prompt) == 1:
        prompt = prompt[0]
    if not isinstance(prompt, str) or any(given.get(name) for name in ("suffix", "echo")):
        reject()
    if given.get("stream") is True:
        choices = _streamed.texts(told)
    else:
        choices = mappings(mapping(told.outputs).get("choices"))
    answers = [
        ({"role": "assistant", "content": one["text"]}, one.get("finish_reason")) for one in choices
    ]
    return exchange(told, [{"role": "user", "content": prompt}], answers, model=given.get("model"))


def _response(told: Told, given: Mapping[str, Any]) -> Rebuilt:
    request = _request(responses, told, given)
    items = request.get("input")
    if isinstance(items, list):
        request["input"] = [_without_nothing(item) for item in mappings(items)]
    elif items is not None and not isinstance(items, str):
        reject()
    mappings(request.get("tools") or [])
    outputs = _streamed.response(told) if request.get("stream") is True else told.outputs
    answer = mapping(outputs)
    answer["output"] = [_without_nothing(item) for item in mappings(answer.get("output"))]
    if "text_format" in given and not request.get("text"):
        request["text"] = _text_format(answer)
    return Rebuilt(responses, request, answer)


def _text_format(answer: Mapping[str, Any]) -> dict[str, Any]:
    """The format of a parsed answer: of the request, only the name of its class is stored."""
    form = mapping(mapping(answer.get("text") or {}).get("format") or {})
    if "schema_" in form:
        form["schema"] = form.pop("schema_")
    return {"format": {key: value for key, value in form.items() if value is not None}}


def _request(endpoint: Endpoint, told: Told, given: Mapping[str, Any]) -> dict[str, Any]:
    """The body as it was sent."""
    body = {key: value for key, value in given.items() if key not in _TRANSPORT}
    extra = given.get("extra_body")
    body |= extra if isinstance(extra, Mapping) else {}
    if told.model:
        body.setdefault("model", told.model)
    return known(endpoint, body)


def _is_not_given(value: Any) -> bool:
    return isinstance(value, str) and _NOT_GIVEN.fullmatch(value) is not None


def _is_thought(part: Mapping[str, Any]) -> bool:
    return part.get("type") in _THOUGHTS


def _without_nothing(value: Any) -> Any:
    """An item without the fields that only an object of openai's has, with nothing in them."""
    if isinstance(value, Mapping):
        return {key: _without_nothing(item) for key, item in value.items() if item is not None}
    return [_without_nothing(item) for item in value] if isinstance(value, list) else value


def _are_messages(value: Any) -> bool:
    return isinstance(value, list) and all(
        isinstance(one, Mapping) and isinstance(one.get("role"), str) for one in value
    )
