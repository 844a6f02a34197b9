"""Ask: the scores of an evaluation, as many at once as the settings allow."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from concurrent.futures import Future
from dataclasses import replace
from typing import Any

from tlm_tracing import _asking, _config
from tlm_tracing._config import Config
from tlm_tracing._messages import Unscorable
from tlm_tracing._scoring import Verdict
from tlm_tracing._stored._formats import Rebuilt
from tlm_tracing.exceptions import ConfigurationError, ScoringError

# Nobody waits for the single score; the same as for stored traces.
_MAX_CONCURRENCY = 64
_CACHE_SIZE = 10_000
_QUEUE_SIZE = 1_000_000
_PAUSES = (1.0, 4.0, 15.0, 30.0)
# As long as a scorer that was waited for in vain is not waited for again.
_GONE = 60.0
_LONGEST_TURN = 5.0


def settings(given: Mapping[str, Any]) -> Config:
    """The settings of an evaluation: every row is scored, and the same answer once.

    Args:
        given: Those that were given for this one, checked already.
    """
    # What the application does with its own calls says nothing about an evaluation.
    config = replace(
        _config.resolve(given),
        mode="background",
        on_error="pass",
        sample_rate=1.0,
        should_score=None,
        queue_size=_QUEUE_SIZE,
    )
    if not _config.is_set("max_concurrency", given):
        config = replace(config, max_concurrency=_MAX_CONCURRENCY)
    if not _config.is_set("cache_size", given):
        config = replace(config, cache_size=_CACHE_SIZE)
    return config if config.enabled else replace(config, mode="off")


def scorer_name(config: Config) -> str | None:
    """The name of the scorer; None if there is none, or it can't work as it is set."""
    if config.scorer is None:
        return None
    try:
        return _asking.scorer(config).name
    except (ScoringError, ConfigurationError):
        return None


def asked(row: Rebuilt, config: Config) -> _asking.Asked:
    """Prepare to ask for the score of a row.

    Raises:
        Unscorable: If it has nothing to score.
    """
    try:
        completion = (
            row.endpoint.construct(row.answer) if _asking.reads_completion(config) else None
        )
        return _asking.ask(row.endpoint, row.request, completion, row.answer, config)
    except Unscorable:
        raise
    except Exception:  # a shape that nobody has thought of
        raise Unscorable("unsupported_content") from None


class Asker:
    """Waits for scores, and asks again where that is of use."""

    def __init__(self) -> None:
        """Nothing is asked yet."""
        self._gave_up = float("-inf")

    def verdict(
        self, wanted: _asking.Asked, config: Config, sent: Future[Verdict] | None = None
    ) -> Verdict:
        """Wait for the verdict on an answer.

        A scorer that is away is waited for, about a minute, and so is the budget's next turn.

        Args:
            wanted: What leaves for the scorer.
            config: The settings in force.
            sent: The verdict to come, if it was sent already.
        """
        pauses = iter(_PAUSES)
        while True:
            verdict = (sent or wanted.send()).result()
            sent = None
            pause = self._pause(verdict.trust.reason, config, pauses)
            if pause is None:
                return verdict
            time.sleep(pause)

    def _pause(self, reason: str | None, config: Config, pauses: Iterator[float]) -> float | None:
        """Seconds until it is worth asking again; None if it is not."""
        if reason == "budget":
            limit = config.max_scores_per_minute
            return min(60.0 / limit, _LONGEST_TURN) if limit else None
        if reason != "scorer_unavailable" or time.monotonic() - self._gave_up < _GONE:
            return None
        pause = next(pauses, None)
        if pause is None:
            self._gave_up = time.monotonic()
        return pause
