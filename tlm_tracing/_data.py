"""The nouns: an exchange with an LLM, the trust in its answer, and who scores it."""

from __future__ import annotations

import functools
from collections.abc import Callable, Generator, Mapping
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeoutError
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, TypeAlias, runtime_checkable

from tlm_tracing import _threads

Status: TypeAlias = Literal["scored", "pending", "unscored"]

REASONS = frozenset(
    {
        "no_scorer",
        "sampled_out",
        "budget",
        "queue_full",
        "timeout",
        "scorer_error",
        "scorer_unavailable",
        "refusal",
        "empty",
        "unsupported_content",
        "partial_stream",
        "call_failed",
        "off",
    }
)
"""The closed list of words that say why a call is unscored."""


@dataclass(frozen=True)
class Trust:
    """How far one answer can be trusted.

    Attributes:
        score: Trustworthiness in [0, 1]; None unless ``status`` is ``"scored"``.
        explanation: Why the scorer thinks so, if it said.
        status: ``"scored"``, ``"pending"`` (background mode, not settled yet) or ``"unscored"``.
        reason: Why the answer is unscored, a word of :data:`REASONS`; None otherwise.
        trace_id: Id of the MLflow trace that holds the call; None when nothing was recorded.
        span_id: Id of the call's parent span.
        scorer: Name of the scorer, such as ``"cleanlab-tlm/medium"``.
        seconds: How long scoring took.
        choices: With several choices, the trust in each of them in their order; the rest of
            this trust is the first one's.
        fields: The trust in each field of a structured answer, if the scorer gave it.
        evals: What else the scorer says of an answer whose context was named: scores in [0, 1],
            by Cleanlab's names ``context_sufficiency``, ``response_groundedness``,
            ``response_helpfulness`` and ``query_ease``, or the scorer's own.
    """

    score: float | None = None
    explanation: str | None = None
    status: Status = "scored"
    reason: str | None = None
    trace_id: str | None = None
    span_id: str | None = None
    scorer: str | None = None
    seconds: float | None = None
    choices: tuple[Trust, ...] = ()
    fields: Mapping[str, Trust] | None = field(default=None, hash=False)
    evals: Mapping[str, float] | None = field(default=None, hash=False)
    _settled: Future[Trust] | None = field(default=None, repr=False, compare=False)

    @staticmethod
    @functools.lru_cache(maxsize=len(REASONS))
    def unscored(reason: str) -> Trust:
        """A trust without a score, and the word that says why."""
        return Trust(status="unscored", reason=reason)

    def untrustworthy_fields(self, threshold: float = 0.8) -> list[str]:
        """The fields whose score is below a threshold, the least trustworthy first.

        Args:
            threshold: In [0, 1]; by default that of Cleanlab's own
                ``TLMChatCompletion.get_untrustworthy_fields``.
        """
        scores = {name: trust.score for name, trust in (self.fields or {}).items()}
        low = [name for name, score in scores.items() if score is not None and score < threshold]
        return sorted(low, key=lambda name: scores[name] or 0.0)

    @property
    def current(self) -> Trust:
        """This trust, or what it has become since: never waits."""
        if self._settled is not None and self._settled.done():
            return self._settled.result()
        return self

    def wait(self, timeout: float | None = None) -> Trust:
        """Wait until a pending trust is settled.

        Args:
            timeout: Seconds to wait at most; None waits for as long as the scorer may take.

        Returns:
            The settled trust, or this one, still pending, when the time ran out.
        """
        if self._settled is None:
            return self
        try:
            return self._settled.result(timeout)
        except FutureTimeoutError:
            return self

    def __await__(self) -> Generator[Any, None, Trust]:
        """``await trust`` gives the settled one."""
        return self._wait_async().__await__()

    async def _wait_async(self) -> Trust:
        if self._settled is None:
            return self
        return await _threads.result(self._settled)


@dataclass(frozen=True)
class Exchange:
    """One answered request, as scorers see it.

    Attributes:
        request: The request body as sent (``messages``, ``model``, ``tools``, ...).
        completion: The answer, an ``openai.types.chat.ChatCompletion`` with the one choice that
            is to be scored, or an ``openai.types.responses.Response``. For a scorer whose
            ``reads_texts_only`` is true, a stored one is not made again: None.
        prompt: The whole prompt as one text: system prompt, history and tools included.
        response: The answer to be scored as one text.
        timeout: Seconds that the score may take.
        response_format: The output format asked for, as chat completions put it; None for
            free text.
        query: What the user wants to know, if a context is named.
        context: What was retrieved to answer it, as one text, if the user has named it; it may
            be empty, when nothing was found.
    """

    request: Mapping[str, Any]
    completion: Any
    prompt: str
    response: str
    timeout: float
    response_format: Mapping[str, Any] | None = None
    query: str | None = None
    context: str | None = None


ScoreResult: TypeAlias = float | Trust | Mapping[str, Any]
"""What a scorer may return: a score, a Trust, or Cleanlab's dict
``{"trustworthiness_score": float, "log": {"explanation": str, "per_field_score": {...}},
"evals": {...}}``, or that of its ``TrustworthyRAG``,
``{"trustworthiness": {"score": float, "log": {...}}, "context_sufficiency": {"score": float}}``."""

ScoreFunction: TypeAlias = Callable[[Mapping[str, Any], Any], Any]
"""A sync or async function ``(request, completion) -> float, Trust or dict``."""


@runtime_checkable
class Scorer(Protocol):
    """Who scores answers: one async method and a name.

    ``score`` always runs on tlm_tracing's own event loop, so it may keep sessions open
    between calls; ``aclose`` ends them. Both may assume that loop.
    """

    @property
    def name(self) -> str:
        """Names the scorer in spans and assessments, such as ``"cleanlab-tlm/medium"``."""

    async def score(self, exchange: Exchange) -> ScoreResult:
        """Score one exchange.

        Raises:
            ScoringError: If no score can be given. Other exceptions count as scorer errors.
        """

    async def aclose(self) -> None:
        """Release what the scorer holds open."""
