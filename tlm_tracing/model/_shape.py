"""Responses and their events in the shapes that MLflow's schema knows."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pydantic
from mlflow.types.responses import ResponsesAgentResponse, ResponsesAgentStreamEvent
from mlflow.types.responses_helpers import Annotation, Content, OutputItem

Data = dict[str, Any]

# Not what OpenAI repeats of the request: the instructions are the operator's own.
_TOLD = (
    "id",
    "object",
    "created_at",
    "model",
    "status",
    "output",
    "error",
    "incomplete_details",
    "usage",
    "metadata",
)


def response(data: Mapping[str, Any], custom_outputs: Data | None = None) -> ResponsesAgentResponse:
    """A response without what MLflow cannot hold.

    Args:
        data: One of the Responses API, as plain data.
        custom_outputs: What is told beside it.
    """
    told: Data = {key: data[key] for key in _TOLD if data.get(key) is not None}
    told["output"] = [kept for item in told.get("output", ()) if (kept := _item(item))]
    told["custom_outputs"] = custom_outputs
    try:
        return ResponsesAgentResponse(**told)
    except pydantic.ValidationError as error:
        wrong = {place["loc"][0] for place in error.errors() if place["loc"]}
        return ResponsesAgentResponse(**{key: told[key] for key in told if key not in wrong})


def event(data: Mapping[str, Any]) -> ResponsesAgentStreamEvent | None:
    """An event of a stream; None if MLflow cannot hold it.

    Args:
        data: The event as plain data, with ``custom_outputs`` if there are any.
    """
    told = dict(data)
    if isinstance(told.get("response"), Mapping):
        told["response"] = dumped(response(told["response"]))
    if told["type"] == "response.output_item.done":
        told["item"] = _item(told.get("item"))
    try:
        return ResponsesAgentStreamEvent(**told)
    except pydantic.ValidationError:
        return None


def dumped(thing: pydantic.BaseModel) -> Data:
    """As plain data, without what was not said."""
    return thing.model_dump(mode="json", exclude_none=True)


def _item(item: Any) -> Data | None:
    """An item of the output without what MLflow does not know; None if that is all of it."""
    if not isinstance(item, Mapping):
        return None
    told = dict(item)
    if told.get("type") == "message":
        told["content"] = [kept for part in told.get("content") or () if (kept := _part(part))]
    return told if _is_valid(OutputItem, told) else None


def _part(part: Mapping[str, Any]) -> Data | None:
    told = dict(part)
    if "annotations" in told:
        cited = told["annotations"] or ()
        told["annotations"] = [one for one in cited if _is_valid(Annotation, one)]
    return told if _is_valid(Content, told) else None


def _is_valid(kind: type[pydantic.BaseModel], data: Mapping[str, Any]) -> bool:
    try:
        kind(**data)
    except pydantic.ValidationError:
        return False
    return True
