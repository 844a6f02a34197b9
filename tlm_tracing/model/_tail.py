"""The end of an agent's stream, which tells of the trust and so waits for it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from mlflow.types.responses import ResponsesAgentStreamEvent

from tlm_tracing.model import _answers, _shape

Data = dict[str, Any]

_DONE = "response.output_item.done"
_NEXT_ITEM = frozenset({_DONE, "response.output_item.added"})
_LAST = frozenset({_DONE, "response.completed", "response.incomplete", "response.failed"})


class Tail:
    """What of a stream is held back: its last item, done, and all that follows."""

    def __init__(self) -> None:
        self._held: list[Data] = []

    def let_through(self, data: Data) -> Iterator[ResponsesAgentStreamEvent]:
        """The events that may go now that this one has come."""
        kind = data["type"]
        if kind in _NEXT_ITEM:
            yield from _known(self._held)
            self._held = []
        if self._held or kind in _LAST:
            self._held.append(data)
        else:
            yield from _known([data])

    def response(self, heard: Any) -> Data:
        """The whole response; of a stream that broke off, what was heard of it."""
        if self._held and "response" in self._held[-1]:
            return dict(self._held[-1]["response"])
        answer = {"output": []} if heard is None else _answers.of(heard)
        answer["status"] = "incomplete"
        self._held += list(_answers.events(answer))[-1:]
        return answer

    def replace(self, answer: Mapping[str, Any]) -> None:
        """Give another response in the end."""
        self._held = list(_answers.events(answer))

    def events(self, custom_outputs: Data) -> Iterator[ResponsesAgentStreamEvent]:
        """What was held, with what is told of the trust on the last item and on the response."""
        items = [data for data in self._held if data["type"] == _DONE]
        for data in self._held:
            if "response" in data or data is items[-1]:
                yield from _known([{**data, "custom_outputs": custom_outputs}])
            else:
                yield from _known([data])


def _known(events: list[Data]) -> Iterator[ResponsesAgentStreamEvent]:
    for data in events:
        event = _shape.event(data)
        if event is not None:
            yield event
