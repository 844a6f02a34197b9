"""How a served agent asks OpenAI: by the Responses API, or by chat completions."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Protocol

from tlm_tracing._endpoints import Endpoint
from tlm_tracing.model import _chat, _responses

Data = dict[str, Any]


class Api(Protocol):
    """One way to ask.

    Attributes:
        ENDPOINT: Where that leads.
    """

    ENDPOINT: Endpoint

    def body(self, request: Mapping[str, Any]) -> Data:
        """What is sent for a request in the words of the Responses API."""

    def create(self, client: Any) -> Callable[..., Any]:
        """The method of OpenAI's client that sends it."""

    def events(self, stream: Iterable[Any]) -> Iterator[Data]:
        """A stream in the events of the Responses API, as plain data."""


APIS: Mapping[str, Api] = {"responses": _responses, "chat": _chat}

# What the methods of OpenAI's client take beside.
_OPTIONS = frozenset({"extra_body", "extra_headers", "extra_query", "stream", "timeout"})


def arguments(api: Api, request: Mapping[str, Any]) -> Data:
    """What the method is called with; what the installed openai does not know is sent as well."""
    body = api.body(request)
    known = api.ENDPOINT.parameters() | _OPTIONS
    told = {key: value for key, value in body.items() if key in known}
    others = {key: value for key, value in body.items() if key not in known}
    if others:
        told["extra_body"] = {**others, **(told.get("extra_body") or {})}
    return told
