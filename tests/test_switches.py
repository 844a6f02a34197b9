"""Off is off, whichever way in and whoever says so; what MLflow does not keep is scored."""

import asyncio
import inspect
import json
import logging
import os
import subprocess
import sys
import textwrap
import threading
from concurrent.futures import ThreadPoolExecutor

import mlflow
import openai
import pytest

import tlm_tracing as tt
import tlm_tracing.openai
from tlm_tracing.openai import AsyncOpenAI, OpenAI

QUESTION = [{"role": "user", "content": "What is the capital of France?"}]
CHAT = {"model": "gpt-4o", "messages": QUESTION}
RESPONSE = {"model": "gpt-4o", "input": "What is the capital of France?"}


@pytest.fixture(autouse=True)
def configured(scorer, sandbox):
    tt.configure(scorer=scorer)


def ask(client=None, **options):
    return (client or OpenAI()).chat.completions.create(**CHAT, **options)


async def aask(client=None):
    async with client or AsyncOpenAI() as client:
        return await client.chat.completions.create(**CHAT)


# The kinds of calls. Each is told how a client is made, and gives what trust may be asked of.


def plain(make):
    return ask(make(openai.OpenAI))


def stream(make):
    chunks = ask(make(openai.OpenAI), stream=True)
    assert list(chunks)
    return chunks


def raw(make):
    answer = make(openai.OpenAI).chat.completions.with_raw_response.create(**CHAT)
    assert json.loads(answer.content)["choices"]
    return answer


def streamed_raw(make):
    completions = make(openai.OpenAI).chat.completions
    with completions.with_streaming_response.create(**CHAT) as answer:
        assert json.loads(answer.read())["choices"]
        return answer


def response(make):
    return make(openai.OpenAI).responses.create(**RESPONSE)


def response_stream(make):
    events = make(openai.OpenAI).responses.create(**RESPONSE, stream=True)
    assert list(events)
    return events


async def async_plain(make):
    return await aask(make(openai.AsyncOpenAI))


async def async_stream(make):
    async with make(openai.AsyncOpenAI) as client:
        chunks = await client.chat.completions.create(**CHAT, stream=True)
        assert [chunk async for chunk in chunks]
        return chunks


async def async_raw(make):
    async with make(openai.AsyncOpenAI) as client:
        answer = await client.chat.completions.with_raw_response.create(**CHAT)
        assert json.loads(answer.content)["choices"]
        return answer


async def async_response(make):
    async with make(openai.AsyncOpenAI) as client:
        return await client.responses.create(**RESPONSE)


KINDS = [plain, stream, raw, streamed_raw, response, response_stream]
KINDS += [async_plain, async_stream, async_raw, async_response]


def called(kind):
    """A kind of call as a plain function, as a sync application has it."""

    def call(make):
        if "response" in kind.__name__ and not hasattr(openai.OpenAI, "responses"):
            pytest.skip("this openai has no Responses API")
        return asyncio.run(kind(make)) if inspect.iscoroutinefunction(kind) else kind(make)

    return call


every_kind = pytest.mark.parametrize(
    "call", [called(kind) for kind in KINDS], ids=[kind.__name__ for kind in KINDS]
)


# The ways in.


def bare(kind):
    return kind()


def trusted(call, **settings):
    return tt.trusted(**settings)(call)(bare)


def trusted_span(call, **settings):
    with tt.trusted_span(**settings):
        return call(bare)


def wrap_openai(call, **settings):
    return call(lambda kind: tt.wrap_openai(kind(), **settings))


def drop_in(call, **settings):
    tt.configure(**settings)
    return call(lambda kind: getattr(tlm_tracing.openai, kind.__name__)())


def autolog(call, **settings):
    tt.autolog(**settings)
    return call(bare)


every_way = pytest.mark.parametrize("way", [trusted, trusted_span, wrap_openai, drop_in, autolog])


# Our own switches


def by_environment(way, call, monkeypatch):
    monkeypatch.setenv("TLM_TRACING_ENABLED", "false")
    return way(call)


def by_suppress_around(way, call, monkeypatch):
    with tt.suppress():
        return way(call)


def by_setting(way, call, monkeypatch):
    return way(call, enabled=False)


def by_configure(way, call, monkeypatch):
    tt.configure(enabled=False)
    return way(call)


SWITCHES = [by_environment, by_suppress_around, by_setting, by_configure]


@every_kind
@every_way
def test_a_call_is_recorded_and_scored_when_nothing_is_switched_off(way, call, traces):
    assert tt.trust(way(call)).score == 0.9
    traces(1)


@every_kind
@every_way
@pytest.mark.parametrize("switched_off", SWITCHES)
def test_a_call_is_left_alone_when_switched_off(
    switched_off, way, call, sandbox, scorer, traces, monkeypatch
):
    answered = switched_off(way, call, monkeypatch)
    assert tt.trust(answered) is None
    assert not hasattr(answered, "tlm_metadata")
    assert len(sandbox.requests("openai")) == 1
    traces(0)
    assert not scorer.exchanges


@every_kind
@every_way
def test_a_call_inside_suppress_is_left_alone_wherever_the_block_is(way, call, scorer, traces):
    def suppressed(make):
        with tt.suppress():
            return call(make)

    assert tt.trust(way(suppressed)) is None
    assert not scorer.exchanges
    blocks = [span.name for trace in traces() for span in trace.data.spans]
    assert blocks == {trusted: ["suppressed"], trusted_span: ["trusted_span"]}.get(way, [])


def test_a_block_that_is_switched_off_knows_of_nothing(traces):
    with tt.trusted_span(enabled=False) as span:
        ask()
    assert (span.trust, span.trusts, span.trace_id) == (None, [], None)
    traces(0)


def test_the_innermost_setting_decides(scorer, traces):
    tt.autolog(enabled=False)
    ask(openai.OpenAI())
    assert not scorer.exchanges
    ask(tt.wrap_openai(openai.OpenAI(), enabled=True))
    assert len(scorer.exchanges) == 1
    with tt.trusted_span(enabled=False):
        ask(tt.wrap_openai(openai.OpenAI(), enabled=True))
        assert len(scorer.exchanges) == 1
        with tt.trusted_span(enabled=True):
            ask(openai.OpenAI())
    assert len(scorer.exchanges) == 2
    traces(2)


def test_suppress_has_the_last_word(scorer, traces):
    with tt.suppress(), tt.trusted_span(enabled=True):
        ask(tt.wrap_openai(openai.OpenAI(), enabled=True))
    assert not scorer.exchanges
    traces(0)


def test_the_environment_may_change_at_run_time(scorer, traces, monkeypatch):
    client = tt.wrap_openai(openai.OpenAI())
    for setting, scores in (("false", 0), ("true", 1), ("off", 1), ("1", 2)):
        monkeypatch.setenv("TLM_TRACING_ENABLED", setting)
        ask(client)
        assert len(scorer.exchanges) == scores
    traces(2)


OFF = """
import asyncio, signal, threading
import openai, tlm_tracing as tt
import tlm_tracing.openai

CHAT = {"model": "gpt-4o", "messages": [{"role": "user", "content": "?"}]}


async def aask(client):
    async with client:
        await client.chat.completions.create(**CHAT)
        [chunk async for chunk in await client.chat.completions.create(stream=True, **CHAT)]


def ask(client):
    client.chat.completions.create(**CHAT)
    list(client.chat.completions.create(stream=True, **CHAT))
    client.chat.completions.create(stream=True, **CHAT).close()
    client.chat.completions.with_raw_response.create(**CHAT)


tt.autolog(mode="background")
tt.trusted(ask)(openai.OpenAI())
asyncio.run(tt.trusted(aask)(openai.AsyncOpenAI()))
with tt.trusted_span():
    ask(tt.wrap_openai(openai.OpenAI()))
ask(tlm_tracing.openai.OpenAI())
asyncio.run(aask(tlm_tracing.openai.AsyncOpenAI()))
assert tt.flush(1)
assert tt.stats() == tt.Stats(scored=0, pending=0, unscored={}, dropped=0, seconds=0.0), tt.stats()
assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
print([thread.name for thread in threading.enumerate() if thread.name.startswith("tlm")])
"""


def test_a_process_that_is_switched_off_has_no_thread_of_ours(sandbox, store, traces):
    environment = {**os.environ, **sandbox.environment(), "MLFLOW_TRACKING_URI": store}
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(OFF)],
        env={**environment, "TLM_TRACING_ENABLED": "false"},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (done.returncode, done.stdout) == (0, "[]\n"), done.stderr
    assert "tlm_tracing" not in done.stderr
    assert not sandbox.requests("tlm")
    traces(0)


# How far suppress reaches


def run_in_task(call):
    async def main():
        with tt.suppress():
            task = asyncio.create_task(asyncio.to_thread(call))
        return await task  # which was made inside, and is done outside

    return asyncio.run(main())


def run_in_to_thread(call):
    async def main():
        with tt.suppress():
            return await asyncio.to_thread(call)

    return asyncio.run(main())


def run_in_executor(call):
    async def main():
        with tt.suppress():
            return await asyncio.get_running_loop().run_in_executor(None, call)

    return asyncio.run(main())


def run_in_pool(call):
    with ThreadPoolExecutor(1) as pool, tt.suppress():
        return pool.submit(call).result()


def run_in_thread(call):
    found = []
    with tt.suppress():
        thread = threading.Thread(target=tt.propagate(lambda: found.append(call())))
        thread.start()
    thread.join()
    return found[0]


ELSEWHERE = [run_in_task, run_in_to_thread, run_in_executor, run_in_pool, run_in_thread]


@pytest.mark.parametrize("elsewhere", ELSEWHERE)
def test_suppress_goes_along_where_a_trusted_block_does(elsewhere, scorer, traces):
    with tt.trusted_span("block") as span:
        assert tt.trust(elsewhere(ask)) is None
    assert span.trusts == []
    assert not scorer.exchanges
    assert [one.name for one in traces(1)[0].data.spans] == ["block"]


@pytest.mark.parametrize("elsewhere", ELSEWHERE)
def test_suppress_goes_along_without_a_block(elsewhere, scorer, traces):
    tt.autolog()
    assert tt.trust(elsewhere(lambda: ask(openai.OpenAI()))) is None
    assert not scorer.exchanges
    traces(0)


def test_suppress_in_one_task_leaves_the_others_alone(scorer, traces):
    both_inside = asyncio.Event()

    async def suppressed():
        with tt.suppress():
            both_inside.set()
            return tt.trust(await aask())

    async def seen():
        await both_inside.wait()
        return tt.trust(await aask())

    async def main():
        return await asyncio.gather(suppressed(), seen())

    nothing, trust = asyncio.run(main())
    assert (nothing, trust.score) == (None, 0.9)
    traces(1)


def test_suppress_in_one_thread_leaves_the_others_alone(traces):
    inside, over = threading.Event(), threading.Event()

    def suppressed():
        with tt.suppress():
            inside.set()
            over.wait(10)

    thread = threading.Thread(target=suppressed)
    thread.start()
    inside.wait(10)
    assert tt.trust(ask()).score == 0.9
    over.set()
    thread.join()
    traces(1)


def test_a_stream_that_is_opened_inside_is_left_alone_outside(scorer, traces):
    client = OpenAI()
    with tt.suppress():
        chunks = ask(client, stream=True)
    assert list(chunks)
    assert tt.trust(chunks) is None
    assert not scorer.exchanges
    traces(0)


def test_an_async_stream_that_is_opened_inside_is_left_alone_outside(scorer, traces):
    async def main():
        async with AsyncOpenAI() as client:
            with tt.suppress():
                chunks = await client.chat.completions.create(**CHAT, stream=True)
            assert [chunk async for chunk in chunks]
            return tt.trust(chunks)

    assert asyncio.run(main()) is None
    assert not scorer.exchanges
    traces(0)


def test_a_stream_that_is_opened_outside_is_scored_when_read_inside(traces):
    chunks = ask(stream=True)
    with tt.suppress():
        assert list(chunks)
    assert tt.trust(chunks).score == 0.9
    traces(1)


def test_a_generator_that_is_consumed_inside_is_left_alone(scorer, traces):
    @tt.trusted
    def answers():
        for _ in range(2):
            yield ask().choices[0].message.content

    with tt.suppress():
        assert len(list(answers())) == 2
    assert not scorer.exchanges
    traces(0)


def test_an_async_generator_that_is_consumed_inside_is_left_alone(scorer, traces):
    @tt.trusted
    async def answers():
        for _ in range(2):
            yield await aask()

    async def main():
        with tt.suppress():
            return [answer async for answer in answers()]

    assert len(asyncio.run(main())) == 2
    assert not scorer.exchanges
    traces(0)


def test_a_generator_that_suppresses_a_part_of_its_work_has_the_rest_recorded(scorer, traces):
    @tt.trusted
    def answers():
        with tt.suppress():
            hidden = ask()
        yield hidden
        yield ask()

    assert [tt.trust(one) is None for one in answers()] == [True, False]
    assert len(scorer.exchanges) == 1
    traces(1)


def test_suppress_may_be_nested_and_left_by_an_exception(scorer, traces):
    client = OpenAI()
    with tt.suppress():
        with pytest.raises(ArithmeticError), tt.suppress():
            raise ArithmeticError
        ask(client)
    assert not scorer.exchanges
    ask(client)
    assert len(scorer.exchanges) == 1
    traces(1)


def test_suppress_decorates_functions(scorer, traces):
    @tt.suppress()
    def quietly():
        return ask()

    for _ in range(2):
        assert tt.trust(quietly()) is None
    assert not scorer.exchanges
    assert tt.trust(ask()).score == 0.9
    traces(1)


# MLflow's switches


@pytest.fixture
def mlflow_switched(monkeypatch):
    """Switches MLflow's tracing for one test."""

    def sample(ratio):
        monkeypatch.setenv("MLFLOW_TRACE_SAMPLING_RATIO", str(ratio))
        mlflow.tracing.reset()

    yield sample
    monkeypatch.undo()
    mlflow.tracing.enable()
    mlflow.tracing.reset()


@pytest.fixture(autouse=True)
def nothing_is_said(caplog):
    """No word of ours, and no complaint of MLflow's."""
    yield
    said = [
        one.getMessage()
        for one in caplog.get_records("call")
        if one.name.startswith(("tlm_tracing", "mlflow.tracing")) and one.levelno >= logging.WARNING
    ]
    assert said == []


def by_disable(call, switch):
    mlflow.tracing.disable()
    return call()


def by_ratio(call, switch):
    switch(0)
    return call()


def by_context(call, switch):
    with mlflow.tracing.context(enabled=False):
        return call()


every_mlflow_switch = pytest.mark.parametrize("unsampled", [by_disable, by_ratio, by_context])


@every_kind
@every_way
@every_mlflow_switch
def test_what_mlflow_does_not_keep_is_scored(unsampled, way, call, scorer, traces, mlflow_switched):
    answered = unsampled(lambda: way(call), mlflow_switched)
    trust = tt.trust(answered)
    assert (trust.score, trust.status) == (0.9, "scored")
    assert (trust.trace_id, trust.span_id) == (None, None)
    assert len(scorer.exchanges) == 1
    traces(0)


@every_mlflow_switch
def test_what_mlflow_does_not_keep_is_scored_in_the_background(
    unsampled, scorer, traces, mlflow_switched
):
    scorer.hold()
    client = tt.wrap_openai(openai.OpenAI(), mode="background")
    dropped = tt.stats().dropped
    trust = tt.trust(unsampled(lambda: ask(client), mlflow_switched))
    assert (trust.status, trust.trace_id) == ("pending", None)
    scorer.release()
    settled = trust.wait(10)
    assert (settled.score, settled.trace_id) == (0.9, None)
    traces(0)
    assert tt.stats().dropped == dropped


@every_mlflow_switch
def test_a_threshold_does_not_depend_on_what_mlflow_keeps(
    unsampled, scorer, traces, mlflow_switched
):
    client = tt.wrap_openai(openai.OpenAI(), threshold=0.95, on_low="raise")
    with pytest.raises(tt.UntrustworthyResponseError) as low:
        unsampled(lambda: ask(client), mlflow_switched)
    assert (low.value.trust.score, low.value.trust.trace_id) == (0.9, None)
    traces(0)


@every_mlflow_switch
def test_a_fallback_does_not_depend_on_what_mlflow_keeps(unsampled, traces, mlflow_switched):
    def stronger(completion, trust):
        return ask(client, temperature=0)

    client = tt.wrap_openai(openai.OpenAI(), threshold=0.95, on_low=stronger)
    assert tt.trust(unsampled(lambda: ask(client), mlflow_switched)).score == 0.9
    traces(0)


@every_mlflow_switch
def test_a_block_that_mlflow_does_not_keep_knows_of_its_trusts(unsampled, traces, mlflow_switched):
    def block():
        with tt.trusted_span() as span:
            span.set_inputs("in")
            ask()
            list(ask(stream=True))
            span.set_outputs("out")
        return span

    span = unsampled(block, mlflow_switched)
    assert (span.trust.score, len(span.trusts), span.trace_id) == (0.9, 2, None)
    traces(0)


@every_mlflow_switch
def test_a_failing_call_fails_as_ever_when_mlflow_keeps_nothing(
    unsampled, sandbox, traces, mlflow_switched
):
    sandbox.script("openai", {"status": 400})
    with pytest.raises(openai.BadRequestError):
        unsampled(ask, mlflow_switched)
    traces(0)


def test_mlflow_may_be_switched_off_and_on_at_run_time(scorer, traces, mlflow_switched):
    client = OpenAI()
    kept = []
    for switch in (None, mlflow.tracing.disable, mlflow.tracing.enable) * 2:
        if switch is not None:
            switch()
        trust = tt.trust(ask(client))
        assert trust.score == 0.9
        kept.append(trust.trace_id)
    # The fourth call is made before the second switch.
    assert [trace_id is None for trace_id in kept] == [False, True, False, False, True, False]
    assert {one.info.trace_id for one in traces(4)} == set(kept) - {None}


def test_mlflow_may_be_switched_off_inside_a_block(traces, mlflow_switched):
    with tt.trusted_span() as span:
        ask()
        mlflow.tracing.disable()
        ask()
        list(ask(stream=True))
    assert [trust.score for trust in span.trusts] == [0.9, 0.9, 0.9]
    mlflow.tracing.enable()
    assert tt.trust(ask()).trace_id in {one.info.trace_id for one in traces()}


def test_mlflow_may_be_switched_off_while_a_score_is_pending(scorer, traces, mlflow_switched):
    scorer.hold()
    trust = tt.trust(ask(tt.wrap_openai(openai.OpenAI(), mode="background")))
    mlflow.tracing.disable()
    scorer.release()
    assert trust.wait(10).score == 0.9
    mlflow.tracing.enable()
    assert [one.info.trace_id for one in traces(1)] == [trust.trace_id]


def test_half_of_the_calls_are_kept_and_all_are_scored(scorer, traces, mlflow_switched):
    mlflow_switched(0.5)
    client = OpenAI()
    trusts = [tt.trust(ask(client)) for _ in range(32)]
    assert {trust.score for trust in trusts} == {0.9}
    assert len(scorer.exchanges) == 32
    kept = {trust.trace_id for trust in trusts} - {None}
    assert 0 < len(kept) < 32  # or else two in four thousand millions
    found = traces(len(kept))
    assert {one.info.trace_id for one in found} == kept
    assert {len(one.data.spans) for one in found} == {3}
    assert {one.info.tags["trust_score"] for one in found} == {"0.9000"}


def test_kept_and_unkept_blocks_mix(scorer, traces):
    @mlflow.trace(sampling_ratio_override=0.0)
    def unkept():
        return tt.trust(ask())

    @mlflow.trace(sampling_ratio_override=1.0)
    def kept():
        return tt.trust(ask())

    with ThreadPoolExecutor(4) as pool:
        made = [pool.submit(function) for function in (unkept, kept) * 4]
        trusts = [one.result() for one in made]
    assert {trust.score for trust in trusts} == {0.9}
    assert [trust.trace_id is None for trust in trusts] == [True, False] * 4
    found = traces(4)
    assert {one.info.trace_id for one in found} == {trust.trace_id for trust in trusts} - {None}
    assert {len(one.data.spans) for one in found} == {4}


@pytest.mark.parametrize("mode", ["inline", "background"])
def test_a_block_inside_an_unkept_one_is_not_kept(mode, traces):
    @mlflow.trace(sampling_ratio_override=0.0)
    def unkept():
        with tt.trusted_span(mode=mode) as span:
            ask()
            list(ask(stream=True))
        return span

    span = unkept()
    assert [trust.wait(10).score for trust in span.trusts] == [0.9, 0.9]
    assert {trust.trace_id for trust in span.trusts} == {span.trace_id} == {None}
    traces(0)


def test_an_unkept_call_costs_no_later_one_its_trace(traces):
    client = OpenAI()
    with mlflow.tracing.context(enabled=False):
        assert tt.trust(ask(client)).trace_id is None
    trust = tt.trust(ask(client))
    assert [one.info.trace_id for one in traces(1)] == [trust.trace_id]


def test_ones_own_suppress_beats_what_mlflow_keeps(scorer, traces):
    with mlflow.start_span("mine"), tt.suppress():
        ask()
    assert not scorer.exchanges
    assert [span.name for span in traces(1)[0].data.spans] == ["mine"]
