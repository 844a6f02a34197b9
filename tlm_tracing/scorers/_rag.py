"""What is asked of Cleanlab about an answer that was given by a context, beside its trust.

The evals are those of the installed cleanlab-tlm, whose import takes a second: this module is
imported where a context is first named.

Source: ``TrustworthyRAG`` in https://help.cleanlab.ai/tlm/api/python/utils.rag/
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from cleanlab_tlm import Eval, get_default_evals

from tlm_tracing._data import Exchange

_TOOL_CALL = re.compile(r"<tool_call>.*?</tool_call>", re.DOTALL)


def chosen(evals: Sequence[Eval] | None, response: str) -> list[Eval]:
    """The evals that can be asked about a response.

    Args:
        evals: The user's; None means Cleanlab's own.
        response: If it only calls tools, there is nothing said that could be grounded or
            helpful.
    """
    wanted = get_default_evals() if evals is None else evals
    if not _only_calls_tools(response):
        return list(wanted)
    return [one for one in wanted if one.response_identifier is None]


def body(
    exchange: Exchange,
    evals: Sequence[Eval],
    preset: str,
    options: Mapping[str, Any],
    api_key: str,
) -> dict[str, Any]:
    """The request body, as cleanlab-tlm sends it.

    Args:
        exchange: One with query and context.
        evals: What is asked.
        preset: The quality preset.
        options: TLM's.
        api_key: Sent in the body, too: cleanlab-tlm names the user by it.
    """
    return {
        "response": {"response": exchange.response},
        "prompt": exchange.prompt,
        "query": exchange.query,
        "context": exchange.context,
        "evals": [dict(vars(one)) for one in evals],
        "quality": preset,
        "options": dict(options),
        "user_id": api_key,
        "client_id": api_key,
        "constrain_outputs": None,
    }


def scores(answer: Mapping[str, Any], evals: Sequence[Eval]) -> dict[str, Any]:
    """What the answer says to each of the evals, as far as it does."""
    told = {one.name: answer.get(one.name) for one in evals}
    return {name: one.get("score") for name, one in told.items() if isinstance(one, Mapping)}


def trustworthiness(answer: Mapping[str, Any]) -> dict[str, Any] | None:
    """Score and log of the answer's trust; None if there is no score."""
    told = answer.get("trustworthiness")
    if not isinstance(told, Mapping):
        return None
    score, log = told.get("score"), told.get("log")
    if not isinstance(score, (int, float)) or not 0.0 <= score <= 1.0:
        return None
    return {"trustworthiness_score": score, "log": dict(log) if isinstance(log, Mapping) else {}}


def _only_calls_tools(response: str) -> bool:
    rest, calls = _TOOL_CALL.subn("", response)
    return calls > 0 and not rest.strip()
