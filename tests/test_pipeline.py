"""Thresholds, background scoring, sampling, and what ``trust`` knows."""

import asyncio
import copy
import gc
import json
import pickle
import sys
import weakref

import openai
import pytest

import tlm_tracing as tt
from tlm_tracing import _pipeline
from tlm_tracing.openai import AsyncOpenAI, OpenAI
from tlm_tracing.testing import FakeScorer

QUESTION = [{"role": "user", "content": "What is the capital of France?"}]
ASK = {"model": "gpt-4o", "messages": QUESTION}


@pytest.fixture(autouse=True)
def running(sandbox):
    sandbox.answer(QUESTION[0]["content"], "Paris.")


def ask(client=None, **options):
    client = client or OpenAI()
    return client.chat.completions.create(**{**ASK, **options})


async def ask_async(**options):
    async with AsyncOpenAI() as client:
        return await ask(client, **options)


def sync_and_async(test):
    """The same promise for both: the test asks by ``asking``."""
    return pytest.mark.parametrize(
        "asking", [ask, lambda **options: asyncio.run(ask_async(**options))], ids=["sync", "async"]
    )(test)


@pytest.mark.parametrize(
    "scorer",
    [
        lambda request, completion: 0.25,
        lambda request, completion: tt.Trust(0.25),
        lambda request, completion: {"trustworthiness_score": 0.25},
    ],
    ids=["number", "trust", "dict"],
)
@sync_and_async
def test_any_function_can_be_the_scorer(asking, scorer):
    tt.configure(scorer=scorer)
    assert tt.trust(asking()).score == 0.25


@sync_and_async
def test_an_async_function_can_be_the_scorer(asking):
    async def judge(request, completion):
        await asyncio.sleep(0)
        return 0.25 if request["messages"] == QUESTION and completion.choices else 0.0

    tt.configure(scorer=judge)
    trust = tt.trust(asking())
    assert (trust.score, trust.scorer) == (0.25, "judge")


def test_a_callable_object_that_cannot_be_hashed_can_be_the_scorer():
    class Judge:
        __hash__ = None

        def __call__(self, request, completion):
            return 0.25

    tt.configure(scorer=Judge())
    assert tt.trust(ask()).score == 0.25


@pytest.mark.parametrize("wrong", [float("nan"), 1.5, -0.1, "high", None, {}, object()])
def test_a_scorer_that_gives_no_score_leaves_the_call_unscored(wrong, trace):
    tt.configure(scorer=lambda request, completion: wrong)
    assert tt.trust(ask()).reason == "scorer_error"
    assert trace().info.tags["trust_status"] == "unscored"


@sync_and_async
def test_a_low_answer_is_flagged(asking, trace):
    tt.configure(scorer=FakeScorer(0.3), threshold=0.5)
    assert asking().choices[0].message.content == "Paris."
    assert trace().data.spans[0].attributes["tlm.action"] == "flagged"


@sync_and_async
def test_a_low_answer_raises_if_asked(asking, trace):
    tt.configure(scorer=FakeScorer(0.3), threshold=0.5, on_low="raise")
    with pytest.raises(tt.UntrustworthyResponseError, match=r"0\.3000.*0\.5000") as caught:
        asking()
    assert caught.value.completion.choices[0].message.content == "Paris."
    assert caught.value.trust.score == 0.3
    found = trace()
    assert found.data.spans[0].attributes["tlm.action"] == "raised"
    assert found.info.tags["trust_score"] == "0.3000"


@sync_and_async
def test_a_low_answer_is_replaced_if_asked(asking, trace):
    def better(completion, trust):
        assert trust.score == 0.3
        answer = completion.model_copy(deep=True)
        answer.choices[0].message.content = "I am not sure."
        return answer

    tt.configure(scorer=FakeScorer(0.3), threshold=0.5, on_low=better)
    assert asking().choices[0].message.content == "I am not sure."
    parent, llm, _ = trace().data.spans
    assert parent.attributes["tlm.action"] == "replaced"
    assert parent.outputs["choices"][0]["message"]["content"] == "I am not sure."
    assert llm.outputs["choices"][0]["message"]["content"] == "Paris."


@sync_and_async
def test_an_answer_may_be_replaced_in_place(asking, trace):
    def better(completion, trust):
        completion.choices[0].message.content = "I am not sure."
        return completion

    tt.configure(scorer=FakeScorer(0.3), threshold=0.5, on_low=better)
    assert asking().choices[0].message.content == "I am not sure."
    parent, llm, _ = trace().data.spans
    assert parent.outputs["choices"][0]["message"]["content"] == "I am not sure."
    assert llm.outputs["choices"][0]["message"]["content"] == "Paris."


def test_a_retry_in_a_fallback_is_traced_inside_the_call(trace):
    def retry(completion, trust):
        return ask(model="gpt-5")

    tt.configure(scorer=FakeScorer(0.1, 0.2), threshold=0.5, on_low=retry)
    assert ask().model == "gpt-5-2024-08-06"
    spans = {span.name: span for span in trace().data.spans}
    assert spans["chat gpt-5"].parent_id == spans["chat gpt-4o"].span_id


def test_an_async_fallback_is_awaited():
    async def retry(completion, trust):
        return await ask_async(model="gpt-5")

    tt.configure(scorer=FakeScorer(0.1), threshold=0.5, on_low=retry)
    assert asyncio.run(ask_async()).model == "gpt-5-2024-08-06"


def test_a_fallbacks_own_exception_is_the_callers(trace):
    def broken(completion, trust):
        raise KeyError("mine")

    tt.configure(scorer=FakeScorer(0.1), threshold=0.5, on_low=broken)
    with pytest.raises(KeyError, match="mine"):
        ask()
    assert trace().info.tags["trust_score"] == "0.1000"


def test_good_answers_are_not_touched(trace):
    tt.configure(scorer=FakeScorer(0.5), threshold=0.5, on_low="raise")
    assert ask()
    assert "tlm.action" not in trace().data.spans[0].attributes


@sync_and_async
def test_background_mode_does_not_wait(asking, scorer, trace):
    scorer.hold()
    tt.configure(scorer=scorer, mode="background")
    completion = asking()
    trust = tt.trust(completion)
    assert trust.status == "pending"
    assert trust.wait(0.01).status == "pending"
    assert tt.stats().pending >= 1
    scorer.release()
    assert trust.wait(10).score == 0.9
    assert tt.trust(completion).score == 0.9
    assert trust.current.score == 0.9
    assert completion.tlm_metadata["trustworthiness_score"] == 0.9
    found = trace()
    assert found.info.tags["trust_score"] == "0.9000"
    assert len(found.data.spans) == 3


def test_a_pending_trust_can_be_awaited(scorer):
    scorer.hold()
    tt.configure(scorer=scorer, mode="background")

    async def main():
        trust = tt.trust(await ask_async())
        assert trust.status == "pending"
        scorer.release()
        return await trust

    assert asyncio.run(main()).score == 0.9


def test_a_stream_in_background_mode(scorer, trace):
    scorer.hold()
    tt.configure(scorer=scorer, mode="background")
    stream = ask(stream=True)
    list(stream)
    assert tt.trust(stream).status == "pending"
    scorer.release()
    assert tt.trust(stream).wait(10).score == 0.9
    trace()


def test_a_caller_who_is_cancelled_does_not_cost_the_score(scorer, trace):
    scorer.hold()
    tt.configure(scorer=scorer)

    async def main():
        task = asyncio.ensure_future(ask_async())
        await asyncio.to_thread(scorer.wait_for, 1)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(main())
    scorer.release()
    assert trace().info.tags["trust_score"] == "0.9000"


def test_an_async_caller_does_not_hold_up_the_loop(scorer):
    scorer.hold()
    tt.configure(scorer=scorer)

    async def main():
        task = asyncio.ensure_future(ask_async())
        await asyncio.to_thread(scorer.wait_for, 1)
        scorer.release()
        return tt.trust(await task)

    assert asyncio.run(main()).score == 0.9


@pytest.fixture
def unwaiting():
    """A client whose answers are there at once."""
    http = sys.modules[openai.DefaultHttpxClient.__mro__[1].__module__.partition(".")[0]]
    answer = json.loads(OpenAI().with_raw_response.chat.completions.create(**ASK).text)
    transport = http.MockTransport(lambda _: http.Response(200, json=answer))
    return lambda: openai.AsyncOpenAI(http_client=http.AsyncClient(transport=transport))


async def turns(client, calls=1):
    """How many turns of the event loop so many calls at once take."""
    count = 0

    def turn():
        nonlocal count, coming
        count += 1
        coming = asyncio.get_running_loop().call_soon(turn)

    await ask(client)  # the first imports
    coming = asyncio.get_running_loop().call_soon(turn)
    await asyncio.gather(*(ask(client) for _ in range(calls)))
    coming.cancel()
    return count


@pytest.mark.parametrize("settings", [{"mode": "off"}, {"sample_rate": 0.0}])
def test_what_is_not_scored_costs_no_turn_of_the_event_loop(settings, unwaiting, trace):
    """In it, other tasks would find more of the client's connections idle, and look at each."""
    trace()

    async def main():
        client = unwaiting()
        return await turns(client), await turns(tt.wrap_openai(client, **settings))

    bare, ours = asyncio.run(main())
    assert ours == bare


def test_many_calls_at_once_do_not_hold_up_the_event_loop(unwaiting, traces):
    """Others get turns in between, on each loop anew."""

    async def main(entered):
        client = unwaiting()
        return await turns(entered(client), 200)

    bare = asyncio.run(main(lambda client: client))
    for _ in range(2):
        assert asyncio.run(main(lambda client: tt.wrap_openai(client, mode="off"))) > bare
    traces(403)


def test_who_is_cancelled_before_its_turn_has_made_no_call(unwaiting, traces):
    async def main():
        client = tt.wrap_openai(unwaiting(), mode="off")
        await ask(client)  # the first imports
        tasks = [asyncio.create_task(ask(client)) for _ in range(200)]
        await asyncio.sleep(0)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        assert (await ask(client)).choices
        return sum(not task.cancelled() for task in tasks)

    answered = asyncio.run(main())
    assert 0 < answered < 200
    found = traces(answered + 3)
    assert {trace.info.state.value for trace in found} == {"OK"}


def test_mode_off_records_and_does_not_score(scorer, trace):
    tt.configure(scorer=scorer, mode="off")
    assert tt.trust(ask()).reason == "off"
    assert not scorer.exchanges
    assert trace().info.tags["trust_status"] == "unscored"


@pytest.mark.parametrize("rate", [0.0, lambda request: 0.0, lambda request: False])
def test_what_is_not_sampled_says_so(rate, scorer, trace):
    tt.configure(scorer=scorer, sample_rate=rate)
    assert tt.trust(ask()).reason == "sampled_out"
    assert not scorer.exchanges
    assert trace().data.spans[0].attributes["tlm.reason"] == "sampled_out"


def test_a_broken_sampling_rule_does_not_reach_the_caller(caplog, scorer):
    tt.configure(scorer=scorer, sample_rate=lambda request: request["nothing"])
    assert ask().choices[0].message.content == "Paris."
    assert "nothing" in caplog.text
    caplog.clear()


def test_a_rule_sees_the_request(scorer):
    tt.configure(scorer=scorer, sample_rate=lambda request: request["model"] == "gpt-4o")
    assert tt.trust(ask()).score == 0.9
    assert tt.trust(ask(model="gpt-5")).reason == "sampled_out"


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        ("sandbox:refusal=no", "refusal"),
        ("sandbox:empty=true", "empty"),
        ("sandbox:null_content=true", "empty"),
        ("sandbox:no_choices=true", "empty"),
    ],
)
def test_what_has_nothing_to_score_says_why(model, reason, scorer, trace):
    tt.configure(scorer=scorer)
    assert tt.trust(ask(model=model)).reason == reason
    assert not scorer.exchanges
    assert trace().data.spans[0].attributes["tlm.reason"] == reason


def test_on_error_raise_raises_what_the_scorer_said(trace):
    tt.configure(scorer=FakeScorer(RuntimeError("no score today")), on_error="raise")
    with pytest.raises(tt.ScoringError, match="no score today") as caught:
        ask()
    assert isinstance(caught.value.__cause__, RuntimeError)
    assert trace().info.tags["trust_status"] == "unscored"


def test_trust_knows_completions_copies_and_trace_ids(scorer, trace):
    tt.configure(scorer=scorer)
    completion = ask()
    found = trace()
    assert tt.trust(found.info.trace_id).score == 0.9
    assert tt.trust(pickle.loads(pickle.dumps(completion))).score == 0.9
    assert tt.trust(copy.deepcopy(completion)).score == 0.9


@pytest.mark.parametrize("unknown", [None, 3, object(), "tr-nothing", {}])
def test_trust_of_something_unknown_is_none(unknown):
    assert tt.trust(unknown) is None


@pytest.mark.parametrize("mode", ["inline", "background"])
def test_nothing_keeps_a_completion_alive(mode):
    tt.configure(scorer=lambda request, completion: 0.9, mode=mode)
    completion = ask()
    gone = weakref.ref(completion)
    del completion
    assert tt.flush(10)
    gc.collect()
    assert gone() is None


def test_cleanlabs_metadata_is_on_the_object_and_its_fields_are_as_they_were(scorer):
    bare = ask(openai.OpenAI()).model_dump()
    tt.configure(scorer=scorer)
    completion = ask()
    dumped = completion.model_dump()
    assert dumped.pop("tlm_metadata") == {"trustworthiness_score": 0.9, "log": {}}
    for volatile in ("id", "created"):
        del dumped[volatile], bare[volatile]
    assert dumped == bare
    assert type(completion) is openai.types.chat.ChatCompletion


def test_flush_gives_false_when_the_time_is_up(scorer):
    scorer.hold()
    tt.configure(scorer=scorer, mode="background")
    ask()
    assert tt.flush(0.05) is False
    scorer.release()
    assert tt.flush(10) is True


def test_counters(scorer):
    before = tt.stats()
    tt.configure(scorer=scorer)
    ask()
    ask(model="sandbox:empty=true")
    after = tt.stats()
    assert after.scored - before.scored == 1
    assert after.unscored["empty"] - before.unscored.get("empty", 0) == 1
    assert after.pending == 0
    assert after.seconds >= before.seconds


def test_a_call_that_is_over_is_not_kept_in_memory():
    tt.configure(scorer=lambda request, completion: 0.9)

    @tt.trusted
    def answer():
        return ask().id

    def calls():
        gc.collect()
        return {id(obj) for obj in gc.get_objects() if type(obj) is _pipeline.Call}

    before = calls()
    for _ in range(5):
        answer()
    tt.flush(10)
    assert calls() <= before
