"""Ask: whether an answer is to be scored, by whom, and what leaves for the scorer."""

from __future__ import annotations

import contextlib
import functools
import itertools
import logging
import random
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import replace
from typing import Any, NamedTuple

from tlm_tracing import _record, _scope, _scoring, scorers
from tlm_tracing._config import Config, cleanlab_api_key, cleanlab_base_url
from tlm_tracing._data import Exchange, Scorer
from tlm_tracing._endpoints import Endpoint
from tlm_tracing._messages import Unscorable, render
from tlm_tracing._scoring import Verdict

_logger = logging.getLogger("tlm_tracing")


class Asked(NamedTuple):
    """What leaves for the scorer, and when it comes back.

    Attributes:
        prompt: The prompt as one text.
        responses: The text of each choice that can be scored.
        is_partial: Whether the prompt lacks turns that only OpenAI knows.
        send: Asks for the scores; gives a future that always gets one verdict on the answer.
    """

    prompt: str
    responses: list[str]
    is_partial: bool
    send: Callable[[], Future[Verdict]]


def ask(
    endpoint: Endpoint, request: Mapping[str, Any], completion: Any, answer: Any, config: Config
) -> Asked:
    """Prepare to ask for the trust in an answer.

    Args:
        endpoint: Where it comes from.
        request: The request body as sent.
        completion: What OpenAI's client returned.
        answer: The same as plain data.
        config: The settings in force.

    Raises:
        Unscorable: If this answer is not to be scored, or has nothing to score; says why.
    """
    if isinstance(answer, Mapping):
        with contextlib.suppress(Exception):  # an odd shape is met again below
            endpoint.remember(request, answer)
    if config.mode == "off":
        raise Unscorable("off")
    if config.scorer is None:
        _warn_of_no_scorer()
        raise Unscorable("no_scorer")
    if not _sampled(config, request):
        raise Unscorable("sampled_out")
    if not isinstance(answer, Mapping):
        raise Unscorable("unsupported_content")
    asked, given = _as_chat(endpoint, request, answer)
    wanted = endpoint.response_format(request)

    def exchange(choice: int) -> Exchange | Unscorable:
        try:
            prompt, response = (_masked(config, text) for text in render(asked, given, choice))
        except Unscorable as nothing:
            return nothing
        one = _with_choice(completion, choice)
        return Exchange(request, one, prompt, response, config.timeout, wanted)

    found = [exchange(choice) for choice in range(max(1, len(given.get("choices") or ())))]
    exchanges = [one for one in found if isinstance(one, Exchange)]
    if not exchanges:
        raise next(one for one in found if isinstance(one, Unscorable))
    return Asked(
        exchanges[0].prompt,
        [one.response for one in exchanges],
        bool(asked.get("prompt_is_partial")),
        functools.partial(_send, found, config),
    )


def _as_chat(
    endpoint: Endpoint, request: Mapping[str, Any], answer: Mapping[str, Any]
) -> tuple[Mapping[str, Any], Mapping[str, Any]]:
    try:
        return endpoint.as_chat(request, answer)
    except Unscorable:
        raise
    except Exception:  # a shape that nobody has thought of
        raise Unscorable("unsupported_content") from None


def _with_choice(completion: Any, choice: int) -> Any:
    """A completion whose first choice is the one to be scored."""
    if choice == 0:
        return completion
    return completion.model_copy(update={"choices": [completion.choices[choice]]})


def _send(found: list[Exchange | Unscorable], config: Config) -> Future[Verdict]:
    """Ask for the score of each choice; the verdict on the first tells of the others, too."""
    verdicts = [
        _submit(one, config) if isinstance(one, Exchange) else _scoring.unscored(one.reason)
        for one in found
    ]
    if len(verdicts) == 1:
        return verdicts[0]
    together: Future[Verdict] = Future()
    left = itertools.count(len(verdicts) - 1, -1)

    def conclude(_: Future[Verdict]) -> None:
        if next(left) == 0:
            first = verdicts[0].result()
            choices = tuple(verdict.result().trust for verdict in verdicts)
            together.set_result(first._replace(trust=replace(first.trust, choices=choices)))

    for verdict in verdicts:
        verdict.add_done_callback(conclude)
    return together


def _submit(exchange: Exchange, config: Config) -> Future[Verdict]:
    return _scoring.submit(
        functools.partial(_scorer, config), functools.partial(_ask, exchange), config
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
