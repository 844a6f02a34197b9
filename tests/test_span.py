"""``trusted`` and ``trusted_span``, on every kind of function."""

import asyncio
import copy
import gc
import inspect
import pickle
import sys

import mlflow
import openai
import pytest

import tlm_tracing as tt
from tlm_tracing.exceptions import ConfigurationError

QUESTION = [{"role": "user", "content": "What is the capital of France?"}]


@pytest.fixture(autouse=True)
def scored(scorer, sandbox):
    tt.configure(scorer=scorer)


def ask():
    return openai.OpenAI().chat.completions.create(model="gpt-4o", messages=QUESTION)


async def ask_async():
    async with openai.AsyncOpenAI() as client:
        return await client.chat.completions.create(model="gpt-4o", messages=QUESTION)


@tt.trusted
def answer(question: str, *, loud: bool = False) -> str:
    """Answers."""
    return ask().choices[0].message.content


@tt.trusted
async def answer_async(question: str) -> str:
    """Answers, later."""
    return (await ask_async()).choices[0].message.content


@tt.trusted
def words(question: str):
    yield from ask().choices[0].message.content.split()


@tt.trusted
async def words_async(question: str):
    for word in (await ask_async()).choices[0].message.content.split():
        yield word


class Assistant:
    @tt.trusted
    def method(self, question):
        return ask()

    @tt.trusted
    @classmethod
    def class_method(cls, question):
        return ask()

    @staticmethod
    @tt.trusted(name="static")
    def static_method(question):
        return ask()


def names(trace):
    return [span.name for span in trace.data.spans]


CALL = ["chat gpt-4o", "openai.chat.completions", "tlm.trustworthiness"]


def test_a_function(trace):
    result = answer("What?", loud=True)
    found = trace()
    root = found.data.spans[0]
    assert names(found) == ["answer", *CALL]
    assert root.inputs == {"question": "What?", "loud": True}
    assert root.outputs == result
    assert root.span_type == "CHAIN"
    assert found.info.tags["trust_score"] == "0.9000"


def test_a_coroutine(trace):
    result = asyncio.run(answer_async("What?"))
    found = trace()
    assert names(found) == ["answer_async", *CALL]
    assert found.data.spans[0].outputs == result


def test_a_generator(trace):
    result = list(words("What?"))
    found = trace()
    assert names(found) == ["words", *CALL]
    assert found.data.spans[0].outputs == "".join(result)


def test_an_async_generator(trace):
    async def main():
        return [word async for word in words_async("What?")]

    result = asyncio.run(main())
    found = trace()
    assert names(found) == ["words_async", *CALL]
    assert found.data.spans[0].outputs == "".join(result)


@pytest.mark.parametrize(
    ("call", "name"),
    [
        (lambda: Assistant().method("What?"), "method"),
        (lambda: Assistant.class_method("What?"), "class_method"),
        (lambda: Assistant.static_method("What?"), "static"),
    ],
)
def test_methods(call, name, trace):
    assert tt.trust(call()).score == 0.9
    found = trace()
    assert names(found) == [name, *CALL]
    assert found.data.spans[0].inputs == {"question": "What?"}


@pytest.mark.parametrize("function", [answer, answer_async, words, words_async])
def test_a_decorated_function_is_what_it_was(function):
    original = function.__wrapped__
    assert function.__doc__ == original.__doc__
    assert function.__name__ == original.__name__
    assert inspect.signature(function) == inspect.signature(original)
    for kind in (
        inspect.iscoroutinefunction,
        inspect.isgeneratorfunction,
        inspect.isasyncgenfunction,
    ):
        assert kind(function) == kind(original)
    assert pickle.loads(pickle.dumps(function)) is function
    assert copy.copy(function) is function


def test_a_generator_that_is_left_early_is_closed_and_recorded(trace):
    cleaned = []

    @tt.trusted
    def numbers():
        try:
            ask()
            yield 1
            yield 2
        finally:
            cleaned.append(True)

    for _ in numbers():
        break
    assert cleaned
    found = trace()
    assert found.data.spans[0].status.status_code.value == "OK"


def test_a_generator_takes_what_is_sent_and_thrown(trace):
    heard = []

    @tt.trusted
    def echo():
        while True:
            try:
                heard.append((yield len(heard)))
            except KeyError as error:  # noqa: PERF203 - this is what is tested
                heard.append(error)
                return "done"

    steps = echo()
    next(steps)
    assert steps.send("a") == 1
    error = KeyError("b")
    with pytest.raises(StopIteration) as stop:
        steps.throw(error)
    assert stop.value.value == "done"
    assert heard == ["a", error]
    trace()


def test_the_consumer_of_a_generator_is_not_inside_its_span(trace, scorer):
    for _ in words("What?"):
        ask()
        break
    assert names(trace()) == ["words", *CALL]
    assert len(scorer.exchanges) == 1


def test_an_async_generator_may_be_closed_from_another_task(traces):
    async def main():
        steps = words_async("What?")
        await steps.__anext__()
        await asyncio.ensure_future(steps.aclose())

    asyncio.run(main())
    assert names(traces(1)[0]) == ["words_async", *CALL]


class Unspeakable:
    def __repr__(self):
        raise RuntimeError("no text of me")


def endless():
    value = ["round"]
    value.append(value)
    return value


def deep():
    value = {}
    for _ in range(5000):
        value = {"in": value}
    return value


@pytest.mark.parametrize(
    "value",
    [Unspeakable(), [Unspeakable()], endless(), deep(), {(1, 2): 3}, {"a\ud83d": "\ud83d"}, b"x"],
    ids=lambda value: type(value).__name__,
)
def test_whatever_goes_in_and_out_the_function_is_not_affected(value, traces):
    @tt.trusted
    def same(value):
        ask()
        return value

    assert same(value) is value
    with tt.trusted_span("block") as span:
        span.set_inputs(value)
        span.set_outputs(value)
    found, block = traces(2)
    assert names(found) == ["same", *CALL]
    assert found.data.spans[0].inputs
    assert block.data.spans[0].outputs


def test_an_exception_goes_on_and_is_recorded(trace):
    @tt.trusted
    def broken():
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine") as caught:
        broken()
    assert caught.value.__cause__ is None
    root = trace().data.spans[0]
    assert root.status.status_code.value == "ERROR"
    assert "mine" in root.status.description


def test_calls_of_concurrent_tasks_are_children_of_their_own_block(traces):
    async def one(number):
        async with tt.trusted_span(f"block {number}") as span:
            await ask_async()
            return span

    async def main():
        return await asyncio.gather(*(one(number) for number in range(5)))

    spans = asyncio.run(main())
    assert [len(span.trusts) for span in spans] == [1] * 5
    for found in traces(5):
        assert len(found.data.spans) == 4


def test_gathered_calls_belong_to_the_block_round_them(trace):
    async def main():
        with tt.trusted_span("quiz") as span:
            await asyncio.gather(*(ask_async() for _ in range(4)))
        return span

    span = asyncio.run(main())
    assert [trust.score for trust in span.trusts] == [0.9] * 4
    found = trace()
    root = found.data.spans[0]
    assert {one.parent_id for one in found.data.spans if one.name == "chat gpt-4o"} == {
        root.span_id
    }
    assert span.trace_id == found.info.trace_id


def test_a_block_reads_like_its_calls_unless_told_otherwise(traces):
    with tt.trusted_span("told") as span:
        span.set_inputs({"question": 1})
        span.set_outputs("two")
        ask()
    with tt.trusted_span("not told"):
        ask()
    told, not_told = traces(2)
    assert (told.data.spans[0].inputs, told.data.spans[0].outputs) == ({"question": 1}, "two")
    assert not_told.data.spans[0].inputs["messages"] == QUESTION
    assert not_told.data.spans[0].outputs["choices"]


def test_a_block_without_calls_has_no_trust(trace):
    with tt.trusted_span() as span:
        pass
    assert (span.trust, span.trusts) == (None, [])
    assert names(trace()) == ["trusted_span"]


def test_one_block_may_be_entered_again(traces):
    block = tt.trusted_span("again")
    with block as outer, block as inner:
        ask()
    assert inner is not outer
    assert len(inner.trusts) == 1
    traces(1)


def test_openai_is_as_it_was_after_the_block():
    with tt.trusted_span():
        assert "request" in vars(openai.OpenAI)
    assert "request" not in vars(openai.OpenAI)


@pytest.mark.parametrize("wrong", [3, "text", type("A", (), {})])
def test_decorating_something_else_says_so(wrong):
    with pytest.raises(ConfigurationError, match="decorates functions"):
        tt.trusted(wrong)


def test_recursion(trace):
    @tt.trusted(name="step")
    def down(depth):
        return down(depth - 1) if depth else ask()

    down(3)
    assert names(trace()) == ["step"] * 4 + CALL


# Wherever a block is left, nothing is said of contexts and nothing stays active.


async def stepped_by_tasks(steps):
    """Each step in a task of its own, and the end in another one."""
    await asyncio.create_task(anext(steps))
    await asyncio.create_task(anext(steps))
    await asyncio.create_task(steps.aclose())


async def stepped_with_a_deadline(steps):
    async for _ in steps:
        await asyncio.wait_for(asyncio.sleep(0), 10)
    await steps.aclose()


async def left_to_the_loop(steps):
    async for _ in steps:
        break
    del steps
    gc.collect()
    await asyncio.sleep(0)  # the loop now closes it in a task of its own
    await asyncio.gather(*asyncio.all_tasks() - {asyncio.current_task()})


@tt.trusted
async def decorated():
    for _ in range(3):
        yield await ask_async()


async def with_a_block_inside():
    async with tt.trusted_span("decorated"):
        for _ in range(3):
            yield await ask_async()


@pytest.mark.parametrize("use", [stepped_by_tasks, stepped_with_a_deadline, left_to_the_loop])
@pytest.mark.parametrize("function", [decorated, with_a_block_inside])
def test_an_async_generator_may_be_driven_from_anywhere(function, use, traces, caplog):
    async def main():
        await use(function())
        # A block of the user's own round a yield is theirs, and MLflow's, to leave in place.
        assert function is with_a_block_inside or mlflow.get_current_active_span() is None
        with tt.trusted_span("after"):
            await ask_async()

    asyncio.run(main())
    assert "different Context" not in caplog.text
    found = traces(2)
    assert {trace.data.spans[0].name for trace in found} == {"decorated", "after"}
    assert {trace.info.state.value for trace in found} == {"OK"}
    assert all(span.end_time_ns for trace in found for span in trace.data.spans)


def test_a_block_may_be_entered_in_one_task_and_left_in_another(trace, caplog):
    async def main():
        block = tt.trusted_span("block")
        await asyncio.create_task(block.__aenter__())
        await asyncio.create_task(block.__aexit__(None, None, None))

    asyncio.run(main())
    assert "different Context" not in caplog.text
    assert trace().data.spans[0].end_time_ns


@pytest.mark.skipif(sys.version_info < (3, 11), reason="task groups came with Python 3.11")
def test_calls_of_a_task_group_belong_to_the_block_round_them(trace):
    async def main():
        with tt.trusted_span("block"):
            async with asyncio.TaskGroup() as group:
                for _ in range(3):
                    group.create_task(ask_async())

    asyncio.run(main())
    found = trace()
    root = found.data.spans[0]
    calls = [span for span in found.data.spans if span.name.startswith("chat ")]
    assert [call.parent_id for call in calls] == [root.span_id] * 3
