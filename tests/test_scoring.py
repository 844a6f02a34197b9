"""The runtime keeps within bounds, and sees scores through to the end of the process."""

import asyncio
import contextvars
import os
import subprocess
import sys
import textwrap
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import mlflow
import openai
import pytest

import tlm_tracing as tt
from tlm_tracing import _scoring, _threads
from tlm_tracing.openai import AsyncOpenAI, OpenAI
from tlm_tracing.testing import FakeScorer

QUESTION = [{"role": "user", "content": "What is the capital of France?"}]


def ask(client=None, model="gpt-4o", **options):
    client = client or OpenAI()
    return client.chat.completions.create(model=model, messages=QUESTION, **options)


class Counting:
    """A scorer that knows how many scores it is asked for at once."""

    name = "counting"

    def __init__(self):
        self.now = self.most = 0

    async def score(self, exchange):
        self.now += 1
        self.most = max(self.most, self.now)
        await asyncio.sleep(0.1)
        self.now -= 1
        return 0.5

    async def aclose(self):
        pass


@pytest.mark.parametrize("cap", [1, 4])
def test_no_more_scores_are_in_flight_than_allowed(cap, sandbox):
    scorer = Counting()
    tt.configure(scorer=scorer, max_concurrency=cap)

    async def main():
        async with AsyncOpenAI() as client:
            return await asyncio.gather(*(ask(client) for _ in range(8)))

    assert {tt.trust(completion).score for completion in asyncio.run(main())} == {0.5}
    assert min(cap, 2) <= scorer.most <= cap


def test_waiting_for_a_place_does_not_count_against_the_timeout(sandbox):
    tt.configure(scorer=Counting(), max_concurrency=1, timeout=0.3)
    with ThreadPoolExecutor(8) as pool:
        completions = list(pool.map(lambda _: ask(), range(8)))
    assert {tt.trust(completion).score for completion in completions} == {0.5}


def test_beyond_the_queue_a_call_is_unscored_at_once(sandbox, scorer, traces):
    scorer.hold()
    tt.configure(scorer=scorer, mode="background", max_concurrency=1, queue_size=1)
    first, second, third = ask(), ask(), ask()
    assert tt.trust(third).wait(10).reason == "queue_full"
    scorer.release()
    assert [tt.trust(one).wait(10).score for one in (first, second)] == [0.9, 0.9]
    traces(3)


def test_each_score_of_a_burst_is_asked_for_in_its_calls_context(sandbox):
    number = contextvars.ContextVar("number")

    async def judge(request, completion):
        return number.get() / 10

    async def one(client, its):
        number.set(its)
        return await ask(client)

    async def main():
        tt.configure(scorer=judge, mode="background")
        async with AsyncOpenAI() as client:
            answers = await asyncio.gather(*(one(client, its) for its in range(10)))
        return [await tt.trust(completion) for completion in answers]

    assert [trust.score for trust in asyncio.run(main())] == [its / 10 for its in range(10)]


def test_a_budget_is_kept(sandbox, scorer):
    tt.configure(scorer=scorer, max_scores_per_minute=2)
    reasons = [tt.trust(ask()).reason for _ in range(4)]
    assert reasons == [None, None, "budget", "budget"]
    assert len(scorer.exchanges) == 2


@pytest.mark.parametrize("kind", ["async", "sync", "deaf"])
def test_a_scorer_that_hangs_costs_the_timeout(kind, sandbox, trace):
    let_go = threading.Event()

    async def hangs(request, completion):
        await asyncio.Event().wait()

    def blocks(request, completion):
        let_go.wait()
        return 0.5

    async def deaf(request, completion):
        while not let_go.is_set():
            try:
                await asyncio.sleep(0.05)
            except asyncio.CancelledError:  # noqa: PERF203 - a scorer as bad as can be
                continue

    started = time.monotonic()
    completion = ask(
        tt.wrap_openai(
            openai.OpenAI(),
            scorer={"async": hangs, "sync": blocks, "deaf": deaf}[kind],
            timeout=0.3,
        )
    )
    assert 0.3 <= time.monotonic() - started < 2
    assert tt.trust(completion).reason == "timeout"
    assert "0.3 seconds" in trace().data.spans[2].status.description
    let_go.set()


def test_one_bad_answer_among_good_ones_does_not_stop_the_others(sandbox):
    error = RuntimeError("this one")
    tt.configure(scorer=FakeScorer(0.5, error, 0.6, error, 0.7))
    scores = [tt.trust(ask()).score for _ in range(5)]
    assert scores == [0.5, None, 0.6, None, 0.7]


def test_an_outage_is_noticed_once_and_its_end_too(sandbox):
    outage = tt.ScoringError("down", reason="scorer_unavailable", outage=True)
    scorer = FakeScorer(outage)
    tt.configure(scorer=scorer)
    assert tt.trust(ask()).reason == "scorer_unavailable"
    assert tt.trust(ask()).reason == "scorer_unavailable"
    assert len(scorer.exchanges) == 1
    until = time.monotonic() + 10
    while tt.trust(ask()).score is None:
        assert time.monotonic() < until
    assert tt.trust(ask()).score == 0.9


def test_an_outage_is_logged_once(sandbox, caplog):
    outage = tt.ScoringError("down", reason="scorer_unavailable", outage=True)
    tt.configure(scorer=FakeScorer(default=outage))
    for _ in range(5):
        ask()
    assert len([one for one in caplog.records if one.name == "tlm_tracing"]) == 1


def test_threads_and_loops_share_one_runtime(sandbox, scorer):
    tt.configure(scorer=scorer)

    async def some():
        async with AsyncOpenAI() as client:
            return await asyncio.gather(*(ask(client) for _ in range(3)))

    with ThreadPoolExecutor(4) as pool:
        found = [
            one for batch in pool.map(lambda _: asyncio.run(some()), range(4)) for one in batch
        ]
    assert {tt.trust(completion).score for completion in found} == {0.9}
    names = [thread.name for thread in threading.enumerate()]
    assert names.count("tlm-tracing-loop") == 1


def run(code, sandbox, store, **more):
    """Run an application in a process of its own, as a user would."""
    environment = {**os.environ, **sandbox.environment(), "MLFLOW_TRACKING_URI": store, **more}
    environment.pop("MLFLOW_ENABLE_ASYNC_TRACE_LOGGING", None)
    return subprocess.run(
        [sys.executable, "-W", "error::ResourceWarning", "-c", textwrap.dedent(code)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
    )


APPLICATION = """
    import mlflow, openai, tlm_tracing as tt
    mlflow.set_experiment({experiment!r})
    def ask(**options):
        return openai.OpenAI().chat.completions.create(
            model="gpt-4o", messages=[{{"role": "user", "content": "?"}}], **options
        )
"""


@pytest.fixture
def application(request):
    return APPLICATION.format(experiment=request.node.nodeid)


def stored(experiment):
    return mlflow.search_traces(locations=[experiment], return_type="list")


def test_nothing_is_said_at_exit_after_inline_calls(sandbox, store, experiment, application):
    done = run(application + "    tt.autolog()\n    ask()", sandbox, store)
    assert done.returncode == 0, done.stderr
    assert "Warning" not in done.stderr.replace("SADeprecationWarning", "")
    assert "Error" not in done.stderr
    assert stored(experiment)[0].info.tags["trust_status"] == "scored"


def test_a_scorer_that_is_cancelled_from_within_is_late(sandbox, trace):
    """As some versions of aiohttp end a request whose time has run out."""

    async def cancelled(request, completion):
        raise asyncio.CancelledError

    client = tt.wrap_openai(openai.OpenAI(), scorer=cancelled)
    completion = client.chat.completions.create(
        model="gpt-4o", messages=[{"role": "user", "content": "Why?"}]
    )
    assert tt.trust(completion).reason == "timeout"
    assert trace().info.tags["trust_status"] == "unscored"


@pytest.mark.parametrize(
    "use",
    [
        pytest.param("stream = ask(stream=True)", marks=pytest.mark.long, id="unread"),
        pytest.param("stream = ask(stream=True); next(iter(stream))", id="begun"),
    ],
)
def test_a_stream_that_is_open_at_exit_is_recorded(use, sandbox, store, experiment, application):
    done = run(f"{application}    tt.autolog()\n    {use}", sandbox, store)
    assert done.returncode == 0, done.stderr
    assert "Error" not in done.stderr
    (found,) = stored(experiment)
    assert found.data.spans[1].attributes["stream.outcome"] == "abandoned"
    assert found.data.spans[0].attributes["tlm.reason"] == "partial_stream"


def test_a_stream_that_was_read_and_dropped_is_scored_at_exit(
    sandbox, store, experiment, application
):
    code = """
    tt.autolog()
    next(chunk for chunk in ask(stream=True) if chunk.choices[0].finish_reason)
    """
    done = run(application + code, sandbox, store)
    assert done.returncode == 0, done.stderr
    (found,) = stored(experiment)
    assert found.info.tags["trust_status"] == "scored"


def test_flush_may_be_called_at_exit(sandbox, store, experiment, application):
    code = """
    import atexit
    atexit.register(lambda: print(tt.flush(30)))
    tt.autolog()
    ask()
    """
    done = run(application + code, sandbox, store)
    assert (done.returncode, done.stdout) == (0, "True\n"), done.stderr
    assert "Error" not in done.stderr
    assert stored(experiment)[0].info.tags["trust_status"] == "scored"


def refuse():
    raise OSError("no space left")


@pytest.mark.parametrize(("chore", "why"), [(lambda: False, "no such trace"), (refuse, "no space")])
def test_what_cannot_be_written_is_counted_and_said_once(chore, why, monkeypatch, caplog):
    monkeypatch.setattr(_threads, "_KEEP_TRYING", 0.1)
    before = tt.stats().dropped
    for _ in range(3):
        _scoring.later(chore)
    assert tt.flush(10)
    assert tt.stats().dropped == before + 3
    said = [one.getMessage() for one in caplog.records if one.name == "tlm_tracing"]
    assert len(said) == 1
    assert why in said[0]


def test_a_write_that_fails_is_tried_again(caplog):
    fails = [True, True]

    def chore():
        if fails:
            fails.pop()
            raise OSError("busy")
        return True

    before = tt.stats().dropped
    _scoring.later(chore)
    assert tt.flush(10)
    assert not fails
    assert tt.stats().dropped == before
    assert not [one for one in caplog.records if one.name == "tlm_tracing"]


def test_nothing_is_said_of_answers_that_are_held_until_the_exit(
    sandbox, store, experiment, application
):
    code = """
    tt.autolog()
    held = [ask(), ask(stream=True), ask(stream=True)]
    sys = __import__("sys")
    sys.modules["held"] = held
    list(held[1])
    next(iter(held[2]))
    """
    done = run(application + code, sandbox, store)
    assert done.returncode == 0, done.stderr
    # OpenAI's client may complain of the stream that nobody closed.
    assert "tlm_tracing" not in done.stderr
    assert len(stored(experiment)) == 3
