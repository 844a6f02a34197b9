"""The Responses API, whose words MLflow's agents speak.

Source: https://platform.openai.com/docs/api-reference/responses
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from tlm_tracing._endpoints import Endpoint, responses
from tlm_tracing._returned import plain

ENDPOINT: Endpoint = responses


def body(request: Mapping[str, Any]) -> dict[str, Any]:
    """The request as it is."""
    return dict(request)


def create(client: Any) -> Callable[..., Any]:
    """Its ``responses.create``."""
    method: Callable[..., Any] = client.responses.create
    return method


def events(stream: Iterable[Any]) -> Iterator[dict[str, Any]]:
    """The events as they are, without what tlm_tracing has noted on them."""
    for event in stream:
        told = plain(event)
        if isinstance(told.get("response"), dict):
            told["response"].pop("tlm_metadata", None)
        yield told
