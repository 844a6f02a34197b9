"""A trusted block goes along into thread pools, and into threads where it is asked to."""

import asyncio
import contextvars
import inspect
import threading
from concurrent.futures import ThreadPoolExecutor

import mlflow
import openai
import pytest

import tlm_tracing as tt

QUESTION = [{"role": "user", "content": "What is the capital of France?"}]


@pytest.fixture(autouse=True)
def scored(scorer, sandbox):
    tt.configure(scorer=scorer)


def ask(_=None):
    return openai.OpenAI().chat.completions.create(model="gpt-4o", messages=QUESTION)


def parents(trace):
    """For each call the name of the span that it was made under."""
    names = {span.span_id: span.name for span in trace.data.spans}
    return [names.get(s.parent_id) for s in trace.data.spans if s.name == "chat gpt-4o"]


def test_calls_in_a_thread_pool_belong_to_the_block(trace):
    with tt.trusted_span("block") as span, ThreadPoolExecutor(2) as pool:
        list(pool.map(ask, range(3)))
        pool.submit(ask).result()
    assert [trust.score for trust in span.trusts] == [0.9] * 4
    assert parents(trace()) == ["block"] * 4


def test_calls_in_an_event_loops_pool_belong_to_the_function(trace):
    @tt.trusted
    async def answer():
        loop = asyncio.get_running_loop()
        await asyncio.gather(
            loop.run_in_executor(None, ask),
            asyncio.to_thread(ask),
            loop.run_in_executor(ThreadPoolExecutor(1), ask),
        )

    asyncio.run(answer())
    assert parents(trace()) == ["answer"] * 3


def test_calls_lie_under_the_users_own_span(trace):
    with tt.trusted_span("block"), mlflow.start_span("mine"), ThreadPoolExecutor(1) as pool:
        pool.submit(ask).result()
    assert parents(trace()) == ["mine"]


def test_blocks_that_share_a_pool_are_kept_apart(traces):
    with ThreadPoolExecutor(2) as pool:

        @tt.trusted
        def answer(number):
            return [pool.submit(ask), pool.submit(ask)]

        futures = []
        for number in range(4):
            with tt.trusted_span(f"block {number}") as span:
                futures.append(pool.submit(ask))
                futures[-1].result()
            assert len(span.trusts) == 1
        assert parents(traces(4)[3]) == ["block 3"]


def test_a_job_of_a_block_that_is_over_is_none_of_its_calls(traces):
    begun, over = threading.Event(), threading.Event()

    def job():
        begun.set()
        over.wait(10)
        return ask()

    with ThreadPoolExecutor(1) as pool:
        with tt.trusted_span("block") as span:
            late = pool.submit(job)
            begun.wait(10)
        over.set()
        late.result()
    assert span.trusts == []
    traces(1)


def test_no_other_context_goes_along():
    mine = contextvars.ContextVar("mine", default="unset")
    mine.set("set")
    with tt.trusted_span(), ThreadPoolExecutor(1) as pool:
        assert pool.submit(mine.get).result() == "unset"


def test_a_pool_is_as_it_was_outside_of_blocks():
    before = ThreadPoolExecutor.submit
    with tt.trusted_span():
        assert inspect.signature(ThreadPoolExecutor.submit) == inspect.signature(before)
        with tt.trusted_span():
            pass
        assert ThreadPoolExecutor.submit is not before
    assert ThreadPoolExecutor.submit is before


def test_a_pools_mistakes_are_its_own():
    with tt.trusted_span(), ThreadPoolExecutor(1) as pool:
        with pytest.raises(ZeroDivisionError):
            pool.submit(lambda: 1 / 0).result()
        with pytest.raises(TypeError):
            pool.submit()
        pool.shutdown()
        with pytest.raises(RuntimeError, match="shutdown"):
            pool.submit(ask)


def test_a_thread_is_propagated_to_by_hand(trace):
    with tt.trusted_span("block") as span:
        thread = threading.Thread(target=tt.propagate(ask))
        thread.start()
        thread.join()
    assert span.trust.score == 0.9
    assert parents(trace()) == ["block"]


def test_what_is_propagated_keeps_its_signature_and_result():
    def add(first: int, *, second: int = 2) -> int:
        """Adds."""
        return first + second

    with tt.trusted_span():
        wrapped = tt.propagate(add)
    assert inspect.signature(wrapped) == inspect.signature(add)
    assert (wrapped.__name__, wrapped.__doc__) == ("add", "Adds.")
    assert wrapped(1) == 3
    assert tt.propagate(add)(1, second=4) == 5


def test_threads_left_without_it_are_calls_of_their_own(traces):
    tt.autolog()
    with tt.trusted_span("block"):
        thread = threading.Thread(target=ask)
        thread.start()
        thread.join()
    assert sorted(map(len, map(parents, traces(2)))) == [0, 1]
