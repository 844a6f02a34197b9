"""Ask: whether an answer is to be scored, by whom, and what leaves for the scorer."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import itertools
import json
import logging
import random
from collections.abc import Callable, Hashable, Mapping
from concurrent.futures import Future
from dataclasses import replace
from typing import Any, NamedTuple

from tlm_tracing import _cache, _record, _scope, _scoring, scorers
from tlm_tracing._config import Config, cleanlab_api_key, cleanlab_base_url
from tlm_tracing._data import Exchange, Scorer
from tlm_tracing._endpoints import Endpoint
from tlm_tracing._messages import Unscorable, question, render
from tlm_tracing._returned import plain
from tlm_tracing._scope import Retrieved
from tlm_tracing._scoring import Verdict

_logger = logging.getLogger("tlm_tracing")

# What a JSON schema would be none without.
_STRUCTURE = frozenset({"$ref", "format", "name", "required", "type"})

_PASSING = frozenset(
    {"id", "call_id", "created", "created_at", "completed_at", "system_fingerprint"}
)
_broken_rules: set[tuple[str, str]] = set()


class Asked(NamedTuple):
    """What leaves for the scorer, and when it comes back.

    Attributes:
        prompt: The prompt as one text.
        responses: The text of each choice that can be scored.
        is_partial: Whether the prompt lacks turns that only OpenAI knows.
        send: Asks for the scores; gives a future that always gets one verdict on the answer. Told
            ``is_awaited=False``, it lets those of some moments be asked for together.
        query: What the context was retrieved for; None if none is named.
        context: What was retrieved; None if none is named.
    """

    prompt: str
    responses: list[str]
    is_partial: bool
    send: Callable[..., Future[Verdict]]
    query: str | None = None
    context: str | None = None


def ask(
    endpoint: Endpoint,
    request: Mapping[str, Any],
    completion: Any,
    answer: Any,
    config: Config,
    retrieved: Retrieved | None = None,
) -> Asked:
    """Prepare to ask for the trust in an answer.

    Args:
        endpoint: Where it comes from.
        request: The request body as sent.
        completion: What OpenAI's client returned; may be None if nobody reads it.
        answer: The same as plain data.
        config: The settings in force.
        retrieved: The context that the user has named for it.

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
    if not _wanted(config, request, completion):
        raise Unscorable("sampled_out")
    asked, given = _as_chat(endpoint, request, answer)
    schema = _masked_schema(config, endpoint.response_format(request))
    query, context = _masked_context(config, retrieved, asked)

    def exchange(choice: int) -> Exchange | Unscorable:
        try:
            prompt, response = (_masked(config, text) for text in render(asked, given, choice))
        except Unscorable as nothing:
            return nothing
        one = _with_choice(completion, choice)
        wanted = prompt if context is not None and query is None else query
        return Exchange(request, one, prompt, response, config.timeout, schema, wanted, context)

    found = [exchange(choice) for choice in range(max(1, len(given.get("choices") or ())))]
    exchanges = [one for one in found if isinstance(one, Exchange)]
    if not exchanges:
        raise next(one for one in found if isinstance(one, Unscorable))
    return Asked(
        exchanges[0].prompt,
        [one.response for one in exchanges],
        bool(asked.get("prompt_is_partial")),
        functools.partial(_send, found, config),
        exchanges[0].query,
        exchanges[0].context,
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
    if choice == 0 or completion is None:
        return completion
    return completion.model_copy(update={"choices": [completion.choices[choice]]})


def _send(
    found: list[Exchange | Unscorable], config: Config, *, is_awaited: bool = True
) -> Future[Verdict]:
    """Ask for the score of each choice; the verdict on the first tells of the others, too."""
    verdicts = [
        _submit(one, config, is_awaited=is_awaited)
        if isinstance(one, Exchange)
        else _scoring.unscored(one.reason)
        for one in found
    ]
    if len(verdicts) == 1:
        return verdicts[0]
    together: Future[Verdict] = Future()
    left = itertools.count(len(verdicts) - 1, -1)

    def conclude(_: Future[Verdict]) -> None:
        if next(left) == 0:
            first, *others = (verdict.result() for verdict in verdicts)
            trust = replace(first.trust, choices=tuple(one.trust for one in (first, *others)))
            is_cached = first.is_cached and all(one.is_cached for one in others)
            together.set_result(first._replace(trust=trust, is_cached=is_cached))

    for verdict in verdicts:
        verdict.add_done_callback(conclude)
    return together


def _submit(exchange: Exchange, config: Config, *, is_awaited: bool) -> Future[Verdict]:
    def send() -> Future[Verdict]:
        scorers.load(config.scorer, has_context=exchange.context is not None)
        find = functools.partial(scorer, config)
        ask = functools.partial(_ask, exchange)
        return _scoring.submit(find, ask, config, is_awaited=is_awaited)

    key = _key(exchange, config) if config.cache_size else None
    return send() if key is None else _cache.find(key, config, send)


def _key(exchange: Exchange, config: Config) -> Hashable | None:
    """What a score is of, and whose; None if that cannot be told."""
    seen: list[Any] = [exchange.prompt, exchange.response, exchange.response_format]
    seen += [exchange.query, exchange.context]
    if not _reads_texts_only(config.scorer):
        seen += [exchange.request, _lasting(plain(exchange.completion))]
    try:
        written = json.dumps(seen, sort_keys=True).encode()
    except (TypeError, ValueError, RecursionError):
        return None
    return (*_named(config), hashlib.sha256(written).digest())


def reads_completion(config: Config) -> bool:
    """Whether anybody looks at an answer as the object that OpenAI's client gives."""
    return config.should_score is not None or not _reads_texts_only(config.scorer)


def _reads_texts_only(scorer: Any) -> bool:
    """Whether a score depends on nothing but the texts and the format, as it says itself."""
    return isinstance(scorer, str) or getattr(scorer, "reads_texts_only", False) is True


def _lasting(answer: Any) -> Any:
    """An answer without what is another each time, though it says the same."""
    if isinstance(answer, Mapping):
        return {key: _lasting(item) for key, item in answer.items() if key not in _PASSING}
    return [_lasting(item) for item in answer] if isinstance(answer, list) else answer


async def _ask(exchange: Exchange, asked: Scorer) -> Any:
    """Whatever the scorer itself calls is not the application's."""
    with _record.silenced(), _scope.suppression(True):
        return await asked.score(exchange)


def scorer(config: Config) -> Scorer:
    """The scorer that the settings mean; the same one for the same settings.

    Raises:
        ScoringError, ConfigurationError: If there is none, or it can't work as it is set.
    """
    return _resolved(*_named(config))


def _named(config: Config) -> tuple[_Spec, str | None, str]:
    """Who the ``scorer`` setting means."""
    return _Spec(config.scorer), cleanlab_api_key(), cleanlab_base_url()


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
        rate = _heeded("sample_rate", rate, _share, request)
    return rate >= 1.0 or random.random() < rate


def _wanted(config: Config, request: Mapping[str, Any], completion: Any) -> bool:
    rule = config.should_score
    return rule is None or _heeded("should_score", rule, bool, request, completion) > 0.0


def _heeded(
    setting: str, rule: Callable[..., Any], read: Callable[[Any], float], *seen: Any
) -> float:
    """What a rule of the user's says; where it fails, the answer is scored."""
    try:
        with _scope.suppression(True):  # or what it asks OpenAI would lead here again
            return read(rule(*seen))
    except Exception as error:
        _warn_of_rule(setting, rule, error)
        return 1.0


def _share(value: Any) -> float:
    share = float(value)
    if not 0.0 <= share <= 1.0:
        raise ValueError(f"{value!r:.100} is no share in [0, 1]")
    return share


def _warn_of_rule(setting: str, rule: Callable[..., Any], error: Exception) -> None:
    """Say it the first time only. By name: a rule may be made anew for each call."""
    known = getattr(rule, "__qualname__", type(rule).__qualname__)
    if (setting, known) not in _broken_rules:
        _broken_rules.add((setting, known))
        _logger.warning(
            "%s=%s failed with %s: %s. Answers are scored where it fails.",
            setting,
            known,
            type(error).__name__,
            error,
        )


def _masked(config: Config, text: str) -> str:
    if config.mask_scorer is None:
        return text
    try:
        return str(config.mask_scorer(text))
    except Exception:
        # What could not be masked must not leave.
        raise Unscorable("scorer_error") from None


def _masked_context(
    config: Config, retrieved: Retrieved | None, asked: Mapping[str, Any]
) -> tuple[str | None, str | None]:
    """Query and context as they may leave; None for a query that can't be told."""
    if retrieved is None:
        return None, None
    query = retrieved.query or question(asked)
    return None if query is None else _masked(config, query), _masked(config, retrieved.context)


def _masked_schema(config: Config, value: Any, key: str = "") -> Any:
    """A JSON schema with its descriptions, values and the like as they may leave."""
    if config.mask_scorer is None:
        return value
    if isinstance(value, Mapping):
        return {name: _masked_schema(config, item, name) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_masked_schema(config, item, key) for item in value]
    is_content = isinstance(value, str) and key not in _STRUCTURE
    return _masked(config, value) if is_content else value


@functools.lru_cache(maxsize=1)
def _warn_of_no_scorer() -> None:
    _logger.warning(
        "Calls are recorded but not scored, because there is no scorer. Set CLEANLAB_TLM_API_KEY "
        "(a key is to be had at https://tlm.cleanlab.ai), or give a scorer of your own: "
        "tlm_tracing.configure(scorer=...) with a function (request, completion) -> score. "
        'To record only, set mode="off".'
    )
