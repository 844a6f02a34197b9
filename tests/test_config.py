"""Keyword, ``configure()``, environment, default: the first that names a setting wins."""

import asyncio
import dataclasses

import openai
import pytest

import tlm_tracing as tt
from tlm_tracing import _config
from tlm_tracing.exceptions import ConfigurationError
from tlm_tracing.testing import FakeScorer

DEFAULTS = {
    "mode": "inline",
    "scorer": None,
    "timeout": 30.0,
    "threshold": None,
    "on_low": "flag",
    "hold_last_chunk": False,
    "on_error": "pass",
    "sample_rate": 1.0,
    "should_score": None,
    "max_scores_per_minute": None,
    "cache_size": 0,
    "max_concurrency": 32,
    "queue_size": 1000,
    "enabled": True,
    "capture_content": True,
    "stream_usage": False,
    "evaluation_events": False,
    "mask": None,
    "mask_scorer": None,
}


def test_defaults():
    assert {name: getattr(_config.base(), name) for name in DEFAULTS} == DEFAULTS
    assert {field.name for field in dataclasses.fields(tt.Config)} == set(DEFAULTS)


def test_a_cleanlab_key_makes_hosted_the_default(monkeypatch):
    monkeypatch.setenv("CLEANLAB_TLM_API_KEY", "key")
    assert _config.base().scorer == "hosted"


def test_configure_gives_the_new_frozen_config_and_adds_up():
    assert tt.configure(timeout=5).timeout == 5
    config = tt.configure(threshold=0.5)
    assert (config.timeout, config.threshold) == (5, 0.5)
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.timeout = 1


ENVIRONMENT = {
    "MODE": ("background", "mode", "background"),
    "TIMEOUT": ("2.5", "timeout", 2.5),
    "THRESHOLD": ("0.25", "threshold", 0.25),
    "ON_LOW": ("raise", "on_low", "raise"),
    "ON_ERROR": ("RAISE", "on_error", "raise"),
    "SAMPLE_RATE": ("0.1", "sample_rate", 0.1),
    "MAX_SCORES_PER_MINUTE": ("60", "max_scores_per_minute", 60),
    "MAX_CONCURRENCY": ("4", "max_concurrency", 4),
    "QUEUE_SIZE": ("7", "queue_size", 7),
    "CACHE_SIZE": ("500", "cache_size", 500),
    "EVALUATION_EVENTS": ("yes", "evaluation_events", True),
    "ENABLED": ("False", "enabled", False),
    "CAPTURE_CONTENT": ("0", "capture_content", False),
    "SCORER": ("hosted", "scorer", "hosted"),
}


@pytest.mark.parametrize("name", ENVIRONMENT)
def test_every_plain_setting_can_come_from_the_environment(name, monkeypatch):
    text, setting, value = ENVIRONMENT[name]
    monkeypatch.setenv(f"TLM_TRACING_{name}", text)
    assert getattr(_config.base(), setting) == value
    tt.configure(**{setting: DEFAULTS[setting]})
    assert getattr(_config.base(), setting) == DEFAULTS[setting]


def test_the_environment_is_read_at_each_call_and_keywords_beat_it(sandbox, monkeypatch, scorer):
    client = tt.wrap_openai(openai.OpenAI(), scorer=scorer)

    def reason(**settings):
        with tt.trusted_span(**settings) as span:
            client.chat.completions.create(
                model="gpt-4o", messages=[{"role": "user", "content": "?"}]
            )
        return span.trusts[0].reason

    assert reason() is None
    monkeypatch.setenv("TLM_TRACING_MODE", "off")
    assert reason() == "off"
    assert reason(mode="inline") is None


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("mode", "later"),
        ("timeout", 0),
        ("timeout", "30"),
        ("timeout", True),
        ("timeout", float("nan")),
        ("timeout", float("inf")),
        ("threshold", 1.5),
        ("on_low", "panic"),
        ("on_error", "log"),
        ("sample_rate", -0.1),
        ("sample_rate", asyncio.sleep),
        ("should_score", 0.5),
        ("should_score", asyncio.sleep),
        ("max_scores_per_minute", -1),
        ("cache_size", -1),
        ("cache_size", True),
        ("max_concurrency", 0),
        ("max_concurrency", 1.5),
        ("queue_size", -1),
        ("enabled", "yes"),
        ("capture_content", 1),
        ("evaluation_events", None),
        ("scorer", "hosted!"),
        ("scorer", 3),
        ("scorer", FakeScorer),
        ("mask", "password"),
        ("mask_scorer", 3),
    ],
)
def test_a_value_that_cannot_work_is_refused_where_it_is_written(setting, value):
    for way in (tt.configure, tt.autolog, tt.trusted_span, tt.trusted):
        with pytest.raises(ConfigurationError, match=setting):
            way(**{setting: value})
    assert getattr(_config.base(), setting) == DEFAULTS[setting]


@pytest.mark.parametrize("text", ["maybe", "2"])
def test_a_wrong_environment_variable_is_named_and_costs_no_call(
    text, monkeypatch, sandbox, caplog
):
    monkeypatch.setenv("TLM_TRACING_ENABLED", text)
    with pytest.raises(ConfigurationError, match="TLM_TRACING_ENABLED"):
        _config.base()
    client = tt.wrap_openai(openai.OpenAI())

    @tt.trusted
    def answer():
        with tt.trusted_span():
            return client.chat.completions.create(
                model="gpt-4o", messages=[{"role": "user", "content": "?"}]
            )

    assert answer().choices[0].message.content
    assert "TLM_TRACING_ENABLED" in caplog.text
    caplog.clear()
