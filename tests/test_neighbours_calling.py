"""Others who call OpenAI by way of its client: each request that they make is a scored call."""

import asyncio
import inspect
import os

# LiteLLM asks when it is imported, by us or by MLflow; without it, it fetches a file from outside.
os.environ.setdefault("LITELLM_LOCAL_MODEL_COST_MAP", "true")

import openai
import pydantic
import pytest

import tlm_tracing as tt

QUESTION = [{"role": "user", "content": "What is the capital of France?"}]
ASK = {"model": "gpt-4o", "messages": QUESTION}


class City(pydantic.BaseModel):
    name: str


@pytest.fixture(autouse=True)
def scored(scorer, sandbox, monkeypatch):
    monkeypatch.setenv("LANGSMITH_TRACING", "false")  # LangChain's own, to the outside
    tt.configure(scorer=scorer)


def package(module, name):
    return pytest.importorskip(module, reason=f"{name} is not installed")


# What they do, by name. Each gives what its caller gets, as plain data.


def litellm_completion(sandbox, **options):
    litellm = package("litellm", "LiteLLM")
    return litellm.completion(**ASK, **options).choices[0].message.content


def litellm_stream(sandbox):
    chunks = package("litellm", "LiteLLM").completion(**ASK, stream=True)
    return [chunk.choices[0].delta.content for chunk in chunks]


async def litellm_async(sandbox):
    answer = await package("litellm", "LiteLLM").acompletion(**ASK)
    return answer.choices[0].message.content


async def litellm_async_stream(sandbox):
    chunks = await package("litellm", "LiteLLM").acompletion(**ASK, stream=True)
    return [chunk.choices[0].delta.content async for chunk in chunks]


def chat_model(model="gpt-4o", **options):
    langchain_openai = package("langchain_openai", "langchain-openai")
    # Without a client of its own it shares one, with connections of an earlier event loop.
    client = openai.DefaultAsyncHttpxClient()
    return langchain_openai.ChatOpenAI(model=model, http_async_client=client, **options)


def langchain_invoke(sandbox):
    return chat_model().invoke(QUESTION).content


def langchain_stream(sandbox):
    return [chunk.content for chunk in chat_model().stream(QUESTION)]


def langchain_structured(sandbox):
    return chat_model().with_structured_output(City).invoke(QUESTION)


def langchain_batch(sandbox):
    return [answer.content for answer in chat_model().batch([QUESTION, QUESTION, QUESTION])]


def langchain_responses(sandbox):
    return chat_model(use_responses_api=True).invoke(QUESTION).text


async def langchain_async(sandbox):
    return (await chat_model().ainvoke(QUESTION)).content


async def langchain_async_stream(sandbox):
    return [chunk.content async for chunk in chat_model().astream(QUESTION)]


def extractor(sandbox, client):
    sandbox.default("openai", tool_args={"name": "Paris"})
    return package("instructor", "instructor").from_openai(client).chat.completions


def instructor_create(sandbox, client=None):
    create = extractor(sandbox, client or openai.OpenAI()).create
    return create(**ASK, response_model=City).model_dump()


def instructor_retries(sandbox):
    create = extractor(sandbox, openai.OpenAI()).create
    sandbox.script("openai", {"tool_args": {"no": "name"}})
    return create(**ASK, response_model=City).model_dump()


def instructor_partial(sandbox):
    create = extractor(sandbox, openai.OpenAI()).create_partial
    return [city.model_dump() for city in create(**ASK, response_model=City)]


async def instructor_async(sandbox):
    create = extractor(sandbox, openai.AsyncOpenAI()).create
    return (await create(**ASK, response_model=City)).model_dump()


def look_up(query: str) -> str:
    """Looks up."""
    return query


def agent(sandbox, model, client=None):
    """An agent whose model first has a tool called, and then answers."""
    agents = package("agents", "openai-agents")
    agents.set_tracing_disabled(True)
    agents.set_default_openai_client(client or openai.AsyncOpenAI(), use_for_tracing=False)
    sandbox.script("openai", {"tools": 1}, {"content": "It is Paris."})
    return agents.Agent("guide", tools=[agents.function_tool(look_up)], model=model), agents.Runner


def completions_model():
    agents = package("agents", "openai-agents")
    return agents.OpenAIChatCompletionsModel("gpt-4o", openai.AsyncOpenAI())


def told(result):
    return result.final_output, [item.type for item in result.new_items]


async def agents_responses(sandbox, client=None):
    guide, runner = agent(sandbox, "gpt-4o", client)
    return told(await runner.run(guide, "Where is the Louvre?"))


async def agents_completions(sandbox):
    guide, runner = agent(sandbox, completions_model())
    return told(await runner.run(guide, "Where is the Louvre?"))


async def streamed(guide, runner):
    result = runner.run_streamed(guide, "Where is the Louvre?")
    return [event.type async for event in result.stream_events()], told(result)


async def agents_responses_stream(sandbox):
    return await streamed(*agent(sandbox, "gpt-4o"))


async def agents_completions_stream(sandbox):
    return await streamed(*agent(sandbox, completions_model()))


CALLS = [
    litellm_completion,
    litellm_stream,
    litellm_async,
    litellm_async_stream,
    langchain_invoke,
    langchain_stream,
    langchain_structured,
    langchain_batch,
    langchain_responses,
    langchain_async,
    langchain_async_stream,
    instructor_create,
    instructor_retries,
    instructor_partial,
    instructor_async,
    agents_responses,
    agents_completions,
    agents_responses_stream,
    agents_completions_stream,
]


# How ours sees it. Each gives the result, and the trusts if there is a block.


async def made(call, *arguments):
    result = call(*arguments)
    return await result if inspect.isawaitable(result) else result


async def with_autolog(call, sandbox):
    tt.autolog()
    try:
        return await made(call, sandbox), None
    finally:
        tt.autolog(disable=True)


async def inside_a_block(call, sandbox):
    async with tt.trusted_span() as span:
        result = await made(call, sandbox)
    return result, span.trusts


async def decorated(call, sandbox):
    return await made(tt.trusted(call), sandbox), None


@pytest.mark.parametrize("way_in", [with_autolog, inside_a_block, decorated])
@pytest.mark.parametrize("call", CALLS)
def test_each_request_is_a_scored_call_and_the_result_is_the_same(
    call, way_in, sandbox, scorer, traces
):
    async def main():
        bare = await made(call, sandbox)
        wanted = len(sandbox.requests("openai"))
        return bare, wanted, *await way_in(call, sandbox)

    bare, wanted, result, trusts = asyncio.run(main())
    assert result == bare
    assert len(sandbox.requests("openai")) == 2 * wanted > 0
    found = traces(wanted if way_in is with_autolog else 1)
    kinds = [span.span_type for trace in found for span in trace.data.spans]
    assert kinds.count("CHAT_MODEL") == wanted
    assert len(scorer.exchanges) == wanted
    assert [one.value for trace in found for one in trace.info.assessments] == [0.9] * wanted
    assert {trace.info.tags["trust_score"] for trace in found} == {"0.9000"}
    if trusts is not None:
        assert [trust.score for trust in trusts] == [0.9] * wanted


def litellm_given(sandbox, client):
    return litellm_completion(sandbox, client=client)


@pytest.mark.parametrize(
    ("call", "base", "wanted"),
    [
        (litellm_given, openai.OpenAI, 1),
        (instructor_create, openai.OpenAI, 1),
        (agents_responses, openai.AsyncOpenAI, 2),
    ],
)
def test_a_wrapped_client_that_they_are_given_stays_wrapped(call, base, wanted, sandbox, scorer):
    asyncio.run(made(call, sandbox, tt.wrap_openai(base())))
    assert len(scorer.exchanges) == len(sandbox.requests("openai")) == wanted


def test_the_trust_is_known_of_litellms_own_answer(sandbox):
    tt.autolog()
    assert tt.trust(package("litellm", "LiteLLM").completion(**ASK)).score == 0.9


def test_the_trust_is_known_of_the_completion_that_instructor_read(sandbox):
    tt.autolog()
    create = extractor(sandbox, openai.OpenAI()).create_with_completion
    _, completion = create(**ASK, response_model=City)
    assert tt.trust(completion).score == 0.9


def litellm_failing():
    litellm = package("litellm", "LiteLLM")
    litellm.suppress_debug_info = True
    litellm.completion(**{**ASK, "model": "openai/sandbox:status=400"})


def langchain_failing():
    chat_model(model="sandbox:status=400").invoke(QUESTION)


@pytest.mark.parametrize("call", [litellm_failing, langchain_failing])
def test_their_callers_meet_the_errors_that_they_would_without_us(call, trace):
    with pytest.raises(openai.BadRequestError) as bare:
        call()
    with tt.trusted_span() as span, pytest.raises(openai.BadRequestError) as ours:
        call()
    assert (type(ours.value), str(ours.value)) == (type(bare.value), str(bare.value))
    assert [trust.reason for trust in span.trusts] == ["call_failed"]
    assert trace().info.tags["trust_status"] == "unscored"
