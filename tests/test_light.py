"""Spans that nobody watches are light, and what is stored of them is what is of MLflow's own."""

import asyncio
import gc
import re
import threading
import time
import weakref

import mlflow
import openai
import pytest

import tlm_tracing as tt
from tlm_tracing._light import LightSpan
from tlm_tracing.openai import AsyncOpenAI, OpenAI
from tlm_tracing.testing import FakeScorer

QUESTION = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "What is the capital of France?"},
]
ID = re.compile(r"\b(tr-)?[0-9a-f]{16,32}\b")
# What is another each time.
PASSING = {"mlflow.trace.sizeStats", "mlflow.trace.sizeBytes", "mlflow.experimentId"}
SECONDS = {"tlm.seconds", "time_to_first_token", "openai.request_id", "gen_ai.response.id"}


def ask(**options):
    return OpenAI().chat.completions.create(model="gpt-4o", messages=QUESTION, **options)


def a_call():
    ask()


def a_call_in_a_trusted_block():
    with tt.trusted_span("agent"):
        ask()


def a_call_in_a_span_of_mlflows():
    with mlflow.start_span("mine") as span:
        ask()
        span.set_outputs("done")


def a_stream():
    list(ask(stream=True))


def a_call_that_fails():
    with pytest.raises(openai.NotFoundError):
        OpenAI(base_url=f"{OpenAI().base_url}nowhere").chat.completions.create(
            model="gpt-4o", messages=QUESTION
        )


def a_low_answer():
    with (
        pytest.raises(tt.UntrustworthyResponseError),
        tt.trusted_span(threshold=1.0, on_low="raise"),
    ):
        ask()


def a_replaced_answer():
    with tt.trusted_span(threshold=1.0, on_low=lambda completion, trust: ask()):
        ask()


def a_call_of_a_session():
    tracing = mlflow.tracing.context(
        tags={"team": "blue"}, metadata={"mlflow.trace.session": "s-1", "mlflow.trace.user": "u-1"}
    )
    with tracing:
        ask()


def a_call_in_a_run():
    with mlflow.start_run():
        ask()


def a_background_score():
    with tt.trusted_span("agent", mode="background"):
        ask()
    assert tt.flush(30)


CASES = [
    a_call,
    a_call_in_a_trusted_block,
    a_call_in_a_span_of_mlflows,
    a_stream,
    a_call_that_fails,
    a_low_answer,
    a_replaced_answer,
    a_call_of_a_session,
    a_call_in_a_run,
    a_background_score,
]


@pytest.fixture(autouse=True)
def scored(sandbox, scorer):
    tt.configure(scorer=scorer)
    return scorer


@pytest.fixture
def made(monkeypatch):
    """How many light spans were made."""
    spans = []
    init = LightSpan.__init__

    def count(self, *args, **kwargs):
        spans.append(self)
        init(self, *args, **kwargs)

    monkeypatch.setattr(LightSpan, "__init__", count)
    return spans


@pytest.fixture
def watched():
    """Somebody is shown each span of MLflow's as it ends."""
    seen = []
    mlflow.tracing.configure(span_processors=[lambda span: seen.append(span.name)])
    yield seen
    mlflow.tracing.configure(span_processors=[])


def told(trace):
    """All that is stored of a trace, but for what is another each time."""
    names = {span.span_id: span.name for span in trace.data.spans}

    def plain(value):
        return ID.sub("ID", value) if isinstance(value, str) else value

    info = trace.info
    return {
        "state": info.state,
        "previews": (info.request_preview, info.response_preview),
        "tags": {key: plain(value) for key, value in info.tags.items() if "artifact" not in key},
        "metadata": {
            key: plain(value)
            for key, value in info.trace_metadata.items()
            if key not in PASSING and key != "mlflow.traceOutputs"
        },
        "assessments": [
            (one.name, one.value, one.rationale, one.source, names[one.span_id])
            for one in info.assessments
        ],
        "spans": [
            {
                "name": span.name,
                "parent": names.get(span.parent_id),
                "type": span.span_type,
                "status": (span.status.status_code, plain(span.status.description)),
                "events": [event.name for event in span.events],
                "inputs": span.inputs,
                "attributes": {
                    key: None if key in SECONDS or key == "mlflow.spanOutputs" else plain(value)
                    for key, value in span.attributes.items()
                    if key not in PASSING
                },
                "has outputs": span.outputs is not None,
                "lasts": span.end_time_ns >= span.start_time_ns,
            }
            for span in sorted(trace.data.spans, key=lambda span: span.start_time_ns)
        ],
    }


@pytest.mark.parametrize("case", CASES)
def test_a_light_trace_is_stored_as_a_live_one(case, traces, made, request):
    case()
    (light,) = traces(1)
    assert made
    seen = request.getfixturevalue("watched")
    made.clear()
    case()
    live = next(one for one in traces(2) if one.info.trace_id != light.info.trace_id)
    assert not made
    assert "openai.chat.completions" in seen
    assert told(light) == told(live)


def test_a_call_is_the_last_active_trace(trace):
    completion = ask()
    assert mlflow.get_last_active_trace_id() == tt.trust(completion).trace_id
    assert trace().info.trace_id == tt.trust(completion).trace_id


def test_what_the_application_says_of_a_trace_right_after_the_call_is_kept(
    trace, asynchronous_export
):
    trace_id = tt.trust(ask()).trace_id
    mlflow.set_trace_tag(trace_id, "customer", "blue")
    assert trace().info.tags["customer"] == "blue"


def test_an_endless_call_is_ended_by_mlflows_timeout(sandbox, monkeypatch, traces, scorer, made):
    """As a failed one, by MLflow itself."""
    monkeypatch.setenv("MLFLOW_TRACE_TIMEOUT_SECONDS", "1")
    monkeypatch.setenv("MLFLOW_TRACE_BUFFER_TTL_SECONDS", "1")
    scorer.hold()
    asking = threading.Thread(target=ask, daemon=True)
    asking.start()
    until = time.monotonic() + 20
    while not (found := mlflow.search_traces(return_type="list")):
        assert time.monotonic() < until
        time.sleep(0.1)
    assert made
    scorer.release()
    asking.join(20)
    assert found[0].info.state.value == "ERROR"


def test_random_numbers_that_are_set_back_do_not_repeat_ids(traces):
    import random

    for _ in range(3):
        random.seed(1)
        ask()
    traces(3)


def test_an_unsampled_call_is_scored_and_not_stored(monkeypatch, traces):
    monkeypatch.setenv("MLFLOW_TRACE_SAMPLING_RATIO", "0")
    mlflow.tracing.reset()
    try:
        assert tt.trust(ask()).score == 0.9
        assert tt.trust(ask()).trace_id is None
    finally:
        monkeypatch.undo()
        mlflow.tracing.reset()
    traces(0)


def test_a_ratio_of_calls_is_sampled(monkeypatch, traces):
    """Once for each call, light or not."""
    tt.configure(scorer=FakeScorer(), mode="off")
    monkeypatch.setenv("MLFLOW_TRACE_SAMPLING_RATIO", "0.5")
    mlflow.tracing.reset()
    try:
        client = OpenAI()
        for _ in range(100):
            client.chat.completions.create(model="gpt-4o", messages=QUESTION)
        found = traces()
    finally:
        mlflow.tracing.reset()
    assert 30 <= len(found) <= 70


def sync_call(**options):
    return ask(**options)


def async_call(**options):
    async def call():
        async with AsyncOpenAI() as client:
            return await client.chat.completions.create(
                model="gpt-4o", messages=QUESTION, **options
            )

    return asyncio.run(call())


def assert_gone_at_once(call):
    """Nothing of ours makes a circle, for which a collection of all of MLflow has to be paid."""
    gc.collect()
    gc.disable()
    try:
        given = call()
        gone = threading.Event()
        weakref.finalize(given, gone.set)
        assert tt.flush(30)
        del given
        assert gone.wait(5)
    finally:
        gc.enable()


@pytest.mark.parametrize("call", [sync_call, async_call])
@pytest.mark.parametrize("mode", ["off", "inline", "background"])
def test_what_its_caller_drops_is_gone_at_once(mode, call):
    tt.configure(scorer=lambda request, completion: 0.9, mode=mode)
    call()
    assert tt.flush(30)
    assert_gone_at_once(call)


def read_stream():
    stream = ask(stream=True)
    list(stream)
    return stream


def read_async_stream():
    async def call():
        async with AsyncOpenAI() as client:
            stream = await client.chat.completions.create(
                model="gpt-4o", messages=QUESTION, stream=True
            )
            async for _ in stream:
                pass
            return stream

    return asyncio.run(call())


@pytest.mark.parametrize("call", [read_stream, read_async_stream])
def test_a_stream_that_its_caller_has_read_is_gone_at_once(call):
    tt.configure(scorer=lambda request, completion: 0.9)
    assert_gone_at_once(call)
