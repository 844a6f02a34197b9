"""Settings: where keyword, ``configure()`` and environment meet.

Nothing else in the package reads the environment.
"""

from __future__ import annotations

import functools
import inspect
import math
import os
import re
import threading
import urllib.parse
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, Literal, TypeAlias

from tlm_tracing import _redacted
from tlm_tracing._data import Scorer, Trust
from tlm_tracing.exceptions import ConfigurationError

Mode: TypeAlias = Literal["inline", "background", "off"]
OnLow: TypeAlias = Literal["flag", "raise"] | Callable[[Any, Trust], Any]
OnError: TypeAlias = Literal["pass", "raise"]
SampleRate: TypeAlias = float | Callable[[Mapping[str, Any]], float | bool]
Rule: TypeAlias = Callable[[Mapping[str, Any], Any], Any]

_SWITCHES = (
    "hold_last_chunk",
    "enabled",
    "capture_content",
    "stream_usage",
    "evaluation_events",
)

SCORER_NAMES = ("hosted",)
"""The scorers that can be meant by name."""

_PREFIX = "TLM_TRACING_"
_API_KEY = "CLEANLAB_TLM_API_KEY"
_MOST_MERGED = 32
_QUOTES = frozenset("\"'`\u2018\u2019\u201c\u201d")
_CLEANLAB_URL = "https://api.cleanlab.ai/api"
_SECRET = re.compile("KEY|TOKEN|SECRET|PASSW|PASSPHRASE|CREDENTIAL|COOKIE|DSN", re.IGNORECASE)


@dataclass(frozen=True)
class Config:
    """The settings in force for a call. All durations are in seconds, scores in [0, 1].

    Each can be given as a keyword to a way in, to :func:`configure`, or in the environment as
    ``TLM_TRACING_<NAME>``; the first of these that names it wins.

    Attributes:
        mode: ``"inline"``: the call returns scored. ``"background"``: it returns at once and
            the score follows on the same trace. ``"off"``: record, don't score.
        scorer: A name (``"hosted"``), a :class:`~tlm_tracing.scorers.Scorer`, or a sync or
            async callable ``(request, completion) -> float, Trust or dict``. By default
            ``"hosted"`` if ``CLEANLAB_TLM_API_KEY`` is set, else None.
        timeout: How long one score may take, counted from its start, all retries included.
        threshold: Scores below it are low; None sets no threshold.
        on_low: What happens to a low answer: ``"flag"`` marks it, ``"raise"`` raises
            :class:`~tlm_tracing.UntrustworthyResponseError`, a callable
            ``(completion, trust) -> completion`` gives what the caller gets instead. An answer
            without a score is never low; in background mode a low one is only marked.
        hold_last_chunk: Whether the end of a stream, from the chunk on that makes the answer
            whole, is held back until the score is in, so that ``on_low`` can still act on it.
            In inline mode only.
        on_error: A scorer's failure in inline mode: ``"pass"`` leaves the call unscored with a
            reason, ``"raise"`` raises :class:`~tlm_tracing.ScoringError`.
        sample_rate: Share of calls that are scored, or a callable on the request body that
            gives that share, or a bool.
        should_score: A callable ``(request, completion) -> bool`` that decides on each answer;
            None scores them all. If a callable here or in ``sample_rate`` fails, that is logged
            once and the answer is scored.
        max_scores_per_minute: Budget of scores by one scorer in 60 seconds, 0.5 for one in two
            minutes; None sets no budget.
        cache_size: How many scores the process keeps, so that the same answer to the same
            prompt is scored once; 0 keeps none. For scorers other than Cleanlab's, the whole
            request and answer have to be the same.
        max_concurrency: Scores in flight at once.
        queue_size: Calls that may wait for a score; beyond it a call is unscored.
        enabled: False makes every way in a pass-through.
        capture_content: Whether texts are recorded: messages, answers, explanations and what
            errors say. If not, shape and numbers alone are.
        stream_usage: Whether streamed chat completions are asked for their token usage
            (``stream_options.include_usage``) if the caller did not; the extra chunk is kept
            from the caller. It changes the request, and not every server knows it.
        evaluation_events: Whether each settled call is told to the application's OpenTelemetry
            logger provider as an event ``gen_ai.evaluation.result``.
        mask: Applied to a copy of whatever is recorded: a span's inputs and outputs, an
            explanation, what an error says. If it raises, none of that is recorded.
        mask_scorer: Applied to each text that leaves for the scorer. If it raises, none leaves.
    """

    mode: Mode = "inline"
    scorer: Any = None
    timeout: float = 30.0
    threshold: float | None = None
    on_low: OnLow = "flag"
    hold_last_chunk: bool = False
    on_error: OnError = "pass"
    sample_rate: SampleRate = 1.0
    should_score: Rule | None = None
    max_scores_per_minute: float | None = None
    cache_size: int = 0
    max_concurrency: int = 32
    queue_size: int = 1000
    enabled: bool = True
    capture_content: bool = True
    stream_usage: bool = False
    evaluation_events: bool = False
    mask: Callable[[Any], Any] | None = None
    mask_scorer: Callable[[str], str] | None = None

    def __post_init__(self) -> None:
        _one_of("mode", self.mode, "inline", "background", "off")
        _one_of("on_error", self.on_error, "pass", "raise")
        if not callable(self.on_low):
            _one_of("on_low", self.on_low, "flag", "raise")
        _number("timeout", self.timeout, above=0.0)
        _whole("max_concurrency", self.max_concurrency, least=1)
        _whole("queue_size", self.queue_size, least=0)
        _whole("cache_size", self.cache_size, least=0)
        if self.threshold is not None:
            _number("threshold", self.threshold, least=0.0, most=1.0)
        if self.max_scores_per_minute is not None:
            _number("max_scores_per_minute", self.max_scores_per_minute, least=0.0)
        if not callable(self.sample_rate):
            _number("sample_rate", self.sample_rate, least=0.0, most=1.0)
        _a_scorer(self.scorer)
        for name in _SWITCHES:
            if not isinstance(getattr(self, name), bool):
                raise ConfigurationError(f"{name} must be True or False.")
        for name in ("should_score", "mask", "mask_scorer"):
            if getattr(self, name) is not None and not callable(getattr(self, name)):
                raise ConfigurationError(f"{name} must be a callable or None.")
        for name in ("sample_rate", "should_score"):
            if inspect.iscoroutinefunction(getattr(self, name)):
                raise ConfigurationError(f"{name} must not be an async function.")


_NAMES = tuple(field.name for field in fields(Config))
_lock = threading.Lock()
_configured: dict[str, Any] = {}


def configure(**settings: Any) -> Config:
    """Set process-wide defaults.

    Args:
        **settings: Any of :class:`Config`'s fields. What is not named keeps its value.

    Returns:
        The configuration that is in force from now on.

    Raises:
        ConfigurationError: If a setting is unknown or its value cannot work.
    """
    check(settings)
    with _lock:
        _configured.update(settings)
        _from_environment.cache_clear()
    return base()


def check(settings: Mapping[str, Any]) -> None:
    """Refuse unknown settings and impossible values where they are written."""
    unknown = sorted(set(settings) - set(_NAMES))
    if unknown:
        raise ConfigurationError(
            f"Unknown setting {', '.join(unknown)}. The settings are: {', '.join(_NAMES)}."
        )
    Config(**settings)


def base() -> Config:
    """The process's defaults: ``configure()`` over environment over built-in.

    Raises:
        ConfigurationError: If an environment variable has a value that cannot work.
    """
    # For each call, so as os.environ keeps them: it decodes a value whenever it is asked for it.
    kept = getattr(os.environ, "_data", None)
    get = os.environ.get if kept is None else kept.get
    return _from_environment(tuple(map(get, _VARIABLES if kept is None else _KEPT_AS)))


def resolve(*layers: Mapping[str, Any]) -> Config:
    """The configuration for one call.

    Args:
        *layers: Keyword settings that were checked already, the most specific last.
    """
    config = base()
    merged: dict[str, Any] = {}
    for layer in layers:
        merged.update(layer)
    if not merged:
        return config
    # By identity: values need not be hashable, and are the same from call to call.
    key = (id(config), *((name, id(value)) for name, value in merged.items()))
    known = _merged.get(key)
    if known is None:
        if len(_merged) >= _MOST_MERGED:
            _merged.clear()
        # With what the identities are of, so that they stay theirs.
        known = _merged[key] = (replace(config, **merged), (config, merged))
    return known[0]


_merged: dict[tuple[Any, ...], tuple[Config, Any]] = {}


def is_set(name: str, *layers: Mapping[str, Any]) -> bool:
    """Whether a setting is given anywhere: in these keywords, by ``configure()`` or outside."""
    given = any(name in layer for layer in (*layers, _configured))
    return given or bool(os.environ.get(_PREFIX + name.upper(), "").strip())


def cleanlab_api_key() -> str | None:
    """The key in ``CLEANLAB_TLM_API_KEY``; None if it is unset or blank."""
    return os.environ.get(_API_KEY, "").strip() or None


def key_fault(key: str) -> str | None:
    """What makes a text no API key, without telling any of it; None if nothing does."""
    bare = key.strip()
    if not bare:
        return "is blank"
    if set(bare) & _QUOTES:
        return "has quotes in it"
    if len(bare.splitlines()) > 1:
        return "has a line break in it"
    if not bare.isascii() or not bare.isprintable() or " " in bare:
        return "contains blanks or characters that no key has"
    if bare != key:
        return "has blanks or a line break around it"
    return None


def cleanlab_base_url() -> str:
    """Where Cleanlab's API is, by ``CLEANLAB_API_BASE_URL``; without a trailing slash."""
    return (os.environ.get("CLEANLAB_API_BASE_URL") or _CLEANLAB_URL).rstrip("/")


def environment_names() -> list[str]:
    """The variables by which the environment gives settings."""
    return [_PREFIX + name.upper() for name in _PARSERS]


def environment_faults() -> dict[str, str]:
    """What must be otherwise with those variables that have a value that cannot work."""
    faults = {}
    for name, parse in _PARSERS.items():
        variable = _PREFIX + name.upper()
        text = os.environ.get(variable, "").strip()
        try:
            if text:
                Config(**{name: parse(text)})
        except ValueError:  # ConfigurationError, too
            faults[variable] = f"must be {_WANTED[name]}"
    return faults


def secrets() -> Iterator[str]:
    """What the environment holds that must not be told: by its name, or a URL's password."""
    for name, value in list(os.environ.items()):
        if _SECRET.search(name):
            yield value
        if "@" in value and (found := re.match(r"[\w+.-]+://[^:/@]*:(.*)@", value)):
            yield found[1]
            yield urllib.parse.unquote(found[1])


_redacted.learn_from(secrets)


@functools.lru_cache(maxsize=32)
def _from_environment(found: tuple[str | bytes | None, ...]) -> Config:
    key, *texts = ("" if text is None else os.fsdecode(text).strip() for text in found)
    values: dict[str, Any] = {"scorer": "hosted" if key else None}
    for (name, parse), text in zip(_PARSERS.items(), texts, strict=True):
        if not text:
            continue
        try:
            values[name] = parse(text)
            Config(**{name: values[name]})
        except ValueError:  # ConfigurationError, too, whose message tells the value: maybe a key
            raise ConfigurationError(f"{_PREFIX}{name.upper()} must be {_WANTED[name]}.") from None
    return Config(**{**values, **_configured})


def _boolean(text: str) -> bool:
    word = text.lower()
    if word in {"1", "true", "yes", "on"}:
        return True
    if word in {"0", "false", "no", "off"}:
        return False
    raise ValueError("must be true or false")


def _scorer_name(text: str) -> str | None:
    return None if text.lower() == "none" else text


_PARSERS: Mapping[str, Callable[[str], Any]] = {
    "mode": str.lower,
    "scorer": _scorer_name,
    "timeout": float,
    "threshold": float,
    "on_low": str.lower,
    "hold_last_chunk": _boolean,
    "on_error": str.lower,
    "sample_rate": float,
    "max_scores_per_minute": float,
    "max_concurrency": int,
    "queue_size": int,
    "cache_size": int,
    "enabled": _boolean,
    "capture_content": _boolean,
    "stream_usage": _boolean,
    "evaluation_events": _boolean,
}

_VARIABLES = (_API_KEY, *environment_names())
_KEPT_AS = tuple(map(os.environ.encodekey, _VARIABLES))

_SHARE = "a number from 0 to 1"
_SWITCH = "true or false"
# Without the value, unlike ConfigurationError: it may be a secret in the wrong place.
_WANTED: Mapping[str, str] = {
    "mode": "inline, background or off",
    "scorer": f"{' or '.join(SCORER_NAMES)} or none",
    "timeout": "a number above 0",
    "threshold": _SHARE,
    "on_low": "flag or raise",
    "hold_last_chunk": _SWITCH,
    "on_error": "pass or raise",
    "sample_rate": _SHARE,
    "max_scores_per_minute": "a number of at least 0",
    "max_concurrency": "a whole number of at least 1",
    "queue_size": "a whole number of at least 0",
    "cache_size": "a whole number of at least 0",
    "enabled": _SWITCH,
    "capture_content": _SWITCH,
    "stream_usage": _SWITCH,
    "evaluation_events": _SWITCH,
}


def _a_scorer(value: object) -> None:
    named = isinstance(value, str) and value in SCORER_NAMES
    made = not isinstance(value, type) and (isinstance(value, Scorer) or callable(value))
    if value is not None and not named and not made:
        names = " or ".join(f'"{name}"' for name in SCORER_NAMES)
        raise ConfigurationError(
            f"scorer must be {names}, a scorer such as HostedTLM(...), or a function "
            f"(request, completion) -> score, not {value!r:.100}."
        )


def _one_of(name: str, value: object, *allowed: str) -> None:
    if value not in allowed:
        words = ", ".join(repr(word) for word in allowed)
        raise ConfigurationError(f"{name} must be one of {words}, not {value!r}.")


def _number(
    name: str,
    value: object,
    *,
    above: float | None = None,
    least: float | None = None,
    most: float | None = None,
) -> None:
    ok = isinstance(value, (int, float)) and not isinstance(value, bool)
    if ok and isinstance(value, (int, float)):
        ok = (
            -math.inf < value < math.inf
            and (above is None or value > above)
            and (least is None or value >= least)
            and (most is None or value <= most)
        )
    if not ok:
        limits = [
            f"{word} {limit:g}"
            for word, limit in (
                ("above", above),
                ("at least", least),
                ("at most", most),
            )
            if limit is not None
        ]
        raise ConfigurationError(f"{name} must be a number {' and '.join(limits)}, not {value!r}.")


def _whole(name: str, value: object, *, least: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ConfigurationError(
            f"{name} must be a whole number of at least {least}, not {value!r}."
        )
