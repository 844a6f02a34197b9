"""Whether the two services answer: the LLM's, and Cleanlab's."""

from __future__ import annotations

import asyncio
import math
import os

from tlm_tracing import _config
from tlm_tracing._data import Exchange
from tlm_tracing._doctor._check import (
    Check,
    Overdue,
    address,
    is_timeout,
    lack_of_connection,
    ok,
    problem,
    skipped,
    within,
)
from tlm_tracing._doctor._local import CLEANLAB_KEY, OPENAI_KEY
from tlm_tracing.exceptions import ScoringError

_LLM = "LLM endpoint"
_CLEANLAB = "Cleanlab"
_NETWORK = "Check the address, the network, proxies and firewalls."
_PROMPT = "What is 1+1?"
_RESPONSE = "2"


def llm_endpoint(timeout: float, found: list[Check]) -> Check:
    """Have the models listed, which costs nothing.

    Args:
        timeout: Seconds that it may take.
        found: What is known already: without a key there is nothing to ask with.
    """
    if _is_wrong(OPENAI_KEY, found):
        return skipped(_LLM, f"{OPENAI_KEY} has to be right first")
    import openai

    client = openai.OpenAI(timeout=timeout, max_retries=0)
    where = address(str(client.base_url))
    try:
        within(timeout, client.models.list)
    except (Overdue, openai.APITimeoutError):
        return problem(_LLM, f"{where} does not answer within {timeout:g} s.", _NETWORK)
    except openai.APIConnectionError as error:
        reason = lack_of_connection(error) or "the connection failed"
        return problem(_LLM, f"{where} does not answer: {reason}.", _at_openai())
    except openai.APIStatusError as error:
        return _by_status(where, error.status_code, str(error))
    except (AttributeError, TypeError, ValueError):
        return problem(_LLM, f"{where} answers, but not as an API does.", _at_openai())
    return ok(_LLM, f"{where} answers")


def _by_status(where: str, status: int, said: str) -> Check:
    if "insufficient permissions" in said:
        return ok(_LLM, f"{where} answers; the key may not list models ({status})")
    if status in (404, 405):
        return ok(
            _LLM,
            f"{where} answers; it lists no models ({status}). If calls fail like that, too, "
            "look whether OPENAI_BASE_URL lacks a part such as /v1",
        )
    if status in (401, 403):
        return problem(
            _LLM,
            f"{where} refuses the key ({status}).",
            f"Check {OPENAI_KEY}: whether it is valid, and whether it is for this address.",
        )
    if status == 429:
        return problem(
            _LLM,
            f"{where} answers that a limit is reached (429).",
            "Check the quota that is left, or wait a little.",
        )
    return problem(_LLM, f"{where} answers {status}.", f"{_at_openai()} Try again later.")


def _at_openai() -> str:
    return f"Check OPENAI_BASE_URL. {_NETWORK}" if os.environ.get("OPENAI_BASE_URL") else _NETWORK


def cleanlab(timeout: float, found: list[Check], *, score: bool) -> Check:
    """Have Cleanlab score a tiny answer, which is billed as any score.

    Args:
        timeout: Seconds that it may take.
        found: What is known already.
        score: False to leave it out.
    """
    if not score:
        return skipped(_CLEANLAB, "--no-score")
    if os.environ.get(CLEANLAB_KEY) is None or _is_wrong(CLEANLAB_KEY, found):
        return skipped(_CLEANLAB, f"{CLEANLAB_KEY} has to be right first")
    where = address(_config.cleanlab_base_url())
    try:
        given = within(timeout, lambda: asyncio.run(_score(timeout)))
    except Overdue:
        return _silent(where, timeout)
    except ScoringError as error:
        return _silent(where, timeout) if error.reason == "timeout" else _failed(where, error)
    if not isinstance(given, (int, float)) or not 0 <= given <= 1 or math.isnan(given):
        return problem(
            _CLEANLAB, f"{where} answers without a score.", "Try again; tell support@cleanlab.ai."
        )
    return ok(_CLEANLAB, f"{where} answers: {given:.4f}. That is billed as one score")


async def _score(timeout: float) -> object:
    from tlm_tracing.scorers import HostedTLM

    scorer = HostedTLM()
    try:
        result = await scorer.score(Exchange({}, None, _PROMPT, _RESPONSE, timeout))
    finally:
        await scorer.aclose()
    return result["trustworthiness_score"]


def _silent(where: str, timeout: float) -> Check:
    return problem(
        _CLEANLAB,
        f"{where} does not answer within {timeout:g} s.",
        f"{_NETWORK} A longer --timeout tells whether it is only slow.",
    )


def _failed(where: str, error: ScoringError) -> Check:
    # What follows a colon or a bracket are others' words, and may quote the key.
    said = str(error).partition(":")[0].partition(" (")[0].rstrip(".")
    if "refused the key" in said:
        advice = f"Check {CLEANLAB_KEY} against https://tlm.cleanlab.ai."
    elif "rate limit" in said:
        wait = "a little" if error.retry_after is None else f"{error.retry_after:.0f} s"
        advice = f"Wait {wait}; TLM_TRACING_MAX_SCORES_PER_MINUTE keeps an application below it."
    elif "not at this address" in said:
        advice = "Check CLEANLAB_API_BASE_URL, which is best left unset."
    elif is_timeout(error) or not error.outage:
        advice = "Try again; if it stays like that, tell support@cleanlab.ai."
    else:
        advice = f"{_NETWORK} Calls go on unscored meanwhile."
    reason = lack_of_connection(error)
    return problem(_CLEANLAB, f"{where}: {said}{f', {reason}' if reason else ''}.", advice)


def _is_wrong(key: str, found: list[Check]) -> bool:
    return any(check.name == key and check.status != "ok" for check in found)
