"""Chunks pass through untouched; a stream is recorded once, however it ends."""

import asyncio
import gc
import gzip
import json
import sys
import threading
import time

import openai
import pytest

import tlm_tracing as tt
from tlm_tracing._endpoints.chat import assemble
from tlm_tracing.openai import AsyncOpenAI, OpenAI

QUESTION = [{"role": "user", "content": "What is the capital of France?"}]
COMPLETION = {
    "id": "chatcmpl-1",
    "object": "chat.completion",
    "created": 1,
    "model": "gpt-4o",
    "choices": [
        {
            "index": 0,
            "finish_reason": "stop",
            "message": {"role": "assistant", "content": "Paris."},
        }
    ],
}
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


def put_together_in_place(chunks):
    """As some frameworks do it: later pieces are added to the first one's object."""
    calls = {}
    for chunk in chunks:
        for call in (chunk.choices[0].delta.tool_calls or ()) if chunk.choices else ():
            first = calls.setdefault(call.index, call)
            if first is not call:
                first.function.arguments += call.function.arguments or ""


def test_a_reader_who_changes_the_chunks_does_not_change_what_is_scored(trace, scorer):
    put_together_in_place(stream_of(OpenAI(), model="sandbox:tools=2", tools=TOOLS))
    calls = llm_span(trace()).outputs["choices"][0]["message"]["tool_calls"]
    assert {call["function"]["arguments"] for call in calls} == {'{"query": "sandbox"}'}
    assert scorer.exchanges[0].response.count("sandbox") == 2


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


def test_a_caller_who_stops_at_the_last_chunk_has_the_whole_answer(traces):
    def read(stream):
        return next(chunk for chunk in stream if chunk.choices[0].finish_reason)

    with stream_of(OpenAI()) as closed:
        read(closed)
    assert tt.trust(closed).score == 0.9

    async def main():
        async with AsyncOpenAI() as client, await stream_of(client) as stream:
            async for chunk in stream:
                if chunk.choices[0].finish_reason:
                    break
        return tt.trust(stream)

    assert asyncio.run(main()).score == 0.9
    read(stream_of(OpenAI()))
    gc.collect()
    for found in traces(3):
        assert llm_span(found).attributes["stream.outcome"] == "complete"
        assert found.info.tags["trust_score"] == "0.9000"


def test_a_dropped_answer_is_waited_for_at_the_flush(scorer, traces):
    scorer.hold()
    next(chunk for chunk in stream_of(OpenAI()) if chunk.choices[0].finish_reason)
    gc.collect()
    scorer.wait_for(1)
    assert not tt.flush(0.1)
    scorer.release()
    assert traces(1)[0].info.tags["trust_score"] == "0.9000"


def test_a_stream_that_is_held_after_a_break_ends_all_the_same(traces):
    held = stream_of(OpenAI())
    for _ in held:
        break

    async def main():
        async with AsyncOpenAI() as client:
            stream = await stream_of(client)
            async for _ in stream:
                break
            await asyncio.sleep(0)  # the loop closes what the break has left
            assert await asyncio.to_thread(tt.flush)
            assert tt.trust(stream).reason == "partial_stream"

    asyncio.run(main())
    for found in traces(2):
        assert llm_span(found).attributes["stream.outcome"] == "abandoned"
    assert tt.trust(held).reason == "partial_stream"
    assert list(held)  # it can be read on, of course


@pytest.mark.parametrize("model", ["gpt-4o", "sandbox:content=a b,chunk_delay=1.1"])
def test_a_stream_that_is_read_on_after_a_break_is_one_answer(model, trace):
    stream = stream_of(OpenAI(), model=model)
    chunks = [next(iter(stream))]
    for chunk in stream:
        chunks.append(chunk)
        break
    chunks += stream
    assert tt.trust(stream).score == 0.9
    llm = llm_span(trace())
    assert llm.attributes["stream.outcome"] == "complete"
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    assert llm.outputs["choices"][0]["message"]["content"] == text


def test_an_exception_of_the_callers_own_is_told_of_the_stream_it_ended(traces):
    def look_up(stream):
        with stream:
            return {}[next(stream)]

    stream = stream_of(OpenAI())
    with pytest.raises(TypeError, match="unhashable"):
        look_up(stream)
    try:
        raise ValueError("handled")
    except ValueError:
        with stream_of(OpenAI()) as inside:
            next(inside)
    failed, left = (llm_span(found) for found in traces(2))
    assert failed.attributes["stream.outcome"] == "error"
    assert failed.status.description.startswith("TypeError: unhashable")
    assert left.attributes["stream.outcome"] == "abandoned"
    assert left.status.status_code.value == "OK"
    assert tt.trust(stream).reason == "partial_stream"


def test_a_generator_round_a_stream_that_is_closed_has_not_failed(trace):
    def words():
        with stream_of(OpenAI()) as stream:
            yield from stream

    steps = words()
    next(steps)
    steps.close()
    assert llm_span(trace()).attributes["stream.outcome"] == "abandoned"


# Raw responses, whose body the caller reads.


def lazily(client, model="gpt-4o", **options):
    return client.chat.completions.with_streaming_response.create(
        model=model, messages=QUESTION, **options
    )


READS = {
    "parse": lambda response: response.parse().choices[0].message.content,
    "json": lambda response: response.json()["choices"][0]["message"]["content"],
    "read": lambda response: json.loads(response.read())["choices"][0]["message"]["content"],
    "text": lambda response: json.loads(response.text())["choices"][0]["message"]["content"],
    "iter_bytes": lambda response: json.loads(b"".join(response.iter_bytes(7)))["choices"][0][
        "message"
    ]["content"],
}


@pytest.mark.parametrize("read", READS.values(), ids=READS)
def test_a_body_is_recorded_as_its_caller_reads_it(read, trace):
    with lazily(OpenAI()) as response:
        assert tt.trust(response) is None
        text = read(response)
        assert tt.trust(response).score == 0.9
    llm = llm_span(trace())
    assert llm.outputs["choices"][0]["message"]["content"] == text
    assert llm.attributes["stream.outcome"] == "complete"
    assert llm.attributes["openai.request_id"] == response.headers["x-request-id"]


@pytest.mark.parametrize("read", ["iter_lines", "iter_bytes", "parse"])
def test_a_streamed_body_is_recorded_as_its_caller_reads_it(read, trace):
    with lazily(OpenAI(), model="sandbox:content=a b c,tools=0", stream=True) as response:
        list(getattr(response, read)())
        assert tt.trust(response).score == 0.9
    llm = llm_span(trace())
    assert llm.outputs["choices"][0]["message"]["content"] == "a b c"
    assert llm.attributes["stream.outcome"] == "complete"


def test_a_body_is_not_read_ahead_of_its_caller(trace):
    with lazily(OpenAI(), model="sandbox:content=a b,chunk_delay=30", stream=True) as response:
        assert next(response.iter_lines()).startswith("data: ")
    assert tt.trust(response).reason == "partial_stream"
    assert llm_span(trace()).attributes["stream.outcome"] == "abandoned"


def test_an_async_body_is_recorded_as_its_caller_reads_it(traces):
    async def main():
        async with AsyncOpenAI() as client:
            async with lazily(client) as response:
                completion = await response.parse()
            assert tt.trust(response).score == tt.trust(completion).score == 0.9
            async with lazily(client, stream=True) as response:
                assert [line async for line in response.iter_lines()][-2] == "data: [DONE]"
            assert tt.trust(response).score == 0.9
            async with lazily(client, stream=True) as response:
                stream = await response.parse()
                assert [chunk async for chunk in stream]
            assert tt.trust(stream).score == tt.trust(response).score == 0.9
            async with lazily(client, stream=True) as response:
                async for _ in response.iter_lines():
                    break
            assert tt.trust(response).reason == "partial_stream"
            async with lazily(client) as response:
                pass
            assert tt.trust(response).reason == "partial_stream"

    asyncio.run(main())
    outcomes = [llm_span(found).attributes["stream.outcome"] for found in traces(5)]
    assert sorted(outcomes) == ["abandoned"] * 2 + ["complete"] * 3


@pytest.mark.parametrize(
    ("fault", "outcome"), [("disconnect=2", "error"), ("truncate=2", "truncated")]
)
@pytest.mark.parametrize("read", ["iter_lines", "parse"])
def test_a_body_that_breaks_keeps_what_had_come(read, fault, outcome, trace):
    def use(client):
        with lazily(client, model=f"sandbox:{fault}", stream=True) as response:
            try:
                return list(getattr(response, read)())
            except Exception as error:
                return type(error), str(error)

    bare = use(openai.OpenAI())
    ours = use(OpenAI())
    assert len(bare) == len(ours)
    assert isinstance(ours, list) or bare == ours
    llm = llm_span(trace())
    assert llm.attributes["stream.outcome"] == outcome
    assert llm.outputs["choices"][0]["message"]["content"]


def test_a_body_that_is_dropped_unread_is_recorded(trace):
    def use():
        lazily(OpenAI()).__enter__()

    use()
    gc.collect()
    assert llm_span(trace()).attributes["stream.outcome"] == "abandoned"


def test_a_raw_stream_is_recorded_by_the_body_if_nobody_parses_it(trace):
    raw = OpenAI().chat.completions.with_raw_response.create(
        model="gpt-4o", messages=QUESTION, stream=True
    )
    assert raw.http_response.read()
    assert tt.trust(raw).score == 0.9
    assert llm_span(trace()).attributes["stream.outcome"] == "complete"


def test_a_compressed_body_is_recorded(trace):
    def compressed(request):
        body = gzip.compress(json.dumps(COMPLETION).encode())
        headers = {"content-type": "application/json", "content-encoding": "gzip"}
        return library.Response(200, headers=headers, stream=Body(body))

    library = sys.modules[openai.DefaultHttpxClient.__mro__[1].__module__.partition(".")[0]]

    class Body(library.SyncByteStream):
        def __init__(self, body):
            self.body = body

        def __iter__(self):
            yield self.body[:9]
            yield self.body[9:]

    transport = library.MockTransport(compressed)
    client = OpenAI(http_client=library.Client(transport=transport))
    with lazily(client) as response:
        assert response.json()["choices"]
    assert llm_span(trace()).outputs == COMPLETION


# Usage that nobody asked for.


@pytest.mark.parametrize("client_class", [openai.OpenAI, openai.AsyncOpenAI])
def test_a_streams_usage_can_be_asked_for_behind_the_callers_back(client_class, trace, sandbox):
    async def chunks(client):
        stream = stream_of(client)
        if client_class is openai.OpenAI:
            return list(stream)
        async with client:
            return [chunk async for chunk in await stream]

    bare = asyncio.run(chunks(client_class()))
    ours = asyncio.run(chunks(tt.wrap_openai(client_class(), stream_usage=True)))
    assert [chunk.choices for chunk in ours] == [chunk.choices for chunk in bare]
    assert not any(chunk.usage for chunk in ours)
    assert trace().info.token_usage["total_tokens"] > 0
    asked = [request.json.get("stream_options") for request in sandbox.requests("openai")]
    assert asked == [None, {"include_usage": True}]


def test_usage_that_the_caller_asked_for_is_theirs(trace):
    client = tt.wrap_openai(openai.OpenAI(), stream_usage=True)
    *_, last = stream_of(client, stream_options={"include_usage": True})
    assert (last.choices, last.usage.total_tokens > 0) == ([], True)
    assert trace().info.token_usage["total_tokens"] == last.usage.total_tokens


def test_other_stream_options_are_kept_when_usage_is_asked_for(sandbox):
    client = tt.wrap_openai(openai.OpenAI(), stream_usage=True)
    list(stream_of(client, stream_options={"include_obfuscation": False}))
    client.chat.completions.create(model="gpt-4o", messages=QUESTION)
    client.chat.completions.with_raw_response.create(
        model="gpt-4o", messages=QUESTION, stream=True
    ).parse().close()
    asked = [request.json.get("stream_options") for request in sandbox.requests("openai")]
    assert asked == [{"include_obfuscation": False, "include_usage": True}, None, None]
