"""Stored traces are scored as live calls are: on SQLite, by the public names, read by MLflow."""

import asyncio
import json
import logging
import math
import re
import threading
import time
from datetime import datetime, timedelta, timezone

import mlflow
import openai
import pandas as pd
import pytest
from mlflow.entities import Feedback
from mlflow.tracing.client import TracingClient
from openai.types.chat import ChatCompletion

import tlm_tracing as tt
from tlm_tracing import _scoring
from tlm_tracing._stored import _judge, _search
from tlm_tracing.testing import FakeScorer

COLUMNS = [
    *("trace_id", "span_id", "timestamp", "prompt", "response", "trust_score", "explanation"),
    *("status", "reason"),
]
FRANCE = "What is the capital of France?"
TAGS = ("trust_score", "explanation", "trust_status")
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "lookup",
            "description": "Finds a city.",
            "parameters": {"type": "object", "properties": {}},
        },
    }
]


def chat(text, **options):
    return {"model": "gpt-4o", "messages": [{"role": "user", "content": text}], **options}


def ask(*texts, client=None, **options):
    """Ask the LLM."""
    client = client or openai.OpenAI(max_retries=0)
    for text in texts:
        answer = client.chat.completions.create(**chat(text, **options))
        if options.get("stream"):
            list(answer)


def ask_ours(*texts, **settings):
    """Ask by a client of ours."""
    with openai.OpenAI(max_retries=0) as client:
        ask(*texts, client=tt.wrap_openai(client, **settings))


def record(*texts, answer="An answer"):
    """Record calls as somebody's own code does; gives the ids of their traces."""
    ids = []
    for text in texts:
        with mlflow.start_span("llm", span_type="CHAT_MODEL") as span:
            span.set_inputs(chat(text))
            span.set_outputs(
                {"choices": [{"message": {"role": "assistant", "content": f"{answer} to {text}"}}]}
            )
        ids.append(span.trace_id)
    return ids


@pytest.fixture
def asked(sandbox):
    """Ask the LLM while ``mlflow.openai.autolog()`` records."""

    def send(*texts, **options):
        mlflow.openai.autolog()
        try:
            ask(*texts, **options)
        finally:
            mlflow.openai.autolog(disable=True)

    return send


async def _collected(*args, **kwargs):
    return await tt.ascore_traces(*args, **kwargs)


@pytest.fixture(params=["sync", "async"])
def score(request):
    """Both forms of ``score_traces``."""
    if request.param == "sync":
        return tt.score_traces
    return lambda *args, **kwargs: asyncio.run(_collected(*args, **kwargs))


def whole(found):
    """All that a store tells of some traces."""
    return {trace.info.trace_id: trace.to_dict() for trace in found}


def tags(trace):
    return {key: tag for key, tag in trace.info.tags.items() if key in TAGS}


def named(trace, name):
    return [span for span in trace.data.spans if span.name.startswith(name)]


def scoring_of(trace):
    (span,) = named(trace, "tlm.trustworthiness")
    return span


def by_prompt(frame):
    return {row.prompt: row for row in frame.itertuples()}


# 1. What autolog has recorded.


def test_a_trace_of_autologs_is_scored(score, asked, sandbox, traces):
    """It gets tags, assessment and scoring span; what was there stays as it was."""
    sandbox.answer(FRANCE, "Lyon.", score=0.123456, explanation="It is Paris.")
    asked(FRANCE)
    (before,) = traces(1)
    score()
    (after,) = traces(1)

    assert tags(after) == {
        "trust_score": "0.1235",
        "explanation": "It is Paris.",
        "trust_status": "scored",
    }
    (assessment,) = after.info.assessments
    llm = before.data.spans[0]
    assert assessment.name == "trustworthiness"
    assert (assessment.value, assessment.rationale) == (0.123456, "It is Paris.")
    assert assessment.span_id == llm.span_id
    assert assessment.source.source_type == "LLM_JUDGE"
    assert assessment.source.source_id == "cleanlab-tlm/medium"
    assert assessment.metadata["llm_model"] == "gpt-4o-2024-08-06"

    span = scoring_of(after)
    assert (span.span_type, span.parent_id) == ("EVALUATOR", llm.span_id)
    assert span.inputs == {"prompt": FRANCE, "response": "Lyon."}
    assert span.outputs == {
        "trust_score": 0.123456,
        "explanation": "It is Paris.",
        "status": "scored",
    }
    assert span.attributes["tlm.trustworthiness_score"] == 0.123456
    assert span.attributes["tlm.scorer"] == "cleanlab-tlm/medium"
    assert span.status.status_code == "OK"
    assert span.start_time_ns >= llm.end_time_ns

    assert after.data.spans[0].to_dict() == llm.to_dict()
    for name in ("state", "execution_duration", "request_time", "token_usage", "cost"):
        assert getattr(after.info, name) == getattr(before.info, name), name
    assert after.info.request_preview == before.info.request_preview
    assert after.info.response_preview == before.info.response_preview


def test_the_frame_has_a_row_for_each_call(score, asked, sandbox, traces, experiment):
    """Exactly these columns, the least trustworthy first, times in UTC."""
    for text, value in {"a": 0.5, "b": 0.1, "c": 0.9}.items():
        sandbox.answer(text, text.upper(), score=value, explanation=f"Why {text}.")
    sandbox.answer("d", "")
    asked("a", "b", "c", "d")
    began = {trace.info.trace_id: trace.data.spans[0].start_time_ns for trace in traces(4)}

    found = score()

    assert list(found.columns) == COLUMNS
    assert list(found["prompt"][:3]) == ["b", "a", "c"]
    assert list(found["response"][:3]) == ["B", "A", "C"]
    assert list(found["explanation"][:3]) == ["Why b.", "Why a.", "Why c."]
    assert list(found["trust_score"][:3]) == [0.1, 0.5, 0.9]
    assert list(found["status"]) == ["scored"] * 3 + ["unscored"]
    assert math.isnan(found["trust_score"][3])
    assert (found["reason"][3], found["prompt"][3]) == ("empty", None)
    assert str(found["timestamp"].dt.tz) == "UTC"
    for row in found.itertuples():
        assert abs(row.timestamp.timestamp() - began[row.trace_id] / 1e9) < 1e-5

    stored = mlflow.search_traces(locations=[experiment])
    together = stored.merge(found, on="trace_id")
    assert len(together) == 4
    for row in together[together["status"] == "scored"].itertuples():
        assert row.tags["trust_score"] == f"{row.trust_score:.4f}"


def test_an_empty_experiment_gives_an_empty_frame(score, sandbox):
    """With the same columns."""
    found = score()
    assert list(found.columns) == COLUMNS
    assert len(found) == 0
    assert str(found["timestamp"].dt.tz) == "UTC"


# 2. What was recorded by us and not scored.


def hanging(request, completion):
    time.sleep(0.3)
    return 0.5


LEFT = {
    "off": ({"mode": "off"}, "off"),
    "sampled_out": ({"sample_rate": 0.0}, "sampled_out"),
    "budget": ({"max_scores_per_minute": 0}, "budget"),
    "no_scorer": ({"scorer": None}, "no_scorer"),
    "timeout": ({"timeout": 0.01, "scorer": hanging}, "timeout"),
}


def told(trace):
    """What a trace tells of the trust in its call, but for ids and times."""
    (parent,) = named(trace, "chat")
    (assessment,) = trace.info.assessments
    span = scoring_of(trace)
    timed = ("tlm.seconds", "tlm.scored_at", "mlflow.chat.tokenUsage", "mlflow.traceRequestId")
    return {
        "tags": tags(trace),
        "assessment": (assessment.name, assessment.value, assessment.rationale),
        "source": assessment.source.to_dictionary(),
        "metadata": {**assessment.metadata, "seconds": None},
        "on the parent": assessment.span_id == parent.span_id == span.parent_id,
        "parent": {
            key: item
            for key, item in parent.attributes.items()
            if key.startswith("tlm.") and key not in timed
        },
        "scoring": (span.name, span.span_type, span.inputs, span.outputs),
        "status": (span.status.status_code, span.status.description),
        "attributes": {
            key: item
            for key, item in span.attributes.items()
            if key not in timed and not key.startswith("mlflow.span")
        },
    }


@pytest.mark.parametrize(("settings", "reason"), LEFT.values(), ids=LEFT)
def test_what_was_left_unscored_is_told_as_a_live_score_would_be(
    settings, reason, score, sandbox, traces
):
    """Tags, assessment, scoring span and parent are those of the live path."""
    sandbox.answer(FRANCE, "Paris.", score=0.98, explanation="So it is.")
    ask_ours(FRANCE, **settings)
    (left,) = traces(1)
    assert named(left, "chat")[0].attributes["tlm.reason"] == reason
    score()
    ask_ours(FRANCE)
    stored, live = traces(2)
    assert told(stored) == told(live)
    assert "tlm.reason" not in named(stored, "chat")[0].attributes
    assert len(stored.data.spans) == 3
    assert stored.info.execution_duration == left.info.execution_duration
    assert stored.info.token_usage == left.info.token_usage


def test_the_assessment_is_the_one_that_the_live_path_writes(sandbox, traces):
    """A live score is replaced in place: the ids are made in the same way."""
    ask_ours(FRANCE)
    (live,) = traces(1)
    sandbox.default("tlm", score=0.25)
    tt.score_traces(rescore=True)
    (stored,) = traces(1)
    (before,), (after,) = live.info.assessments, stored.info.assessments
    assert after.assessment_id == before.assessment_id
    assert after.value == 0.25
    assert scoring_of(stored).span_id == scoring_of(live).span_id
    assert scoring_of(stored).outputs["trust_score"] == 0.25
    assert named(stored, "chat")[0].attributes["tlm.trustworthiness_score"] == 0.25


def test_several_choices_are_scored_each(sandbox, traces):
    """As the live path does."""
    ask_ours(FRANCE, mode="off")
    with openai.OpenAI() as client:
        for settings in ({"mode": "off"}, {}):
            wrapped = tt.wrap_openai(client.with_options(), **settings)
            wrapped.chat.completions.create(**chat("two", n=2))
    tt.score_traces()
    _, stored, live = traces(3)
    assert len(scoring_of(live).outputs["choices"]) == 2
    assert told(stored) == told(live)


# 3. Another run.


def test_a_second_run_sends_and_writes_nothing(score, asked, sandbox, traces):
    """Whatever the first has found."""
    asked("one", "two")
    ask_ours("three", mode="off")
    with tt.trusted_span("block"):
        ask_ours("four")
        ask_ours("five", mode="off")
    with mlflow.start_span("no call"):
        pass
    sandbox.script("openai", {"refusal": "I cannot."})
    asked("six")
    score()
    sent = len(sandbox.requests("tlm"))
    assert sent == 5
    before = whole(traces(6))
    score()
    assert whole(traces(6)) == before
    assert len(sandbox.requests("tlm")) == sent


def test_rescore_replaces_in_place(score, asked, sandbox, traces):
    """Score, explanation, tags, assessment and scoring span; each is there once."""
    asked(FRANCE)
    sandbox.default("tlm", score=0.7, explanation="First.")
    score()
    sandbox.default("tlm", score=0.2, explanation="Second.")
    found = score(rescore=True)
    assert list(found["trust_score"]) == [0.2]
    (trace,) = traces(1)
    (assessment,) = trace.info.assessments
    assert (assessment.value, assessment.rationale) == (0.2, "Second.")
    assert scoring_of(trace).outputs["trust_score"] == 0.2
    assert tags(trace) == {
        "trust_score": "0.2000",
        "explanation": "Second.",
        "trust_status": "scored",
    }


def test_an_explanation_that_went_away_is_told_nowhere(asked, sandbox, traces):
    """Not in the tags, nor as the new score's rationale."""
    asked(FRANCE)
    sandbox.default("tlm", score=0.7, explanation="First.")
    tt.score_traces()
    sandbox.default("tlm", score=0.8, no_log=True)
    tt.score_traces(rescore=True)
    (trace,) = traces(1)
    assert tags(trace) == {"trust_score": "0.8000", "trust_status": "scored"}
    assert not trace.info.assessments[0].rationale
    assert "explanation" not in scoring_of(trace).outputs


def test_a_call_that_cannot_be_rescored_keeps_its_score(sandbox, traces):
    """The trace's lowest score is still told when another call gets a new one."""
    with tt.trusted_span("block"):
        ask_ours("secret", capture_content=False, scorer=FakeScorer(0.1))
        ask_ours("open", scorer=FakeScorer(0.5))
    tt.score_traces(rescore=True, scorer=lambda request, completion: 0.6)
    (trace,) = traces(1)
    assert tags(trace)["trust_score"] == "0.1000"
    assert tags(trace)["trust_status"] == "scored"


def test_a_score_stays_when_rescoring_fails(monkeypatch, sandbox, traces):
    """The row tells the failure, the trace its old score."""
    monkeypatch.setattr(_judge, "_PAUSES", ())
    with tt.trusted_span("block"):
        ask_ours("good", scorer=FakeScorer(0.5))
        ask_ours("bad", scorer=FakeScorer(0.1))

    def broken(request, completion):
        if request["messages"][-1]["content"] == "bad":
            raise RuntimeError("no score today")
        return 0.6

    found = by_prompt(tt.score_traces(rescore=True, scorer=broken))
    assert (found["bad"].status, found["bad"].reason) == ("unscored", "scorer_error")
    (trace,) = traces(1)
    assert (tags(trace)["trust_score"], tags(trace)["trust_status"]) == ("0.1000", "scored")


def test_a_more_certain_reason_replaces_the_one_that_is_told(sandbox, traces):
    """A refusal that was recorded only is a refusal, as the live path would have said."""
    sandbox.script("openai", {"refusal": "I cannot."})
    ask_ours(FRANCE, mode="off")
    (row,) = tt.score_traces().itertuples()
    assert row.reason == "refusal"
    (trace,) = traces(1)
    assert named(trace, "chat")[0].attributes["tlm.reason"] == "refusal"
    assert tags(trace) == {"trust_status": "unscored"}


def test_a_kept_reason_is_not_replaced_by_a_vaguer_one(sandbox, traces):
    """Without texts, the stored trace cannot tell a refusal; the live call could."""
    sandbox.script("openai", {"refusal": "I cannot."})
    ask_ours(FRANCE, capture_content=False)
    before = whole(traces(1))
    tt.score_traces()
    assert whole(traces(1)) == before


# 4. A mixed store.


PARTS = [{"type": "text", "text": "What is this?"}, {"type": "text", "text": "And where?"}]
TURNS = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Hello"},
    {"role": "assistant", "content": "Hi."},
    {"role": "user", "content": FRANCE},
]


def mix(sandbox):
    """A trace of each kind; gives what is to be found by its name."""
    wanted = {}

    def made(name, **row):
        wanted[mlflow.get_last_active_trace_id()] = {"name": name, **row}

    client = openai.OpenAI(max_retries=0)
    ask_ours("ours")
    made("ours, scored", prompt=None)
    ask_ours("recorded", mode="off")
    made("ours, off", prompt="recorded", response="The Sandbox's answer to: recorded")
    mlflow.openai.autolog()
    try:
        ask("plain", client=client)
        made("plain", prompt="plain", response="The Sandbox's answer to: plain")
        ask("streamed", client=client, stream=True)
        made("streamed", prompt="streamed", response="The Sandbox's answer to: streamed")
        sandbox.script("openai", {"tools": 1})
        ask("tools", client=client, tools=TOOLS)
        made("tools", prompt=..., response=...)
        ask(PARTS, client=client)
        made("parts", prompt=..., response=...)
        client.chat.completions.create(model="gpt-4o", messages=TURNS)
        made("turns", prompt=..., response=f"The Sandbox's answer to: {FRANCE}")
        if hasattr(client, "responses"):
            client.responses.create(model="gpt-4o", input="respond")
            made("response", prompt="respond", response="The Sandbox's answer to: respond")
        sandbox.script("openai", {"status": 400})
        with pytest.raises(openai.BadRequestError):
            ask("failed", client=client)
        made("failed", reason="call_failed")
        sandbox.script("openai", {"refusal": "I cannot."})
        ask("refused", client=client)
        made("refused", reason="refusal")
        sandbox.script("openai", {"truncate": 2})
        ask("broken off", client=client, stream=True)
        made("broken off", reason="partial_stream")
    finally:
        mlflow.openai.autolog(disable=True)
        client.close()
    with mlflow.start_span("llm", span_type="LLM") as span:
        span.set_inputs({"question": "what?"})
        span.set_outputs({"text": "that"})
    made("odd", reason="unsupported_content")
    with mlflow.start_span("retriever", span_type="RETRIEVER"):
        pass
    made("without a call", reason="empty")
    return wanted


def test_each_trace_of_a_mixed_store_gets_the_right_texts_or_reason(
    score, sandbox, traces, experiment
):
    """And the tags that go with it; what was scored live is not even looked at."""
    wanted = mix(sandbox)
    left_open = mlflow.start_span_no_context("in progress")
    inner = mlflow.start_span_no_context("llm", span_type="CHAT_MODEL", parent_span=left_open)
    inner.set_inputs(chat("early"))
    inner.set_outputs("late")
    inner.end()
    stored = {trace.info.trace_id: trace for trace in traces(len(wanted) + 1)}
    untouched = stored[left_open.trace_id].to_dict()

    rows = {row.trace_id: row for row in score().itertuples()}

    stored = {trace.info.trace_id: trace for trace in traces(len(wanted) + 1)}
    for trace_id, row in wanted.items():
        name = row["name"]
        if name == "ours, scored":
            assert trace_id not in rows
            continue
        found, trace = rows[trace_id], stored[trace_id]
        assert found.reason == row.get("reason"), name
        if found.reason is None:
            asked = scoring_of(trace).inputs
            assert (found.prompt, found.response) == (asked["prompt"], asked["response"]), name
            for key in ("prompt", "response"):
                assert row[key] in (..., getattr(found, key)), name
            assert tags(trace)["trust_score"] == f"{found.trust_score:.4f}", name
            assert tags(trace)["trust_status"] == found.status == "scored", name
            assert [one.value for one in trace.info.assessments] == [found.trust_score], name
        else:
            assert tags(trace) == {"trust_status": "unscored"}, name
            assert trace.info.assessments == [], name
            assert (found.span_id is None) == (name == "without a call"), name
            assert (found.prompt, found.status) == (None, "unscored"), name
    prompts = {
        row["name"]: rows[trace_id].prompt for trace_id, row in wanted.items() if trace_id in rows
    }
    responses = {
        row["name"]: rows[trace_id].response for trace_id, row in wanted.items() if trace_id in rows
    }
    assert "lookup" in prompts["tools"]
    assert "lookup" in responses["tools"]
    assert "What is this?" in prompts["parts"]
    assert "And where?" in prompts["parts"]
    assert prompts["turns"].startswith("System: Be brief.")

    assert (rows[left_open.trace_id].status, rows[left_open.trace_id].span_id) == ("pending", None)
    assert stored[left_open.trace_id].to_dict() == untouched
    left_open.end()
    row = by_prompt(score())["early"]
    assert (row.trace_id, row.response, row.status) == (left_open.trace_id, "late", "scored")


def test_the_same_texts_are_scored_whoever_has_recorded_them(asked, sandbox, traces):
    """Cleanlab is sent by a run what it would have been sent live."""
    asked("hello", tools=TOOLS)
    with openai.OpenAI() as client:
        ask("hello", client=tt.wrap_openai(client), tools=TOOLS)
    tt.score_traces()
    live, stored = (request.json for request in sandbox.requests("tlm"))
    for body in (live, stored):
        body.get("options", {}).pop("max_timeout", None)
    assert live == stored


def test_the_lowest_score_of_several_calls_is_the_traces(score, asked, sandbox, traces):
    """With its explanation; each call has its own assessment and scoring span."""
    for text, value in {"a": 0.5, "b": 0.1, "c": 0.9}.items():
        sandbox.answer(text, text.upper(), score=value, explanation=f"Why {text}.")
    with mlflow.start_span("agent"):
        asked("a", "b", "c")
    found = score()
    assert list(found["prompt"]) == ["b", "a", "c"]
    (trace,) = traces(1)
    assert tags(trace) == {
        "trust_score": "0.1000",
        "explanation": "Why b.",
        "trust_status": "scored",
    }
    assert sorted(one.value for one in trace.info.assessments) == [0.1, 0.5, 0.9]
    spans = named(trace, "tlm.trustworthiness")
    llms = {span.span_id for span in named(trace, "Completions")}
    assert {span.parent_id for span in spans} == llms
    assert len(spans) == len(llms) == 3


def test_a_trace_of_which_a_call_has_no_score_is_partial(score, asked, sandbox, traces):
    """The other call's score is told."""
    with mlflow.start_span("agent"):
        asked("a")
        sandbox.script("openai", {"refusal": "I cannot."})
        asked("b")
    found = score()
    assert sorted(found["status"]) == ["scored", "unscored"]
    (trace,) = traces(1)
    assert tags(trace)["trust_status"] == "partial"
    assert tags(trace)["trust_score"] == f"{found['trust_score'][0]:.4f}"


def test_a_score_that_is_on_its_way_is_waited_for(sandbox, scorer, traces, monkeypatch):
    """Nothing of its trace is sent or written; who has it in the background will do both."""
    monkeypatch.setattr("tlm_tracing._pipeline._MOST_HELD", 0)
    scorer.hold()
    with tt.trusted_span("block"):
        ask_ours("on its way", mode="background", scorer=scorer)
        ask_ours("left out", mode="off")
    mlflow.flush_trace_async_logging()
    asked = FakeScorer()
    found = tt.score_traces(scorer=asked)
    assert (list(found["status"]), asked.exchanges) == (["pending"] * 2, [])
    scorer.release()
    traces(1)
    found = tt.score_traces(scorer=asked)
    assert [exchange.prompt for exchange in asked.exchanges] == ["left out"]
    (trace,) = traces(1)
    assert tags(trace)["trust_status"] == "scored"
    assert len(trace.info.assessments) == 2


@pytest.mark.parametrize("how", ["given whole", "given by id", "searched for"])
def test_a_trace_in_progress_is_left_alone(how, scorer, experiment):
    """However it is meant, until it has ended."""
    root = mlflow.start_span_no_context("root")
    inner = mlflow.start_span_no_context("llm", span_type="CHAT_MODEL", parent_span=root)
    inner.set_inputs(chat("early"))
    inner.set_outputs("an answer")
    inner.end()
    read = mlflow.search_traces(locations=[experiment], return_type="list")
    means = {
        "given whole": {"traces": read},
        "given by id": {"traces": [root.trace_id]},
        "searched for": {},
    }
    (row,) = tt.score_traces(**means[how], scorer=scorer).itertuples()
    assert (row.status, row.span_id, scorer.exchanges) == ("pending", None, [])
    root.end()
    (row,) = tt.score_traces(**means[how], scorer=scorer).itertuples()
    assert (row.status, len(scorer.exchanges)) == ("scored", 1)


def test_a_trace_that_mlflow_has_not_written_whole_is_left_alone(scorer, experiment, monkeypatch):
    """The write that is still to come would take away tags and assessments."""
    with mlflow.start_span("llm", span_type="CHAT_MODEL") as span:
        span.set_inputs(chat("early"))
        span.set_outputs("an answer")
    whole_trace = mlflow.get_trace(span.trace_id)
    client = TracingClient()
    mlflow.MlflowClient().delete_traces(experiment, trace_ids=[span.trace_id])
    client.log_spans(experiment, whole_trace.data.spans)
    (row,) = tt.score_traces(scorer=scorer).itertuples()
    assert (row.status, scorer.exchanges) == ("pending", [])
    client.start_trace(whole_trace.info)
    (row,) = tt.score_traces(scorer=scorer).itertuples()
    assert (row.status, row.prompt) == ("scored", "early")


def test_a_trace_that_came_by_opentelemetry_is_scored_a_minute_later(scorer, experiment):
    """Nothing tells of it that it is whole."""
    at = time.time_ns() - 61 * 10**9
    span = mlflow.start_span_no_context("llm", span_type="CHAT_MODEL", start_time_ns=at)
    span.set_inputs(chat("early"))
    span.set_outputs("an answer")
    span.end(end_time_ns=at + 1)
    spans = mlflow.get_trace(span.trace_id).data.spans
    mlflow.MlflowClient().delete_traces(experiment, trace_ids=[span.trace_id])
    TracingClient().log_spans(experiment, spans)
    (row,) = tt.score_traces(scorer=scorer).itertuples()
    assert row.status == "scored"


def test_a_call_of_langchains_is_scored(sandbox, traces):
    """Once, though OpenAI's client is inside of it."""
    langchain_openai = pytest.importorskip("langchain_openai")
    mlflow.langchain.autolog()
    try:
        langchain_openai.ChatOpenAI(model="gpt-4o").invoke(FRANCE)
    finally:
        mlflow.langchain.autolog(disable=True)
    (row,) = tt.score_traces().itertuples()
    assert row.prompt.endswith(FRANCE)
    assert row.response == f"The Sandbox's answer to: {FRANCE}"


# 5. Which traces.


def test_a_dry_run_sends_and_writes_nothing(score, asked, sandbox, traces, monkeypatch):
    """And needs no key; it tells how much would be sent."""
    monkeypatch.delenv("CLEANLAB_TLM_API_KEY")
    asked("one", "three")
    with mlflow.start_span("no call"):
        pass
    before = whole(traces(3))
    seen = []
    found = score(dry_run=True, progress=seen.append)
    assert whole(traces(3)) == before
    assert sandbox.requests("tlm") == []
    assert sorted(found["status"]) == ["pending", "pending", "unscored"]
    length = sum(len(row.prompt) + len(row.response) for row in found.itertuples() if row.prompt)
    assert (seen[-1].characters, seen[-1].traces, seen[-1].total) == (length, 3, 3)


def test_a_limit_counts_traces_that_are_sent(score, scorer, traces):
    """The newest first; the next run goes on."""
    record("a", "b", "c")
    with mlflow.start_span("no call"):
        pass
    assert set(score(limit=2, scorer=scorer)["prompt"].dropna()) == {"b", "c"}
    assert len(scorer.exchanges) == 2
    assert set(score(limit=2, scorer=scorer)["prompt"].dropna()) == {"a"}


SINCE = {
    "a datetime with a time zone": lambda at: datetime.fromtimestamp(at, timezone.utc),
    "a datetime elsewhere": lambda at: datetime.fromtimestamp(at, timezone(timedelta(hours=5))),
    "a local datetime": datetime.fromtimestamp,
    "ISO 8601": lambda at: datetime.fromtimestamp(at, timezone.utc).isoformat(),
    "ISO 8601 with a Z": lambda at: (
        datetime.fromtimestamp(at, timezone.utc).isoformat().replace("+00:00", "Z")
    ),
    "seconds since 1970": lambda at: at,
    "a timedelta": lambda at: timedelta(seconds=time.time() - at),
    "seconds ago": lambda at: f"{time.time() - at:.3f}s",
    "hours ago": lambda at: f"{(time.time() - at) / 3600:.9f} H",
}


@pytest.fixture(scope="module")
def years(store):
    """Traces that began one and three hours ago, and just now."""
    mlflow.set_tracking_uri(store)
    experiment = mlflow.set_experiment("years").experiment_id
    now = time.time()
    for name, ago in {"new": 0, "old": 3_600, "older": 3 * 3_600}.items():
        at = int((now - ago) * 1e9)
        span = mlflow.start_span_no_context("llm", span_type="CHAT_MODEL", start_time_ns=at)
        span.set_inputs(chat(name))
        span.set_outputs("an answer")
        span.end(end_time_ns=at + 1_000_000)
    return experiment, now


@pytest.mark.parametrize("form", SINCE.values(), ids=SINCE)
def test_since_and_until_take_every_form_of_a_time(form, years, scorer):
    """Both ends count."""
    experiment, now = years
    asked = {"experiment_ids": experiment, "dry_run": True}
    bound = now - 2 * 3_600
    assert set(tt.score_traces(**asked, since=form(bound))["prompt"]) == {"old", "new"}
    assert set(tt.score_traces(**asked, until=form(bound))["prompt"]) == {"older"}
    both = tt.score_traces(**asked, since=form(bound), until=form(now - 1_800))
    assert set(both["prompt"]) == {"old"}


@pytest.mark.parametrize(("since", "found"), [("90m", 2), ("2h", 2), ("1d", 3), ("1w", 3)])
def test_how_long_ago_has_its_units(since, found, years):
    """Minutes, hours, days and weeks."""
    assert len(tt.score_traces(years[0], since=since, dry_run=True)) == found


def test_experiments_are_meant_by_id_or_name(request, scorer):
    """One or several; without any, the active one."""
    ids = []
    for number in range(3):
        name = f"{request.node.nodeid} {number}"
        ids.append(mlflow.set_experiment(name).experiment_id)
        record(str(number))

    def found(**asked):
        return set(tt.score_traces(**asked, dry_run=True)["prompt"])

    names = [f"{request.node.nodeid} {number}" for number in range(3)]
    assert found() == {"2"}
    assert found(experiment_ids=ids[0]) == found(experiment_ids=int(ids[0])) == {"0"}
    assert found(experiment_ids=ids[:2]) == found(experiment_names=names[:2]) == {"0", "1"}
    assert found(experiment_names=names[1]) == {"1"}
    assert found(experiment_ids=ids[0], experiment_names=names[1]) == {"0", "1"}


def test_a_filter_of_mlflows_is_kept(scorer):
    """Beside what else is asked for."""
    first, _ = record("a", "b")
    mlflow.set_trace_tag(first, "env", "production")
    found = tt.score_traces(filter_string="tag.env = 'production'", scorer=scorer, since="1h")
    assert list(found["trace_id"]) == [first]
    found = tt.score_traces(filter_string="trace.status = 'ERROR'", scorer=scorer)
    assert len(found) == 0


@pytest.mark.parametrize("form", [lambda *part: part, lambda *part: "{}/{}".format(*part)])
def test_shards_are_disjoint_and_together_complete(form, scorer):
    """Each trace is in exactly one part."""
    ids = record(*map(str, range(12)))
    parts = [set(tt.score_traces(shard=form(k, 3), scorer=scorer)["trace_id"]) for k in (1, 2, 3)]
    assert sorted(one for part in parts for one in part) == sorted(ids)
    assert len(scorer.exchanges) == 12


def test_a_shard_of_given_traces_is_a_shard(scorer):
    """The workers may be given the same list."""
    ids = record(*map(str, range(8)))
    for k in (1, 2):
        tt.score_traces(traces=ids, shard=(k, 2), scorer=scorer)
    assert sorted(one.prompt for one in scorer.exchanges) == list(map(str, range(8)))


def test_traces_are_given_in_every_form(score, experiment):
    """A frame, traces, their infos, ids, or whatever gives these; each counts once."""
    ids = record("a", "b")
    record("another")
    read = [mlflow.get_trace(trace_id) for trace_id in ids]
    frame = mlflow.search_traces(locations=[experiment])
    forms = {
        "a frame": frame[frame["trace_id"].isin(ids)],
        "traces": read,
        "a trace and an id": [read[0], ids[1]],
        "infos": [trace.info for trace in read],
        "ids": ids,
        "a generator": (trace_id for trace_id in ids),
        "a series": pd.Series(ids),
        "twice the same": [*read, *ids],
        "without spans": mlflow.search_traces(
            locations=[experiment], include_spans=False, return_type="list"
        )[1:],
    }
    for name, form in forms.items():
        scorer = FakeScorer()
        found = score(traces=form, scorer=scorer, rescore=True)
        assert sorted(found["trace_id"]) == sorted(ids), name
        assert len(scorer.exchanges) == 2, name
    for one in (ids[0], read[0], read[0].info):
        assert list(score(traces=one, dry_run=True, rescore=True)["prompt"]) == ["a"]
    assert len(score(traces=[], scorer=FakeScorer())) == 0


def test_of_given_traces_those_with_a_score_are_left_alone(scorer):
    """Their rows tell it."""
    ids = record("a", "b")
    tt.score_traces(traces=ids[:1], scorer=FakeScorer(0.3))
    found = by_prompt(tt.score_traces(traces=ids, scorer=scorer))
    assert (found["a"].trust_score, found["a"].status) == (0.3, "scored")
    assert [exchange.prompt for exchange in scorer.exchanges] == ["b"]


def test_a_score_that_came_since_a_trace_was_read_is_replaced(traces):
    """Old news of a trace do no harm: one assessment, the newest score."""
    record("a")
    (stale,) = traces(1)
    tt.score_traces(scorer=FakeScorer(0.3))
    tt.score_traces(traces=[stale], scorer=FakeScorer(0.6))
    (trace,) = traces(1)
    assert [one.value for one in trace.info.assessments] == [0.6]
    assert tags(trace)["trust_score"] == "0.6000"
    assert scoring_of(trace).outputs["trust_score"] == 0.6


def test_of_two_scorers_the_newer_score_is_known(traces):
    """A trace whose tags got lost gets those of the newer one, and nobody is asked."""
    record("a")
    for score, name in ((0.9, "first"), (0.2, "second")):
        tt.score_traces(scorer=FakeScorer(score, name=name), rescore=True)
    (trace,) = traces(1)
    for tag in ("trust_status", "trust_score"):
        mlflow.delete_trace_tag(trace.info.trace_id, tag)
    third = FakeScorer(0.5, name="third")
    tt.score_traces(scorer=third)
    assert third.exchanges == []
    assert tags(traces(1)[0])["trust_score"] == "0.2000"


@pytest.mark.parametrize("page", [1, 2, 3, 7])
def test_traces_of_one_millisecond_are_all_found_while_they_are_written(page, experiment):
    """However small the pages, each exactly once."""
    at = time.time_ns() - 10**9
    ids = []
    for moment in (at, at + 2_000_000, *[at + 1_000_000] * 5):
        span = mlflow.start_span_no_context("llm", start_time_ns=moment)
        span.end(end_time_ns=moment + 1)
        ids.append(span.trace_id)
    client = TracingClient()
    found = []
    unscored = "tag.trust_status IS NULL"
    asked = _search.query(experiment)
    for infos in _search.newest_first(client, asked, extra_filter=unscored, page=page):
        for info in infos:
            client.set_trace_tag(info.trace_id, "trust_status", "scored")
        found += [info.trace_id for info in infos]
    assert sorted(found) == sorted(ids)


def test_a_trace_that_is_deleted_meanwhile_costs_no_other_its_score(scorer, traces, experiment):
    """And it does not come back."""
    ids = record("a", "b", "c")
    client = mlflow.MlflowClient()

    def deleting(request, completion):
        if request["messages"][0]["content"] == "b":
            client.delete_traces(experiment, trace_ids=[ids[1]])
        return 0.5

    tt.score_traces(scorer=deleting)
    assert {trace.info.trace_id: tags(trace)["trust_score"] for trace in traces(2)} == {
        ids[0]: "0.5000",
        ids[2]: "0.5000",
    }


# 6. What can't be done.


def refusing(**asked):
    with pytest.raises(tt.ConfigurationError) as refused:
        tt.score_traces(**asked)
    with pytest.raises(tt.ConfigurationError):
        asyncio.run(_collected(**asked))
    return str(refused.value)


WRONG = {
    "an unknown setting": ({"treshold": 1}, "treshold.*threshold"),
    "an impossible setting": ({"timeout": -1}, "timeout"),
    "no limit": ({"limit": 0}, "limit.*at least 1"),
    "half a limit": ({"limit": 1.5}, "limit"),
    "a limit that is a bool": ({"limit": True}, "limit"),
    "a shard of nothing": ({"shard": (0, 3)}, "shard.*3/8"),
    "a shard beyond": ({"shard": "4/3"}, "shard"),
    "a shard in words": ({"shard": "first"}, "shard"),
    "a shard of one number": ({"shard": 3}, "shard"),
    "a time in words": ({"since": "yesterday"}, "since.*24h"),
    "a time without an end": ({"until": math.inf}, "until"),
    "a time that is a bool": ({"since": True}, "since"),
    "a time before all times": ({"since": "99999999w"}, "since"),
    "a filter that is none": ({"filter_string": "trust is low"}, "filter.*trust is low"),
    "an experiment that is none": ({"experiment_names": "nobody's"}, "nobody's"),
    "a trace that is none": ({"traces": [1]}, "traces must be"),
    "traces that are none": ({"traces": 7}, "traces must be"),
    "a frame of something else": ({"traces": pd.DataFrame({"a": [1]})}, "trace_id"),
    "traces and a search": ({"traces": ["tr-1"], "since": "1h"}, "either traces"),
    "no experiment at all": ({"experiment_ids": []}, "list of experiments is empty"),
    "progress that is none": ({"progress": True}, "progress"),
    "no budget at all": ({"max_scores_per_minute": 0}, "max_scores_per_minute.*dry_run"),
}


@pytest.mark.parametrize(("asked", "said"), WRONG.values(), ids=WRONG)
def test_what_cannot_be_done_is_refused_with_a_word_on_why(asked, said, sandbox):
    """Before anything is sent."""
    record("a")
    assert re.search(said, refusing(**asked))
    assert sandbox.requests("tlm") == []


def test_the_streaming_form_refuses_where_it_is_written(sandbox):
    """Not at the first row."""
    with pytest.raises(tt.ConfigurationError):
        tt.iter_scores(limit=0)


@pytest.mark.parametrize("key", [None, "", "  "])
def test_without_a_key_it_is_told_how_to_get_one(key, monkeypatch):
    """Or what to do without."""
    if key is not None:
        monkeypatch.setenv("CLEANLAB_TLM_API_KEY", key)
    assert re.search("CLEANLAB_TLM_API_KEY.*scorer=", refusing())
    if key is not None:
        assert "CLEANLAB_TLM_API_KEY" in refusing(scorer="hosted")


def test_a_key_that_cannot_work_is_told_at_once(monkeypatch):
    """And not repeated."""
    monkeypatch.setenv("CLEANLAB_TLM_API_KEY", '"very secret"')
    said = refusing()
    assert "key" in said
    assert "very secret" not in said


def test_what_is_switched_off_scores_nothing(monkeypatch, sandbox):
    """The switch is named."""
    monkeypatch.setenv("TLM_TRACING_ENABLED", "false")
    assert "TLM_TRACING_ENABLED" in refusing()


# 7. Settings.


def enclosed(value):
    return {"masked": value} if isinstance(value, dict) else f"<{value}>"


def test_without_content_no_text_is_written(sandbox, traces):
    """As for a live call; the caller's own frame has them."""
    sandbox.answer(FRANCE, "Paris.", score=0.98, explanation="So it is.")
    record(FRANCE, answer="Lyon, or so")
    tt.score_traces(capture_content=False)
    (trace,) = traces(1)
    written = json.dumps([tags(trace), scoring_of(trace).to_dict()])
    written += json.dumps([one.to_dictionary() for one in trace.info.assessments])
    for text in (FRANCE, "Lyon", "So it is"):
        assert text not in written
    assert "explanation" not in tags(trace)


@pytest.mark.parametrize("settings", [{"capture_content": False}, {"mask": enclosed}, {}])
def test_what_may_be_seen_is_the_same_as_live(settings, sandbox, traces):
    """Texts and explanation, each masked once."""
    sandbox.default("tlm", score=0.5, explanation="Because.")
    ask_ours(FRANCE, mode="off")
    tt.score_traces(**settings)
    ask_ours(FRANCE, **settings)
    stored, live = traces(2)
    assert told(stored) == told(live)


def test_a_mask_hides_texts_on_the_scoring_span(traces):
    """And in the explanation that is written."""

    def mask(value):
        return json.loads(json.dumps(value).replace("secret", "***"))

    record("a secret")
    trust = {"trustworthiness_score": 0.5, "log": {"explanation": "Too secret."}}
    tt.score_traces(mask=mask, scorer=FakeScorer(trust))
    (trace,) = traces(1)
    assert scoring_of(trace).inputs["prompt"] == "a ***"
    assert tags(trace)["explanation"] == "Too ***."
    assert trace.info.assessments[0].rationale == "Too ***."


def test_a_mask_for_the_scorer_is_applied_to_what_leaves(sandbox):
    """And what it cannot mask does not leave."""
    record("a secret")

    def broken(text):
        raise RuntimeError

    (row,) = tt.score_traces(mask_scorer=broken).itertuples()
    assert (row.reason, sandbox.requests("tlm")) == ("scorer_error", [])
    tt.score_traces(mask_scorer=lambda text: text.replace("secret", "***"))
    (request,) = sandbox.requests("tlm")
    assert b"secret" not in request.body
    assert b"a ***" in request.body


@pytest.mark.parametrize(
    "settings", [{"sample_rate": 0.0}, {"should_score": lambda request, completion: False}]
)
def test_what_is_sampled_out_is_left_as_it_is(settings, score, scorer, traces):
    """Nothing is sent, nothing written."""
    record("a")
    before = whole(traces(1))
    (row,) = score(scorer=scorer, **settings).itertuples()
    assert (row.status, row.reason, scorer.exchanges) == ("unscored", "sampled_out", [])
    assert whole(traces(1)) == before


def test_a_cache_scores_the_same_answer_once(sandbox, traces):
    """The trace says so."""
    record("a", "a", "b")
    tt.score_traces(cache_size=10)
    assert len(sandbox.requests("tlm")) == 2
    cached = [scoring_of(trace).attributes.get("tlm.cached") for trace in traces(3)]
    assert sorted(cached, key=str) == [None, None, True]
    assert len({tags(trace)["trust_score"] for trace in traces(3)}) == 2


@pytest.mark.parametrize("is_async", [False, True])
def test_a_function_scores_what_openais_client_would_give_it(is_async, asked):
    """The request as it was sent, the answer as a completion."""
    seen = []

    def function(request, completion):
        seen.append((request, completion))
        return {"trustworthiness_score": 0.4, "log": {"explanation": "Read it."}}

    async def coroutine(request, completion):
        return function(request, completion)

    asked(FRANCE, temperature=0.5)
    (row,) = tt.score_traces(scorer=coroutine if is_async else function).itertuples()
    assert (row.trust_score, row.explanation) == (0.4, "Read it.")
    ((request, completion),) = seen
    assert isinstance(completion, ChatCompletion)
    assert completion.choices[0].message.content == row.response
    assert request["messages"] == chat(FRANCE)["messages"]
    assert request["temperature"] == 0.5


@pytest.mark.parametrize("way", ["keyword", "configure", "environment"])
def test_no_more_are_in_flight_than_may_be(way, sandbox, monkeypatch):
    """Over all traces together, wherever it is set."""
    record(*map(str, range(10)))
    sandbox.default("tlm", delay=0.05)
    if way == "configure":
        tt.configure(max_concurrency=3)
    elif way == "environment":
        monkeypatch.setenv("TLM_TRACING_MAX_CONCURRENCY", "3")
    tt.score_traces(**({"max_concurrency": 3} if way == "keyword" else {}))
    assert sandbox.max_in_flight("tlm") == 3
    assert len(sandbox.requests("tlm")) == 10


def test_a_budget_is_kept_by_waiting(sandbox):
    """A great one leaves nobody out; of a tiny one, the first score alone is asked for."""
    record("a", "b", "c", "d")
    found = tt.score_traces(limit=2, max_scores_per_minute=1e6)
    assert list(found["status"]) == ["scored"] * 2
    rows = tt.iter_scores(max_scores_per_minute=0.001)
    assert next(rows).status == "scored"
    rows.close()
    assert len(sandbox.requests("tlm")) == 3


# 8. The streaming form.


class Gate:
    """A scorer that lets the first call pass, and keeps the others until it is opened."""

    name = "gate"

    def __init__(self):
        self.asked = []
        self.opened = threading.Event()

    async def score(self, exchange):
        self.asked.append(exchange.prompt)
        if len(self.asked) > 1:
            await asyncio.to_thread(self.opened.wait, 30)
        return 0.5

    async def aclose(self):
        self.opened.set()


@pytest.fixture
def gate():
    gate = Gate()
    yield gate
    gate.opened.set()


def assert_what_was_sent_is_written(gate, traces, count):
    scored = [trace for trace in traces(count) if tags(trace)]
    assert sorted(scoring_of(trace).inputs["prompt"] for trace in scored) == sorted(gate.asked)
    assert all(len(trace.info.assessments) == 1 for trace in scored)
    assert len(scored) < count


def test_rows_come_before_the_end(gate):
    """Written already; who goes on gets them all."""
    record(*map(str, range(4)))
    rows = tt.iter_scores(scorer=gate, max_concurrency=1)
    first = next(rows)
    assert first.status == "scored"
    assert isinstance(first, tt.ScoredCall)
    assert mlflow.get_trace(first.trace_id).info.tags["trust_score"] == "0.5000"
    gate.opened.set()
    assert len(list(rows)) == 3


@pytest.mark.parametrize("how", ["close", "break", "error"])
def test_who_stops_early_finds_what_was_sent_written(how, gate, traces):
    """And the rest untouched; the next run goes on there."""
    record(*map(str, range(6)))
    rows = tt.iter_scores(scorer=gate, max_concurrency=1)

    def consume():
        for _ in rows:
            gate.opened.set()
            if how == "break":
                break
            if how == "error":
                raise KeyError
            rows.close()

    if how == "error":
        with pytest.raises(KeyError):
            consume()
    else:
        consume()
    rows.close()
    assert_what_was_sent_is_written(gate, traces, 6)
    sent = len(gate.asked)
    assert len(tt.score_traces(scorer=gate)) == 6 - sent
    assert sorted(gate.asked) == list(map(str, range(6)))


def test_a_task_that_is_cancelled_leaves_what_was_sent_written(gate, traces):
    """And is cancelled."""
    record(*map(str, range(6)))

    async def main():
        first = asyncio.Event()

        async def consume():
            async for _ in tt.aiter_scores(scorer=gate, max_concurrency=1):
                first.set()

        task = asyncio.create_task(consume())
        await first.wait()
        gate.opened.set()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(main())
    assert_what_was_sent_is_written(gate, traces, 6)


def test_a_task_that_is_cancelled_at_once_leaves_nothing_behind(scorer, traces):
    """No run goes on that nobody reads."""
    record("a", "b")
    before = {thread.name for thread in threading.enumerate()}

    async def main():
        task = asyncio.create_task(tt.ascore_traces(scorer=scorer))
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(main())
    for thread in threading.enumerate():
        if thread.name == "tlm-tracing-stored" and thread.name not in before:
            thread.join(10)
    assert len([trace for trace in traces(2) if tags(trace)]) == len(scorer.exchanges)
    assert "tlm-tracing-stored" not in {thread.name for thread in threading.enumerate()}


def test_a_progress_callable_that_fails_is_no_matter(score, scorer, caplog):
    """It is said once."""
    record("a")

    def broken(progress):
        raise RuntimeError("no display")

    assert len(score(scorer=scorer, progress=broken)) == 1
    said = [one for one in caplog.records if "progress" in one.getMessage()]
    assert [one.levelno for one in said] == [logging.WARNING]


def test_progress_tells_how_far_it_is(scorer):
    """At the end all of it."""
    record("a", "b")
    with mlflow.start_span("no call"):
        pass
    seen = []
    tt.score_traces(scorer=scorer, progress=seen.append)
    last = seen[-1]
    assert isinstance(last, tt.Progress)
    assert (last.traces, last.scored, last.unscored, last.total) == (3, 2, 1, 3)
    assert last.characters == sum(len(one.prompt + one.response) for one in scorer.exchanges)
    assert last.rate > 0
    assert last.seconds_left == 0


def test_the_sync_form_works_inside_a_running_loop(scorer):
    """As in Jupyter."""
    record("a")

    async def cell():
        return tt.score_traces(scorer=scorer)

    assert list(asyncio.run(cell())["status"]) == ["scored"]


def test_the_async_form_leaves_the_loop_to_others(gate):
    """While a score is waited for, others have their turns."""
    record("a", "b")

    async def main():
        scoring = asyncio.create_task(tt.ascore_traces(scorer=gate))
        others = asyncio.Event()
        asyncio.get_running_loop().call_soon(others.set)
        await others.wait()
        assert not scoring.done()
        gate.opened.set()
        return await scoring

    assert len(asyncio.run(main())) == 2


def test_a_run_inside_a_scorer_of_the_live_path_is_none_of_its_calls(sandbox, traces):
    """What a scorer asks an LLM leaves no traces."""
    record("a")

    def judge(request, completion):
        mlflow.openai.autolog()
        try:
            ask("Is it right?")
        finally:
            mlflow.openai.autolog(disable=True)
        return 0.5

    tt.score_traces(scorer=judge)
    traces(1)


# 9. A scorer in trouble. The store's troubles are in test_stored_roads.


DOWN = {
    "refused": (None, {}),
    "429": ({"status": 429}, {}),
    "500": ({"status": 500}, {}),
    "rubbish": ({"garbage": True}, {}),
    "hangs": ({"hang": True}, {"timeout": 0.2}),
}


@pytest.mark.parametrize(("fault", "settings"), DOWN.values(), ids=DOWN)
def test_an_outage_ends_a_run_early_and_costs_nothing_but_time(
    fault, settings, score, sandbox, traces, monkeypatch, caplog
):
    """Nothing is written, it is said once, and the next run scores all."""
    monkeypatch.setattr(_judge, "_PAUSES", (0.01, 0.01))
    monkeypatch.setattr("tlm_tracing.scorers.hosted._FIRST_PAUSE", 0.01)
    record(*map(str, range(5)))
    before = whole(traces(5))
    if fault is None:
        sandbox.stop_side("tlm")
    else:
        sandbox.default("tlm", **fault)
    found = score(**settings)
    assert set(found["status"]) == {"unscored"}
    assert set(found["reason"]) <= {"scorer_unavailable", "timeout"}
    assert whole(traces(5)) == before
    ended = [one for one in caplog.records if "ended early" in one.getMessage()]
    assert len(ended) == 1
    sandbox.clear()
    _scoring._runtime.breakers.clear()
    assert list(score()["status"]) == ["scored"] * 5
    assert {tags(trace)["trust_status"] for trace in traces(5)} == {"scored"}


def test_one_bad_answer_among_good_ones_is_asked_for_again(sandbox, traces, monkeypatch):
    """A fault that passes costs no score."""
    monkeypatch.setattr(_judge, "_PAUSES", (0.01,) * 5)
    record(*map(str, range(5)))
    sandbox.script("tlm", {}, {"garbage": True}, {}, {"status": 503})
    tt.score_traces(max_concurrency=1)
    assert {tags(trace)["trust_status"] for trace in traces(5)} == {"scored"}


def test_one_call_that_cannot_be_scored_leaves_the_others_alone(sandbox, traces):
    """It is unscored with a reason, and tried again by the next run."""
    record("a", "b", "c")
    sandbox.script("tlm", {"score": "nan"})
    found = tt.score_traces(max_concurrency=1)
    assert sorted(found["status"]) == ["scored", "scored", "unscored"]
    assert set(found["reason"].dropna()) == {"scorer_error"}
    assert sum(not tags(trace) for trace in traces(3)) == 1
    assert list(tt.score_traces()["status"]) == ["scored"]


def test_without_assessments_tags_and_span_tell_the_score(score, scorer, traces):
    """And the next run knows it by these."""
    record("a")
    score(assessments=False, scorer=scorer)
    (trace,) = traces(1)
    assert trace.info.assessments == []
    assert tags(trace)["trust_score"] == "0.9000"
    assert scoring_of(trace).outputs["trust_score"] == 0.9
    score(scorer=scorer, traces=[trace.info.trace_id])
    assert len(scorer.exchanges) == 1


def test_others_assessments_and_tags_stay(traces, scorer):
    """What a human has said is not ours to touch."""
    (trace_id,) = record("a")
    mlflow.set_trace_tag(trace_id, "env", "production")
    mlflow.log_feedback(trace_id=trace_id, name="trustworthiness", value=0.1)
    tt.score_traces(scorer=scorer)
    (trace,) = traces(1)
    assert trace.info.tags["env"] == "production"
    assert sorted(one.value for one in trace.info.assessments) == [0.1, 0.9]
    assert all(isinstance(one, Feedback) for one in trace.info.assessments)
