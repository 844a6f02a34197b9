"""Answers that were given by a context, on the TLM side of the Sandbox.

Source: ``TrustworthyRAG`` of cleanlab-tlm 1.1.39, what it sends and what it refuses to send.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tlm_tracing.testing._state import State

_PRESETS = frozenset({"base", "low", "medium", "high", "best"})
_EXPLAINING = frozenset({"high", "best"})
_IDENTIFIERS = {
    "query": "query_identifier",
    "context": "context_identifier",
    "response": "response_identifier",
}


def check(body: Mapping[str, Any]) -> None:
    """Refuse a request that is none.

    Raises:
        ValueError, LookupError, TypeError, AttributeError: If something is missing or wrong.
    """
    for name in ("prompt", "query", "context"):
        _demand(isinstance(body[name], str), f"{name} must be a text")
    _demand(isinstance(body["response"]["response"], str), "response must have a text")
    _demand(body["quality"] in _PRESETS, f"there is no preset {body['quality']!r}")
    options = body["options"]
    _demand("custom_eval_criteria" not in options, "there are evals in place of criteria")
    if "explanation" in options.get("log", ()):
        _demand(_may_explain(body["quality"], options), "this preset does not explain")
    names = [_checked_name(one) for one in body["evals"]]
    _demand(len(names) == len(set(names)), "evals must have different names")


def scores(body: Mapping[str, Any], response: str, state: State) -> dict[str, float | None]:
    """A score for each eval, made up of what it looks at: the same each time.

    Args:
        body: A checked request.
        response: The answer.
        state: Makes scores up.
    """
    texts = {"query": body["query"], "context": body["context"], "response": response}
    found: dict[str, float | None] = {}
    for one in body["evals"]:
        seen = [texts[text] for text, key in _IDENTIFIERS.items() if one.get(key)]
        found[one["name"]] = state.score(f"{one['name']}\x1f{one['criteria']}", repr(seen)).score
    return found


def _checked_name(one: Mapping[str, Any]) -> str:
    name, criteria = one["name"], one["criteria"]
    _demand(isinstance(name, str) and isinstance(criteria, str), "an eval needs texts")
    known = [one[key] for key in _IDENTIFIERS.values() if one.get(key) is not None]
    _demand(bool(known), f"{name} looks at nothing")
    _demand(all(word in criteria for word in known), f"{name} does not name what it looks at")
    return str(name)


def _may_explain(quality: str, options: Mapping[str, Any]) -> bool:
    reasons = options.get("reasoning_effort") not in (None, "none", "minimal")
    return quality in _EXPLAINING or reasons or bool(options.get("num_consistency_samples"))


def _demand(holds: bool, otherwise: str) -> None:
    if not holds:
        raise ValueError(otherwise)
