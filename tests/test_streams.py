"""Chunks pass through untouched; a stream is recorded once, however it ends."""

import asyncio
import gc
import threading
import time

import openai
import pytest

import tlm_tracing as tt
from tlm_tracing._endpoints.chat import assemble
from tlm_tracing.openai import AsyncOpenAI, OpenAI

QUESTION = [{"role": "user", "content": "What is the capital of France?"}]
TOOLS = [
    {"type": "function", "function": {"name": name, "parameters": {"type": "object"}}}
    for name in ("weather", "clock")
]


@pytest.fixture(autouse=True)
def scored(scorer, sandbox):
    tt.configure(scorer=scorer)


def stream_of(client, model="gpt-4o", **options):
    return client.chat.completions.create(model=model, messages=QUESTION, stream=True, **options)


def plain(chunks):
    """Chunks without what the server makes up anew for each answer."""
    return [{**chunk.model_dump(), "id": None, "created": None} for chunk in chunks]


def llm_span(trace):
    return next(span for span in trace.data.spans if span.name == "openai.chat.completions")


VARIANTS = {
    "text": {},
    "usage": {"stream_options": {"include_usage": True}},
    "choices": {"n": 3},
    "logprobs": {"logprobs": True},
    "tools": {"model": "sandbox:tools=3", "tools": TOOLS},
    "function_call": {"model": "sandbox:function_call=true"},
    "refusal": {"model": "sandbox:refusal=I will not do that"},
    "reasoning": {"model": "sandbox:reasoning=let me think"},
    "length": {"model": "sandbox:finish_reason=length"},
}


@pytest.mark.parametrize("options", VARIANTS.values(), ids=VARIANTS)
def test_chunks_and_type_are_those_of_the_bare_client(options):
    bare = stream_of(openai.OpenAI(), **options)
    ours = stream_of(OpenAI(), **options)
    assert type(ours) is type(bare)
    assert plain(ours) == plain(bare)


@pytest.mark.parametrize("options", VARIANTS.values(), ids=VARIANTS)
def test_a_stream_adds_up_to_the_answer_that_is_not_streamed(options):
    client = openai.OpenAI()
    wanted = client.chat.completions.create(
        messages=QUESTION,
        **{"model": "gpt-4o", **{k: v for k, v in options.items() if k != "stream_options"}},
    ).model_dump(exclude_unset=True)
    found = assemble(stream_of(client, **options))
    assert found["model"] == wanted["model"]
    if "stream_options" in options:
        assert found["usage"] == wanted["usage"]
    for ours, theirs in zip(found["choices"], wanted["choices"], strict=True):
        assert ours["finish_reason"] == theirs["finish_reason"]
        assert (ours["logprobs"] or {}).get("content") == (theirs["logprobs"] or {}).get("content")
        given = {key: value for key, value in theirs["message"].items() if value}
        assert {key: value for key, value in ours["message"].items() if value} == given


def test_a_stream_is_scored_when_it_is_exhausted(trace):
    stream = stream_of(OpenAI())
    assert tt.trust(stream) is None
    text = "".join(chunk.choices[0].delta.content or "" for chunk in stream)
    assert tt.trust(stream).score == 0.9
    found = trace()
    span = llm_span(found)
    assert span.outputs["choices"][0]["message"]["content"] == text
    assert span.attributes["stream.outcome"] == "complete"
    assert 0 < span.attributes["time_to_first_token"] < 10
    assert found.info.tags["trust_score"] == "0.9000"


def test_an_async_stream_is_scored_when_it_is_exhausted(trace):
    async def main():
        async with AsyncOpenAI() as client:
            stream = await stream_of(client)
            chunks = [chunk async for chunk in stream]
            return chunks, tt.trust(stream)

    chunks, trust = asyncio.run(main())
    assert len(chunks) > 2
    assert trust.score == 0.9
    assert llm_span(trace()).attributes["stream.outcome"] == "complete"


def test_a_stream_is_scored_before_the_block_round_it_closes(scorer):
    with tt.trusted_span() as span:
        for _ in stream_of(openai.OpenAI()):
            pass
        assert span.trust.score == 0.9
    assert len(scorer.exchanges) == 1


def test_the_stream_helper_is_recorded_and_scored(trace, helpers):
    with helpers(OpenAI()).stream(model="gpt-4o", messages=QUESTION) as stream:
        kinds = {event.type for event in stream}
        completion = stream.get_final_completion()
    assert {"chunk", "content.delta", "content.done"} <= kinds
    assert tt.trust(stream).score == 0.9
    content = llm_span(trace()).outputs["choices"][0]["message"]["content"]
    assert content == completion.choices[0].message.content


def test_the_async_stream_helper_is_recorded_and_scored(trace, helpers):
    async def main():
        async with AsyncOpenAI() as client:
            helper = helpers(client).stream(model="gpt-4o", messages=QUESTION)
            async with helper as stream:
                await stream.until_done()
            return tt.trust(stream)

    assert asyncio.run(main()).score == 0.9
    trace()


def test_usage_is_recorded_when_the_caller_asked_for_it(trace):
    list(stream_of(OpenAI(), stream_options={"include_usage": True}))
    assert trace().info.token_usage["total_tokens"] > 0


def test_parallel_tool_calls_are_put_together(trace, scorer):
    list(stream_of(OpenAI(), model="sandbox:tools=3", tools=TOOLS))
    calls = llm_span(trace()).outputs["choices"][0]["message"]["tool_calls"]
    assert [call["id"] for call in calls] == ["call_0", "call_1", "call_2"]
    assert {call["function"]["arguments"] for call in calls} == {'{"query": "sandbox"}'}
    assert scorer.exchanges[0].response.count("<tool_call>") == 3


def test_the_first_chunk_is_not_held_back(sandbox):
    started = time.monotonic()
    stream = stream_of(OpenAI(), model="sandbox:content=a b c d,chunk_delay=0.2")
    next(stream)
    assert time.monotonic() - started < 0.75 < 5 * 0.2
    stream.close()


def close(stream):
    next(stream)
    stream.close()


def leave_with(stream):
    with stream:
        next(stream)


def drop(stream):
    next(stream)


def never_iterate(stream):
    pass


def break_and_drop(stream):
    for _ in stream:
        break


@pytest.mark.parametrize("leave", [close, leave_with, drop, never_iterate, break_and_drop])
def test_a_stream_that_is_left_is_recorded_with_what_had_come(leave, trace, scorer):
    def use():
        leave(stream_of(OpenAI()))

    use()
    gc.collect()
    found = trace()
    assert llm_span(found).attributes["stream.outcome"] == "abandoned"
    assert found.info.tags["trust_status"] == "unscored"
    assert found.data.spans[0].attributes["tlm.reason"] == "partial_stream"
    assert not scorer.exchanges


@pytest.mark.parametrize("parsed", [False, True])
def test_a_raw_stream_that_nobody_reads_is_recorded(parsed, trace):
    def use():
        raw = OpenAI().chat.completions.with_raw_response.create(
            model="gpt-4o", messages=QUESTION, stream=True
        )
        if parsed:
            raw.parse()

    use()
    gc.collect()
    assert llm_span(trace()).attributes["stream.outcome"] == "abandoned"


def test_an_async_stream_that_is_closed_is_recorded(trace):
    async def main():
        async with AsyncOpenAI() as client:
            stream = await stream_of(client)
            await stream.__anext__()
            await stream.close()
            return tt.trust(stream)

    assert asyncio.run(main()).reason == "partial_stream"
    assert llm_span(trace()).attributes["stream.outcome"] == "abandoned"


def test_an_async_stream_that_is_cancelled_is_recorded(trace, sandbox):
    async def main():
        async with AsyncOpenAI() as client:
            stream = await stream_of(client, model="sandbox:chunk_delay=30")
            first = asyncio.Event()

            async def read():
                async for _ in stream:
                    first.set()

            task = asyncio.ensure_future(read())
            await first.wait()
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task

    asyncio.run(main())
    assert llm_span(trace()).attributes["stream.outcome"] == "cancelled"


@pytest.mark.parametrize(
    ("fault", "error"),
    [("disconnect=2", Exception), ("stream_error=2", openai.APIError)],
)
def test_a_stream_that_breaks_raises_what_the_bare_client_raises(fault, error, trace):
    with pytest.raises(error) as bare:
        list(stream_of(openai.OpenAI(), model=f"sandbox:{fault}"))
    stream = stream_of(OpenAI(), model=f"sandbox:{fault}")
    with pytest.raises(error) as ours:
        list(stream)
    assert (type(ours.value), str(ours.value)) == (type(bare.value), str(bare.value))
    assert tt.trust(stream).reason == "partial_stream"
    span = llm_span(trace())
    assert span.attributes["stream.outcome"] == "error"
    assert span.status.status_code.value == "ERROR"
    assert span.outputs["choices"][0]["message"]["content"]


def test_a_body_that_ends_early_is_not_taken_for_the_whole_answer(trace, scorer):
    stream = stream_of(OpenAI(), model="sandbox:truncate=2")
    assert len(list(stream)) == 2
    assert tt.trust(stream).reason == "partial_stream"
    assert llm_span(trace()).attributes["stream.outcome"] == "truncated"
    assert not scorer.exchanges


def test_a_stream_may_be_read_in_another_thread(trace):
    stream = stream_of(OpenAI())
    thread = threading.Thread(target=list, args=(stream,))
    thread.start()
    thread.join()
    assert tt.trust(stream).score == 0.9
    trace()


def test_a_stream_may_outlive_the_block_it_was_made_in(traces):
    with tt.trusted_span("block"):
        stream = stream_of(openai.OpenAI())
    list(stream)
    assert tt.trust(stream).score == 0.9
    names = sorted(span.name for found in traces() for span in found.data.spans)
    assert names == ["block", "chat gpt-4o", "openai.chat.completions", "tlm.trustworthiness"]
