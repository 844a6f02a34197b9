"""What became of an answer: the response that is given, and what is told of the trust in it."""

from __future__ import annotations

from typing import Any

from tlm_tracing import _returned
from tlm_tracing._data import Trust
from tlm_tracing._span import TrustedSpan
from tlm_tracing.exceptions import ScoringError, UntrustworthyResponseError
from tlm_tracing.model import _answers

Data = dict[str, Any]


def heard(block: TrustedSpan) -> Any:
    """What OpenAI has answered so far, as plain data; None if that is not known."""
    call = _call(block)
    return None if call is None else call.answer


def concluded(
    block: TrustedSpan, given: Any, error: UntrustworthyResponseError | ScoringError | None
) -> tuple[Data, Data]:
    """The response to give, and its custom outputs.

    Args:
        block: Where the call was made.
        given: What the call gave.
        error: Why it gave nothing.
    """
    call = _call(block)
    if call is None:
        return _answers.of(given), outputs(Trust.unscored("off"))
    if error is not None:
        return _answers.withheld(call.answer, _why(error)), outputs(call.trust, "raised")
    trust = call.trust
    if call.has_replaced and not isinstance(given, str):
        trust = _returned.trust(given) or trust
    return _answers.of(given), outputs(trust, call._action, call.trust.trace_id)


def outputs(trust: Trust, action: str | None = None, trace_id: str | None = None) -> Data:
    """What is told of a trust.

    Args:
        trust: In the answer that is given if it has one, else in the one that it replaces.
        action: What the threshold did.
        trace_id: The trace, if the trust does not know it.
    """
    told = {
        "trust_score": trust.score,
        "explanation": trust.explanation,
        "status": trust.status,
        "reason": trust.reason,
        "action": action,
        "trace_id": trace_id or trust.trace_id,
    }
    return {**told, "evals": dict(trust.evals)} if trust.evals else told


def _call(block: TrustedSpan) -> Any:
    """The agent's own call, not one of a fallback's; None if nothing is recorded."""
    return next(iter(block._scope.calls), None)


def _why(error: UntrustworthyResponseError | ScoringError) -> str:
    if isinstance(error, ScoringError):
        return f"The answer is withheld, as it could not be scored ({error.reason})."
    return f"The answer is withheld. {error}"
