"""Ask: whether an answer is to be scored, by whom, and what leaves for the scorer."""

from __future__ import annotations

import functools
import logging
import random
from collections.abc import Mapping
from concurrent.futures import Future
from typing import Any

from tlm_tracing import _record, _scope, _scoring, scorers
from tlm_tracing._config import Config, cleanlab_api_key, cleanlab_base_url
from tlm_tracing._data import Exchange, Scorer
from tlm_tracing._messages import Unscorable, render
from tlm_tracing._scoring import Verdict

_logger = logging.getLogger("tlm_tracing")


def exchange(request: Mapping[str, Any], completion: Any, answer: Any, config: Config) -> Exchange:
    """What is to be scored.

    Args:
        request: The request body as sent.
        completion: What OpenAI's client returned.
        answer: The same as plain data.
        config: The settings in force.

    Raises:
        Unscorable: If this answer is not to be scored, or has nothing to score; says why.
    """
    if config.mode == "off":
        raise Unscorable("off")
    if config.scorer is None:
        _warn_of_no_scorer()
        raise Unscorable("no_scorer")
    if not _sampled(config, request):
        raise Unscorable("sampled_out")
    if not isinstance(answer, Mapping):
        raise Unscorable("unsupported_content")
    prompt, response = (_masked(config, text) for text in render(request, answer))
    return Exchange(request, completion, prompt, response, config.timeout)


def submit(asked: Exchange, config: Config) -> Future[Verdict]:
    """Have the scorer of these settings score it; the future always gets a verdict."""
    return _scoring.submit(
        functools.partial(_scorer, config), functools.partial(_ask, asked), config
    )


async def _ask(exchange: Exchange, scorer: Scorer) -> Any:
    """Whatever the scorer itself calls is not the application's."""
    with _record.silenced(), _scope.suppress():
        return await scorer.score(exchange)


def _scorer(config: Config) -> Scorer:
    return _resolved(_Spec(config.scorer), cleanlab_api_key(), cleanlab_base_url())


@functools.lru_cache(maxsize=64)
def _resolved(spec: _Spec, api_key: str | None, base_url: str) -> Scorer:
    """Once per setting: the key and the address are part of what "hosted" means."""
    return scorers.resolve(spec.value)


class _Spec:
    """A ``scorer`` setting as a key: a name by its text, all else by identity."""

    def __init__(self, value: Any) -> None:
        self.value = value
        self._key = value if isinstance(value, str) else id(value)

    def __hash__(self) -> int:
        return hash(self._key)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Spec) and self._key == other._key


def _sampled(config: Config, request: Mapping[str, Any]) -> bool:
    rate = config.sample_rate
    if callable(rate):
        rate = rate(request)
    return rate >= 1.0 or random.random() < rate


def _masked(config: Config, text: str) -> str:
    if config.mask_scorer is None:
        return text
    try:
        return str(config.mask_scorer(text))
    except Exception:
        # What could not be masked must not leave.
        raise Unscorable("scorer_error") from None


@functools.lru_cache(maxsize=1)
def _warn_of_no_scorer() -> None:
    _logger.warning(
        "Calls are recorded but not scored, because there is no scorer. Set CLEANLAB_TLM_API_KEY "
        "(a key is to be had at https://tlm.cleanlab.ai), or give a scorer of your own: "
        "tlm_tracing.configure(scorer=...) with a function (request, completion) -> score. "
        'To record only, set mode="off".'
    )
