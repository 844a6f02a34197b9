"""What happens to an answer whose score is low: at each call site, and at the end of a stream."""

import asyncio
import contextlib
import json
import os
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import fresh
import openai
import pytest

import tlm_tracing as tt
from tlm_tracing.openai import AsyncOpenAI, OpenAI
from tlm_tracing.testing import FakeScorer

QUESTION = [{"role": "user", "content": "What is the capital of France?"}]
ANSWER = "It is Paris, I am quite sure."
needs_responses = pytest.mark.skipif(
    not hasattr(openai.OpenAI, "responses"), reason="this openai has no Responses API"
)


@pytest.fixture(autouse=True)
def running(sandbox):
    sandbox.answer(QUESTION[0]["content"], ANSWER)


def low(**settings):
    """Every answer is below the threshold."""
    tt.configure(scorer=FakeScorer(default=0.3), threshold=0.5, **settings)


def ask(client=None, **options):
    client = client or OpenAI()
    return client.chat.completions.create(**{"model": "gpt-4o", "messages": QUESTION, **options})


async def settled(value):
    return await value if hasattr(value, "__await__") else value


def spans_of(trace):
    return {span.name: span for span in trace.data.spans}


def text_of(completion):
    """The text of a chat completion, or of a response."""
    if hasattr(completion, "choices"):
        return completion.choices[0].message.content
    return completion.output_text


class Case:
    """One way to get an answer, sync or async, by either endpoint."""

    def __init__(self, client_class, endpoint, by_helper=False):
        self.client_class = client_class
        self.is_async = issubclass(client_class, openai.AsyncOpenAI)
        self.endpoint = endpoint
        self.by_helper = by_helper
        self.parent = "chat gpt-4o" if endpoint == "chat" else "response gpt-4o"
        self.llm = "openai.chat.completions" if endpoint == "chat" else "openai.responses"
        self.seen = []
        self.stream = None

    @property
    def bare(self):
        return openai.AsyncOpenAI if self.is_async else openai.OpenAI

    def resource(self, client):
        return client.chat.completions if self.endpoint == "chat" else client.responses

    def request(self, **options):
        asked = {"messages": QUESTION} if self.endpoint == "chat" else {"input": QUESTION}
        return {"model": "gpt-4o", **asked, **options}

    def read(self, client_class=None, **options):
        """Read a stream to its end; what has come is in ``seen`` at any time."""
        self.seen = []
        asyncio.run(self.aread(client_class or self.client_class, options))
        return self.seen

    async def aread(self, client_class, options):
        async with contextlib.AsyncExitStack() as stack:
            client = client_class()
            if self.is_async:
                await stack.enter_async_context(client)
            self.stream = await self.open(client, stack, options)
            if hasattr(self.stream, "__aiter__"):
                async for item in self.stream:
                    self.seen.append(item)
            else:
                for item in self.stream:
                    self.seen.append(item)

    async def open(self, client, stack, options):
        if not self.by_helper:
            request = self.request(stream=True, **options)
            return await settled(self.resource(client).create(**request))
        resource = self.resource(client)
        if not hasattr(resource, "stream"):
            resource = client.beta.chat.completions
        helper = resource.stream(**self.request(**options))
        if self.is_async:
            return await stack.enter_async_context(helper)
        return stack.enter_context(helper)

    def chunks(self):
        """What has come as the stream's own chunks or events."""
        if self.endpoint == "chat" and self.by_helper:
            return [event.chunk for event in self.seen if event.type == "chunk"]
        return self.seen

    def text(self):
        if self.endpoint == "chat":
            return "".join(c.choices[0].delta.content or "" for c in self.chunks() if c.choices)
        return "".join(e.delta for e in self.seen if e.type == "response.output_text.delta")

    def has_ended(self):
        if self.endpoint == "chat":
            return any(c.choices and c.choices[0].finish_reason for c in self.chunks())
        return any(event.type == "response.completed" for event in self.seen)

    def metadata(self):
        """Of each chunk that has any; where it is on the event of a helper, its response's."""
        told = (
            getattr(chunk, "tlm_metadata", None)
            or getattr(getattr(chunk, "response", None), "tlm_metadata", None)
            for chunk in self.chunks()
        )
        return [metadata for metadata in told if metadata]


def cases(*client_classes, helpers=True):
    return [
        pytest.param(
            Case(client_class, endpoint, by_helper),
            id=f"{endpoint}-{client_class.__name__}-{'helper' if by_helper else 'create'}",
            marks=[needs_responses] if endpoint == "responses" else [],
        )
        for client_class in client_classes
        for endpoint in ("chat", "responses")
        for by_helper in ([False, True] if helpers else [False])
    ]


every_stream = pytest.mark.parametrize("case", cases(OpenAI, AsyncOpenAI))
every_answer = pytest.mark.parametrize("case", cases(OpenAI, AsyncOpenAI, helpers=False))


# The end of a stream is held back.


@every_stream
def test_the_end_of_a_stream_is_held_until_the_score_is_in(case, scorer, trace):
    scorer.hold()
    tt.configure(scorer=scorer, hold_last_chunk=True)
    reader = threading.Thread(target=case.read)
    reader.start()
    scorer.wait_for(1)
    assert case.text() == ANSWER
    assert not case.has_ended()
    scorer.release()
    reader.join(10)
    assert case.has_ended()
    assert case.metadata() == [{"trustworthiness_score": 0.9, "log": {}}]
    assert tt.trust(case.stream).score == 0.9
    found = trace()
    assert found.data.spans[0].outputs
    assert found.info.tags["trust_score"] == "0.9000"
    assert "tlm.action" not in spans_of(found)[case.parent].attributes


def told(items):
    """What a stream told, without what the server makes up anew for each answer."""
    told = []
    for item in items:
        data = item.model_dump(exclude={"tlm_metadata": True, "response": {"tlm_metadata"}})
        told.append(_without_ids(data))
    return told


def _without_ids(data):
    if isinstance(data, dict):
        volatile = ("id", "item_id", "created", "created_at", "completed_at", "tlm_metadata")
        return {key: _without_ids(value) for key, value in data.items() if key not in volatile}
    return [_without_ids(item) for item in data] if isinstance(data, list) else data


@every_stream
def test_a_held_stream_gives_what_the_bare_one_gives(case):
    bare = told(case.read(case.bare))
    tt.configure(scorer=FakeScorer(), hold_last_chunk=True)
    assert told(case.read()) == bare


VARIANTS = {
    "usage": {"stream_options": {"include_usage": True}},
    "choices": {"n": 3},
    "choices and usage": {"n": 2, "stream_options": {"include_usage": True}},
    "tools": {"model": "sandbox:tools=3"},
    "refusal": {"model": "sandbox:refusal=I will not do that"},
    "empty": {"model": "sandbox:empty=true"},
    "length": {"model": "sandbox:finish_reason=length"},
    "truncated": {"model": "sandbox:truncate=2"},
}


@pytest.mark.parametrize("options", VARIANTS.values(), ids=VARIANTS)
def test_no_chunk_is_lost_doubled_or_moved(options):
    bare = told(ask(openai.OpenAI(), stream=True, **options))
    tt.configure(scorer=FakeScorer(), hold_last_chunk=True)
    assert told(ask(stream=True, **options)) == bare


def test_the_last_chunk_of_all_carries_the_score(trace):
    tt.configure(scorer=FakeScorer({"trustworthiness_score": 0.8, "log": {"explanation": "Yes."}}))
    client = tt.wrap_openai(openai.OpenAI(), hold_last_chunk=True)
    *_, ended, usage = ask(client, stream=True, stream_options={"include_usage": True})
    assert not hasattr(ended, "tlm_metadata")
    assert usage.tlm_metadata == {"trustworthiness_score": 0.8, "log": {"explanation": "Yes."}}
    assert tt.trust(usage).score == 0.8
    assert trace().info.token_usage["total_tokens"] == usage.usage.total_tokens


def test_a_chunk_that_is_kept_from_the_caller_carries_nothing(trace):
    tt.configure(scorer=FakeScorer(), hold_last_chunk=True, stream_usage=True)
    *_, last = ask(stream=True)
    assert last.choices[0].finish_reason == "stop"
    assert last.tlm_metadata["trustworthiness_score"] == 0.9
    assert trace().info.token_usage["total_tokens"] > 0


def test_the_first_chunks_are_not_held(scorer):
    tt.configure(scorer=scorer, hold_last_chunk=True)
    started = time.monotonic()
    stream = ask(model="sandbox:content=a b c d,chunk_delay=0.2", stream=True)
    next(stream)
    assert time.monotonic() - started < 0.75 < 5 * 0.2
    assert not scorer.exchanges
    stream.close()


def event_stream(*chunks):
    """A client whose server sends these chunks, whatever is asked."""
    library = sys.modules[openai.DefaultHttpxClient.__mro__[1].__module__.partition(".")[0]]
    lines = [f"data: {json.dumps(chunk)}\n\n" for chunk in chunks]
    body = "".join([*lines, "data: [DONE]\n\n"]).encode()

    def answer(request):
        headers = {"content-type": "text/event-stream"}
        return library.Response(200, headers=headers, content=body)

    return OpenAI(http_client=library.Client(transport=library.MockTransport(answer)))


def piece(index, content=None, finish_reason=None):
    choice = {"index": index, "delta": {"content": content}, "finish_reason": finish_reason}
    return {
        "id": "chatcmpl-1",
        "object": "chat.completion.chunk",
        "created": 1,
        "model": "gpt-4o",
        "choices": [choice],
    }


def test_choices_that_come_one_after_the_other_are_held_once(scorer):
    tt.configure(scorer=scorer, hold_last_chunk=True)
    sent = [piece(0, "a"), piece(0, None, "stop"), piece(1, "b"), piece(1, None, "stop")]
    stream = ask(event_stream(*sent), stream=True, n=2)
    assert [next(stream).choices[0].index for _ in range(3)] == [0, 0, 1]
    assert not scorer.exchanges
    (last,) = stream
    assert (last.choices[0].index, tt.trust(last).score) == (1, 0.9)
    assert [exchange.response for exchange in scorer.exchanges] == ["a", "b"]


def test_odd_chunks_are_given_as_they_came(caplog):
    tt.configure(scorer=FakeScorer(), hold_last_chunk=True)
    odd = [piece(0, "a"), {**piece(0), "choices": None}, piece(0, None, "stop"), {"odd": True}]
    ours = list(ask(event_stream(*odd), stream=True))
    assert [chunk.model_dump(exclude_unset=True) for chunk in ours[:3]] == odd[:3]
    assert ours[3].odd is True


# What becomes of a low answer that is streamed.


@every_stream
def test_a_low_stream_raises_in_place_of_its_end(case, trace):
    low(hold_last_chunk=True, on_low="raise")
    with pytest.raises(tt.UntrustworthyResponseError, match=r"0\.3000.*0\.5000") as caught:
        case.read()
    assert text_of(caught.value.completion) == ANSWER
    assert caught.value.trust.score == 0.3
    assert case.text() == ANSWER
    assert not case.has_ended()
    assert not case.metadata()
    found = trace()
    call = spans_of(found)[case.parent]
    assert call.attributes["tlm.action"] == "raised"
    assert call.attributes["tlm.threshold"] == 0.5
    assert spans_of(found)[case.llm].outputs
    assert spans_of(found)[case.llm].attributes["stream.outcome"] == "complete"
    assert found.info.tags["trust_score"] == "0.3000"


@every_stream
def test_a_low_stream_ends_with_its_replacement(case, trace):
    calls = []

    def better(completion, trust):
        calls.append((text_of(completion), trust.score))
        return "I am not sure."

    low(hold_last_chunk=True, on_low=better)
    case.read()
    assert calls == [(ANSWER, 0.3)]
    assert case.has_ended()
    (metadata,) = case.metadata()
    assert metadata["replacement"] == "I am not sure."
    assert metadata["trustworthiness_score"] == 0.3
    found = spans_of(trace())
    assert found[case.parent].attributes["tlm.action"] == "replaced"
    assert found[case.parent].outputs == "I am not sure."
    assert ANSWER in json.dumps(found[case.llm].outputs)


@every_stream
def test_a_low_stream_is_flagged(case, trace):
    low(hold_last_chunk=True)
    case.read()
    assert case.has_ended()
    assert [metadata["trustworthiness_score"] for metadata in case.metadata()] == [0.3]
    call = spans_of(trace())[case.parent]
    assert call.attributes["tlm.action"] == "flagged"
    assert call.attributes["tlm.threshold"] == 0.5


def test_a_replacement_is_the_very_object_that_was_given():
    def retry(completion, trust):
        return ask(model="gpt-5")

    low(hold_last_chunk=True, on_low=retry)
    *_, last = ask(stream=True)
    replacement = last.tlm_metadata["replacement"]
    assert type(replacement) is openai.types.chat.ChatCompletion
    assert replacement.model == "gpt-5-2024-08-06"


@needs_responses
def test_the_last_event_and_its_response_carry_the_replacement():
    low(hold_last_chunk=True, on_low=lambda response, trust: ["another", response.id])
    *_, last = OpenAI().responses.create(model="gpt-4o", input="Where?", stream=True)
    assert last.type == "response.completed"
    assert last.tlm_metadata["replacement"] == ["another", last.response.id]
    assert last.response.tlm_metadata == last.tlm_metadata
    assert tt.trust(last.response).score == tt.trust(last).score == 0.3


def test_a_fallbacks_exception_comes_in_place_of_the_streams_end(trace):
    def broken(completion, trust):
        raise KeyError("mine")

    low(hold_last_chunk=True, on_low=broken)
    case = Case(OpenAI, "chat")
    with pytest.raises(KeyError, match="mine"):
        case.read()
    assert not case.has_ended()
    call = trace().data.spans[0]
    assert call.attributes["tlm.action"] == "replaced"
    assert call.outputs["choices"][0]["message"]["content"] == ANSWER


def test_without_the_opt_in_a_low_stream_is_flagged_only(trace):
    low(on_low="raise")
    chunks = list(ask(stream=True))
    assert chunks[-1].choices[0].finish_reason == "stop"
    assert trace().data.spans[0].attributes["tlm.action"] == "flagged"


def test_a_stream_parsed_from_a_raw_response_is_held(traces):
    low(hold_last_chunk=True, on_low="raise")
    raw = OpenAI().chat.completions.with_raw_response
    stream = raw.create(model="gpt-4o", messages=QUESTION, stream=True).parse()
    with pytest.raises(tt.UntrustworthyResponseError):
        list(stream)
    lazy = OpenAI().chat.completions.with_streaming_response
    with (
        lazy.create(model="gpt-4o", messages=QUESTION, stream=True) as response,
        pytest.raises(tt.UntrustworthyResponseError),
    ):
        list(response.parse())
    for found in traces(2):
        assert found.data.spans[0].attributes["tlm.action"] == "raised"


def test_a_body_of_events_that_is_read_as_such_is_flagged_only(trace):
    low(hold_last_chunk=True, on_low="raise")
    lazy = OpenAI().chat.completions.with_streaming_response
    with lazy.create(model="gpt-4o", messages=QUESTION, stream=True) as response:
        assert list(response.iter_lines())[-2] == "data: [DONE]"
    assert trace().data.spans[0].attributes["tlm.action"] == "flagged"


# Where nothing is held, or nothing is decided.


@every_stream
@pytest.mark.parametrize("mode", ["background", "off"])
def test_nothing_is_held_in_other_modes(case, mode, scorer, trace):
    scorer.hold()
    tt.configure(scorer=scorer, mode=mode, hold_last_chunk=True, threshold=1.0, on_low="raise")
    case.read()
    assert case.has_ended()
    assert not case.metadata()
    scorer.release()
    trace()


@pytest.mark.parametrize("mode", ["background", "off"])
def test_in_other_modes_the_last_chunk_comes_before_the_bodys_end(mode):
    library = sys.modules[openai.DefaultHttpxClient.__mro__[1].__module__.partition(".")[0]]
    was_given, in_time = threading.Event(), []

    class Body(library.SyncByteStream):
        def __iter__(self):
            yield f"data: {json.dumps(piece(0, 'Yes.', 'stop'))}\n\n".encode()
            in_time.append(was_given.wait(5))
            yield b"data: [DONE]\n\n"

    def answer(request):
        headers = {"content-type": "text/event-stream"}
        return library.Response(200, headers=headers, stream=Body())

    tt.configure(scorer=FakeScorer(), mode=mode, hold_last_chunk=True)
    client = OpenAI(http_client=library.Client(transport=library.MockTransport(answer)))
    for chunk in ask(client, stream=True):
        assert chunk.choices[0].finish_reason == "stop"
        was_given.set()
    assert in_time == [True]


@pytest.mark.parametrize(
    ("scorer", "reason"),
    [
        (None, "no_scorer"),
        (FakeScorer(default=RuntimeError("no score today")), "scorer_error"),
        (FakeScorer(default="nonsense"), "scorer_error"),
    ],
)
def test_an_unscored_stream_is_given_as_it_is(scorer, reason, trace):
    low(hold_last_chunk=True, on_low="raise")
    case = Case(OpenAI, "chat")
    tt.configure(scorer=scorer)
    case.read()
    assert case.has_ended()
    assert not case.metadata()
    assert tt.trust(case.stream).reason == reason
    assert "tlm.action" not in trace().data.spans[0].attributes


def test_a_stream_is_held_no_longer_than_a_score_may_take(scorer, trace):
    scorer.hold()
    tt.configure(scorer=scorer, timeout=0.2, hold_last_chunk=True, threshold=1.0, on_low="raise")
    case = Case(OpenAI, "chat")
    started = time.monotonic()
    case.read()
    assert 0.2 <= time.monotonic() - started < 5
    assert case.has_ended()
    assert tt.trust(case.stream).reason == "timeout"
    trace()


def test_a_scorers_failure_is_raised_after_the_stream_if_asked():
    tt.configure(scorer=FakeScorer(RuntimeError("no")), on_error="raise", hold_last_chunk=True)
    case = Case(OpenAI, "chat")
    with pytest.raises(tt.ScoringError):
        case.read()
    assert case.has_ended()


def test_bare_streams_are_not_held(scorer):
    scorer.hold()
    tt.configure(scorer=scorer, hold_last_chunk=True)
    *_, last = ask(openai.OpenAI(), stream=True)
    assert last.choices[0].finish_reason == "stop"
    assert not hasattr(last, "tlm_metadata")


def test_one_clients_streams_can_be_held_by_the_environment(monkeypatch):
    monkeypatch.setenv("TLM_TRACING_HOLD_LAST_CHUNK", "true")
    tt.configure(scorer=FakeScorer())
    *_, last = ask(stream=True)
    assert last.tlm_metadata["trustworthiness_score"] == 0.9
    *_, last = ask(tt.wrap_openai(openai.OpenAI(), hold_last_chunk=False), stream=True)
    assert not hasattr(last, "tlm_metadata")


# A stream that ends otherwise, held or not.


def leave(stream):
    next(stream)
    stream.close()


def leave_by_break(stream):
    with stream:
        for _ in stream:
            break


@pytest.mark.parametrize("leave", [leave, leave_by_break])
def test_a_stream_that_is_left_before_its_end_is_not_judged(leave, trace, scorer):
    tt.configure(scorer=scorer, hold_last_chunk=True, threshold=1.0, on_low="raise")
    leave(ask(stream=True))
    assert trace().data.spans[0].attributes["tlm.reason"] == "partial_stream"
    assert not scorer.exchanges


def until_it_breaks(client):
    options = {"model": "sandbox:content=a b,stream_error=4"}
    seen = []
    stream = ask(client, stream=True, stream_options={"include_usage": True}, **options)
    with pytest.raises(openai.APIError):
        seen.extend(stream)  # what came before the error is there
    return seen


def test_a_stream_that_breaks_after_its_last_chunk_gives_it_first(trace):
    bare = until_it_breaks(openai.OpenAI())
    assert bare[-1].choices[0].finish_reason == "stop"
    tt.configure(scorer=FakeScorer(), hold_last_chunk=True)
    assert told(until_it_breaks(OpenAI())) == told(bare)
    assert spans_of(trace())["openai.chat.completions"].attributes["stream.outcome"] == "error"


def test_a_reader_who_is_cancelled_while_the_end_is_held_gets_no_more(scorer, trace):
    scorer.hold()
    tt.configure(scorer=scorer, hold_last_chunk=True)
    case = Case(AsyncOpenAI, "chat")

    async def main():
        reading = asyncio.ensure_future(case.aread(AsyncOpenAI, {}))
        await asyncio.to_thread(scorer.wait_for, 1)
        reading.cancel()
        with pytest.raises(asyncio.CancelledError):
            await reading

    asyncio.run(main())
    assert not case.has_ended()
    scorer.release()
    assert trace().info.tags["trust_score"] == "0.9000"


def test_an_interrupt_while_the_end_is_held_is_the_callers(trace):
    def interrupted(completion, trust):
        raise KeyboardInterrupt

    low(hold_last_chunk=True, on_low=interrupted)
    case = Case(OpenAI, "chat")
    with pytest.raises(KeyboardInterrupt):
        case.read()
    assert not case.has_ended()
    trace()


def test_a_held_stream_can_be_closed_by_another_thread(scorer, trace):
    scorer.hold()
    tt.configure(scorer=scorer, hold_last_chunk=True)
    case = Case(OpenAI, "chat")
    reader = threading.Thread(target=case.read)
    reader.start()
    scorer.wait_for(1)
    case.stream.close()
    scorer.release()
    reader.join(10)
    assert case.has_ended()
    assert trace().info.tags["trust_score"] == "0.9000"


def test_whoever_stops_at_the_last_chunk_of_a_held_stream_has_the_score(trace):
    tt.configure(scorer=FakeScorer(), hold_last_chunk=True)
    with ask(stream=True) as stream:
        last = next(chunk for chunk in stream if chunk.choices[0].finish_reason)
    assert last.tlm_metadata["trustworthiness_score"] == 0.9
    assert spans_of(trace())["openai.chat.completions"].attributes["stream.outcome"] == "complete"


# Fallbacks that ask again.


@every_answer
def test_a_fallback_may_ask_again_by_each_way(case, trace):
    async def aretry(completion, trust):
        async with AsyncOpenAI() as client:
            return await case.resource(client).create(**case.request(model="gpt-5"))

    def retry(completion, trust):
        return case.resource(OpenAI()).create(**case.request(model="gpt-5"))

    async def main():
        client = case.client_class()
        return await settled(case.resource(client).create(**case.request()))

    low(on_low=aretry if case.is_async else retry)
    assert asyncio.run(main()).model.startswith("gpt-5")
    found = trace()
    spans = spans_of(found)
    assert spans[case.parent.replace("gpt-4o", "gpt-5")].parent_id == spans[case.parent].span_id
    assert len(found.data.spans) == 6


@every_stream
def test_a_streams_fallback_may_ask_again(case, trace):
    async def aretry(completion, trust):
        async with AsyncOpenAI() as client:
            stream = await ask(client, model="gpt-5", stream=True)
            return "".join([c.choices[0].delta.content or "" async for c in stream])

    def retry(completion, trust):
        stream = ask(model="gpt-5", stream=True)
        return "".join(c.choices[0].delta.content or "" for c in stream)

    low(hold_last_chunk=True, on_low=aretry if case.is_async else retry)
    case.read()
    assert case.metadata()[0]["replacement"] == ANSWER
    found = trace().data.spans
    parent = next(span for span in found if span.name == case.parent)
    inner = next(span for span in found if span.name == "chat gpt-5")
    assert inner.parent_id == parent.span_id
    assert len(found) == 6


def test_a_fallback_that_asks_in_a_pool_is_not_called_again(trace):
    calls = []

    def retry(completion, trust):
        calls.append(trust)
        assert len(calls) < 5
        with ThreadPoolExecutor() as pool:
            models = ["gpt-5", "gpt-5-mini"]
            first, _ = pool.map(lambda model: ask(openai.OpenAI(), model=model), models)
            return first

    low(on_low=retry)
    tt.autolog()
    assert ask(openai.OpenAI()).model.startswith("gpt-5")
    assert len(calls) == 1
    spans = spans_of(trace())
    for model in ("gpt-5", "gpt-5-mini"):
        assert spans[f"chat {model}"].parent_id == spans["chat gpt-4o"].span_id


def test_a_fallback_that_asks_in_tasks_is_not_called_again(trace):
    calls = []

    async def retry(completion, trust):
        calls.append(trust)
        async with AsyncOpenAI() as client:
            models = ["gpt-5", "gpt-5-mini"]
            return (await asyncio.gather(*(ask(client, model=model) for model in models)))[0]

    async def main():
        async with AsyncOpenAI() as client:
            return await ask(client)

    low(on_low=retry)
    asyncio.run(main())
    assert len(calls) == 1
    spans = spans_of(trace())
    for model in ("gpt-5", "gpt-5-mini"):
        assert spans[f"chat {model}"].parent_id == spans["chat gpt-4o"].span_id


def test_what_a_fallback_leaves_running_does_not_call_it_again():
    calls, tasks = [], []

    async def again():
        async with AsyncOpenAI() as client:
            return await ask(client, model="gpt-5")

    async def later(completion, trust):
        calls.append(trust)
        assert len(calls) < 5
        tasks.append(asyncio.ensure_future(again()))
        return completion

    async def main():
        async with AsyncOpenAI() as client:
            await ask(client)
            for task in tasks:
                await task
            assert len(calls) == 1
            await ask(client)
            assert len(calls) == 2
            await tasks[-1]

    low(on_low=later)
    asyncio.run(main())
    assert len(calls) == 2


def test_a_fallback_may_have_a_threshold_and_a_fallback_of_its_own(trace):
    def stronger(completion, trust):
        with tt.trusted_span("stronger", threshold=0.4, on_low=strongest):
            return ask(openai.OpenAI(), model="gpt-5")

    def strongest(completion, trust):
        return ask(openai.OpenAI(), model="o3")

    tt.configure(scorer=FakeScorer(0.3, 0.35, 0.1), threshold=0.5, on_low=stronger)
    assert ask().model.startswith("o3")
    spans = spans_of(trace())
    assert spans["stronger"].parent_id == spans["chat gpt-4o"].span_id
    assert spans["chat gpt-5"].parent_id == spans["stronger"].span_id
    assert spans["chat o3"].parent_id == spans["chat gpt-5"].span_id
    actions = {name: spans[name].attributes.get("tlm.action") for name in spans if "chat " in name}
    assert actions == {"chat gpt-4o": "replaced", "chat gpt-5": "replaced", "chat o3": None}


def test_after_a_fallback_the_threshold_is_in_force_again():
    low(on_low=lambda completion, trust: "replaced")
    assert (ask(), ask()) == ("replaced", "replaced")


@pytest.mark.parametrize("fallback", [None, 0, "I am not sure.", ["a", "list"], object()])
def test_a_fallback_may_give_anything(fallback, trace):
    low(on_low=lambda completion, trust: fallback)
    assert ask() is fallback
    parent, llm, _ = trace().data.spans
    assert parent.attributes["tlm.action"] == "replaced"
    if isinstance(fallback, (str, list, int)):
        assert parent.outputs == fallback
    assert llm.outputs["choices"][0]["message"]["content"] == ANSWER


@every_answer
def test_a_fallback_that_fails_leaves_its_mark(case, trace):
    def broken(completion, trust):
        raise KeyError("mine")

    async def main():
        await settled(case.resource(case.client_class()).create(**case.request()))

    low(on_low=broken)
    with pytest.raises(KeyError, match="mine"):
        asyncio.run(main())
    found = spans_of(trace())
    assert found[case.parent].attributes["tlm.action"] == "replaced"
    assert found[case.parent].attributes["tlm.threshold"] == 0.5
    assert found[case.parent].outputs == found[case.llm].outputs


@pytest.mark.parametrize("scorer", [None, FakeScorer(default=RuntimeError("no score today"))])
def test_an_unscored_answer_is_never_low(scorer, trace):
    calls = []
    low(on_low=lambda *args: calls.append(args))
    tt.configure(scorer=scorer)
    assert text_of(ask()) == ANSWER
    assert calls == []
    assert "tlm.action" not in trace().data.spans[0].attributes


# Raw responses.


async def ask_raw(case, to_parse=True, **options):
    """A raw response and what its parsing gives, eagerly read."""
    resource = case.resource(case.client_class()).with_raw_response
    raw = await settled(resource.create(**case.request(**options)))
    return raw, raw.parse() if to_parse else None


async def ask_lazily(case, read="parse", **options):
    """A raw response and what its parsing gives, which reads it."""
    resource = case.resource(case.client_class()).with_streaming_response
    async with contextlib.AsyncExitStack() as stack:
        manager = resource.create(**case.request(**options))
        if case.is_async:
            raw = await stack.enter_async_context(manager)
        else:
            raw = stack.enter_context(manager)
        return raw, await settled(getattr(raw, read)())


either_raw = pytest.mark.parametrize("asking", [ask_raw, ask_lazily], ids=["eager", "lazy"])


@every_answer
@either_raw
@pytest.mark.parametrize(
    "fallback", ["I am not sure.", None, object()], ids=["text", "None", "object"]
)
def test_parsing_a_raw_response_gives_the_fallback(case, asking, fallback, trace, sandbox):
    low(on_low=lambda completion, trust: fallback)
    raw, parsed = asyncio.run(asking(case))
    assert parsed is fallback
    assert asyncio.run(settled(raw.parse())) is fallback
    assert (raw.status_code, raw.http_response.status_code) == (200, 200)
    assert raw.headers["x-request-id"] == raw.request_id
    assert ANSWER in raw.http_response.text
    found = spans_of(trace())
    assert found[case.parent].attributes["tlm.action"] == "replaced"
    assert found[case.llm].attributes["openai.request_id"] == raw.headers["x-request-id"]
    assert tt.trust(raw).score == 0.3


@every_answer
@either_raw
def test_a_raw_response_is_of_the_bare_ones_kind(case, asking):
    bare, _ = asyncio.run(asking(Case(case.bare, case.endpoint)))
    low(on_low=lambda completion, trust: completion)
    raw, parsed = asyncio.run(asking(case))
    assert isinstance(raw, type(bare))
    assert repr(type(raw)) == repr(type(bare))
    assert text_of(parsed) == ANSWER


@every_answer
@either_raw
def test_a_low_raw_response_raises_if_asked(case, asking, trace):
    low(on_low="raise")
    with pytest.raises(tt.UntrustworthyResponseError) as caught:
        asyncio.run(asking(case))
    assert text_of(caught.value.completion) == ANSWER
    assert spans_of(trace())[case.parent].attributes["tlm.action"] == "raised"


@every_answer
@either_raw
def test_a_raw_response_that_is_not_low_is_as_before(case, asking, trace):
    tt.configure(scorer=FakeScorer(), threshold=0.5, on_low=lambda completion, trust: "replaced")
    raw, parsed = asyncio.run(asking(case))
    assert text_of(parsed) == ANSWER
    assert tt.trust(raw).score == 0.9
    assert "tlm.action" not in spans_of(trace())[case.parent].attributes


@every_answer
@either_raw
def test_a_low_raw_response_is_flagged(case, asking, trace):
    low()
    raw, parsed = asyncio.run(asking(case))
    bare, _ = asyncio.run(asking(Case(case.bare, case.endpoint)))
    assert type(raw) is type(bare)
    assert text_of(parsed) == ANSWER
    assert spans_of(trace())[case.parent].attributes["tlm.action"] == "flagged"


@pytest.mark.parametrize("read", ["read", "text", "json"])
def test_a_lazy_body_is_judged_by_whatever_reads_it(read, traces):
    case = Case(OpenAI, "chat")
    low(on_low="raise")
    with pytest.raises(tt.UntrustworthyResponseError):
        asyncio.run(ask_lazily(case, read))
    low(on_low=lambda completion, trust: "replaced")
    raw, body = asyncio.run(ask_lazily(case, read))
    assert ANSWER in str(body)
    assert raw.parse() == "replaced"
    actions = [found.data.spans[0].attributes["tlm.action"] for found in traces(2)]
    assert actions == ["raised", "replaced"]


def test_closing_a_lazy_body_that_is_left_early_raises_nothing(trace):
    low(on_low="raise")
    lazy = OpenAI().chat.completions.with_streaming_response
    with lazy.create(model="gpt-4o", messages=QUESTION) as response:
        next(response.iter_bytes(5))
    # It may have come in one piece.
    assert trace().data.spans[0].attributes.get("tlm.action") in (None, "flagged")


def test_an_answer_replaced_in_place_is_so_in_its_raw_response():
    def better(completion, trust):
        completion.choices[0].message.content = "I am not sure."
        return completion

    low(on_low=better)
    case = Case(OpenAI, "chat")
    for asking in (ask_raw, ask_lazily):
        _, parsed = asyncio.run(asking(case))
        assert text_of(parsed) == "I am not sure."


@pytest.mark.parametrize("on_low", ["raise", lambda completion, trust: "replaced"])
def test_in_background_mode_a_low_answer_is_flagged_however_soon_its_score_is_in(on_low, traces):
    low(on_low=on_low, mode="background", hold_last_chunk=True)
    tt.configure(scorer=None)
    assert text_of(ask()) == ANSWER  # unscored: its verdict is there at once
    low()
    case = Case(OpenAI, "chat")
    for _ in range(5):
        assert text_of(ask()) == ANSWER
        for asking in (ask_raw, ask_lazily):
            assert text_of(asyncio.run(asking(case))[1]) == ANSWER
        case.read()
        assert case.has_ended()
    actions = [found.data.spans[0].attributes.get("tlm.action") for found in traces(21)]
    assert actions == [None] + ["flagged"] * 20


# Call sites.


def test_the_innermost_threshold_wins(traces, monkeypatch):
    monkeypatch.setenv("TLM_TRACING_THRESHOLD", "0.91")
    tt.configure(scorer=FakeScorer(default=0.9))
    client = tt.wrap_openai(openai.OpenAI())
    ask(client)
    tt.configure(threshold=0.92)
    ask(client)
    tt.wrap_openai(client, threshold=0.93)
    ask(client)
    with tt.trusted_span("block", threshold=0.94):
        ask(client)

        @tt.trusted(threshold=0.95)
        def answer():
            ask(client)
            with tt.trusted_span("innermost", threshold=None):
                ask(client)

        answer()
    found = [span for trace in traces() for span in trace.data.spans if span.name == "chat gpt-4o"]
    thresholds = sorted(span.attributes.get("tlm.threshold", 0.0) for span in found)
    assert thresholds == [0.0, 0.91, 0.92, 0.93, 0.94, 0.95]
    actions = sorted(str(span.attributes.get("tlm.action")) for span in found)
    assert actions == ["None"] + ["flagged"] * 5


def test_a_blocks_threshold_is_for_all_of_its_calls():
    tt.configure(scorer=FakeScorer(default=0.3))
    strict = {"threshold": 0.5, "on_low": "raise"}
    with tt.trusted_span("block", **strict):
        for client in (openai.OpenAI(), tt.wrap_openai(openai.OpenAI(), threshold=0.1)):
            with pytest.raises(tt.UntrustworthyResponseError):
                ask(client)
    assert ask(openai.OpenAI())


def test_a_decorated_functions_threshold_raises_through_it(trace):
    tt.configure(scorer=FakeScorer(0.3))

    @tt.trusted(threshold=0.5, on_low="raise")
    def answer():
        return ask(openai.OpenAI())

    with pytest.raises(tt.UntrustworthyResponseError):
        answer()
    block, call, _, _ = trace().data.spans
    assert block.status.status_code.value == "ERROR"
    assert call.attributes["tlm.action"] == "raised"


def test_of_several_choices_the_first_ones_score_counts(trace):
    tt.configure(scorer=FakeScorer(0.9, 0.1), threshold=0.5, on_low="raise")
    completion = ask(n=2)
    assert [choice.score for choice in tt.trust(completion).choices] == [0.9, 0.1]
    assert "tlm.action" not in trace().data.spans[0].attributes
    tt.configure(scorer=FakeScorer(0.1, 0.9))
    with pytest.raises(tt.UntrustworthyResponseError):
        ask(n=2)


EXAMPLES = {
    "fixed_answer": "I am not sure. Please ask our support.",
    "stronger_model": "gpt-5-2024-08-06 has a trust of",
    "hand_over": "A colleague will answer you soon.",
    "careful_stream": "Please disregard that: a trust of 0.",
}


@pytest.mark.parametrize(("name", "line"), EXAMPLES.items(), ids=EXAMPLES)
def test_an_example_shows_what_becomes_of_a_low_answer(name, line, store):
    path = Path(__file__).parent.parent / "examples" / f"{name}.py"
    done = fresh.run(path, "--sandbox", env={**os.environ, "MLFLOW_TRACKING_URI": store})
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    assert line in done.stdout
