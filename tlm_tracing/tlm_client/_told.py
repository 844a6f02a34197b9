"""What a TLM client tells: the trust in a pair, or why there is none."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from typing import Any, NamedTuple

from tlm_tracing._data import Trust
from tlm_tracing._scoring import as_trust
from tlm_tracing.exceptions import ScoringError

# By the names of the classes, the error's own first: of Cleanlab, aiohttp, requests and Python.
_REASONS: Mapping[str, str] = {
    "APITimeoutError": "timeout",
    "TimeoutError": "timeout",
    "Timeout": "timeout",
    "APIError": "scorer_unavailable",
    "AuthError": "scorer_unavailable",
    "RateLimitError": "scorer_unavailable",
    "ClientError": "scorer_unavailable",
    "OSError": "scorer_unavailable",
}
# What the client says of these in a batch is all that is known of them.
_TIMEOUT = "Timeout while waiting"


class About(NamedTuple):
    """Who answers and scores.

    Attributes:
        scorer: As the source of an assessment.
        preset: The quality preset.
        model: The LLM that scores.
        llm: The LLM that answers, where TLM does.
    """

    scorer: str
    preset: str | None
    model: str | None
    llm: str | None


def about(client: Any) -> About:
    """Who answers and scores for a client."""
    preset = getattr(client, "_quality_preset", None) or getattr(
        client, "_score_quality_preset", None
    )
    model = llm = None
    with contextlib.suppress(Exception):
        if hasattr(client, "get_model_names"):
            names = client.get_model_names()
            model, llm = names["score_model"], names["response_model"]
        else:
            named = client if hasattr(client, "get_model_name") else client._tlm
            model = llm = named.get_model_name()
    return About(f"cleanlab-tlm/{preset}" if preset else "cleanlab-tlm", preset, model, llm)


def judged(result: Any, client: Any) -> tuple[Trust, str | None]:
    """The trust that a client's result tells.

    Args:
        result: Of one pair.
        client: Whose it is.

    Returns:
        The trust, and what went wrong, if anything did.
    """
    try:
        return as_trust(result), None
    except ScoringError as error:
        if (failure := _failure(result)) is not None:
            return failure
        options = getattr(client, "_options", None) or {}
        if options.get("disable_trustworthiness"):
            return Trust.unscored("off"), None
        return Trust.unscored("scorer_error"), str(error)


def failed(error: BaseException) -> Trust:
    """The trust in a pair for which the client raises this."""
    if not isinstance(error, Exception):
        return Trust.unscored("call_failed")
    names = (kind.__name__ for kind in type(error).__mro__)
    found = next((_REASONS[name] for name in names if name in _REASONS), "scorer_error")
    return Trust.unscored(found)


def has_answer(result: Any) -> bool:
    """Whether a client's result has the response that was asked for."""
    return isinstance(result, Mapping) and result.get("response") is not None


def _failure(result: Any) -> tuple[Trust, str] | None:
    """The error that a client notes in a result of a batch; None if it notes none."""
    if not isinstance(result, Mapping):
        return None
    told = result.get("trustworthiness")
    log = (told if isinstance(told, Mapping) else result).get("log")
    error = log.get("error") if isinstance(log, Mapping) else None
    if not isinstance(error, Mapping):
        return None
    message = str(error.get("message") or "TLM says no more than that it failed.")
    if message.startswith(_TIMEOUT):
        return Trust.unscored("timeout"), message
    reason = "scorer_unavailable" if error.get("retryable") else "scorer_error"
    return Trust.unscored(reason), message
