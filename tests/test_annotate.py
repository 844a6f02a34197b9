"""Tags and assessments reach the trace, whatever the moment, and none is lost."""

import asyncio
import threading
from concurrent.futures import ThreadPoolExecutor

import mlflow
import openai
import pytest

import tlm_tracing as tt
from tlm_tracing import _annotate
from tlm_tracing._data import Trust
from tlm_tracing.openai import AsyncOpenAI, OpenAI
from tlm_tracing.testing import FakeScorer

QUESTION = [{"role": "user", "content": "What is the capital of France?"}]
STATES = pytest.mark.parametrize("mode", ["inline", "background"])


def ask(client=None, question="What is the capital of France?", **options):
    client = client or OpenAI()
    return client.chat.completions.create(
        model="gpt-4o", messages=[{"role": "user", "content": question}], **options
    )


def own_score(request, completion):
    """Each question is its own score."""
    return {
        "trustworthiness_score": float(request["messages"][0]["content"]),
        "log": {"explanation": request["messages"][0]["content"]},
    }


@STATES
def test_no_tag_is_lost_when_200_calls_end_at_once(mode, sandbox, traces, asynchronous_export):
    questions = [f"{number / 200:.4f}" for number in range(200)]
    client = tt.wrap_openai(openai.OpenAI(), scorer=own_score, mode=mode)
    with ThreadPoolExecutor(16) as pool:
        list(pool.map(lambda question: ask(client, question), questions))
    found = traces(200)
    for one in found:
        question = one.data.spans[0].inputs["messages"][0]["content"]
        assert one.info.tags["trust_score"] == question
        assert one.info.tags["explanation"] == question
        assert one.info.tags["trust_status"] == "scored"
        assert [assessment.value for assessment in one.info.assessments] == [float(question)]


@STATES
def test_tags_of_async_calls_are_not_lost_either(mode, sandbox, traces, asynchronous_export):
    async def main():
        async with AsyncOpenAI() as client:
            await asyncio.gather(*(ask(client, f"{number / 50:.4f}") for number in range(50)))

    tt.configure(scorer=own_score, mode=mode)
    asyncio.run(main())
    for one in traces(50):
        question = one.data.spans[0].inputs["messages"][0]["content"]
        assert one.info.tags["trust_score"] == question


def test_a_score_that_comes_while_the_users_trace_is_open(sandbox, trace, scorer):
    tt.configure(scorer=scorer)
    with mlflow.start_span("mine"):
        ask()
    found = trace()
    assert found.info.tags["trust_score"] == "0.9000"
    assert len(found.info.assessments) == 1


@pytest.mark.parametrize("export", ["synchronous", "asynchronous"])
def test_a_score_that_comes_after_the_users_trace_has_ended(
    export, sandbox, trace, scorer, request
):
    if export == "asynchronous":
        request.getfixturevalue("asynchronous_export")
    scorer.hold()
    with mlflow.start_span("mine"):
        completion = ask(tt.wrap_openai(openai.OpenAI(), scorer=scorer, mode="background"))
    assert tt.trust(completion).status == "pending"
    scorer.release()
    assert tt.trust(completion).wait(10).score == 0.9
    found = trace()
    assert found.info.tags["trust_score"] == "0.9000"
    assert [assessment.value for assessment in found.info.assessments] == [0.9]
    assert found.data.spans[0].name == "mine"
    assert len(found.data.spans) == 4


@pytest.mark.parametrize("stream", [False, True])
def test_no_span_is_lost_that_ends_after_the_users_trace(
    stream, sandbox, traces, scorer, asynchronous_export
):
    scorer.hold()
    tt.configure(scorer=scorer, mode="background")
    streams = []
    for _ in range(20):
        with tt.trusted_span("block"):
            streams.append(ask(openai.OpenAI(), stream=stream))
        if stream:
            list(streams[-1])
    scorer.release()
    for one in traces(20):
        assert [span.name for span in one.data.spans] == [
            "block",
            "chat gpt-4o",
            "openai.chat.completions",
            "tlm.trustworthiness",
        ]
        assert one.info.tags["trust_score"] == "0.9000"


def stored_trace():
    """A trace that is in the store, and no longer in memory."""
    with mlflow.start_span("stored") as span:
        pass
    mlflow.flush_trace_async_logging()
    return span.trace_id, span.span_id


def trust_of(ids, score, explanation=None, **more):
    return Trust(
        score, explanation, trace_id=ids[0], span_id=ids[1], scorer="fake", seconds=0.1, **more
    )


def test_a_score_reaches_a_stored_trace(sandbox, trace):
    ids = stored_trace()
    trust = trust_of(ids, 0.25, "why")
    assert not _annotate.annotate_live(trust, _annotate.Notes())
    assert _annotate.annotate_stored(trust, _annotate.Notes())
    found = trace()
    assert found.info.tags["trust_score"] == "0.2500"
    assert found.info.tags["explanation"] == "why"
    (assessment,) = found.info.assessments
    assert (assessment.value, assessment.rationale) == (0.25, "why")
    assert tt.trust(ids[0]).score == 0.25


def test_scoring_a_stored_call_again_updates_and_never_duplicates(sandbox, trace):
    ids = stored_trace()
    for score in (0.8, 0.3):
        assert _annotate.annotate_stored(trust_of(ids, score), _annotate.Notes())
    assert [assessment.value for assessment in trace().info.assessments] == [0.3]


def test_a_trace_that_nobody_knows_is_not_annotated_yet():
    trust = trust_of(("tr-" + "0" * 32, "0" * 16), 0.5)
    assert not _annotate.annotate_live(trust, _annotate.Notes())
    assert not _annotate.annotate_stored(trust, _annotate.Notes())


def test_the_lowest_score_of_a_trace_wins_whatever_the_order(sandbox, trace):
    results = [
        {"trustworthiness_score": score, "log": {"explanation": str(score)}}
        for score in (0.7, 0.2, 0.5)
    ]
    with tt.trusted_span(scorer=FakeScorer(*results)) as span:
        for _ in results:
            ask(openai.OpenAI())
    assert [trust.score for trust in span.trusts] == [0.7, 0.2, 0.5]
    assert span.trust.score == 0.2
    found = trace()
    assert found.info.tags["trust_score"] == "0.2000"
    assert found.info.tags["explanation"] == "0.2"
    assert sorted(one.value for one in found.info.assessments) == [0.2, 0.5, 0.7]


@pytest.mark.parametrize("order", [(0.7, ValueError("no")), (ValueError("no"), 0.7)])
def test_a_trace_with_unscored_calls_is_partial(order, sandbox, trace):
    with tt.trusted_span(scorer=FakeScorer(*order)):
        ask(openai.OpenAI())
        ask(openai.OpenAI())
    found = trace()
    assert found.info.tags["trust_status"] == "partial"
    assert found.info.tags["trust_score"] == "0.7000"


def test_a_lower_score_without_explanation_takes_the_other_ones_away(sandbox, trace):
    explained = {"trustworthiness_score": 0.7, "log": {"explanation": "of 0.7"}}
    with tt.trusted_span(scorer=FakeScorer(explained, 0.2)):
        ask(openai.OpenAI())
        ask(openai.OpenAI())
    found = trace()
    assert found.info.tags["trust_score"] == "0.2000"
    assert "explanation" not in found.info.tags


@pytest.mark.parametrize(
    "text",
    ["é" * 5000, "e\u0301" * 3000, "👩‍👩‍👧" * 1000, "a\x00b" * 3000],
    ids=["accents", "combining", "joined", "nul"],
)
def test_a_long_explanation_is_cut_at_mlflows_limit_between_characters(text, sandbox, trace):
    result = {"trustworthiness_score": 0.5, "log": {"explanation": text}}
    ask(tt.wrap_openai(openai.OpenAI(), scorer=FakeScorer(result)))
    found = trace()
    tag = found.info.tags["explanation"]
    assert 4000 < len(tag) <= 4096
    assert tag.endswith("…")
    assert text.replace("\x00", "").startswith(tag[:-1])
    assert tag[-2] not in "\u200d"
    assert found.info.assessments[0].rationale.startswith(tag[:-1])


def test_an_explanation_with_half_a_character_is_written(sandbox, trace):
    result = {"trustworthiness_score": 0.5, "log": {"explanation": "half \ud83d"}}
    ask(tt.wrap_openai(openai.OpenAI(), scorer=FakeScorer(result)))
    assert trace().info.tags["explanation"] == "half ?"


def test_filters_find_what_users_mean(sandbox, traces, experiment):
    tt.configure(scorer=own_score)
    for question in ("0.1000", "0.4999", "0.5000", "1.0000"):
        ask(question=question)
    traces(4)
    found = mlflow.search_traces(
        locations=[experiment],
        filter_string="feedback.trustworthiness < 0.5",
        return_type="list",
    )
    assert {one.info.tags["trust_score"] for one in found} == {"0.1000", "0.4999"}


def test_traces_of_several_threads_do_not_mix(sandbox, traces):
    tt.configure(scorer=own_score)

    def work(number):
        with tt.trusted_span(f"{number:.4f}") as span:
            ask(openai.OpenAI(), f"{number:.4f}")
        assert span.trust.score == number

    threads = [threading.Thread(target=work, args=(number / 8,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for one in traces(8):
        assert one.info.tags["trust_score"] == one.data.spans[0].name
