"""What is asked of Cleanlab about the fields of a structured answer.

Source: ``TLMChatCompletion`` in https://help.cleanlab.ai/tlm/api/python/utils.chat_completions/
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from tlm_tracing._data import Exchange


def is_structured(exchange: Exchange) -> bool:
    """Whether the answer has fields."""
    wanted = exchange.response_format
    if not isinstance(wanted, Mapping) or wanted.get("type") not in ("json_schema", "json_object"):
        return False
    try:
        return isinstance(json.loads(exchange.response), dict)
    except ValueError:
        return False


def body(
    exchange: Exchange, preset: str, options: Mapping[str, Any], allowed: float
) -> dict[str, Any]:
    """The request body.

    Args:
        exchange: One with a structured answer.
        preset: The quality preset.
        options: TLM's.
        allowed: Seconds that it may take.
    """
    message = {"role": "assistant", "content": exchange.response}
    return {
        **options,
        "quality_preset": preset,
        "log": ["per_field_score"],
        "max_timeout": allowed,
        # The texts as they may leave, in the shape that this endpoint takes.
        "messages": [{"role": "user", "content": exchange.prompt}],
        "response_format": exchange.response_format,
        "response": {
            "id": "",
            "object": "chat.completion",
            "created": 0,
            "model": options["model"],
            "choices": [{"index": 0, "finish_reason": "stop", "message": message}],
        },
    }


def scores(answer: Mapping[str, Any]) -> Any:
    """The score of each field in Cleanlab's answer; None if there is none."""
    log = answer.get("log")
    return log.get("per_field_score") if isinstance(log, Mapping) else None
