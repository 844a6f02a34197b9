"""How a served agent asks OpenAI: by the Responses API, or by chat completions."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Protocol

from tlm_tracing.model import _chat, _responses

Data = dict[str, Any]


class Api(Protocol):
    """One way to ask."""

    def body(self, request: Mapping[str, Any]) -> Data:
        """What is sent for a request in the words of the Responses API."""

    def create(self, client: Any) -> Callable[..., Any]:
        """The method of OpenAI's client that sends it."""

    def events(self, stream: Iterable[Any]) -> Iterator[Data]:
        """A stream in the events of the Responses API, as plain data."""


APIS: Mapping[str, Api] = {"responses": _responses, "chat": _chat}
