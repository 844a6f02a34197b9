"""Cost: who decides what is scored, what is scored once only, and what the budget allows."""

import asyncio
import os
import subprocess
import sys
import textwrap
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

import tlm_tracing as tt
from tlm_tracing import _asking, _cache, _pipeline
from tlm_tracing._limits import Budget
from tlm_tracing.openai import AsyncOpenAI, OpenAI
from tlm_tracing.testing import FakeScorer

QUESTION = [{"role": "user", "content": "What is the capital of France?"}]
OUTAGE = tt.ScoringError("down", reason="scorer_unavailable", outage=True)
FORMAT = {"type": "json_object"}


@pytest.fixture(autouse=True)
def anew(sandbox, monkeypatch):
    sandbox.answer(QUESTION[0]["content"], "Paris.")
    monkeypatch.setattr(_cache, "_cache", _cache._Cache())
    monkeypatch.setattr(_asking, "_broken_rules", set())


def ask(client=None, text=QUESTION[0]["content"], **options):
    client = client or OpenAI()
    messages = [{"role": "user", "content": text}]
    return client.chat.completions.create(**{"model": "gpt-4o", "messages": messages, **options})


async def ask_async(**options):
    async with AsyncOpenAI() as client:
        return await ask(client, **options)


def ask_streamed(**options):
    stream = ask(stream=True, **options)
    list(stream)
    return stream


WAYS = {
    "sync": ask,
    "async": lambda **options: asyncio.run(ask_async(**options)),
    "streamed": ask_streamed,
}


def in_every_way(test):
    return pytest.mark.parametrize("asking", WAYS.values(), ids=WAYS)(test)


def said(caplog):
    return [one.getMessage() for one in caplog.records if one.name == "tlm_tracing"]


def scoring_spans(found):
    return [span for one in found for span in one.data.spans if span.name == "tlm.trustworthiness"]


# Rules


@in_every_way
def test_a_rule_decides_by_request_and_answer(asking, scorer, trace):
    def rule(request, completion):
        return request["model"] != "gpt-4o" or completion.choices[0].message.content != "Paris."

    tt.configure(scorer=scorer, should_score=rule)
    assert tt.trust(asking()).reason == "sampled_out"
    assert not scorer.exchanges
    assert trace().data.spans[0].attributes["tlm.reason"] == "sampled_out"
    assert tt.trust(asking(model="gpt-5")).score == 0.9


@in_every_way
def test_a_rule_that_raises_is_told_once_and_the_answer_is_scored(asking, scorer, caplog):
    def rule(request, completion):
        return request["nothing"]

    tt.configure(scorer=scorer, should_score=rule)
    assert [tt.trust(asking()).score for _ in range(3)] == [0.9] * 3
    (told,) = said(caplog)
    assert "should_score" in told
    assert "KeyError: 'nothing'" in told


@pytest.mark.parametrize("rate", [None, 1.5, -0.1, float("nan"), "often", object(), {}])
def test_an_impossible_sample_rate_is_told_once_and_the_answer_is_scored(rate, scorer, caplog):
    tt.configure(scorer=scorer, sample_rate=lambda request: rate)
    assert [tt.trust(ask()).score for _ in range(3)] == [0.9] * 3
    (told,) = said(caplog)
    assert "sample_rate" in told


def test_a_sample_rate_that_raises_is_told_once_and_the_answer_is_scored(scorer, caplog):
    tt.configure(scorer=scorer, sample_rate=lambda request: 1 / 0)
    assert [tt.trust(ask()).score for _ in range(3)] == [0.9] * 3
    assert len(said(caplog)) == 1


def test_rules_made_anew_for_each_call_are_told_once(scorer, caplog):
    for _ in range(3):
        with tt.trusted_span(scorer=scorer, should_score=lambda request, completion: 1 / 0):
            ask()
    assert len(said(caplog)) == 1


def test_a_rule_may_ask_a_model_itself(scorer, trace, sandbox):
    def rule(request, completion):
        return ask(text="Is that worth a score?").choices

    tt.configure(scorer=scorer, should_score=rule)
    assert tt.trust(ask()).score == 0.9
    assert len(sandbox.requests("openai")) == 2
    assert len(trace().data.spans) == 3


def test_a_rule_is_not_asked_about_what_is_not_scored_anyway(scorer):
    asked = []
    tt.configure(scorer=scorer, sample_rate=0.0, should_score=lambda *seen: asked.append(seen))
    assert tt.trust(ask()).reason == "sampled_out"
    with tt.trusted_span(mode="off"):
        assert tt.trust(ask()).reason == "off"
    assert not asked


# The cache


@in_every_way
def test_the_same_answer_to_the_same_prompt_is_scored_once(asking, sandbox, traces):
    sandbox.answer(QUESTION[0]["content"], "Paris.", score=0.75, explanation="It is.")
    tt.configure(cache_size=10)
    first, second = tt.trust(asking()), tt.trust(asking())
    assert len(sandbox.requests("tlm")) == 1
    assert first.score == second.score == 0.75
    assert first.explanation == second.explanation == "It is."
    assert first.seconds > second.seconds == 0.0
    assert first.trace_id != second.trace_id
    one, other = scoring_spans(traces(2))
    assert "tlm.cached" not in one.attributes
    assert other.attributes["tlm.cached"] is True
    assert other.outputs["trust_score"] == 0.75


def test_without_a_cache_every_answer_is_scored(sandbox):
    ask()
    ask()
    assert len(sandbox.requests("tlm")) == 2


def test_cleanlab_is_asked_again_only_if_it_sees_something_else(sandbox):
    tt.configure(cache_size=10)

    def asked(**options):
        before = len(sandbox.requests("tlm"))
        ask(**options)
        return len(sandbox.requests("tlm")) > before

    assert asked()
    assert not asked(seed=1, user="someone", temperature=0.5)
    assert asked(text="What is the capital of Italy?")
    assert asked(response_format=FORMAT)
    assert not asked(response_format=FORMAT)
    sandbox.answer(QUESTION[0]["content"], "Lyon.")
    assert asked()


def test_other_scorers_are_asked_again_if_the_request_differs(scorer):
    tt.configure(scorer=scorer, cache_size=10)
    for seed in (1, 2, 1, 2):
        ask(seed=seed)
    assert [one.request["seed"] for one in scorer.exchanges] == [1, 2]


def test_other_scorers_are_asked_again_if_the_answer_differs_beside_its_text(sandbox):
    def thoughtful(request, completion):
        return completion.usage.completion_tokens_details.reasoning_tokens / 100

    tt.configure(scorer=thoughtful, cache_size=10)
    scores = []
    for tokens in (10, 20, 10):
        sandbox.script("openai", {"reasoning_tokens": tokens})
        scores.append(tt.trust(ask()).score)
    assert scores == [0.1, 0.2, 0.1]


def test_a_function_may_say_that_it_reads_the_texts_only(sandbox):
    asked = []

    def judge(request, completion):
        asked.append(request)
        return 0.5

    judge.reads_texts_only = True
    tt.configure(scorer=judge, cache_size=10)
    for seed in (1, 2):
        ask(seed=seed)
    assert len(asked) == 1


def test_each_scorer_has_its_own_scores(sandbox):
    tt.configure(cache_size=10)
    one, other = (FakeScorer(default=score, name="judge") for score in (0.1, 0.2))
    for _ in range(2):
        for scorer in (one, other):
            tt.configure(scorer=scorer)
            assert tt.trust(ask()).score == (0.1 if scorer is one else 0.2)
    tt.configure(scorer="hosted")
    ask()
    assert len(sandbox.requests("tlm")) == len(one.exchanges) == len(other.exchanges) == 1


def test_what_was_used_least_lately_is_dropped(scorer):
    tt.configure(scorer=scorer, cache_size=2)
    for text in ("a", "b", "a", "c", "a", "b"):
        ask(text=text)
    assert [one.request["messages"][0]["content"] for one in scorer.exchanges] == list("abcb")


def test_texts_count_as_they_leave(sandbox):
    tt.configure(
        cache_size=10, mask_scorer=lambda text: text.replace("Ann", "X").replace("Bob", "X")
    )
    for name in ("Ann", "Bob"):
        sandbox.answer(f"Who is {name}?", "A friend.")
        ask(text=f"Who is {name}?")
    assert len(sandbox.requests("tlm")) == 1


def test_errors_are_not_kept():
    scorer = FakeScorer(RuntimeError("not now"), tt.Trust.unscored("empty"), 0.7)
    tt.configure(scorer=scorer, cache_size=10)
    trusts = [tt.trust(ask()) for _ in range(4)]
    assert [trust.reason for trust in trusts] == ["scorer_error", "empty", None, None]
    assert [trust.score for trust in trusts[2:]] == [0.7, 0.7]
    assert len(scorer.exchanges) == 3


def test_the_same_in_flight_share_one_request(scorer, traces):
    scorer.hold()
    tt.configure(scorer=scorer, cache_size=10, mode="background")
    trusts = [tt.trust(ask()) for _ in range(4)]
    assert {trust.status for trust in trusts} == {"pending"}
    assert tt.stats().pending == 4
    scorer.release()
    assert [trust.wait(10).score for trust in trusts] == [0.9] * 4
    assert len(scorer.exchanges) == 1
    marks = [span.attributes.get("tlm.cached") for span in scoring_spans(traces(4))]
    assert sorted(marks, key=str) == [None, True, True, True]


def test_calls_that_share_a_request_count_as_traces_that_are_held(scorer, traces, monkeypatch):
    monkeypatch.setattr(_pipeline, "_MOST_HELD", 2)
    scorer.hold()
    tt.configure(scorer=scorer, cache_size=10, mode="background")
    trusts = [tt.trust(ask()) for _ in range(5)]
    scorer.release()
    assert [trust.wait(10).score for trust in trusts] == [0.9] * 5
    found = traces(5)
    assert [one.info.tags["trust_status"] for one in found] == ["scored"] * 5
    # What marks the spans of traces that did not wait for their score.
    late = ["mlflow.chat.tokenUsage" in span.attributes for span in scoring_spans(found)]
    assert sorted(late) == [False, False, True, True, True]


@pytest.mark.parametrize("way", ["threads", "tasks"])
def test_callers_who_wait_at_the_same_time_share_one_request(way):
    async def slowly(exchange):
        await asyncio.sleep(0.2)
        return 0.5

    scorer = FakeScorer(slowly)
    tt.configure(scorer=scorer, cache_size=10)

    async def main():
        async with AsyncOpenAI() as client:
            return await asyncio.gather(*(ask(client) for _ in range(8)))

    with ThreadPoolExecutor(8) as pool:
        threads = pool.map(lambda _: ask(), range(8)) if way == "threads" else ()
        completions = list(threads) or asyncio.run(main())
    assert [tt.trust(completion).score for completion in completions] == [0.5] * 8
    assert len(scorer.exchanges) == 1


def test_a_failure_is_shared_in_flight_and_asked_for_anew_after():
    scorer = FakeScorer(RuntimeError("not now"))
    scorer.hold()
    tt.configure(scorer=scorer, cache_size=10, mode="background")
    trusts = [tt.trust(ask()) for _ in range(3)]
    scorer.release()
    assert [trust.wait(10).reason for trust in trusts] == ["scorer_error"] * 3
    assert len(scorer.exchanges) == 1
    assert tt.trust(ask()).wait(10).score == 0.9


def test_whoever_raises_a_shared_failure_has_an_exception_of_their_own():
    async def fails(exchange):
        await asyncio.sleep(0.2)
        raise RuntimeError("not now")

    scorer = FakeScorer(default=fails)
    tt.configure(scorer=scorer, cache_size=10, on_error="raise")

    async def main():
        async with AsyncOpenAI() as client:
            asking = (ask(client) for _ in range(3))
            return await asyncio.gather(*asking, return_exceptions=True)

    errors = asyncio.run(main())
    assert {str(error) for error in errors} == {"RuntimeError: not now"}
    assert {str(error.__cause__) for error in errors} == {"not now"}
    assert len({id(error) for error in errors}) == 3


def test_who_may_wait_longer_does_not_share_a_timeout(scorer):
    scorer.hold()
    tt.configure(scorer=scorer, cache_size=10, mode="background")
    with tt.trusted_span(timeout=0.2):
        hasty = tt.trust(ask())
    patient = tt.trust(ask())
    assert hasty.wait(10).reason == "timeout"
    scorer.release()
    assert patient.wait(10).score == 0.9


def test_a_known_score_costs_no_budget_and_needs_no_scorer():
    scorer = FakeScorer(0.8, OUTAGE)
    tt.configure(scorer=scorer, cache_size=10, max_scores_per_minute=2)
    assert [tt.trust(ask()).score for _ in range(3)] == [0.8] * 3
    assert tt.trust(ask(text="b")).reason == "scorer_unavailable"
    assert tt.trust(ask(text="c")).reason == "scorer_unavailable"
    assert tt.trust(ask()).score == 0.8


def test_a_known_score_takes_no_place_in_the_queue(scorer):
    tt.configure(scorer=scorer, cache_size=10, mode="background", max_concurrency=1, queue_size=0)
    assert tt.trust(ask()).wait(10).score == 0.9
    scorer.hold()
    held = tt.trust(ask(text="b"))
    assert tt.trust(ask(text="c")).wait(10).reason == "queue_full"
    assert tt.trust(ask()).score == 0.9
    scorer.release()
    assert held.wait(10).score == 0.9


def test_each_choice_is_known_by_itself(sandbox, traces):
    tt.configure(cache_size=10)
    first, second = tt.trust(ask(n=2)), tt.trust(ask(n=2))
    assert len(sandbox.requests("tlm")) <= 2
    assert [one.score for one in first.choices] == [one.score for one in second.choices]
    assert [span.attributes.get("tlm.cached") for span in scoring_spans(traces(2))][1] is True


def test_a_low_known_score_is_low_all_the_same():
    tt.configure(scorer=FakeScorer(0.2), cache_size=10, threshold=0.5, on_low="raise")
    for _ in range(2):
        with pytest.raises(tt.UntrustworthyResponseError):
            ask()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_forked_child_starts_anew(sandbox, store, request):
    code = f"""
    import os
    import mlflow, openai, tlm_tracing as tt
    mlflow.set_experiment({request.node.nodeid!r})
    def ask():
        return openai.OpenAI().chat.completions.create(
            model="gpt-4o", messages=[{{"role": "user", "content": "?"}}]
        )
    tt.autolog(cache_size=10)
    assert tt.trust(ask()).score is not None
    assert tt.trust(ask()).seconds == 0.0
    child = os.fork()
    if not child:
        trust = tt.trust(ask())
        os._exit(0 if trust.score is not None and trust.seconds > 0.0 else 1)
    assert os.waitpid(child, 0)[1] == 0
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        env={**os.environ, **sandbox.environment(), "MLFLOW_TRACKING_URI": store},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert len(sandbox.requests("tlm")) == 2


# The budget


@pytest.mark.parametrize("mode", ["inline", "background"])
@pytest.mark.parametrize("way", ["threads", "tasks"])
def test_a_budget_is_kept_by_many_at_once(mode, way, scorer):
    tt.configure(scorer=scorer, mode=mode, max_scores_per_minute=5)

    async def main():
        async with AsyncOpenAI() as client:
            return await asyncio.gather(*(ask(client) for _ in range(20)))

    with ThreadPoolExecutor(8) as pool:
        threads = pool.map(lambda _: ask(), range(20)) if way == "threads" else ()
        completions = list(threads) or asyncio.run(main())
    reasons = [tt.trust(completion).wait(10).reason for completion in completions]
    assert sorted(reasons, key=str) == [None] * 5 + ["budget"] * 15
    assert len(scorer.exchanges) == 5


@pytest.mark.parametrize(
    ("limit", "starts"),
    [
        (2, [0, 0, 60, 60, 120, 120]),
        (1, [0, 60, 120]),
        (0.5, [0, 120]),
        (0.4, [0]),
        (2.5, [0, 0, 0, 72, 72, 72]),
        (0, []),
    ],
)
def test_a_budget_holds_in_any_minute_and_may_be_a_fraction(limit, starts):
    budget = Budget()
    taken = [now for now in range(140) for _ in range(5) if budget.take(limit, now, "one")]
    assert taken == starts


def test_no_budget_is_no_limit_and_takes_nothing_from_others(scorer):
    tt.configure(scorer=scorer, max_scores_per_minute=1)
    with tt.trusted_span(max_scores_per_minute=None) as span:
        for _ in range(3):
            ask()
    assert [trust.score for trust in span.trusts] == [0.9] * 3
    assert [tt.trust(ask()).reason for _ in range(2)] == [None, "budget"]


def test_scorers_have_budgets_of_their_own_by_their_names():
    def reasons(scorer):
        with tt.trusted_span(scorer=scorer, max_scores_per_minute=1) as span:
            ask()
        return span.trusts[0].reason

    assert reasons(FakeScorer(name="one")) is None
    assert reasons(FakeScorer(name="other")) is None
    assert reasons(FakeScorer(name="one")) == "budget"


def test_a_spent_budget_does_not_keep_a_scorer_unavailable():
    scorer = FakeScorer(OUTAGE)
    tt.configure(scorer=scorer, max_scores_per_minute=1)
    assert tt.trust(ask()).reason == "scorer_unavailable"
    until = time.monotonic() + 20
    while tt.trust(ask()).reason == "scorer_unavailable":
        assert time.monotonic() < until
    assert tt.trust(ask()).reason == "budget"
    assert len(scorer.exchanges) == 2
    with tt.trusted_span(max_scores_per_minute=None):
        assert tt.trust(ask()).score == 0.9
