"""Scores that come late: however many calls wait for theirs, no trace is lost."""

import asyncio
import os
import subprocess
import sys
from collections import Counter

import mlflow
import pytest

import tlm_tracing as tt
from tlm_tracing import _pipeline
from tlm_tracing.openai import AsyncOpenAI, OpenAI
from tlm_tracing.testing import FakeScorer

QUESTION = [{"role": "user", "content": "What is the capital of France?"}]


def ask(client=None, **options):
    client = client or OpenAI()
    return client.chat.completions.create(model="gpt-4o", messages=QUESTION, **options)


async def ask_async(**options):
    async with AsyncOpenAI() as client:
        return await ask(client, **options)


def streamed(**options):
    stream = ask(stream=True, **options)
    list(stream)
    return stream


@pytest.fixture
def held(monkeypatch, sandbox, scorer):
    """A scorer that keeps everybody waiting, when no call may wait with its trace open."""
    monkeypatch.setattr(_pipeline, "_MOST_HELD", 0)
    scorer.hold()
    tt.configure(scorer=scorer, mode="background")
    return scorer


def stored(experiment):
    mlflow.flush_trace_async_logging()
    return mlflow.search_traces(locations=[experiment], return_type="list")


def total_tokens(trace):
    return (trace.info.token_usage or {}).get("total_tokens", 0)


ASKING = [ask, streamed, lambda **options: asyncio.run(ask_async(**options))]


@pytest.mark.parametrize("asking", ASKING, ids=["sync", "stream", "async"])
def test_beyond_the_bound_a_call_is_stored_at_once_and_scored_late(
    asking, held, experiment, trace, asynchronous_export
):
    answer = asking()
    (before,) = stored(experiment)
    assert [span.name for span in before.data.spans] == ["chat gpt-4o", "openai.chat.completions"]
    assert before.data.spans[0].outputs
    assert not {"trust_score", "explanation", "trust_status"} & before.info.tags.keys()
    assert "tlm.status" not in before.data.spans[0].attributes
    assert tt.trust(answer).status == "pending"

    held.release()
    assert tt.trust(answer).wait(10).score == 0.9
    after = trace()
    parent, _, scoring = after.data.spans
    assert (scoring.name, scoring.parent_id) == ("tlm.trustworthiness", parent.span_id)
    assert scoring.outputs["trust_score"] == parent.attributes["tlm.trustworthiness_score"] == 0.9
    assert parent.outputs == before.data.spans[0].outputs
    assert after.info.tags["trust_score"] == "0.9000"
    assert after.info.tags["trust_status"] == "scored"
    assert [one.value for one in after.info.assessments] == [0.9]
    assert after.info.assessments[0].span_id == parent.span_id
    assert after.info.execution_duration == before.info.execution_duration
    assert total_tokens(after) == total_tokens(before)


def test_a_late_score_finds_the_trace_of_a_block_that_is_long_over(
    held, trace, asynchronous_export
):
    with tt.trusted_span("block") as span:
        ask()
    held.release()
    found = trace()
    assert [one.name for one in found.data.spans] == [
        "block",
        "chat gpt-4o",
        "openai.chat.completions",
        "tlm.trustworthiness",
    ]
    assert found.info.trace_id == span.trace_id
    assert span.trust.score == 0.9


def test_a_late_score_waits_for_a_block_that_is_open(held, trace, asynchronous_export):
    with tt.trusted_span("block"):
        trust = tt.trust(ask())
        held.release()
        assert trust.wait(10).score == 0.9
    found = trace()
    assert found.info.tags["trust_score"] == "0.9000"
    assert len(found.data.spans) == 4


def test_the_lowest_of_early_and_late_scores_counts(
    monkeypatch, sandbox, trace, asynchronous_export
):
    monkeypatch.setattr(_pipeline, "_MOST_HELD", 2)
    scorer = FakeScorer(0.8, 0.2, 0.5)
    scorer.hold()
    tt.configure(scorer=scorer, mode="background", max_concurrency=1)
    with tt.trusted_span("block"):
        for _ in range(3):
            ask()
    scorer.release()
    found = trace()
    assert found.info.tags["trust_score"] == "0.2000"
    assert sorted(one.value for one in found.info.assessments) == [0.2, 0.5, 0.8]
    assert len(found.data.spans) == 10


def test_a_late_failure_says_why(monkeypatch, sandbox, trace, asynchronous_export):
    monkeypatch.setattr(_pipeline, "_MOST_HELD", 0)
    scorer = FakeScorer(RuntimeError("no score today"))
    scorer.hold()
    tt.configure(scorer=scorer, mode="background")
    ask()
    scorer.release()
    found = trace()
    assert found.info.tags["trust_status"] == "unscored"
    assert found.data.spans[0].attributes["tlm.reason"] == "scorer_error"
    assert not found.info.assessments


def test_a_threshold_is_kept_late_too(monkeypatch, sandbox, trace, asynchronous_export):
    monkeypatch.setattr(_pipeline, "_MOST_HELD", 0)
    scorer = FakeScorer(0.1)
    tt.configure(scorer=scorer, threshold=0.5, on_low=lambda completion, trust: "another answer")
    assert ask() == "another answer"
    parent, llm, _ = trace().data.spans
    assert parent.attributes["tlm.action"] == "replaced"
    assert parent.outputs == "another answer"
    assert llm.outputs["choices"]


APPLICATION = """
import mlflow, openai, tlm_tracing as tt
from concurrent.futures import ThreadPoolExecutor
from tlm_tracing.testing import FakeScorer

mlflow.set_experiment({experiment!r})
scorer = FakeScorer()
scorer.hold()
client = tt.wrap_openai(openai.OpenAI(), scorer=scorer, mode="background", timeout=300)

def ask(number):
    client.chat.completions.create(model="gpt-4o", messages=[{{"role": "user", "content": "?"}}])

with ThreadPoolExecutor(8) as pool:
    list(pool.map(ask, range(650)))
scorer.release()
assert tt.flush(120)
"""


@pytest.mark.long
def test_no_trace_is_lost_of_more_calls_than_mlflow_has_room_for(
    request, sandbox, store, experiment
):
    environment = {
        **os.environ,
        "MLFLOW_TRACKING_URI": store,
        "MLFLOW_TRACE_BUFFER_MAX_SIZE": "600",
        "MLFLOW_ENABLE_ASYNC_TRACE_LOGGING": "true",
    }
    code = APPLICATION.format(experiment=request.node.nodeid)
    subprocess.run([sys.executable, "-c", code], env=environment, check=True, timeout=200)
    found = mlflow.search_traces(locations=[experiment], max_results=2000, include_spans=False)
    assert Counter(tags.get("trust_score") for tags in found["tags"]) == {"0.9000": 650}
