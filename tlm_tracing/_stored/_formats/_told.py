"""What an LLM span tells, and the chat exchange that is made of it."""

from __future__ import annotations

import functools
import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple, NoReturn

from mlflow.entities import Span, SpanEvent

from tlm_tracing._endpoints import Endpoint, chat
from tlm_tracing._messages import Unscorable

Message = dict[str, Any]

_MODEL = "mlflow.llm.model"
_TOOLS = "mlflow.chat.tools"
# What providers say of the end of an answer, by the key under which they say it.
_ENDS = frozenset({"finish_reason", "finishReason", "stop_reason", "stopReason", "done_reason"})
_ENDED = frozenset({"completed", "incomplete"})


class Rebuilt(NamedTuple):
    """A request and its answer as an endpoint of OpenAI's has them.

    Attributes:
        endpoint: Which endpoint.
        request: The request body.
        answer: The answer as plain data.
    """

    endpoint: Endpoint
    request: Mapping[str, Any]
    answer: Mapping[str, Any]


class Told:
    """What an LLM span tells; parsed once, as MLflow keeps it as JSON.

    Attributes:
        name: The span's name.
        inputs: What went in.
        outputs: What came out.
        attribute: Gives an attribute by its name; None if there is none.
    """

    def __init__(self, span: Span) -> None:
        self._span = span
        self.name = span.name
        self.inputs: Any = span.inputs
        self.outputs: Any = span.outputs
        self.attribute = span.get_attribute

    @functools.cached_property
    def events(self) -> list[SpanEvent]:
        """What happened in it, the oldest first; of many, MLflow keeps the newest 128."""
        return self._span.events

    @property
    def model(self) -> str | None:
        """The model by MLflow's own attribute."""
        model = self.attribute(_MODEL)
        return model if isinstance(model, str) and model else None

    @property
    def tools(self) -> list[dict[str, Any]]:
        """The tools by MLflow's own attribute, as chat completions put them."""
        return mappings(self.attribute(_TOOLS) or [])


def reject(reason: str = "unsupported_content") -> NoReturn:
    """Say that a call cannot be rebuilt as it was.

    Raises:
        Unscorable: Always.
    """
    raise Unscorable(reason)


def mapping(value: Any) -> dict[str, Any]:
    """A mapping.

    Raises:
        Unscorable: If it is none.
    """
    return dict(value) if isinstance(value, Mapping) else reject()


def mappings(value: Any) -> list[dict[str, Any]]:
    """A list of mappings.

    Raises:
        Unscorable: If it is none, such as the text of an object that could not be stored.
    """
    if not isinstance(value, (list, tuple)):
        reject()
    return [mapping(item) for item in value]


def decoded(value: Any) -> Any:
    """What a text has as JSON; all else as it is."""
    if isinstance(value, str):
        try:
            return json.loads(value)
        except ValueError:
            return value
    return value


def is_text_of_object(value: Any) -> bool:
    """Whether a text is what Python shows of an object that could not be stored."""
    return isinstance(value, str) and value.startswith("<") and value.endswith(">")


def text_part(text: Any) -> dict[str, Any]:
    """A part of a content."""
    return {"type": "text", "text": str(text)}


def tool_call(call_id: Any, name: Any, arguments: Any) -> dict[str, Any]:
    """A call of a function; arguments may be text or data.

    Raises:
        Unscorable: If it has no name, as pieces of a call have none.
    """
    if not isinstance(name, str) or not name:
        reject()
    written = arguments if isinstance(arguments, str) else json.dumps(arguments or {})
    told = {"name": name, "arguments": written}
    return {"id": call_id or name, "type": "function", "function": told}


def tool_result(call_id: Any, content: Any, name: Any = None) -> Message:
    """The message that tells what a tool has found."""
    told = content if isinstance(content, (str, list)) else json.dumps(content)
    named = {"name": name} if name else {}
    return {"role": "tool", "tool_call_id": call_id or name, **named, "content": told}


def function(name: Any, description: Any, parameters: Any) -> dict[str, Any]:
    """A tool as chat completions put it."""
    told = {"name": name, "description": description, "parameters": parameters}
    return {
        "type": "function",
        "function": {key: value for key, value in told.items() if value is not None},
    }


def turn(
    role: str,
    parts: Sequence[Mapping[str, Any]],
    calls: Sequence[Mapping[str, Any]] = (),
    results: Sequence[Message] = (),
) -> list[Message]:
    """The messages of one turn: what tools have found, then what was said."""
    if results and not parts and not calls:
        return list(results)
    alone = len(parts) == 1 and parts[0].get("type") == "text"
    content: Any = parts[0]["text"] if alone else list(parts) or None
    said: Message = {"role": role, "content": content}
    if calls:
        said["tool_calls"] = list(calls)
    return [*results, said]


def spoken(texts: Iterable[Any], calls: Sequence[Mapping[str, Any]] = ()) -> Message:
    """The message of an answer: its texts are pieces of one."""
    content = "".join(str(text) for text in texts)
    message: Message = {"role": "assistant", "content": content or None}
    if calls:
        message["tool_calls"] = list(calls)
    return message


def continued(messages: list[Message], message: Message) -> Message:
    """An answer that goes on where the last message left off, in one with that."""
    if messages and messages[-1]["role"] == "assistant" and not messages[-1].get("tool_calls"):
        begun = messages.pop()["content"]
        if not isinstance(begun, str):
            reject()
        return {**message, "content": begun + (message.get("content") or "")}
    return message


def exchange(
    told: Told,
    messages: list[Message],
    choices: Iterable[tuple[Message, str | None]],
    **request: Any,
) -> Rebuilt:
    """An exchange of chat completions.

    Args:
        told: The span.
        messages: Those of the request.
        choices: Each answer's message and finish reason.
        request: Other parameters of the request; those that are None count as not given.

    Raises:
        Unscorable: If there are no messages or no choices.
    """
    body = {"model": told.model, "messages": messages, **request}
    answer = completion(told, choices)
    if not messages or not answer["choices"]:
        reject()
    return Rebuilt(chat, {key: value for key, value in body.items() if value}, answer)


def completion(told: Told, choices: Iterable[tuple[Message, str | None]]) -> dict[str, Any]:
    """A chat completion, of each choice's message and finish reason."""
    return {
        "object": "chat.completion",
        "model": told.model,
        "choices": [
            {"index": index, "message": message, "finish_reason": reason}
            for index, (message, reason) in enumerate(choices)
        ],
    }


def tells_end(value: Any) -> bool:
    """Whether somewhere in a value it is said that, or why, an answer has ended."""
    if isinstance(value, Mapping):
        is_response = value.get("object") == "response"
        return any(
            (key in _ENDS and bool(item))
            or (key == "status" and item in _ENDED and is_response)
            or tells_end(item)
            for key, item in value.items()
        )
    return isinstance(value, list) and any(tells_end(item) for item in value)
