"""Token usage as MLflow and OpenTelemetry have it: the endpoints differ in OpenAI's words alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def attributes(answer: Mapping[str, Any], given: str, said: str) -> dict[str, Any]:
    """The attributes that tell an answer's usage; values may be None.

    Args:
        answer: The answer as plain data.
        given: What the endpoint calls the tokens that it was given: ``"prompt"``, ``"input"``.
        said: What it calls those of the answer: ``"completion"``, ``"output"``.
    """
    usage = answer.get("usage")
    if not isinstance(usage, Mapping):
        return {}
    counts = {
        "input_tokens": usage.get(f"{given}_tokens"),
        "output_tokens": usage.get(f"{said}_tokens"),
        "total_tokens": usage.get("total_tokens"),
        "cache_read_input_tokens": _detail(usage, given, "cached_tokens"),
    }
    return {
        "mlflow.chat.tokenUsage": {
            key: count for key, count in counts.items() if isinstance(count, int)
        },
        "gen_ai.usage.reasoning.output_tokens": _detail(usage, said, "reasoning_tokens"),
    }


def _detail(usage: Mapping[str, Any], group: str, name: str) -> Any:
    details = usage.get(f"{group}_tokens_details")
    return details.get(name) if isinstance(details, Mapping) else None
