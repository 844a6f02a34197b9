"""What a tracer of OpenAI calls ought to get right: a table of 74 behaviours, executed.

Each has the number that it has in the comparison of eleven other tracers that it comes from (10,
on embeddings, is not ours). A row runs on the sync and on the async client, unless it is about
one of them or has a twin for the other.
"""

import asyncio
import contextlib
import functools
import gc
import inspect
import json
import signal
import threading
from concurrent.futures import ThreadPoolExecutor

import mlflow
import openai
import pydantic
import pytest
from openai.types.chat import ChatCompletion

import tlm_tracing as tt
from tlm_tracing.openai import AsyncAzureOpenAI, AsyncOpenAI, AzureOpenAI, OpenAI

QUESTION = [{"role": "user", "content": "What is the capital of France?"}]
ANSWER = "Paris it is."
FIRST_WORD = "Paris"
TOOLS = [
    {"type": "function", "function": {"name": name, "parameters": {"type": "object"}}}
    for name in ("weather", "clock")
]
REFUSES = "sandbox:refusal=I will not do that"
REASONS = "sandbox:reasoning=let me think"
PAUSES = "sandbox:chunk_delay=30"
HANGS = "sandbox:hang"
CALL = ["chat gpt-4o", "openai.chat.completions", "tlm.trustworthiness"]
RESPONSE = ["response gpt-4o", "openai.responses", "tlm.trustworthiness"]
RESPONSES_API = pytest.mark.skipif(
    not hasattr(openai.OpenAI, "responses"), reason="this openai has no Responses API"
)


class City(pydantic.BaseModel):
    name: str


class Way:
    """How an application calls OpenAI: sync or async.

    The steps of a row are written once, as a coroutine. On the sync way it never has to wait, so
    that it needs no event loop, as a sync application has none.
    """

    def __init__(self, name):
        self.name = name
        self.is_async = name == "async"

    def bare(self, **options):
        """A client of OpenAI's own."""
        return (openai.AsyncOpenAI if self.is_async else openai.OpenAI)(**options)

    def client(self, **options):
        """The same, traced."""
        return (AsyncOpenAI if self.is_async else OpenAI)(**options)

    def run(self, steps, client=None):
        """What the steps give, on a client that is open meanwhile."""

        async def run():
            async with inside(client or self.client()) as ready:
                return await steps(ready)

        return self.drive(run())

    def make(self, call, client=None):
        """What a call gives."""
        return self.run(lambda ready: given(call(ready)), client)

    def read(self, call, client=None):
        """The chunks of a streamed call, to its end."""
        return self.run(lambda ready: pieces(call(ready)), client)

    def drive(self, coroutine):
        if self.is_async:
            return asyncio.run(coroutine)
        with contextlib.closing(coroutine), pytest.raises(StopIteration) as end:
            coroutine.send(None)
        return end.value.value

    async def collect_garbage(self):
        """All of it: an event loop closes async generators, which then is a few turns later."""
        gc.collect()
        if self.is_async:
            for _ in range(10):
                await asyncio.sleep(0)
            gc.collect()


SYNC, ASYNC = Way("sync"), Way("async")
ROWS = {}


def row(number, says, *case, on=(SYNC, ASYNC)):
    """A row of the table: on which ways it runs, and its case of what the test is about."""

    def register(test):
        assert number not in ROWS
        ROWS[number] = says
        ours = [pytest.param(way, *case, id=f"row-{number:02}-{way.name}") for way in on]
        if not hasattr(test, "rows"):
            test.rows = []
            arguments = list(inspect.signature(test).parameters)[: 1 + len(case)]
            pytest.mark.parametrize(arguments, test.rows)(test)
        test.rows[:0] = ours
        return test

    return register


@pytest.fixture(autouse=True)
def scored(scorer, sandbox):
    sandbox.answer(QUESTION[0]["content"], ANSWER)
    tt.configure(scorer=scorer)


@contextlib.asynccontextmanager
async def inside(thing):
    """``with`` or ``async with``."""
    if hasattr(thing, "__aenter__"):
        async with thing as entered:
            yield entered
    else:
        with thing as entered:
            yield entered


async def given(value):
    """``await``, where there is something to await."""
    return await value if inspect.isawaitable(value) else value


async def each(stream):
    """``for`` or ``async for``."""
    if hasattr(stream, "__aiter__"):
        async for piece in stream:
            yield piece
    else:
        for piece in stream:
            yield piece


async def pieces(stream):
    return [piece async for piece in each(await given(stream))]


async def read_a_word(stream):
    """As an impatient application does: ``break`` in a loop on the stream itself."""
    if hasattr(stream, "__aiter__"):
        async for piece in stream:
            if has_word(piece):
                break
    else:
        for piece in stream:
            if has_word(piece):
                break


def has_word(piece):
    """Whether a chunk, or an event of the helper's stream, brings some of the text."""
    if hasattr(piece, "choices"):
        return bool(piece.choices[0].delta.content)
    return piece.type == "content.delta" and bool(piece.delta)


def chat(model="gpt-4o", messages=QUESTION, **options):
    """A call, to be made by any client."""
    return lambda client: client.chat.completions.create(model=model, messages=messages, **options)


streamed = functools.partial(chat, stream=True)


def response(**options):
    question = QUESTION[0]["content"]
    return lambda client: client.responses.create(model="gpt-4o", input=question, **options)


def text_of(chunks, choice=0):
    """What chunks say in one choice."""
    parts = (part for chunk in chunks for part in chunk.choices if part.index == choice)
    return "".join(part.delta.content or "" for part in parts)


def names(trace):
    return [span.name for span in trace.data.spans]


def llm(trace):
    """The LLM span of a trace with one call."""
    (span,) = (span for span in trace.data.spans if span.span_type == "CHAT_MODEL")
    return span


def said(trace, choice=0):
    """The message on the LLM span."""
    return llm(trace).outputs["choices"][choice]["message"]


def assert_whole(trace):
    """A stream was recorded to its end, and scored."""
    assert llm(trace).attributes["stream.outcome"] == "complete"
    assert llm(trace).status.status_code.value == "OK"
    assert trace.info.tags["trust_status"] == "scored"


def assert_left(trace, text=FIRST_WORD, outcome="abandoned"):
    """A stream was recorded as one that was left, with the text that had come."""
    assert llm(trace).attributes["stream.outcome"] == outcome
    assert (llm(trace).outputs and said(trace)["content"]) == text
    assert trace.data.spans[0].attributes["tlm.reason"] == "partial_stream"


def assert_failed(span, *words):
    assert span.status.status_code.value == "ERROR"
    assert all(word in span.status.description for word in words)


def assert_below(trace, count, root="root"):
    """So many calls are right below the one span of that name."""
    (parent,) = (span for span in trace.data.spans if span.name == root)
    calls = [span.parent_id for span in trace.data.spans if span.name == "chat gpt-4o"]
    assert calls == [parent.span_id] * count


# One call.


@row(1, "create: input, output and usage on one span", on=[SYNC])
@row(2, "async create: the same", on=[ASYNC])
def test_create(way, trace):
    completion = way.make(chat(temperature=0.5))
    found = trace()
    assert names(found) == CALL
    assert llm(found).inputs == {"messages": QUESTION, "model": "gpt-4o", "temperature": 0.5}
    assert said(found)["content"] == completion.choices[0].message.content == ANSWER
    usage = llm(found).attributes["mlflow.chat.tokenUsage"]
    assert usage["input_tokens"] == completion.usage.prompt_tokens > 0
    assert usage["output_tokens"] == completion.usage.completion_tokens > 0
    assert found.info.token_usage["total_tokens"] == completion.usage.total_tokens


def parse(helpers):
    where = [{"role": "user", "content": "Where?"}]
    return lambda client: helpers(client).parse(
        model="gpt-4o", messages=where, response_format=City
    )


@row(3, "parse: exactly one LLM span, .parsed intact")
def test_parse(way, trace, helpers):
    completion = way.make(parse(helpers))
    assert completion.choices[0].message.parsed == City(name="text")
    assert names(trace()) == CALL


@row(4, "parse: the response format is recorded as a JSON schema")
def test_parse_schema(way, trace, helpers, sandbox):
    way.make(parse(helpers))
    wanted = llm(trace()).inputs["response_format"]
    assert wanted["json_schema"]["schema"]["properties"]["name"]["type"] == "string"
    assert wanted == sandbox.requests("openai")[0].json["response_format"]


@row(5, "parse: the parsed object is recorded")
def test_parse_parsed(way, trace, helpers):
    way.make(parse(helpers))
    assert said(trace())["parsed"] == {"name": "text"}


@row(6, "stream() helper, read to its end")
def test_stream_helper(way, trace, helpers):
    async def steps(client):
        async with inside(helpers(client).stream(model="gpt-4o", messages=QUESTION)) as stream:
            return await pieces(stream), await given(stream.get_final_completion())

    events, completion = way.run(steps)
    assert {"chunk", "content.delta", "content.done"} <= {event.type for event in events}
    found = trace()
    assert names(found) == CALL
    assert said(found)["content"] == completion.choices[0].message.content == ANSWER
    assert_whole(found)


@RESPONSES_API
@row(7, "Responses API: create")
def test_response(way, trace):
    answer = way.make(response())
    found = trace()
    assert names(found) == RESPONSE
    assert llm(found).inputs["input"] == QUESTION[0]["content"]
    assert llm(found).outputs["output"][0]["content"][0]["text"] == answer.output_text == ANSWER
    usage = llm(found).attributes["mlflow.chat.tokenUsage"]
    assert usage["total_tokens"] == answer.usage.total_tokens > 0


@RESPONSES_API
@row(8, "Responses API: create(stream=True)", response(stream=True))
@row(
    9,
    "Responses API: stream() helper",
    lambda client: client.responses.stream(model="gpt-4o", input=QUESTION[0]["content"]),
)
def test_response_stream(way, call, trace):
    async def steps(client):
        async with inside(await given(call(client))) as stream:
            return await pieces(stream)

    events = way.run(steps)
    deltas = [event.delta for event in events if event.type == "response.output_text.delta"]
    found = trace()
    assert names(found) == RESPONSE
    assert llm(found).outputs["output"][0]["content"][0]["text"] == "".join(deltas) == ANSWER
    assert llm(found).attributes["mlflow.chat.tokenUsage"]["total_tokens"] > 0
    assert_whole(found)


# Clients.


@row(11, "Azure's client is traced, and labelled as Azure")
def test_azure(way, trace, sandbox):
    url = sandbox.openai_base_url.removesuffix("/v1")
    azure = AsyncAzureOpenAI if way.is_async else AzureOpenAI
    way.make(chat(), azure(azure_endpoint=url, api_key="key", api_version="2024-10-21"))
    found = trace()
    assert names(found) == CALL
    assert llm(found).attributes["mlflow.llm.provider"] == "azure"


@row(12, "the module's own client is traced", on=[SYNC])
def test_module_client(way, trace, sandbox, monkeypatch):
    monkeypatch.setattr(openai, "api_key", "sk-sandbox")
    monkeypatch.setattr(openai, "base_url", f"{sandbox.openai_base_url}/")
    tt.autolog()
    chat()(openai)
    assert said(trace())["content"] == ANSWER


@row(13, "clients derived by with_options() and copy() are traced")
def test_derived_clients(way, traces):
    async def steps(client):
        for derived in (client.with_options(max_retries=0), client.copy(timeout=5)):
            await given(chat()(derived))

    way.run(steps)
    assert [said(found)["content"] for found in traces(2)] == [ANSWER] * 2


@row(14, "what was taken from a client before it was wrapped is traced")
def test_preexisting_client(way, traces):
    async def steps(client):
        completions = client.chat.completions
        creates = completions.create, completions.with_raw_response.create
        tt.wrap_openai(client)
        for create in creates:
            await given(create(model="gpt-4o", messages=QUESTION))

    way.run(steps, way.bare())
    assert [said(found)["content"] for found in traces(2)] == [ANSWER] * 2


@row(15, "wrapping twice gives one span")
def test_double_wrap(way, trace, sandbox, scorer):
    tt.autolog()
    way.make(chat(), tt.wrap_openai(tt.wrap_openai(way.client())))
    assert names(trace()) == CALL
    assert len(sandbox.requests("openai")) == len(scorer.exchanges) == 1


# What the caller gets.


@row(16, "create() gives a real ChatCompletion")
def test_completion_type(way):
    assert type(way.make(chat())) is ChatCompletion


@row(17, "a stream is a real Stream or AsyncStream")
def test_stream_type(way):
    assert type(way.make(streamed())) is (openai.AsyncStream if way.is_async else openai.Stream)


@row(18, "with_raw_response: output recorded, headers and parse() work", False)
@row(19, "with_raw_response, streamed: output recorded, headers usable", True)
def test_raw_response(way, stream, trace):
    async def steps(client):
        raw = await given(
            client.chat.completions.with_raw_response.create(
                model="gpt-4o", messages=QUESTION, stream=stream
            )
        )
        parsed = await given(raw.parse())
        return raw.headers, text_of(await pieces(parsed)) if stream else parsed

    headers, parsed = way.run(steps)
    assert headers["x-request-id"]
    assert (parsed if stream else parsed.choices[0].message.content) == ANSWER
    assert said(trace())["content"] == ANSWER


def unread(client, model="gpt-4o", **options):
    create = client.chat.completions.with_streaming_response.create
    return inside(create(model=model, messages=QUESTION, **options))


@row(20, "with_streaming_response: the body is left to the caller, and recorded")
def test_streaming_response(way, traces):
    async def read(client):
        async with unread(client) as reply:
            assert reply.headers["x-request-id"]
            assert not reply.http_response.is_stream_consumed
            return await given(reply.parse())

    async def read_what_breaks_off(client):
        async with unread(client, "sandbox:disconnect=1") as reply:
            with pytest.raises(Exception, match=r"."):  # here, and not before
                await given(reply.read())

    completion = way.run(read)
    way.run(read_what_breaks_off)
    whole, broken = traces(2)
    assert said(whole)["content"] == completion.choices[0].message.content == ANSWER
    assert_failed(llm(broken))


@row(21, "with_streaming_response, streamed: lines come as they are sent, and are recorded")
def test_streaming_response_lines(way, traces):
    async def first_line(client):
        async with unread(client, PAUSES, stream=True) as reply:
            return await anext(each(reply.iter_lines()))

    async def lines(client):
        async with unread(client, stream=True) as reply:
            return [line for line in await pieces(reply.iter_lines()) if line]

    # Were the body read ahead, the pause after the first line would be a timeout.
    assert "chat.completion.chunk" in way.run(first_line, way.client(timeout=5, max_retries=0))
    bare, ours = way.run(lines, way.bare()), way.run(lines)
    assert len(ours) == len(bare)
    assert ours[-1] == bare[-1] == "data: [DONE]"
    left, read = traces(2)
    assert_left(left, text="")
    assert said(read)["content"] == ANSWER
    assert_whole(read)


# All of an answer.


@row(22, "several choices", chat(n=2))
@row(29, "streamed: several choices are kept apart", streamed(n=2))
def test_choices(way, call, trace):
    chunks = way.read(call)
    indexes = [piece.choices[0].index for piece in chunks if hasattr(piece, "choices")]
    assert indexes[:4] in ([], [0, 1, 0, 1])  # whole, or interleaved
    found = trace()
    assert [choice["index"] for choice in llm(found).outputs["choices"]] == [0, 1]
    assert [said(found, choice)["content"] for choice in (0, 1)] == [ANSWER, f"{ANSWER} (1)"]


CALLED = [
    {"id": f"call_{number}", "type": "function", "function": {"name": name, "arguments": told}}
    for told in ['{"query": "sandbox"}']
    for number, name in enumerate(["weather", "clock", "weather"])
]


@row(23, "parallel tool calls", chat("sandbox:tools=3", tools=TOOLS), "tool_calls", CALLED)
@row(25, "a refusal", chat(REFUSES), "refusal", "I will not do that")
@row(26, "reasoning, as vLLM and DeepSeek", chat(REASONS), "reasoning_content", "let me think")
@row(27, "streamed: the text", streamed(), "content", ANSWER)
@row(30, "streamed: a refusal", streamed(REFUSES), "refusal", "I will not do that")
@row(31, "streamed: reasoning", streamed(REASONS), "reasoning_content", "let me think")
def test_message(way, call, key, wanted, trace):
    way.read(call)
    assert said(trace())[key] == wanted


@row(24, "the definitions of tools")
def test_tool_definitions(way, trace):
    way.make(chat(tools=TOOLS))
    span = llm(trace())
    assert span.inputs["tools"] == TOOLS
    shown = [tool["function"]["name"] for tool in span.attributes["mlflow.chat.tools"]]
    assert shown == ["weather", "clock"]


@row(28, "streamed: parallel tool calls whose pieces are interleaved")
def test_stream_tools(way, trace):
    chunks = way.read(streamed("sandbox:tools=3", tools=TOOLS))
    deltas = [chunk.choices[0].delta.tool_calls for chunk in chunks]
    indexes = [calls[0].index for calls in deltas if calls]
    assert indexes == [0, 1, 2] * 3
    assert said(trace())["tool_calls"] == CALLED


@row(32, "streamed: finish_reason length")
def test_stream_length(way, trace):
    way.read(streamed("sandbox:finish_reason=length"))
    span = llm(trace())
    assert span.outputs["choices"][0]["finish_reason"] == "length"
    assert span.attributes["gen_ai.response.finish_reasons"] == ["length"]


@row(33, "streamed: usage, with cached and reasoning tokens")
def test_stream_usage(way, trace):
    model = "sandbox:cached_tokens=40,reasoning_tokens=30"
    usage = way.read(streamed(model, stream_options={"include_usage": True}))[-1].usage
    found = trace()
    assert llm(found).attributes["mlflow.chat.tokenUsage"] == {
        "input_tokens": usage.prompt_tokens,
        "output_tokens": usage.completion_tokens,
        "total_tokens": usage.total_tokens,
        "cache_read_input_tokens": 40,
    }
    assert llm(found).attributes["gen_ai.usage.reasoning.output_tokens"] == 30
    assert found.info.token_usage["total_tokens"] == usage.total_tokens > 70


@row(34, "streamed: usage that the caller did not ask for, and does not see")
def test_stream_usage_default(way, trace, sandbox):
    def plain(chunks):
        return [{**chunk.model_dump(), "id": None, "created": None} for chunk in chunks]

    bare = way.read(streamed(), way.bare())
    tt.configure(stream_usage=True)
    assert plain(way.read(streamed())) == plain(bare)
    assert sandbox.requests("openai")[1].json["stream_options"] == {"include_usage": True}
    found = trace()
    assert llm(found).attributes["mlflow.chat.tokenUsage"]["total_tokens"] > 0
    assert said(found)["content"] == ANSWER


@row(35, "streamed: the time to the first token")
def test_time_to_first_token(way, trace):
    way.read(streamed("sandbox:chunk_delay=0.1"))
    span = llm(trace())
    seconds = (span.end_time_ns - span.start_time_ns) / 1e9
    # After the first chunk there are four more.
    assert 0 < span.attributes["time_to_first_token"] < seconds - 0.3


@row(36, "the response's id, system_fingerprint and resolved model")
def test_response_id(way, trace):
    completion = way.make(chat())
    attributes = llm(trace()).attributes
    assert attributes["gen_ai.response.id"] == completion.id
    assert attributes["gen_ai.response.model"] == completion.model == "gpt-4o-2024-08-06"
    assert attributes["openai.response.system_fingerprint"] == "fp_sandbox"


@row(37, "the x-request-id")
def test_request_id(way, traces):
    async def steps(client):
        stream = await given(streamed()(client))
        await pieces(stream)
        return stream.response.headers["x-request-id"]

    ids = [way.make(chat())._request_id, way.run(steps)]
    assert [llm(found).attributes["openai.request_id"] for found in traces(2)] == ids


# The request.


@row(38, "message objects among the messages")
def test_messages_pydantic(way, trace, sandbox):
    first = way.make(chat("sandbox:tools=1"), way.bare())
    tool = {"role": "tool", "tool_call_id": "call_0", "content": "none"}
    way.make(chat(messages=[*QUESTION, first.choices[0].message, tool]))
    messages = llm(trace()).inputs["messages"]
    assert messages == sandbox.requests("openai")[1].json["messages"]
    assert messages[1]["tool_calls"][0]["id"] == "call_0"


@row(39, "a one-shot iterator as messages reaches the API")
def test_messages_iterator(way, trace, sandbox):
    way.make(chat(messages=iter(QUESTION)))
    assert sandbox.requests("openai")[0].json["messages"] == QUESTION
    assert llm(trace()).inputs["messages"] == QUESTION


@row(40, "NOT_GIVEN and omit are kept out of the trace")
def test_not_given(way, trace):
    way.make(chat(user=openai.NOT_GIVEN, seed=getattr(openai, "omit", openai.NOT_GIVEN)))
    found = trace()
    assert set(llm(found).inputs) == {"model", "messages"}
    text = json.dumps([span.to_dict() for span in found.data.spans])
    assert not any(word in text for word in ("NOT_GIVEN", "NotGiven", "Omit"))


@row(41, "credentials in extra_headers are kept out of the trace")
def test_secrets(way, trace, sandbox):
    way.make(chat(extra_headers={"Authorization": "Bearer sk-SECRET", "x-api-key": "SECRET"}))
    assert sandbox.requests("openai")[0].headers["x-api-key"] == "SECRET"
    text = json.dumps(trace().to_dict())
    assert "SECRET" not in text
    assert "sk-sandbox" not in text


@row(42, "1 MB of an image is kept out of the spans, and the rest of the prompt is not")
def test_image_1mb(way, trace, sandbox):
    url = f"data:image/png;base64,{'iVBORw0KGgoA' * 90_000}"
    asked = {"type": "text", "text": "What is this?"}
    parts = [asked, {"type": "image_url", "image_url": {"url": url}}]
    way.make(chat(messages=[{"role": "user", "content": parts}]))
    assert sandbox.requests("openai")[0].json["messages"][0]["content"] == parts
    found = trace()
    assert llm(found).inputs["messages"][0]["content"][0] == asked
    assert max(len(json.dumps(span.to_dict())) for span in found.data.spans) < 10_000


@row(43, "the request on the wire is what it would be without us")
def test_request_unchanged(way, sandbox, traces):
    mine = {"extra_headers": {"X-Mine": "1"}, "extra_body": {"more": 1}, "user": openai.NOT_GIVEN}

    async def steps(client):
        await given(chat(temperature=0.5, metadata={"mine": "1"}, store=True, **mine)(client))
        await pieces(streamed(**mine)(client))

    way.run(steps, way.bare())
    with mlflow.start_span("mine"), tt.trusted_span("block"):
        way.run(steps)
    assert len(traces(1)[0].data.spans) == 2 + 2 * len(CALL)

    def sent(request):
        noise = {"x-stainless-read-timeout"}
        headers = [pair for pair in request.raw_headers if pair[0].lower() not in noise]
        return request.method, request.path, headers, request.body

    requests = [sent(request) for request in sandbox.requests("openai")]
    assert requests[2:] == requests[:2]


# Streams that are left early. What is given back is what the application still holds.


async def drop(client, _):
    await read_a_word(await given(streamed()(client)))


async def hold(client, _):
    stream = await given(streamed()(client))
    await read_a_word(stream)
    return stream


async def close(client, _):
    stream = await given(streamed()(client))
    await read_a_word(stream)
    await given(stream.close())
    return stream


async def leave_with(client, _):
    async with inside(await given(streamed()(client))) as stream:
        await read_a_word(stream)
    return stream


async def leave_helper(client, helpers):
    helper = helpers(client).stream(model="gpt-4o", messages=QUESTION)
    async with inside(helper) as stream:
        await read_a_word(stream)
    return helper, stream


async def drop_helper(client, helpers):
    helper = helpers(client).stream(model="gpt-4o", messages=QUESTION)
    enter = getattr(helper, "__aenter__", None) or helper.__enter__
    await read_a_word(await given(enter()))


async def close_unread(client, _):
    stream = await given(streamed()(client))
    await given(stream.close())
    return stream


async def drop_unread(client, _):
    await given(streamed()(client))


@row(44, "for + break, stream dropped: ended", drop, FIRST_WORD, on=[SYNC])
@row(45, "for + break, stream still held: ended", hold, FIRST_WORD)
@row(46, "... and then close(): ended", close, FIRST_WORD, on=[SYNC])
@row(47, "with stream: + break: ended at its exit", leave_with, FIRST_WORD, on=[SYNC])
@row(48, "close() before anything was read: ended", close_unread, None)
@row(49, "never iterated, dropped: ended", drop_unread, None, on=[SYNC])
@row(51, "with stream() + break: ended at its exit", leave_helper, FIRST_WORD, on=[SYNC])
@row(52, "... and never exited: ended once it is garbage", drop_helper, FIRST_WORD)
@row(53, "async with stream() + break: ended at its exit", leave_helper, FIRST_WORD, on=[ASYNC])
@row(54, "async for + break, dropped: ended", drop, FIRST_WORD, on=[ASYNC])
@row(55, "async for + break, held, await close(): ended", close, FIRST_WORD, on=[ASYNC])
@row(56, "async with stream: + break: ended at its exit", leave_with, FIRST_WORD, on=[ASYNC])
@row(57, "async, never iterated, dropped: ended", drop_unread, None, on=[ASYNC])
def test_stream_left(way, leave, text, trace, helpers):
    async def steps(client):
        held = await leave(client, helpers)
        await way.collect_garbage()
        return trace(), held

    found, _ = way.run(steps)
    assert_left(found, text)


@row(50, "read with next()")
def test_stream_next(way, trace):
    async def steps(client):
        stream, chunks = await given(streamed()(client)), []
        with contextlib.suppress(StopIteration, StopAsyncIteration):
            while True:
                chunks.append(await anext(stream) if way.is_async else next(stream))
        return trace(), chunks, stream

    found, chunks, _ = way.run(steps)
    assert said(found)["content"] == text_of(chunks) == ANSWER
    assert_whole(found)


# Failures.


def failure(way, call, client):
    """What a call ends in, read to its end."""
    with pytest.raises(Exception, match=r".") as caught:
        way.read(call, client)
    return caught.value


@row(58, "API error in mid-stream: ERROR, text kept", "stream_error", openai.APIError, on=[SYNC])
@row(59, "the same, async", "stream_error", openai.APIError, on=[ASYNC])
@row(60, "connection dropped in mid-stream: the same", "disconnect", Exception)
def test_stream_that_breaks(way, fault, kind, trace):
    call = streamed(f"sandbox:{fault}=2")
    bare, ours = failure(way, call, way.bare()), failure(way, call, way.client())
    assert isinstance(ours, kind)
    assert (type(ours), str(ours)) == (type(bare), str(bare))
    found = trace()
    assert_left(found, outcome="error")
    assert_failed(llm(found), type(ours).__name__, str(ours))


@row(61, "the consumer raises inside with stream: ended, and ERROR")
def test_stream_with_consumer_raises(way, trace):
    mine = KeyError("mine")

    async def steps(client):
        async with inside(await given(streamed()(client))) as stream:
            async for piece in each(stream):
                if has_word(piece):
                    raise mine

    with pytest.raises(KeyError) as caught:
        way.run(steps)
    assert caught.value is mine
    found = trace()
    assert said(found)["content"] == FIRST_WORD
    assert_failed(llm(found))


@row(62, "a task is cancelled in mid-stream: not OK, and the text so far", on=[ASYNC])
def test_stream_cancelled(way, trace):
    async def steps(client):
        first = asyncio.Event()

        async def read():
            async for _ in await streamed(PAUSES)(client):
                first.set()

        task = asyncio.ensure_future(read())
        await first.wait()
        task.cancel()
        await task

    with pytest.raises(asyncio.CancelledError):
        way.run(steps)
    found = trace()
    assert_left(found, text="", outcome="cancelled")
    assert_failed(llm(found), "CancelledError")


@row(63, "a task is cancelled during await create(): ended, and ERROR", on=[ASYNC])
def test_create_cancelled(way, trace, sandbox):
    async def steps(client):
        task = asyncio.ensure_future(chat(HANGS)(client))
        await asyncio.to_thread(sandbox.wait_for, "openai", 1)
        task.cancel()
        await task

    with pytest.raises(asyncio.CancelledError):
        way.run(steps)
    assert_failed(llm(trace()), "CancelledError")


@pytest.fixture
def interruptible():
    """A process that a shell has put into the background ignores the signal otherwise."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@row(64, "KeyboardInterrupt out of the call: ended, and ERROR")
def test_keyboard_interrupt(way, trace, sandbox, interruptible):
    def press_ctrl_c():
        sandbox.wait_for("openai", 1)
        signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)

    with ThreadPoolExecutor() as pool:
        pool.submit(press_ctrl_c)
        with pytest.raises(KeyboardInterrupt):
            way.make(chat(HANGS))
    span = llm(trace())
    assert_failed(span)
    # An event loop may turn it into a cancellation.
    kinds = ["KeyboardInterrupt", *(["CancelledError"] if way.is_async else [])]
    assert span.status.description.partition(":")[0] in kinds


# Context.


@row(65, "a stream read in another thread or task")
def test_stream_elsewhere(way, trace):
    async def steps(client):
        stream = await given(streamed()(client))
        if way.is_async:
            return await asyncio.ensure_future(pieces(stream))
        with ThreadPoolExecutor() as pool:
            return pool.submit(list, stream).result()

    with mlflow.start_span("mine"):
        chunks = way.run(steps)
    found = trace()
    assert names(found) == ["mine", *CALL]
    assert said(found)["content"] == text_of(chunks) == ANSWER
    assert_whole(found)


@row(66, "spans that the caller opens while iterating are not below the LLM span")
def test_stream_ctx_leak(way, trace):
    async def steps(client):
        with mlflow.start_span("outer"):
            async for _ in each(await given(streamed()(client))):
                with mlflow.start_span("inner"):
                    pass

    way.run(steps)
    outer, *spans = trace().data.spans
    parents = [span.parent_id for span in spans if span.name == "inner"]
    assert parents == [outer.span_id] * 5


@row(67, "a stream that is returned from the traced function keeps its parent")
def test_stream_outlives_parent(way, trace):
    # What a function gives may be awaitable or not: the decorator tells the two apart.
    @tt.trusted(name="root")
    def ask(client):
        return streamed()(client)

    @tt.trusted(name="root")
    async def ask_async(client):
        return await streamed()(client)

    chunks = way.read(ask_async if way.is_async else ask, way.bare())
    found = trace()
    assert sorted(names(found)) == sorted(["root", *CALL])
    assert_below(found, 1)
    assert said(found)["content"] == text_of(chunks) == ANSWER


@row(68, "a 4xx: the exception is unchanged, the span ERROR with its message")
def test_error_400(way, trace):
    call = chat("sandbox:status=400")
    bare, ours = failure(way, call, way.bare()), failure(way, call, way.client())
    assert isinstance(ours, openai.BadRequestError)
    assert (type(ours), str(ours), ours.body) == (type(bare), str(bare), bare.body)
    assert_failed(llm(trace()), "BadRequestError", "The Sandbox was told to fail.")


@row(69, "each retry of openai's client is visible")
def test_retries(way, trace, sandbox):
    way.make(chat("sandbox:fail_first=2,retry_after=0.01"))
    assert len(sandbox.requests("openai")) == 3
    span = llm(trace())
    assert span.status.status_code.value == "OK"
    assert span.attributes["http.request.resend_count"] == 2
    retries = [event.attributes for event in span.events if event.name == "retry"]
    assert [event["http.request.resend_count"] for event in retries] == [1, 2]


@row(70, "calls are nested under the decorated function: sync, gather, to_thread")
def test_ctx_nested(way, trace):
    @tt.trusted(name="root")
    def ask(client):
        return chat()(client)

    @tt.trusted(name="root")
    async def ask_async(client):
        await asyncio.gather(chat()(client), chat()(client))
        await asyncio.to_thread(chat(), openai.OpenAI())

    way.make(ask_async if way.is_async else ask, way.bare())
    assert_below(trace(), 3 if way.is_async else 1)


@row(71, "... and in a ThreadPoolExecutor, without the user's help")
def test_ctx_threadpool(way, trace):
    @tt.trusted(name="root")
    def ask(client):
        with ThreadPoolExecutor() as pool:
            list(pool.map(chat(), [client, client]))

    @tt.trusted(name="root")
    async def ask_async(_):
        run = asyncio.get_running_loop().run_in_executor
        with ThreadPoolExecutor() as pool:
            await asyncio.gather(*(run(pool, chat(), openai.OpenAI()) for _ in range(2)))

    way.make(ask_async if way.is_async else ask, way.bare())
    assert_below(trace(), 2)


@tt.trusted(name="root")
def words(client):
    for chunk in streamed()(client):
        yield chunk.choices[0].delta.content or ""


@tt.trusted(name="root")
async def words_async(client):
    async for chunk in await streamed()(client):
        yield chunk.choices[0].delta.content or ""


@row(72, "a decorated generator: call nested, output captured", words, on=[SYNC])
@row(73, "a decorated async generator: the same", words_async, on=[ASYNC])
def test_generator(way, generator, trace):
    assert "".join(way.read(generator, way.bare())) == ANSWER
    found = trace()
    assert found.data.spans[0].outputs == ANSWER
    assert_below(found, 1)


@row(74, "... left early by its consumer: its span ends")
def test_generator_left(way, trace):
    async def steps(client):
        async for word in each((words_async if way.is_async else words)(client)):
            if word:
                break
        await way.collect_garbage()
        return trace()

    found = way.run(steps, way.bare())
    root = found.data.spans[0]
    assert (root.outputs, root.status.status_code.value) == (FIRST_WORD, "OK")
    assert_below(found, 1)


@row(75, "switched off: nothing is traced, and nothing is left on the classes")
def test_uninstrument(way, traces):
    classes = (openai.OpenAI, openai.AsyncOpenAI)
    before = [dict(vars(cls)) for cls in classes]
    tt.autolog()
    way.make(chat(), way.bare())
    tt.autolog(disable=True)
    assert [dict(vars(cls)) for cls in classes] == before
    way.make(chat(), way.bare())
    traces(1)


def test_every_row_is_there():
    assert sorted(ROWS) == [number for number in range(1, 76) if number != 10]
