"""``wrap_tlm``: Cleanlab's own clients, traced."""

import asyncio
import copy
import functools
import inspect
import pickle
import threading
import time
import warnings

import mlflow
import openai
import pytest
from cleanlab_tlm import TLM, Eval, TLMCalibrated, TLMLite, TrustworthyRAG, errors
from cleanlab_tlm.utils.chat_completions import TLMChatCompletion
from cleanlab_tlm.utils.responses import TLMResponses
from mlflow.entities import SpanStatusCode

import tlm_tracing as tt
from tlm_tracing import _ready
from tlm_tracing.exceptions import ConfigurationError
from tlm_tracing.tlm_client import wrap_tlm

CANNED = [
    ("What is 1+1?", "2", 0.96, "Nothing is wrong with it."),
    ("What is 1+2?", "4", 0.0312, "It is 3."),
    ("What is 1+3?", "4", 0.875, "It seems right."),
]
PROMPTS = [prompt for prompt, *_ in CANNED]
RESPONSES = [response for _, response, *_ in CANNED]
SCORES = [score for *_, score, _ in CANNED]
REASONS = [explanation for *_, explanation in CANNED]
EXPLAINED = {"log": ["explanation"]}


@pytest.fixture(autouse=True)
def cleanlab(sandbox):
    """What Cleanlab's service says."""
    for prompt, response, score, explanation in CANNED:
        sandbox.answer(prompt, response, score=score, explanation=explanation)
    return sandbox


def make(kind=TLM, **settings):
    return kind(**{"options": EXPLAINED, **settings})


@pytest.fixture
def tlm():
    return wrap_tlm(make())


WAYS = ["sync", "async"]


@pytest.fixture(params=WAYS)
def call(request):
    """Calls a method, or its async twin: ``call(client, "prompt", ...)``."""

    def sync(client, name, *args, **kwargs):
        return getattr(client, name)(*args, **kwargs)

    def later(client, name, *args, **kwargs):
        return asyncio.run(getattr(client, f"{name}_async")(*args, **kwargs))

    return {"sync": sync, "async": later}[request.param]


def only_span(trace):
    (span,) = trace.data.spans
    return span


def parted(trace):
    """The span of a batch, and those of its pairs in their order."""
    (batch,) = [span for span in trace.data.spans if span.parent_id is None]
    pairs = [span for span in trace.data.spans if span is not batch]
    assert {span.parent_id for span in pairs} <= {batch.span_id}
    return batch, sorted(pairs, key=lambda span: PROMPTS.index(asked(span)))


def asked(span):
    return span.inputs.get("query", span.inputs.get("prompt"))


def tags(trace):
    return {key: tag for key, tag in trace.info.tags.items() if not key.startswith("mlflow.")}


def assessments(trace):
    return {one.span_id: one for one in trace.info.assessments}


# One pair.


def test_a_score_is_a_trace(tlm, call, trace):
    result = call(tlm, "get_trustworthiness_score", PROMPTS[1], RESPONSES[1])
    assert result == {"trustworthiness_score": 0.0312, "log": {"explanation": "It is 3."}}
    found = trace()
    span = only_span(found)
    assert (span.name, span.span_type) == ("tlm.trustworthiness", "EVALUATOR")
    assert span.inputs == {"prompt": PROMPTS[1], "response": RESPONSES[1]}
    assert span.outputs == result
    assert span.attributes["tlm.trustworthiness_score"] == 0.0312
    assert span.attributes["tlm.status"] == "scored"
    assert span.attributes["tlm.scorer"] == "cleanlab-tlm/medium"
    assert span.attributes["tlm.client"] == "TLM"
    assert 0 < span.attributes["tlm.seconds"] <= (span.end_time_ns - span.start_time_ns) / 1e9
    assert tags(found) == {
        "trust_score": "0.0312",
        "explanation": "It is 3.",
        "trust_status": "scored",
    }
    (assessment,) = found.info.assessments
    assert (assessment.name, assessment.value) == ("trustworthiness", 0.0312)
    assert assessment.rationale == "It is 3."
    assert assessment.span_id == span.span_id
    assert assessment.source.source_id == "cleanlab-tlm/medium"
    assert assessment.source.source_type == "LLM_JUDGE"
    assert assessment.metadata["model"] == "gpt-4.1-mini"
    assert "llm_model" not in assessment.metadata


def test_an_answer_is_a_scored_llm_call(tlm, call, trace, experiment):
    result = call(tlm, "prompt", PROMPTS[1])
    assert result["response"] == RESPONSES[1]
    found = trace()
    span = only_span(found)
    assert (span.name, span.span_type) == ("tlm.prompt", "LLM")
    assert span.inputs == {"prompt": PROMPTS[1]}
    assert span.outputs == result
    assert span.attributes["mlflow.llm.model"] == "gpt-4.1-mini"
    assert (found.info.request_preview, found.info.response_preview) == (PROMPTS[1], RESPONSES[1])
    assert tags(found)["trust_score"] == "0.0312"
    (assessment,) = found.info.assessments
    assert assessment.metadata["llm_model"] == "gpt-4.1-mini"
    found_by_score = mlflow.search_traces(
        locations=[experiment],
        filter_string="feedback.trustworthiness < 0.5",
        return_type="list",
    )
    assert [one.info.trace_id for one in found_by_score] == [found.info.trace_id]


def test_an_explanation_is_no_score(call, trace):
    tlm = wrap_tlm(make(options={}))
    result = {"trustworthiness_score": 0.0312}
    told = call(tlm, "get_explanation", prompt=PROMPTS[1], response=RESPONSES[1], tlm_result=result)
    assert told == "It is 3."
    assert result["log"] == {"explanation": "It is 3."}  # as the client does it
    found = trace()
    span = only_span(found)
    assert (span.name, span.span_type) == ("tlm.explanation", "EVALUATOR")
    assert span.inputs == {
        "prompt": PROMPTS[1],
        "response": RESPONSES[1],
        "tlm_result": {"trustworthiness_score": 0.0312},
    }
    assert span.outputs == "It is 3."
    assert tags(found) == {}
    assert found.info.assessments == []


def test_what_has_been_scored_is_counted(tlm):
    before = tt.stats().scored
    tlm.get_trustworthiness_score(PROMPTS, RESPONSES)
    assert tt.stats().scored == before + 3


def test_a_low_score_is_flagged(tlm, trace):
    tt.configure(threshold=0.5, on_low="raise")
    assert tlm.get_trustworthiness_score(PROMPTS[1], RESPONSES[1])["trustworthiness_score"] < 0.5
    span = only_span(trace())
    assert (span.attributes["tlm.threshold"], span.attributes["tlm.action"]) == (0.5, "flagged")


# Batches.


def test_a_batch_has_a_span_for_each_pair(tlm, call, trace):
    results = call(tlm, "get_trustworthiness_score", PROMPTS, RESPONSES)
    assert [one["trustworthiness_score"] for one in results] == SCORES
    found = trace()
    batch, pairs = parted(found)
    assert (batch.name, batch.span_type) == ("tlm.trustworthiness.batch", "CHAIN")
    assert batch.inputs == {"pairs": 3}
    assert batch.outputs == {"trust_score": 0.0312, "scored": 3, "unscored": 0}
    assert [(span.name, span.span_type) for span in pairs] == [
        ("tlm.trustworthiness", "EVALUATOR")
    ] * 3
    assert [span.inputs["response"] for span in pairs] == RESPONSES
    assert [span.outputs for span in pairs] == results
    assert [span.attributes["tlm.trustworthiness_score"] for span in pairs] == SCORES
    assert tags(found) == {
        "trust_score": "0.0312",
        "explanation": "It is 3.",
        "trust_status": "scored",
    }
    of_spans = assessments(found)
    assert [of_spans[span.span_id].value for span in pairs] == SCORES
    assert [of_spans[span.span_id].rationale for span in pairs] == REASONS


def test_a_batch_of_prompts(tlm, call, trace):
    results = call(tlm, "prompt", PROMPTS)
    found = trace()
    batch, pairs = parted(found)
    assert batch.name == "tlm.prompt.batch"
    assert [(span.name, span.span_type) for span in pairs] == [("tlm.prompt", "LLM")] * 3
    assert [span.outputs for span in pairs] == results
    assert len(found.info.assessments) == 3


def test_a_batch_of_explanations(call, trace):
    tlm = wrap_tlm(make(options={}))
    results = [{"trustworthiness_score": score} for score in SCORES]
    told = call(tlm, "get_explanation", prompt=PROMPTS, response=RESPONSES, tlm_result=results)
    assert told == REASONS
    batch, pairs = parted(trace())
    assert batch.name == "tlm.explanation.batch"
    assert [span.outputs for span in pairs] == REASONS
    assert [span.inputs["tlm_result"] for span in pairs] == [
        {"trustworthiness_score": score} for score in SCORES
    ]


def test_an_empty_batch(tlm, trace):
    assert tlm.get_trustworthiness_score([], []) == make().get_trustworthiness_score([], [])
    assert only_span(trace()).inputs == {"pairs": 0}


def test_each_pair_has_its_own_part_of_the_arguments(trace):
    tlm = wrap_tlm(make(task="classification", options={}))
    outputs = [["2", "3"], ["4", "5"], ["4", "6"]]
    tlm.get_trustworthiness_score(PROMPTS, RESPONSES, constrain_outputs=outputs)
    _, pairs = parted(trace())
    assert [span.inputs["constrain_outputs"] for span in pairs] == outputs


def test_what_all_pairs_share_stays_whole(trace):
    tlm = wrap_tlm(make(task="classification", options={}))
    tlm.get_trustworthiness_score(PROMPTS, RESPONSES, constrain_outputs=["2", "4", "other"])
    _, pairs = parted(trace())
    assert [span.inputs["constrain_outputs"] for span in pairs] == [["2", "4", "other"]] * 3


@pytest.fixture
def release_after(cleanlab):
    """Lets go of what hangs when so many requests have arrived; gives when that was."""
    threads, released = [], []

    def release(count):
        def wait():
            cleanlab.wait_for("tlm", count, 30)
            released.append(time.time_ns())
            cleanlab.release()

        threads.append(threading.Thread(target=wait))
        threads[-1].start()

    def when():
        threads[-1].join()
        return released[-1]

    release.when = when
    return release


def test_each_pair_has_its_own_duration(tlm, cleanlab, release_after, trace):
    """One hangs; those that are over before it is let go are over before it on their spans."""
    prompts = [f"What is {number} times two?" for number in range(8)]
    cleanlab.script("tlm", {"hang": True})
    release_after(len(prompts))  # the client begins with four at once: some are answered by then
    tlm.get_trustworthiness_score(prompts, ["x"] * len(prompts))
    released = release_after.when()
    late = cleanlab.requests("tlm")[0].json["prompt"]
    spans = [span for span in trace().data.spans if span.parent_id is not None]
    (hung,) = [span for span in spans if span.inputs["prompt"] == late]
    assert hung.start_time_ns < released < hung.end_time_ns
    assert min(span.end_time_ns for span in spans) < released
    for span in spans:
        assert span.attributes["tlm.seconds"] == (span.end_time_ns - span.start_time_ns) / 1e9


def test_to_wait_for_ones_turn_is_no_work(tlm, cleanlab, release_after, trace):
    """The client asks for four pairs at once; the others' spans begin when their turn has come."""
    prompts = [f"What is {number} times two?" for number in range(6)]
    cleanlab.script("tlm", *[{"hang": True}] * 4)
    release_after(4)
    tlm.get_trustworthiness_score(prompts, ["x"] * len(prompts))
    released = release_after.when()
    spans = [span for span in trace().data.spans if span.parent_id is not None]
    waited = [span for span in spans if span.start_time_ns > released]
    assert len(waited) == 2
    for span in waited:
        assert span.start_time_ns - span.attributes["tlm.queued_seconds"] * 1e9 < released


def test_the_times_of_a_client_that_does_it_otherwise_are_those_of_the_batch(trace):
    class Later(TLM):
        """As a later version of cleanlab-tlm may be."""

        async def _batch_get_trustworthiness_score(self, prompts, responses):
            return [{"trustworthiness_score": 0.5} for _ in prompts]

    wrap_tlm(make(Later)).get_trustworthiness_score(PROMPTS, RESPONSES)
    batch, pairs = parted(trace())
    assert len(pairs) == 3
    for span in pairs:
        assert span.attributes["tlm.timing"] == "batch"
        assert span.attributes["tlm.trustworthiness_score"] == 0.5
        assert "tlm.seconds" not in span.attributes
        assert batch.start_time_ns <= span.start_time_ns <= span.end_time_ns <= batch.end_time_ns


def test_batches_at_the_same_time_are_not_mixed(traces):
    async def both():
        tlm = wrap_tlm(make())
        await asyncio.gather(
            tlm.get_trustworthiness_score_async(PROMPTS, RESPONSES),
            tlm.get_trustworthiness_score_async(PROMPTS[:2], RESPONSES[:2]),
            *(
                tlm.get_trustworthiness_score_async(*pair)
                for pair in zip(PROMPTS, RESPONSES, strict=True)
            ),
        )

    asyncio.run(both())
    found = traces(5)
    assert sorted(len(one.data.spans) for one in found) == [1, 1, 1, 3, 4]
    for one in found:
        for span in one.data.spans:
            if span.name == "tlm.trustworthiness":
                score = SCORES[PROMPTS.index(span.inputs["prompt"])]
                assert span.attributes["tlm.trustworthiness_score"] == score


def test_a_batch_of_hundreds_is_whole_on_a_server(cleanlab, sqlite_server, store, request):
    """Right after a flush, each of 300 pairs has its span, its score and its assessment."""
    cleanlab.load(
        {"prompt": f"q{number}", "response": f"a{number}", "score": number / 300}
        for number in range(300)
    )
    mlflow.set_tracking_uri(sqlite_server.uri)
    try:
        mlflow.set_experiment(request.node.nodeid)
        with tt.trusted_span("a block") as block:
            wrap_tlm(make()).get_trustworthiness_score(
                [f"q{number}" for number in range(300)], [f"a{number}" for number in range(300)]
            )
        assert tt.flush(60)
        found = mlflow.get_trace(block.trace_id)
    finally:
        mlflow.set_tracking_uri(store)
    assert len(found.data.spans) == 302
    scores = assessments(found)
    pairs = [span for span in found.data.spans if span.name == "tlm.trustworthiness"]
    for span in pairs:
        score = int(span.inputs["prompt"][1:]) / 300
        assert span.attributes["tlm.trustworthiness_score"] == score
        assert scores[span.span_id].value == score
    assert tags(found)["trust_score"] == "0.0000"


@pytest.mark.long
@pytest.mark.usefixtures("asynchronous_export")
def test_no_span_of_thousands_is_lost(trace):
    """Though OpenTelemetry's queue has room for 2,048 only."""
    tlm = wrap_tlm(make())
    tlm.get_trustworthiness_score([f"q{number}" for number in range(4000)], ["a"] * 4000)
    assert len(trace().data.spans) == 4001


# Trouble.


def test_a_pair_that_fails_does_not_fail_the_batch(tlm, call, cleanlab, trace):
    cleanlab.script("tlm", {"status": 422})
    with pytest.warns(UserWarning, match="failed. Retrying will not help"):
        results = call(tlm, "get_trustworthiness_score", PROMPTS, RESPONSES)
    found = trace()
    batch, pairs = parted(found)
    (lost,) = [number for number, one in enumerate(results) if "error" in one["log"]]
    span = pairs[lost]
    assert span.status.status_code == SpanStatusCode.ERROR
    assert "The Sandbox was told to fail." in span.status.description
    assert span.outputs == results[lost]
    assert (span.attributes["tlm.status"], span.attributes["tlm.reason"]) == (
        "unscored",
        "scorer_error",
    )
    assert batch.outputs["scored"] == 2
    assert batch.outputs["unscored"] == 1
    assert batch.status.status_code == SpanStatusCode.OK
    assert tags(found)["trust_status"] == "partial"
    assert len(found.info.assessments) == 2


def test_a_pair_that_takes_too_long(cleanlab, trace):
    cleanlab.script("tlm", {"hang": True})
    with pytest.warns(UserWarning, match="Timeout"):
        wrap_tlm(make(timeout=1.0)).get_trustworthiness_score(PROMPTS, RESPONSES)
    cleanlab.release()
    _, pairs = parted(trace())
    reasons = [span.attributes.get("tlm.reason") for span in pairs]
    assert sorted(reasons, key=str) == [None, None, "timeout"]


FAULTS = {
    "key": ({"api_key": "invalid"}, {}, errors.AuthError, "scorer_unavailable"),
    "refused": ({}, {"status": 422}, errors.TlmBadRequestError, "scorer_error"),
    "slow": ({"timeout": 0.2}, {"hang": True}, errors.APITimeoutError, "timeout"),
}


@pytest.mark.parametrize(("settings", "behaviour", "error", "reason"), FAULTS.values(), ids=FAULTS)
def test_an_error_is_the_clients_own(settings, behaviour, error, reason, call, cleanlab, trace):
    cleanlab.default("tlm", **behaviour)
    tlm = wrap_tlm(make(**settings))
    with pytest.raises(error) as raised:
        call(tlm, "get_trustworthiness_score", PROMPTS[0], RESPONSES[0])
    cleanlab.release()
    assert type(raised.value) is error
    found = trace()
    span = only_span(found)
    assert span.status.status_code == SpanStatusCode.ERROR
    assert span.attributes["tlm.reason"] == reason
    assert span.events[0].attributes["exception.type"] == error.__name__
    assert tags(found) == {"trust_status": "unscored"}
    assert found.info.assessments == []


def test_a_prompt_that_fails_is_a_failed_call(tlm, cleanlab, trace):
    cleanlab.default("tlm", status=422)
    with pytest.raises(errors.TlmBadRequestError):
        tlm.prompt(PROMPTS[0])
    assert only_span(trace()).attributes["tlm.reason"] == "call_failed"


def test_a_score_that_is_none_says_so(tlm, cleanlab, trace):
    cleanlab.default("tlm", score=None)
    result = tlm.get_trustworthiness_score(PROMPTS[0], RESPONSES[0])
    assert result["trustworthiness_score"] is None
    span = only_span(trace())
    assert span.status.status_code == SpanStatusCode.ERROR
    assert span.attributes["tlm.reason"] == "scorer_error"


def test_scoring_that_is_switched_off_is_no_error(cleanlab, trace):
    criteria = [{"name": "brief", "criteria": "Is it brief?"}]
    options = {"disable_trustworthiness": True, "custom_eval_criteria": criteria}
    cleanlab.default("tlm", score=None)
    wrap_tlm(make(options=options)).get_trustworthiness_score(PROMPTS[0], RESPONSES[0])
    span = only_span(trace())
    assert span.status.status_code == SpanStatusCode.OK
    assert span.attributes["tlm.reason"] == "off"


@pytest.mark.parametrize(
    "wrong", [{}, {"prompt": "?"}, {"prompt": "?", "response": ["a"]}, {"nonsense": 1}], ids=str
)
def test_a_wrong_call_fails_as_ever(wrong, tlm, traces):
    def complaint(client):
        with pytest.raises((TypeError, errors.ValidationError)) as raised:
            client.get_trustworthiness_score(**wrong)
        return type(raised.value), str(raised.value)

    assert complaint(tlm) == complaint(make())
    assert only_span(traces(1)[0]).status.status_code == SpanStatusCode.ERROR


def test_a_batch_that_fails_keeps_what_there_is(cleanlab, trace):
    """Explanations fail all together."""
    tlm = wrap_tlm(make(options={}))
    known = {"trustworthiness_score": 0.96, "log": {"explanation": "Known."}}
    results = [known, {"trustworthiness_score": 0.0312}]
    cleanlab.default("tlm", status=422)
    with pytest.raises(errors.TlmBadRequestError):
        tlm.get_explanation(prompt=PROMPTS[:2], response=RESPONSES[:2], tlm_result=results)
    batch, pairs = parted(trace())
    assert batch.status.status_code == SpanStatusCode.ERROR
    assert pairs[0].outputs == "Known."
    assert pairs[1].status.status_code == SpanStatusCode.ERROR


def test_a_call_that_is_cancelled(tlm, cleanlab, trace):
    cleanlab.default("tlm", hang=True)

    async def cancel():
        task = asyncio.create_task(tlm.get_trustworthiness_score_async(PROMPTS, RESPONSES))
        await asyncio.to_thread(cleanlab.wait_for, "tlm", 3)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(cancel())
    cleanlab.release()
    batch, pairs = parted(trace())
    assert {span.status.status_code for span in (batch, *pairs)} == {SpanStatusCode.ERROR}
    assert {span.attributes["tlm.reason"] for span in pairs} == {"call_failed"}


def test_a_bug_of_ours_is_not_the_callers(tlm, caplog, monkeypatch):
    from tlm_tracing.tlm_client import _call

    monkeypatch.setattr(_call.TLMCall, "_conclude", lambda *_: 1 / 0)
    assert tlm.get_trustworthiness_score(PROMPTS[0], RESPONSES[0])["trustworthiness_score"] == 0.96
    monkeypatch.setattr(_call.TLMCall, "_opened", lambda *_: 1 / 0)
    assert tlm.get_trustworthiness_score(PROMPTS[0], RESPONSES[0])["trustworthiness_score"] == 0.96
    assert caplog.text.count("the application's call is not affected") == 2
    caplog.clear()


# The client stays what it is.


def test_it_is_still_its_own_kind(tlm):
    assert isinstance(tlm, TLM)
    assert tlm.__class__ is TLM
    assert tlm.get_model_name() == "gpt-4.1-mini"
    assert "TLM object" in repr(tlm)
    for name in ("prompt", "prompt_async", "get_trustworthiness_score", "get_explanation_async"):
        traced, bare = getattr(tlm, name), getattr(TLM, name)
        assert inspect.signature(traced) == inspect.signature(functools.partial(bare, tlm))
        assert inspect.iscoroutinefunction(traced) == inspect.iscoroutinefunction(bare)
        assert (traced.__name__, traced.__doc__) == (bare.__name__, bare.__doc__)
        assert getattr(tlm, name) == traced


def test_the_given_client_is_not_touched(traces):
    bare = make()
    before = dict(vars(bare))
    tlm = wrap_tlm(bare)
    tlm.get_trustworthiness_score(PROMPTS[0], RESPONSES[0])
    assert vars(bare) == before
    bare.get_trustworthiness_score(PROMPTS[0], RESPONSES[0])
    traces(1)


def test_what_is_set_on_it_counts(tlm, cleanlab):
    tlm._options["max_tokens"] = 100
    tlm._quality_preset = "low"
    tlm.get_trustworthiness_score(PROMPTS[0], RESPONSES[0])
    (sent,) = cleanlab.requests("tlm")
    assert sent.json["quality"] == "low"
    assert sent.json["options"]["max_tokens"] == 100


def test_twice_is_once(tlm, trace):
    again = wrap_tlm(tlm)
    assert again is tlm
    again.get_trustworthiness_score(PROMPTS[0], RESPONSES[0])
    assert len(trace().data.spans) == 1


def test_copies_are_traced(tlm, traces):
    copy.copy(tlm).get_trustworthiness_score(PROMPTS[0], RESPONSES[0])
    traces(1)


def test_what_could_not_be_pickled_still_cannot():
    def complaint(client):
        with pytest.raises((TypeError, AttributeError)) as raised:
            pickle.dumps(client)
        return type(raised.value), str(raised.value)

    bare = make()
    assert complaint(wrap_tlm(bare)) == complaint(bare)


class Portable(TLM):
    """A client that can be pickled."""

    def __reduce__(self):
        return Portable, ()


def test_what_could_be_pickled_still_can_and_is_traced(traces):
    again = pickle.loads(pickle.dumps(wrap_tlm(Portable())))
    assert isinstance(again, Portable)
    again.get_trustworthiness_score(PROMPTS[0], RESPONSES[0])
    assert copy.deepcopy(again).get_trustworthiness_score(PROMPTS[0], RESPONSES[0])
    traces(2)


class Doubtful(TLM):
    """Has half of TLM's trust."""

    def get_trustworthiness_score(self, prompt, response, **kwargs):
        found = super().get_trustworthiness_score(prompt, response, **kwargs)
        if isinstance(found, dict):
            return {"trustworthiness_score": found["trustworthiness_score"] / 2}
        return [{"trustworthiness_score": one["trustworthiness_score"] / 2} for one in found]


def test_a_subclass_with_methods_of_its_own(trace):
    tlm = wrap_tlm(make(Doubtful))
    half = {"trustworthiness_score": 0.48}
    assert tlm.get_trustworthiness_score(PROMPTS[0], RESPONSES[0]) == half
    span = only_span(trace())
    assert (span.outputs, span.attributes["tlm.trustworthiness_score"]) == (half, 0.48)


def test_what_a_batch_gives_in_the_end_is_what_counts(trace):
    wrap_tlm(make(Doubtful)).get_trustworthiness_score(PROMPTS, RESPONSES)
    found = trace()
    _, pairs = parted(found)
    assert [span.outputs for span in pairs] == [
        {"trustworthiness_score": score / 2} for score in SCORES
    ]
    assert [span.attributes["tlm.trustworthiness_score"] for span in pairs] == [
        score / 2 for score in SCORES
    ]
    assert sorted(one.value for one in found.info.assessments) == sorted(s / 2 for s in SCORES)
    assert all("tlm.timing" not in span.attributes for span in pairs)


def test_a_deprecated_method_warns_its_caller_and_is_traced(tlm, trace):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        tlm.try_get_trustworthiness_score(PROMPTS, RESPONSES)
    (warning,) = [one for one in caught if one.category is DeprecationWarning]
    assert warning.filename == __file__
    assert len(trace().data.spans) == 4


@pytest.mark.parametrize(
    ("given", "advice"),
    [
        (object(), "a client of cleanlab-tlm"),
        (None, "a client of cleanlab-tlm"),
        (TLM, r"wrap_tlm\(TLM\("),
        (Eval("clear", "Is it clear?", response_identifier="Response"), "cleanlab_tlm.TLM"),
        (openai.OpenAI(api_key="sk-none"), "wrap_openai"),
    ],
    ids=["object", "none", "class", "eval", "openai"],
)
def test_what_is_no_client_is_refused(given, advice):
    with pytest.raises(ConfigurationError, match=advice):
        wrap_tlm(given)


# Switches.


def test_enabled_false_lets_everything_pass(tlm, call, traces, monkeypatch):
    monkeypatch.setenv("TLM_TRACING_ENABLED", "false")
    assert call(tlm, "get_trustworthiness_score", PROMPTS[0], RESPONSES[0])
    traces(0)


def test_suppress_lets_everything_pass(tlm, call, traces):
    with tt.suppress():
        assert call(tlm, "get_trustworthiness_score", PROMPTS, RESPONSES)
    traces(0)


@pytest.mark.parametrize("count", [1, 3])
def test_without_content_there_are_no_words(count, tlm, trace):
    tt.configure(capture_content=False)
    if count == 1:
        tlm.prompt(PROMPTS[1])
    else:
        tlm.prompt(PROMPTS)
    found = trace()
    written = found.to_json()
    for word in ("What is", "It is 3", "Nothing is wrong"):
        assert word not in written
    assert tags(found) == {"trust_score": "0.0312", "trust_status": "scored"}
    assert {span.attributes["tlm.content"] for span in found.data.spans} == {"shape"}


def test_what_is_masked_is_recorded_nowhere(tlm, cleanlab, trace):
    def mask(value):
        if isinstance(value, dict):
            return {key: mask(item) for key, item in value.items()}
        return value.replace("1+2", "[sum]") if isinstance(value, str) else value

    tt.configure(mask=mask)
    tlm.get_trustworthiness_score(PROMPTS, RESPONSES)
    written = trace().to_json()
    assert "1+2" not in written
    assert "What is [sum]?" in written
    assert {one.json["prompt"] for one in cleanlab.requests("tlm")} == set(PROMPTS)


def test_a_key_is_not_told(cleanlab, trace):
    key = "tlm-key-that-nobody-may-see"
    cleanlab.default("tlm", status=422, body={"error": f"The key {key} may not do this."})
    with pytest.raises(errors.TlmBadRequestError):
        wrap_tlm(make(api_key=key)).get_trustworthiness_score(PROMPTS[0], RESPONSES[0])
    assert key not in trace().to_json()


# Inside of something.


def test_in_a_trusted_block(tlm, trace):
    with tt.trusted_span("quiz") as span:
        tlm.prompt(PROMPTS[0])
        tlm.get_trustworthiness_score(PROMPTS, RESPONSES)
        tlm.get_explanation(
            prompt=PROMPTS[0],
            response=RESPONSES[0],
            tlm_result={"trustworthiness_score": 0.96},
        )
    assert [trust.score for trust in span.trusts] == [0.96, *SCORES]
    assert span.trust.explanation == "It is 3."
    assert span.trust.trace_id == span.trace_id
    found = trace()
    root = found.data.spans[0]
    assert root.name == "quiz"
    children = [one.name for one in found.data.spans if one.parent_id == root.span_id]
    assert children == ["tlm.prompt", "tlm.trustworthiness.batch", "tlm.explanation"]
    assert tags(found)["trust_score"] == "0.0312"


def test_in_a_span_of_the_users(tlm, trace):
    with mlflow.start_span("mine") as mine:
        tlm.get_trustworthiness_score(PROMPTS, RESPONSES)
    found = trace()
    batch = next(span for span in found.data.spans if span.name == "tlm.trustworthiness.batch")
    assert batch.parent_id == mine.span_id
    assert len(found.data.spans) == 5


def test_beside_a_call_of_openais(tlm, cleanlab, trace, scorer):
    @tt.trusted(scorer=scorer)
    def answer(question):
        completion = openai.OpenAI().chat.completions.create(
            model="gpt-4o", messages=[{"role": "user", "content": question}]
        )
        text = completion.choices[0].message.content
        return tlm.get_trustworthiness_score(question, text)["trustworthiness_score"]

    assert answer(PROMPTS[1]) == 0.0312
    found = trace()
    assert tags(found)["trust_score"] == "0.0312"
    assert len(found.info.assessments) == 2
    assert len(found.data.spans) == 5


def test_a_scorer_may_use_it(tlm, trace):
    """What a scorer asks is not the application's."""

    async def scorer(request, completion):
        question = request["messages"][-1]["content"]
        return await tlm.get_trustworthiness_score_async(
            question, completion.choices[0].message.content
        )

    client = tt.wrap_openai(openai.OpenAI(), scorer=scorer)
    completion = client.chat.completions.create(
        model="gpt-4o", messages=[{"role": "user", "content": PROMPTS[1]}]
    )
    assert tt.trust(completion).score == 0.0312
    assert len(trace().data.spans) == 3


def test_what_has_its_score_is_not_scored_again(tlm, traces, scorer):
    tlm.prompt(PROMPTS[0])
    tlm.prompt(PROMPTS)
    tlm.get_trustworthiness_score(PROMPTS, RESPONSES)
    before = [tags(one) for one in traces(3)]
    assert len(tt.score_traces(scorer=scorer)) == 0
    tt.score_traces(scorer=scorer, rescore=True)
    assert [tags(one) for one in traces(3)] == before


def test_in_an_evaluation_of_mlflows(traces):
    """A scorer of MLflow's that asks TLM, and an application that answers by it."""

    def tlm():
        return wrap_tlm(make())  # one a thread, as its loop wants it

    @mlflow.genai.scorer
    def trustworthy(inputs, outputs):
        found = tlm().get_trustworthiness_score(inputs["question"], outputs)
        return found["trustworthiness_score"]

    result = mlflow.genai.evaluate(
        data=[{"inputs": {"question": prompt}} for prompt in PROMPTS],
        predict_fn=lambda question: tlm().prompt(question)["response"],
        scorers=[trustworthy],
    )
    assert result.metrics["trustworthy/mean"] == pytest.approx(sum(SCORES) / 3)
    answers = [one for one in traces() if any(s.name == "tlm.prompt" for s in one.data.spans)]
    assert sorted(float(tags(one)["trust_score"]) for one in answers) == sorted(SCORES)


def test_where_mlflow_records_nothing(tlm, call, traces):
    """The trust is known all the same."""
    with mlflow.tracing.context(enabled=False), tt.trusted_span() as span:
        call(tlm, "get_trustworthiness_score", PROMPTS, RESPONSES)
        call(tlm, "get_trustworthiness_score", PROMPTS[1], RESPONSES[1])
    assert [trust.score for trust in span.trusts] == [*SCORES, SCORES[1]]
    assert span.trust.trace_id is None
    traces(0)


def test_before_mlflow_is_ready(tlm, monkeypatch, trace):
    """What is recorded until then becomes a trace later, with its own times."""
    monkeypatch.setattr(_ready, "wait", lambda: False)
    began = time.time_ns()
    tlm.get_trustworthiness_score(PROMPTS, RESPONSES)
    ended = time.time_ns()
    found = trace()
    batch, pairs = parted(found)
    assert [span.attributes["tlm.trustworthiness_score"] for span in pairs] == SCORES
    assert tags(found)["trust_score"] == "0.0312"
    assert len(found.info.assessments) == 3
    for span in pairs:
        seconds = span.attributes["tlm.seconds"]
        assert seconds == (span.end_time_ns - span.start_time_ns) / 1e9
        assert began < batch.start_time_ns < span.start_time_ns < span.end_time_ns < ended


# Cleanlab's other clients.

QUERY, CONTEXT = PROMPTS[1], "One and two are three."


@pytest.fixture
def rag():
    evals = [
        Eval("clear", "Is the Response clear?", response_identifier="Response"),
        Eval("easy", "Is the Query easy?", query_identifier="Query"),
    ]
    return wrap_tlm(make(TrustworthyRAG, quality_preset="high", evals=evals))


def test_a_rag_score(rag, call, trace):
    result = call(rag, "score", query=QUERY, context=CONTEXT, response=RESPONSES[1])
    assert result["trustworthiness"]["score"] == 0.0312
    found = trace()
    span = only_span(found)
    assert span.name == "tlm.trustworthiness"
    assert span.inputs == {"query": QUERY, "context": CONTEXT, "response": RESPONSES[1]}
    assert span.outputs == result
    assert span.attributes["tlm.client"] == "TrustworthyRAG"
    assert tags(found)["trust_score"] == "0.0312"


def test_a_rag_answer(rag, trace):
    result = rag.generate(query=QUERY, context=CONTEXT)
    found = trace()
    span = only_span(found)
    assert (span.name, span.outputs) == ("tlm.prompt", result)
    assert span.attributes["tlm.method"] == "generate"
    assert tags(found)["trust_score"] == "0.0312"


def test_a_rag_batch(rag, cleanlab, trace):
    cleanlab.script("tlm", {"status": 422})
    with pytest.warns(UserWarning, match="failed"):
        results = rag.score(query=PROMPTS, context=[CONTEXT] * 3, response=RESPONSES)
    _, pairs = parted(trace())
    assert [span.outputs for span in pairs] == results
    assert [span.inputs["context"] for span in pairs] == [CONTEXT] * 3
    reasons = [span.attributes.get("tlm.reason") for span in pairs]
    assert sorted(reasons, key=str) == [None, None, "scorer_error"]
    assert all("tlm.timing" not in span.attributes for span in pairs)


def test_a_rag_explanation(rag, call, trace):
    result = {"trustworthiness": {"score": 0.0312}}
    told = call(
        rag,
        "get_explanation",
        query=QUERY,
        context=CONTEXT,
        response=RESPONSES[1],
        tlm_result=result,
    )
    assert only_span(trace()).outputs == told


def completion_of(question):
    return openai.OpenAI().chat.completions.create(
        model="gpt-4o", messages=[{"role": "user", "content": question}]
    )


def test_the_score_of_a_completion(call, trace):
    asked = {"model": "gpt-4o", "messages": [{"role": "user", "content": PROMPTS[1]}]}
    completion = completion_of(PROMPTS[1])
    tlm = wrap_tlm(make(TLMChatCompletion))
    result = call(tlm, "score", response=completion, **asked)
    assert result["trustworthiness_score"] == 0.0312
    span = only_span(trace())
    assert span.inputs["messages"] == asked["messages"]
    assert span.inputs["response"]["choices"][0]["message"]["content"] == RESPONSES[1]
    assert span.attributes["tlm.client"] == "TLMChatCompletion"


def test_the_explanation_of_a_completion(trace):
    asked = {"model": "gpt-4o", "messages": [{"role": "user", "content": PROMPTS[1]}]}
    tlm = wrap_tlm(make(TLMChatCompletion, options={}))
    told = tlm.get_explanation(
        response=completion_of(PROMPTS[1]), tlm_result={"trustworthiness_score": 0.0312}, **asked
    )
    span = only_span(trace())
    assert (span.name, span.outputs, told) == ("tlm.explanation", "It is 3.", "It is 3.")


def test_the_score_of_a_response(trace):
    if not hasattr(openai.OpenAI, "responses"):
        pytest.skip("this openai has no Responses API")
    asked = {"model": "gpt-4o", "input": PROMPTS[1]}
    response = openai.OpenAI().responses.create(**asked)
    result = wrap_tlm(make(TLMResponses)).score(response=response, **asked)
    assert only_span(trace()).outputs == result


class Perplexed(TLM):
    """With the perplexity that TLMLite asks for, which the Sandbox does not tell."""

    async def _prompt_async(self, *args, **kwargs):
        result = await super()._prompt_async(*args, **kwargs)
        result["log"]["perplexity"] = 0.5
        return result


@pytest.fixture
def light():
    client = TLMLite(quality_preset="medium", options=EXPLAINED)
    client._tlm_response = make(Perplexed)
    return wrap_tlm(client)


def test_the_light_client(light, trace):
    result = light.prompt(PROMPTS[1])
    assert result["trustworthiness_score"] == 0.0312
    found = trace()
    span = only_span(found)
    assert (span.name, span.outputs) == ("tlm.prompt", result)
    (assessment,) = found.info.assessments
    assert assessment.source.source_id == "cleanlab-tlm/medium"


def test_a_batch_of_the_light_client(light, cleanlab, trace):
    """It asks for the answers first, then for the scores of those that came."""
    cleanlab.script("tlm", {"status": 422})
    with pytest.warns(UserWarning, match="failed"):
        results = light.prompt(PROMPTS)
    _, pairs = parted(trace())
    assert [span.outputs for span in pairs] == results
    reasons = [span.attributes.get("tlm.reason") for span in pairs]
    assert sorted(reasons, key=str) == [None, None, "call_failed"]
    lost = reasons.index("call_failed")
    ends = [span.end_time_ns for span in pairs]
    assert ends[lost] == min(ends)
    assert all("tlm.timing" not in span.attributes for span in pairs)


def test_the_calibrated_client(trace):
    bare = TLMCalibrated(quality_preset="medium", options=EXPLAINED)
    scores = make().get_trustworthiness_score(PROMPTS, RESPONSES)
    tlm = wrap_tlm(bare)
    tlm.fit(scores, [1.0, 0.0, 1.0])
    results = tlm.get_trustworthiness_score(PROMPTS, RESPONSES)
    _, pairs = parted(trace())
    assert [span.outputs["calibrated_score"] for span in pairs] == [
        one["calibrated_score"] for one in results
    ]
    assert [span.attributes["tlm.trustworthiness_score"] for span in pairs] == SCORES
    assert all("tlm.timing" not in span.attributes for span in pairs)
