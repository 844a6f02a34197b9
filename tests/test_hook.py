"""Every way in sees the same calls, once, and leaves the request and the classes alone."""

import asyncio
import inspect
import subprocess
import sys

import mlflow
import openai
import pydantic
import pytest

import tlm_tracing as tt
import tlm_tracing.openai
from tlm_tracing.exceptions import ConfigurationError

QUESTION = [{"role": "user", "content": "What is the capital of France?"}]
SHAPE = ["chat gpt-4o", "openai.chat.completions", "tlm.trustworthiness"]


def ask(client, model="gpt-4o", **options):
    return client.chat.completions.create(model=model, messages=QUESTION, **options)


def names(trace):
    return [span.name for span in trace.data.spans]


def by_autolog(scorer, base):
    tt.autolog(scorer=scorer)
    return base()


def by_wrapping(scorer, base):
    return tt.wrap_openai(base(), scorer=scorer)


def by_import(scorer, base):
    tt.configure(scorer=scorer)
    return getattr(tlm_tracing.openai, base.__name__)()


WAYS_IN = pytest.mark.parametrize("way_in", [by_autolog, by_wrapping, by_import])


@WAYS_IN
def test_a_sync_call_is_recorded_and_scored(way_in, sandbox, scorer, trace):
    completion = ask(way_in(scorer, openai.OpenAI))
    assert completion.choices[0].message.content
    assert tt.trust(completion).score == 0.9
    assert names(trace()) == SHAPE


@WAYS_IN
def test_an_async_call_is_recorded_and_scored(way_in, sandbox, scorer, trace):
    async def main():
        async with way_in(scorer, openai.AsyncOpenAI) as client:
            return await ask(client)

    assert tt.trust(asyncio.run(main())).score == 0.9
    assert names(trace()) == SHAPE


@WAYS_IN
@pytest.mark.parametrize("base", [openai.OpenAI, openai.AsyncOpenAI])
def test_the_client_is_still_an_instance_of_its_class(way_in, base, sandbox, scorer):
    client = way_in(scorer, base)
    assert isinstance(client, base)
    assert type(client).__name__ == base.__name__
    assert str(inspect.signature(client.request)) == str(inspect.signature(base().request))


def test_wrapping_gives_the_same_client(sandbox):
    client = openai.OpenAI()
    assert tt.wrap_openai(client) is client
    assert tt.wrap_openai(client) is client


def test_copies_of_a_wrapped_client_are_traced_and_other_clients_are_not(sandbox, scorer, traces):
    client = tt.wrap_openai(openai.OpenAI(), scorer=scorer)
    ask(client.with_options(max_retries=0))
    ask(client.copy(timeout=3).with_options())
    ask(openai.OpenAI())
    traces(2)
    assert len(scorer.exchanges) == 2


def test_a_call_seen_by_several_ways_in_counts_once(sandbox, scorer, trace):
    tt.autolog(scorer=scorer)
    client = tt.wrap_openai(tlm_tracing.openai.OpenAI(), scorer=scorer)

    @tt.trusted
    def answer():
        with tt.trusted_span("block"):
            return ask(client)

    answer()
    assert len(scorer.exchanges) == 1
    assert len(sandbox.requests("openai")) == 1
    assert names(trace()) == ["answer", "block", *SHAPE]


def test_the_innermost_settings_win(sandbox, scorer):
    other = tt.testing.FakeScorer(default=0.1)
    tt.configure(scorer=other)
    client = tt.wrap_openai(openai.OpenAI(), scorer=scorer)
    assert tt.trust(ask(client)).score == 0.9
    with tt.trusted_span(scorer=other):
        assert tt.trust(ask(client)).score == 0.1


def test_autolog_is_idempotent_and_leaves_no_residue(sandbox, scorer, traces):
    before = dict(vars(openai.OpenAI)), dict(vars(openai.AsyncOpenAI))
    original = openai.OpenAI.request
    tt.autolog(scorer=scorer)
    tt.autolog(scorer=scorer)
    ask(openai.OpenAI())
    tt.autolog(disable=True)
    tt.autolog(disable=True)
    assert (dict(vars(openai.OpenAI)), dict(vars(openai.AsyncOpenAI))) == before
    assert openai.OpenAI.request is original
    ask(openai.OpenAI())
    traces(1)


def test_autolog_reaches_clients_made_before_it_and_the_module_itself(
    sandbox, scorer, traces, monkeypatch
):
    monkeypatch.setattr(openai, "api_key", "sk-sandbox")
    monkeypatch.setattr(openai, "base_url", f"{sandbox.openai_base_url}/")
    client = openai.OpenAI()
    tt.autolog(scorer=scorer)
    ask(client)
    ask(openai)
    traces(2)


def test_autolog_under_another_tools_patch_can_still_be_switched_off(sandbox, scorer, traces):
    tt.autolog(scorer=scorer)
    ours = openai.OpenAI.request

    def theirs(self, *args, **kwargs):
        return ours(self, *args, **kwargs)

    openai.OpenAI.request = theirs
    try:
        ask(openai.OpenAI())
        tt.autolog(disable=True)
        ask(openai.OpenAI())
        traces(1)
    finally:
        del openai.OpenAI.request


def test_azure_is_recorded_as_such(sandbox, scorer, trace):
    client = tt.wrap_openai(
        openai.AzureOpenAI(
            azure_endpoint=sandbox.openai_base_url.removesuffix("/v1"),
            api_key="key",
            api_version="2024-10-21",
        ),
        scorer=scorer,
    )
    assert tt.trust(ask(client)).score == 0.9
    assert trace().data.spans[1].attributes["mlflow.llm.provider"] == "azure"


def _as_sent(request):
    headers = {
        name: value for name, value in request.headers.items() if name != "x-stainless-read-timeout"
    }
    return request.path, headers, request.body


@pytest.mark.parametrize("stream", [False, True])
def test_the_request_on_the_wire_is_the_same_as_without_us(stream, sandbox, scorer):
    options = {
        "temperature": 0.5,
        "stream": stream,
        "extra_headers": {"X-Mine": "1"},
        "user": openai.NOT_GIVEN,
    }
    with openai.OpenAI() as client:
        list(ask(client, **options))
        tt.wrap_openai(client, scorer=scorer)
        with tt.trusted_span("inside"):
            list(ask(client, **options))
    bare, ours = sandbox.requests("openai")
    assert _as_sent(ours) == _as_sent(bare)


def test_other_requests_are_left_alone(sandbox, scorer, traces):
    client = tt.wrap_openai(openai.OpenAI(), scorer=scorer)
    assert client.models.list().data
    assert client.embeddings.create(model="m", input="x").data[0].embedding
    traces(0)


def failing(client, model):
    """The exception that a call ends in, sync or async."""

    async def call():
        asked = ask(client, model=model, timeout=0.5)
        return await asked if inspect.isawaitable(asked) else asked

    with pytest.raises(openai.OpenAIError) as caught:
        asyncio.run(call())
    return caught.value


@pytest.mark.parametrize("base", [openai.OpenAI, openai.AsyncOpenAI])
@pytest.mark.parametrize(
    "fault",
    ["status=400", "status=401", "status=429", "status=503", "disconnect=0", "hang", "down"],
)
def test_when_openai_fails_the_caller_meets_what_the_bare_client_raises(
    fault, base, sandbox, scorer, trace
):
    model = f"sandbox:{fault}"
    if fault == "down":
        sandbox.stop_side("openai")
        model = "gpt-4o"
    bare = failing(base(max_retries=0), model)
    ours = failing(tt.wrap_openai(base(max_retries=0), scorer=scorer), model)
    assert (type(ours), str(ours), ours.body) == (type(bare), str(bare), bare.body)
    assert type(ours.__cause__) is type(bare.__cause__)
    found = trace()
    assert [span.status.status_code.value for span in found.data.spans] == ["ERROR", "ERROR"]
    assert found.info.tags["trust_status"] == "unscored"
    assert found.data.spans[0].attributes["tlm.reason"] == "call_failed"
    assert not scorer.exchanges


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    "place",
    [
        "_record.visible",
        "_endpoints.chat.tools",
        "_endpoints.chat.attributes",
        "_record.trust_attributes",
        "_live.may_be_lost",
    ],
)
def test_a_bug_of_ours_reaches_no_caller_and_holds_back_no_trace(
    place, stream, sandbox, scorer, caplog, monkeypatch, traces
):
    def broken(*_args, **_kwargs):
        raise RuntimeError("a bug")

    client = tt.wrap_openai(openai.OpenAI(), scorer=scorer)
    with mlflow.start_span("mine"), monkeypatch.context() as bug:
        bug.setattr(f"tlm_tracing.{place}", broken)
        completion = ask(client, stream=stream)
        assert list(completion) if stream else completion.choices[0].message.content
    assert "a bug" in caplog.text
    caplog.clear()
    (found,) = traces(1)
    assert found.info.state.value == "OK"
    assert all(span.end_time_ns for span in found.data.spans)


def test_enabled_false_makes_every_way_in_a_pass_through(sandbox, scorer, traces, monkeypatch):
    monkeypatch.setenv("TLM_TRACING_ENABLED", "false")
    tt.autolog(scorer=scorer)
    with tt.trusted_span("nothing") as span:
        ask(tt.wrap_openai(openai.OpenAI()))
    assert (span.trust, span.trace_id) == (None, None)
    traces(0)


def test_suppress_records_and_scores_nothing(sandbox, scorer, traces):
    client = tt.wrap_openai(openai.OpenAI(), scorer=scorer)
    with tt.suppress(), tt.trusted_span("nothing"):
        ask(client)
    traces(0)
    assert not scorer.exchanges


@pytest.mark.parametrize("wrong", ["a text", openai.OpenAI, object()])
def test_wrapping_something_else_says_what_is_wanted(wrong):
    with pytest.raises(ConfigurationError, match=r"openai\.OpenAI or openai\.AsyncOpenAI"):
        tt.wrap_openai(wrong)


@pytest.mark.parametrize("way", [tt.autolog, tt.configure, tt.trusted_span, tt.trusted])
def test_an_unknown_setting_names_the_known_ones(way):
    with pytest.raises(ConfigurationError, match=r"Unknown setting tresholds.*threshold"):
        way(tresholds=0.5)


def test_subclasses_of_the_client_can_be_wrapped(sandbox, scorer):
    class Mine(openai.OpenAI):
        extra = "kept"

    client = tt.wrap_openai(Mine(), scorer=scorer)
    assert (client.extra, isinstance(client, Mine)) == ("kept", True)
    assert tt.trust(ask(client)).score == 0.9


def test_raw_responses_are_scored_and_stay_raw(sandbox, scorer, traces):
    client = tt.wrap_openai(openai.OpenAI(), scorer=scorer)
    raw = client.chat.completions.with_raw_response.create(model="gpt-4o", messages=QUESTION)
    assert raw.headers["x-request-id"]
    assert tt.trust(raw.parse()).score == 0.9
    streamed = client.chat.completions.with_raw_response.create(
        model="gpt-4o", messages=QUESTION, stream=True
    )
    stream = streamed.parse()
    assert list(stream)
    assert tt.trust(stream).score == 0.9
    traces(2)


def test_a_raw_answer_that_the_caller_cannot_parse_is_recorded(sandbox, scorer, trace):
    class City(pydantic.BaseModel):
        name: str

    client = tt.wrap_openai(openai.OpenAI(), scorer=scorer)
    raw_completions = client.chat.completions.with_raw_response
    if not hasattr(raw_completions, "parse"):
        pytest.skip("this openai has no raw parse")
    raw = raw_completions.parse(
        model="sandbox:finish_reason=length", messages=QUESTION, response_format=City
    )
    with pytest.raises(openai.LengthFinishReasonError):
        raw.parse()
    found = trace()
    assert found.info.tags["trust_status"] == "scored"
    assert len(found.data.spans) == 3


def test_importing_the_drop_in_patches_nothing():
    code = (
        "import openai; before = dict(vars(openai.OpenAI)), openai.OpenAI.request;"
        "import tlm_tracing.openai;"
        "assert before == (dict(vars(openai.OpenAI)), openai.OpenAI.request)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@WAYS_IN
@pytest.mark.parametrize("base", [openai.OpenAI, openai.AsyncOpenAI])
def test_retries_are_told_on_the_span(base, way_in, sandbox, scorer, trace):
    client = way_in(scorer, base)

    async def call():
        asked = ask(client, model="sandbox:fail_first=2")
        return await asked if inspect.isawaitable(asked) else asked

    assert tt.trust(asyncio.run(call())).score == 0.9
    llm = trace().data.spans[1]
    assert llm.attributes["http.request.resend_count"] == 2
    numbers = [event.attributes["http.request.resend_count"] for event in llm.events]
    assert numbers == [1, 2]
    assert len(sandbox.requests("openai")) == 3


def test_a_call_of_one_attempt_tells_of_no_retries(sandbox, scorer, trace):
    with tt.trusted_span(scorer=scorer):
        ask(tt.wrap_openai(openai.OpenAI()))
    llm = trace().data.spans[2]
    assert "http.request.resend_count" not in llm.attributes
    assert llm.events == []


def test_a_client_with_a_hook_of_its_own_for_requests_keeps_it(sandbox, scorer, trace):
    class Signing(openai.OpenAI):
        def _prepare_request(self, request):
            request.headers["x-signed"] = "yes"

    tt.autolog(scorer=scorer)
    ask(tt.wrap_openai(Signing()), model="sandbox:fail_first=1")
    assert trace().data.spans[1].attributes["http.request.resend_count"] == 1
    assert {request.headers["x-signed"] for request in sandbox.requests("openai")} == {"yes"}


def test_openais_id_of_the_request_is_recorded_however_the_call_ends(sandbox, scorer, traces):
    client = tt.wrap_openai(openai.OpenAI(max_retries=0), scorer=scorer)
    list(ask(client, stream=True))
    ask(client)
    with pytest.raises(openai.BadRequestError) as failed:
        ask(client, model="sandbox:status=400")
    found = [trace.data.spans[1].attributes.get("openai.request_id") for trace in traces(3)]
    assert found[2] == failed.value.request_id
    assert all(one.startswith("req_") for one in found)
    assert len(set(found)) == 3


def test_an_answer_that_is_cut_short_is_recorded_with_the_error_about_it(
    sandbox, scorer, trace, helpers
):
    class City(pydantic.BaseModel):
        name: str

    client = tt.wrap_openai(openai.OpenAI(), scorer=scorer)
    with pytest.raises(openai.LengthFinishReasonError) as caught:
        helpers(client).parse(
            model="sandbox:finish_reason=length", messages=QUESTION, response_format=City
        )
    found = trace()
    llm = found.data.spans[1]
    assert llm.status.status_code.value == "ERROR"
    said = caught.value.completion.choices[0].message.content
    assert llm.outputs["choices"][0]["message"]["content"] == said
    assert llm.inputs["response_format"]["json_schema"]["schema"]["properties"]["name"]
    assert found.data.spans[0].attributes["tlm.reason"] == "call_failed"


def test_a_body_given_by_extra_body_is_sent_and_not_recorded(sandbox, scorer, trace):
    ask(tt.wrap_openai(openai.OpenAI(), scorer=scorer), extra_body={"top_k": 3})
    assert sandbox.requests("openai")[0].json["top_k"] == 3
    assert "top_k" not in trace().data.spans[1].inputs
    assert "top_k" not in scorer.exchanges[0].request
