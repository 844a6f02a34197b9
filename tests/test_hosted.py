"""Cleanlab's hosted TLM: what is sent, and what a caller gets when it is in trouble."""

import asyncio
import time

import openai
import pytest

import tlm_tracing as tt
from tlm_tracing.exceptions import ConfigurationError
from tlm_tracing.openai import AsyncOpenAI, OpenAI
from tlm_tracing.scorers import HostedTLM

QUESTION = [{"role": "user", "content": "What is the capital of France?"}]


@pytest.fixture(autouse=True)
def canned(sandbox):
    sandbox.answer(QUESTION[0]["content"], "Paris.", score=0.98, explanation="It is.")


def ask(client=None, **options):
    client = client or OpenAI()
    return client.chat.completions.create(model="gpt-4o", messages=QUESTION, **options)


def test_a_key_in_the_environment_is_all_it_takes(trace):
    completion = ask()
    trust = tt.trust(completion)
    assert (trust.score, trust.explanation, trust.scorer) == (0.98, "It is.", "cleanlab-tlm/medium")
    assert completion.tlm_metadata == {
        "trustworthiness_score": 0.98,
        "log": {"explanation": "It is."},
    }
    (assessment,) = trace().info.assessments
    assert assessment.source.source_id == "cleanlab-tlm/medium"
    assert assessment.metadata["preset"] == "medium"
    assert assessment.metadata["model"] == "gpt-4.1-mini"
    assert assessment.metadata["mlflow.scorer.framework"] == "cleanlab-tlm"
    assert float(assessment.metadata["seconds"]) > 0


def test_a_netrc_file_of_the_users_does_not_get_in_the_way(tmp_path, monkeypatch):
    netrc = tmp_path / "netrc"
    netrc.write_text("default login me password mine\n")
    netrc.chmod(0o600)
    monkeypatch.setenv("NETRC", str(netrc))
    monkeypatch.setenv("HOME", str(tmp_path))
    assert tt.trust(ask(tt.wrap_openai(openai.OpenAI(), scorer=HostedTLM()))).score == 0.98


def test_a_proxy_of_the_environment_is_heeded(monkeypatch):
    client = tt.wrap_openai(openai.OpenAI(), scorer=HostedTLM(), timeout=0.5)
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")  # where nobody listens
    assert tt.trust(ask(client)).reason in ("scorer_unavailable", "timeout")


def test_what_needs_no_proxy_takes_none(monkeypatch):
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    assert tt.trust(ask(tt.wrap_openai(openai.OpenAI(), scorer=HostedTLM()))).score == 0.98


def test_what_is_sent_is_what_cleanlabs_own_client_sends(sandbox):
    import cleanlab_tlm
    from cleanlab_tlm.internal.api import api

    ask()
    # The client reads the address only once, when it is imported.
    before, api.tlm_base_url = api.tlm_base_url, f"{sandbox.tlm_base_url}/v0/trustworthy_llm"
    try:
        tlm = cleanlab_tlm.TLM("medium", options={"log": ["explanation"]}, timeout=30.0)
        tlm.get_trustworthiness_score(QUESTION[0]["content"], "Paris.")
    finally:
        api.tlm_base_url = before
    ours, theirs = sandbox.requests("tlm")
    assert ours.json == theirs.json
    assert ours.path == theirs.path
    for header in ("authorization", "content-type", "client-type", "x-tlm-origin"):
        assert ours.headers[header] == theirs.headers[header]


def test_scores_share_one_kept_alive_connection(sandbox):
    client = OpenAI()
    for _ in range(5):
        ask(client)
    assert len(sandbox.requests("tlm")) == 5
    assert sandbox.connections("tlm") == 1


FAULTS = {
    "500": ({"status": 500}, "scorer_unavailable"),
    "502 of a proxy": ({"status": 502, "html": True}, "scorer_unavailable"),
    "503": ({"status": 503, "retry_after": 60}, "scorer_unavailable"),
    "429 without Retry-After": ({"status": 429}, "scorer_unavailable"),
    "429 with Retry-After": ({"status": 429, "retry_after": 60}, "scorer_unavailable"),
    "429 with fractions": ({"status": 429, "retry_after": "0.1"}, "scorer_unavailable"),
    "429 with a date": (
        {"status": 429, "retry_after": "Wed, 21 Oct 2065 07:28:00 GMT"},
        "scorer_unavailable",
    ),
    "429 with nonsense": ({"status": 429, "retry_after": "soon"}, "scorer_unavailable"),
    "429 with a page": ({"status": 429, "html": True}, "scorer_unavailable"),
    "400": ({"status": 400}, "scorer_error"),
    "401 for the key": ({"status": 401, "code": "invalid_api_key"}, "scorer_unavailable"),
    "401": ({"status": 401}, "scorer_unavailable"),
    "401 of a proxy": ({"status": 401, "html": True}, "scorer_unavailable"),
    "403": ({"status": 403}, "scorer_unavailable"),
    "403 of a proxy": ({"status": 403, "html": True}, "scorer_unavailable"),
    "404": ({"status": 404}, "scorer_unavailable"),
    "422": ({"status": 422}, "scorer_error"),
    "malformed JSON": ({"garbage": True}, "scorer_unavailable"),
    "a page with status 200": ({"html": True}, "scorer_unavailable"),
    "empty body": ({"empty_body": True}, "scorer_unavailable"),
    "half a body": ({"partial": True}, "scorer_unavailable"),
    "disconnect": ({"disconnect": True}, "scorer_unavailable"),
    "disconnect in the body": ({"disconnect": "mid"}, "scorer_unavailable"),
    "no score": ({"no_score": True}, "scorer_error"),
    "score null": ({"score": None}, "scorer_error"),
    "score NaN": ({"score": "nan"}, "scorer_error"),
    "score out of range": ({"score": 1.5}, "scorer_error"),
    "score as text": ({"score": "high"}, "scorer_error"),
    "hang": ({"hang": True}, "timeout"),
    "drip": ({"drip": 0.2}, "timeout"),
}
ALL_FAULTS = pytest.mark.parametrize(("fault", "reason"), FAULTS.values(), ids=FAULTS)


@ALL_FAULTS
def test_whatever_cleanlab_does_the_caller_gets_the_answer(fault, reason, sandbox, trace):
    sandbox.default("tlm", **fault)
    started = time.monotonic()
    completion = ask(tt.wrap_openai(openai.OpenAI(), timeout=1.5))
    assert time.monotonic() - started < 5
    assert completion.choices[0].message.content == "Paris."
    trust = tt.trust(completion)
    assert (trust.status, trust.reason, trust.score) == ("unscored", reason, None)
    assert not hasattr(completion, "tlm_metadata")
    assert len(sandbox.requests("tlm")) <= 3
    found = trace()
    assert found.info.tags["trust_status"] == "unscored"
    assert not {"trust_score", "explanation"} & found.info.tags.keys()
    assert found.info.assessments == []
    assert found.data.spans[0].attributes["tlm.reason"] == reason
    assert found.data.spans[0].status.status_code.value == "OK"
    scoring = found.data.spans[2]
    assert scoring.status.status_code.value == "ERROR"
    assert scoring.status.description


@ALL_FAULTS
def test_on_error_raise_says_what_happened(fault, reason, sandbox):
    sandbox.default("tlm", **fault)

    async def main():
        async with AsyncOpenAI() as client:
            with tt.trusted_span(on_error="raise", timeout=0.6):
                await ask(client)

    with pytest.raises(tt.ScoringError) as caught:
        asyncio.run(main())
    assert caught.value.reason in (reason, "timeout")
    assert str(caught.value)


def test_a_score_without_log_is_a_score(sandbox):
    sandbox.default("tlm", no_log=True)
    trust = tt.trust(ask())
    assert (trust.score, trust.explanation) == (0.98, None)


def test_a_fault_that_passes_costs_a_retry_and_no_score(sandbox):
    sandbox.script("tlm", {"status": 503}, {"disconnect": True})
    assert tt.trust(ask()).score == 0.98
    assert len(sandbox.requests("tlm")) == 3


def test_retry_after_is_kept_to(sandbox):
    sandbox.script("tlm", {"status": 429, "retry_after": 1})
    started = time.monotonic()
    assert tt.trust(ask()).score == 0.98
    assert time.monotonic() - started >= 1
    assert len(sandbox.requests("tlm")) == 2


def test_an_unreachable_cleanlab_is_waited_for_once(sandbox, traces):
    sandbox.stop_side("tlm")
    client = tt.wrap_openai(openai.OpenAI(), timeout=2)
    assert tt.trust(ask(client)).reason == "scorer_unavailable"
    started = time.monotonic()
    for _ in range(10):
        completion = ask(client)
        assert completion.choices[0].message.content == "Paris."
        assert tt.trust(completion).reason == "scorer_unavailable"
    assert time.monotonic() - started < 10  # waited for each time, it would be 20
    traces(11)


def test_scores_come_again_when_cleanlab_is_back(sandbox):
    sandbox.stop_side("tlm")
    client = OpenAI()
    assert tt.trust(ask(client)).reason == "scorer_unavailable"
    sandbox.start_side("tlm")
    until = time.monotonic() + 10
    while tt.trust(ask(client)).score is None:
        assert time.monotonic() < until
    assert tt.trust(ask(client)).score == 0.98


def test_a_hanging_cleanlab_costs_the_timeout_once(sandbox):
    sandbox.default("tlm", hang=True)
    client = tt.wrap_openai(openai.OpenAI(), timeout=0.5)
    assert tt.trust(ask(client)).reason == "timeout"
    started = time.monotonic()
    assert tt.trust(ask(client)).reason == "scorer_unavailable"
    assert time.monotonic() - started < 0.4


def test_no_key_no_scorer_one_warning(monkeypatch, caplog, traces):
    monkeypatch.delenv("CLEANLAB_TLM_API_KEY")
    client = OpenAI()
    for _ in range(2):
        assert tt.trust(ask(client)).reason == "no_scorer"
    warnings = [record for record in caplog.records if record.name == "tlm_tracing"]
    assert len(warnings) == 1
    for way in ("CLEANLAB_TLM_API_KEY", "configure(scorer=", 'mode="off"'):
        assert way in warnings[0].getMessage()
    for found in traces(2):
        assert found.info.tags["trust_status"] == "unscored"
        assert found.data.spans[0].attributes["tlm.reason"] == "no_scorer"
        assert len(found.data.spans) == 2


def test_hosted_by_name_without_a_key_has_no_scorer(monkeypatch):
    monkeypatch.delenv("CLEANLAB_TLM_API_KEY")
    tt.configure(scorer="hosted")
    assert tt.trust(ask()).reason == "no_scorer"


def test_a_wrong_key_is_named_and_never_shown(sandbox, monkeypatch, caplog):
    monkeypatch.setenv("CLEANLAB_TLM_API_KEY", "invalid")
    assert tt.trust(ask()).reason == "scorer_unavailable"
    assert "Check CLEANLAB_TLM_API_KEY" in caplog.text
    assert "invalid)" not in caplog.text


@pytest.mark.parametrize("key", ["sandbox\n", "  sandbox  "])
def test_blanks_round_the_key_do_no_harm(key, monkeypatch):
    monkeypatch.setenv("CLEANLAB_TLM_API_KEY", key)
    assert tt.trust(ask()).score == 0.98


@pytest.mark.parametrize("key", ["", "   ", "two words", "with\x00nul", "schlüssel"])
def test_a_key_that_can_be_none_is_refused(key, monkeypatch):
    monkeypatch.delenv("CLEANLAB_TLM_API_KEY")
    with pytest.raises(ConfigurationError, match=r"key"):
        HostedTLM(api_key=key)


def test_the_key_is_not_in_the_repr():
    assert "sandbox" not in repr(HostedTLM(api_key="sandbox"))


@pytest.mark.parametrize(
    ("preset", "options"),
    [
        ("excellent", None),
        ("medium", {"model": "gpt-1"}),
        ("medium", {"max_tokens": 1}),
        ("medium", {"colour": "red"}),
        ("low", {"log": ["everything"]}),
    ],
)
def test_what_cleanlab_refuses_is_refused_at_once(preset, options):
    with pytest.raises(ConfigurationError, match="cleanlab-tlm refuses"):
        HostedTLM(preset, options=options)


@pytest.mark.parametrize("preset", ["base", "low", "medium", "high", "best"])
@pytest.mark.parametrize("explanation", [None, True, False])
def test_the_explanation_is_asked_for_wherever_the_preset_gives_it(preset, explanation, sandbox):
    tt.configure(scorer=HostedTLM(preset, explanation=explanation))
    trust = tt.trust(ask())
    assert trust.score == 0.98
    along = preset not in ("base", "low")
    wanted = explanation or (explanation is None and along)
    assert trust.explanation == ("It is." if wanted else None)
    assert len(sandbox.requests("tlm")) == (2 if explanation and not along else 1)
    assert ("log" in sandbox.requests("tlm")[0].json["options"]) == bool(wanted and along)


def test_options_are_sent(sandbox):
    tt.configure(scorer=HostedTLM("low", options={"model": "gpt-4.1-nano", "max_tokens": 100}))
    ask()
    (request,) = sandbox.requests("tlm")
    assert request.json["quality"] == "low"
    assert request.json["options"]["model"] == "gpt-4.1-nano"
    assert request.json["options"]["max_tokens"] == 100


def test_options_can_be_checked_inside_a_running_loop():
    async def main():
        return HostedTLM("low", options={"model": "gpt-4.1"})

    assert asyncio.run(main()).model == "gpt-4.1"


def test_an_explanation_that_fails_does_not_cost_the_score(sandbox):
    sandbox.script("tlm", {}, {"status": 400})
    tt.configure(scorer=HostedTLM("low", explanation=True))
    trust = tt.trust(ask())
    assert (trust.score, trust.explanation) == (0.98, None)


def test_several_loops_share_the_scoring_loop(sandbox):
    async def main():
        async with AsyncOpenAI() as client:
            return await asyncio.gather(*(ask(client) for _ in range(10)))

    for _ in range(3):
        assert {tt.trust(completion).score for completion in asyncio.run(main())} == {0.98}
    assert len(sandbox.requests("tlm")) == 30
