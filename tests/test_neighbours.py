"""Others who watch the same calls: each call still has one LLM span."""

import asyncio

import mlflow
import openai
import pytest

import tlm_tracing as tt
from tlm_tracing.openai import AsyncOpenAI

QUESTION = [{"role": "user", "content": "What is the capital of France?"}]
CALL = ["chat gpt-4o", "openai.chat.completions", "tlm.trustworthiness"]


@pytest.fixture(autouse=True)
def scored(scorer, sandbox):
    tt.configure(scorer=scorer)


@pytest.fixture
def mlflow_autolog():
    mlflow.openai.autolog()
    yield
    mlflow.openai.autolog(disable=True)


def ask(client, model="gpt-4o", **options):
    return client.chat.completions.create(model=model, messages=QUESTION, **options)


async def ask_async(**options):
    async with AsyncOpenAI() as client:
        answer = await ask(client, **options)
        return [chunk async for chunk in answer] if options.get("stream") else answer


def names(trace):
    return [span.name for span in trace.data.spans]


@pytest.mark.parametrize("stream", [False, True])
def test_with_mlflows_autolog_a_call_has_one_llm_span(stream, mlflow_autolog, trace, sandbox):
    answer = ask(tt.wrap_openai(openai.OpenAI()), stream=stream)
    if stream:
        list(answer)
    assert tt.trust(answer).score == 0.9
    found = trace()
    assert names(found) == CALL
    assert found.info.tags["trust_score"] == "0.9000"
    assert "traceparent" not in sandbox.requests("openai")[0].headers


@pytest.mark.parametrize("stream", [False, True])
def test_with_mlflows_autolog_an_async_call_has_one_llm_span(stream, mlflow_autolog, trace):
    asyncio.run(ask_async(stream=stream))
    assert names(trace()) == CALL


@pytest.mark.parametrize("first", ["ours", "mlflow's"])
def test_the_two_autologs_get_along_in_either_order(first, traces):
    switches = [tt.autolog, mlflow.openai.autolog]
    for switch in switches if first == "ours" else switches[::-1]:
        switch()
    try:
        ask(openai.OpenAI())
        assert names(traces(1)[0]) == CALL
        tt.autolog(disable=True)
        ask(openai.OpenAI())
        assert names(traces(2)[1]) == ["Completions"]
        tt.autolog()
        mlflow.openai.autolog(disable=True)
        ask(openai.OpenAI())
        assert names(traces(3)[2]) == CALL
    finally:
        mlflow.openai.autolog(disable=True)


def test_mlflows_autolog_inside_the_users_own_span(mlflow_autolog, trace):
    with mlflow.start_span("mine"), tt.trusted_span("block"):
        ask(openai.OpenAI())
        ask(openai.OpenAI())
    found = trace()
    assert sorted(names(found)) == sorted(["mine", "block", *CALL, *CALL])
    assert (
        found.info.token_usage["total_tokens"]
        == 2 * found.data.spans[3].attributes["mlflow.chat.tokenUsage"]["total_tokens"]
    )


def test_a_failed_call_with_mlflows_autolog_is_recorded_once(mlflow_autolog, trace):
    client = tt.wrap_openai(openai.OpenAI(max_retries=0))
    with pytest.raises(openai.RateLimitError):
        ask(client, model="sandbox:status=429")
    assert [span.status.status_code.value for span in trace().data.spans] == ["ERROR"] * 2


def test_a_stream_left_early_with_mlflows_autolog_holds_nothing_back(mlflow_autolog, trace):
    with tt.trusted_span("block"):
        stream = ask(openai.OpenAI(), stream=True)
        next(stream)
        stream.close()
    assert names(trace()) == ["block", *CALL[:2]]


@pytest.mark.parametrize(
    "mine", ["00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01", "something else"]
)
def test_a_callers_own_traceparent_is_theirs(mine, mlflow_autolog, sandbox):
    ask(tt.wrap_openai(openai.OpenAI()), extra_headers={"traceparent": mine})
    assert sandbox.requests("openai")[0].headers["traceparent"] == mine


def test_calls_that_are_not_ours_are_left_to_mlflows_autolog(mlflow_autolog, trace, sandbox):
    tt.wrap_openai(openai.OpenAI())
    ask(openai.OpenAI())
    assert names(trace()) == ["Completions"]
    assert "traceparent" in sandbox.requests("openai")[0].headers
