"""Every error that a user of tlm_tracing may want to catch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tlm_tracing._data import Trust


class TLMTracingError(Exception):
    """Base class of all errors that tlm_tracing raises on its own account."""


class ConfigurationError(TLMTracingError, ValueError):
    """A setting is unknown or has a value that cannot work; the message names what to do."""


class ScoringError(TLMTracingError):
    """A scorer could not give a score.

    Scorers raise it; callers see it only with ``on_error="raise"``, otherwise the call is
    recorded as unscored.

    Attributes:
        reason: The word that is recorded as the call's reason: ``"timeout"``,
            ``"scorer_error"`` or ``"scorer_unavailable"``.
        outage: Whether the failure says that the back end as a whole is unavailable, which
            opens the circuit breaker, rather than that this one answer cannot be scored.
        retry_after: Seconds for which the back end asked to be left alone, if it did.
    """

    def __init__(
        self,
        message: str,
        *,
        reason: str = "scorer_error",
        outage: bool = False,
        retry_after: float | None = None,
    ) -> None:
        super().__init__(message)
        self.reason = reason
        self.outage = outage
        self.retry_after = retry_after


class UntrustworthyResponseError(TLMTracingError):
    """An answer scored below the threshold, and ``on_low="raise"`` was asked for.

    Attributes:
        completion: The answer as OpenAI returned it.
        trust: Its :class:`~tlm_tracing.Trust`.
    """

    def __init__(self, completion: Any, trust: Trust, threshold: float) -> None:
        super().__init__(
            f"The answer's trust score {trust.score:.4f} is below the threshold {threshold:.4f} "
            f"(trace {trust.trace_id})."
        )
        self.completion = completion
        self.trust = trust
