"""Others who watch the same calls: each call still has one LLM span."""

import asyncio
import contextlib
import inspect

import mlflow
import openai
import pytest

import tlm_tracing as tt
from tlm_tracing.openai import AsyncOpenAI

QUESTION = [{"role": "user", "content": "What is the capital of France?"}]
ANSWER = "It is Paris."
CALL = ["chat gpt-4o", "openai.chat.completions", "tlm.trustworthiness"]


@pytest.fixture(autouse=True)
def scored(scorer, sandbox):
    tt.configure(scorer=scorer)
    sandbox.answer(QUESTION[0]["content"], ANSWER)


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


@contextlib.contextmanager
def theirs(client):
    mlflow.openai.autolog()
    try:
        yield
    finally:
        mlflow.openai.autolog(disable=True)


@contextlib.contextmanager
def autologging(client):
    tt.autolog()
    try:
        yield
    finally:
        tt.autolog(disable=True)


@contextlib.contextmanager
def wrapping(client):
    tt.wrap_openai(client)
    yield


@contextlib.contextmanager
def inside_a_block(client):
    with tt.trusted_span("block"):
        yield


@pytest.mark.parametrize("base", [openai.OpenAI, openai.AsyncOpenAI])
@pytest.mark.parametrize("ours", [autologging, wrapping, inside_a_block])
@pytest.mark.parametrize("first", ["ours", "theirs"])
def test_whoever_is_first_a_call_has_one_llm_span(first, ours, base, trace):
    client = base()
    sides = [ours, theirs] if first == "ours" else [theirs, ours]
    with sides[0](client), sides[1](client):
        call = ask(client)
        if inspect.isawaitable(call):
            asyncio.run(awaited(call))
    assert names(trace()) == (["block", *CALL] if ours is inside_a_block else CALL)


async def awaited(call):
    return await call


@pytest.mark.parametrize(
    "order",
    [
        "+ours +theirs -ours -theirs",
        "+ours +theirs -theirs -ours",
        "+theirs +ours -ours -theirs",
        "+theirs +ours -theirs -ours",
    ],
)
def test_each_autolog_can_be_taken_off_and_the_other_goes_on(order, traces):
    client = openai.OpenAI()
    switches = {"ours": autologging, "theirs": theirs}
    on, wanted = {}, []
    for step in order.split() * 2:
        sign, name = step[0], step[1:]
        if sign == "+":
            on[name] = contextlib.ExitStack()
            on[name].enter_context(switches[name](client))
        else:
            on.pop(name).close()
        ask(client)
        if on:
            wanted.append(CALL if "ours" in on else ["Completions"])
    assert [names(found) for found in traces()] == wanted


@pytest.mark.parametrize(
    ("before", "switch", "wanted"),
    [
        ("both", lambda: mlflow.openai.autolog(disable=True), CALL),
        ("both", lambda: tt.autolog(disable=True), CALL),
        ("ours", mlflow.openai.autolog, CALL),
        ("theirs", tt.autolog, ["Completions"]),
    ],
    ids=["theirs off", "ours off", "theirs on", "ours on"],
)
def test_a_stream_goes_on_as_it_began_when_one_is_switched(before, switch, wanted, trace):
    with contextlib.ExitStack() as on:
        on.callback(mlflow.openai.autolog, disable=True)
        for side, name in [(autologging, "ours"), (theirs, "theirs")]:
            if before in (name, "both"):
                on.enter_context(side(None))
        stream = ask(openai.OpenAI(), stream=True)
        first = next(stream)
        switch()
        chunks = [first, *stream]
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    assert text == ANSWER
    assert names(trace()) == wanted


@pytest.mark.parametrize("stream", [False, True])
def test_a_raw_response_with_mlflows_autolog_has_one_llm_span(stream, mlflow_autolog, trace):
    completions = tt.wrap_openai(openai.OpenAI()).chat.completions
    raw = completions.with_raw_response.create(model="gpt-4o", messages=QUESTION, stream=stream)
    assert raw.headers["x-request-id"]
    answer = raw.parse()
    if stream:
        assert list(answer)
    assert tt.trust(answer).score == 0.9
    assert names(trace()) == CALL


@pytest.mark.skipif(not hasattr(openai.OpenAI, "responses"), reason="no Responses API")
@pytest.mark.parametrize("stream", [False, True])
def test_a_response_with_mlflows_autolog_has_one_llm_span(stream, mlflow_autolog, trace, sandbox):
    client = tt.wrap_openai(openai.OpenAI())
    answer = client.responses.create(model="gpt-4o", input="Where is the Louvre?", stream=stream)
    if stream:
        assert list(answer)
    assert tt.trust(answer).score == 0.9
    assert names(trace()) == ["response gpt-4o", "openai.responses", "tlm.trustworthiness"]
    assert "traceparent" not in sandbox.requests("openai")[0].headers


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


def test_a_failed_async_call_with_mlflows_autolog_is_recorded_once(mlflow_autolog, trace):
    async def main():
        async with AsyncOpenAI(max_retries=0) as client:
            await ask(client, model="sandbox:status=429")

    with pytest.raises(openai.RateLimitError):
        asyncio.run(main())
    assert [span.status.status_code.value for span in trace().data.spans] == ["ERROR"] * 2


def test_a_stream_that_breaks_with_mlflows_autolog_is_recorded_once(mlflow_autolog, trace):
    stream = ask(tt.wrap_openai(openai.OpenAI()), model="sandbox:stream_error=2", stream=True)
    with pytest.raises(openai.APIError):
        list(stream)
    assert tt.trust(stream).reason == "partial_stream"
    assert [span.span_type for span in trace().data.spans] == ["CHAIN", "CHAT_MODEL"]


def test_an_async_stream_left_early_with_mlflows_autolog_holds_nothing_back(mlflow_autolog, trace):
    async def main():
        async with openai.AsyncOpenAI() as client, tt.trusted_span("block"):
            stream = await ask(client, stream=True)
            await stream.__anext__()
            await stream.close()

    asyncio.run(main())
    assert names(trace()) == ["block", *CALL[:2]]


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
