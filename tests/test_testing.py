"""The Sandbox, as users' own tests drive it."""

import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import openai
import pytest

import tlm_tracing as tt
from tlm_tracing.scorers import HostedTLM
from tlm_tracing.testing import FakeScorer, Sandbox

QUESTION = [{"role": "user", "content": "What is 1+1?"}]


@pytest.fixture(scope="module", params=[False, True], ids=["thread", "process"])
def either(request):
    with Sandbox(process=request.param) as sandbox:
        yield sandbox


@pytest.fixture
def box(either):
    either.clear()
    return either


def client_of(box, **options):
    return openai.OpenAI(base_url=box.openai_base_url, api_key="any", max_retries=0, **options)


def ask(box, model="gpt-4o", **options):
    return client_of(box).chat.completions.create(model=model, messages=QUESTION, **options)


def test_a_canned_answer_and_its_score(box):
    box.answer("What is 1+1?", "3", score=0.02, explanation="It is 2.")
    scorer = HostedTLM(base_url=box.tlm_base_url, api_key="any")
    with tt.trusted_span(scorer=scorer):
        completion = ask(box)
    assert completion.choices[0].message.content == "3"
    assert completion.model == "gpt-4o-2024-08-06"
    assert completion._request_id.startswith("req_")
    trust = tt.trust(completion)
    assert (trust.score, trust.explanation) == (0.02, "It is 2.")


def test_a_score_belongs_to_question_and_answer_in_any_conversation(box):
    box.answer("What is 1+1?", "3", score=0.02)
    scorer = HostedTLM(base_url=box.tlm_base_url, api_key="any")
    history = [{"role": "system", "content": "You count."}, *QUESTION]
    with tt.trusted_span(scorer=scorer) as span:
        client_of(box).chat.completions.create(model="gpt-4o", messages=history)
        client_of(box).chat.completions.create(model="sandbox:content=2", messages=history)
    assert span.trusts[0].score == 0.02
    assert span.trusts[1].score != 0.02


def test_requests_are_recorded(box):
    ask(box, temperature=0.5)
    (request,) = box.requests("openai")
    assert (request.method, request.path) == ("POST", "/v1/chat/completions")
    assert request.json["temperature"] == 0.5
    assert request.headers["authorization"] == "Bearer any"
    assert box.requests("tlm") == []


def test_a_script_is_followed_and_then_the_default(box):
    box.default("openai", content="default")
    box.script("openai", {"content": "first"}, {"status": 500})
    assert ask(box).choices[0].message.content == "first"
    with pytest.raises(openai.InternalServerError):
        ask(box)
    assert ask(box).choices[0].message.content == "default"
    box.default("openai")
    assert "What is 1+1?" in ask(box).choices[0].message.content


def test_a_request_can_steer_its_own_answer(box):
    assert ask(box, "sandbox:content=so").choices[0].message.content == "so"
    assert len(ask(box, "sandbox:tools=2").choices[0].message.tool_calls) == 2
    with pytest.raises(openai.RateLimitError) as caught:
        ask(box, "sandbox:status=429,retry_after=7")
    assert caught.value.response.headers["retry-after"] == "7"


def test_an_unknown_behaviour_names_the_known_ones(box):
    with pytest.raises(ValueError, match=r"Unknown behaviour colour.*content"):
        box.script("openai", {"colour": "red"})
    with pytest.raises(ValueError, match="sides are"):
        box.default("elsewhere", status=500)


def test_failing_first_and_then_not(box):
    client = client_of(box).with_options(max_retries=2)
    completion = client.chat.completions.create(model="sandbox:fail_first=2", messages=QUESTION)
    assert completion.choices
    assert len(box.requests("openai")) == 3


def test_a_side_can_be_down_and_come_back_at_the_same_address(box):
    address = box.openai_base_url
    box.stop_side("openai")
    with pytest.raises(openai.APIConnectionError):
        ask(box)
    box.start_side("openai")
    assert box.openai_base_url == address
    assert ask(box).choices


def test_what_hangs_is_let_go(box):
    with ThreadPoolExecutor(1) as pool:
        asked = pool.submit(ask, box, "sandbox:hang=true")
        box.wait_for("openai", 1)
        assert not asked.done()
        box.release()
        assert asked.result(10).choices


def test_waiting_for_requests_that_do_not_come_is_an_error(box):
    with pytest.raises(TimeoutError, match="0 of 1"):
        box.wait_for("tlm", 1, timeout=0.01)


def test_many_at_once(box):
    client = client_of(box)
    with ThreadPoolExecutor(32) as pool:
        model = "sandbox:delay=0.2"
        asked = [
            pool.submit(client.chat.completions.create, model=model, messages=QUESTION)
            for _ in range(32)
        ]
        assert all(one.result().choices for one in asked)
    assert box.max_in_flight("openai") > 16
    assert box.connections("openai") >= box.max_in_flight("openai")


def test_structured_output_fits_its_schema(box):
    schema = {
        "type": "object",
        "properties": {"a": {"type": "integer"}, "b": {"type": "array", "items": {"enum": ["x"]}}},
    }
    response_format = {"type": "json_schema", "json_schema": {"name": "s", "schema": schema}}
    assert ask(box, response_format=response_format).choices[0].message.content == (
        '{"a": 1, "b": ["x"]}'
    )


def test_wrong_requests_get_openais_errors(box):
    with pytest.raises(openai.BadRequestError):
        client_of(box).post("/chat/completions", cast_to=object, body={"model": "m"})
    with pytest.raises(openai.NotFoundError):
        client_of(box).images.generate(prompt="a cat")


def test_it_stops_at_once_even_while_something_hangs():
    sandbox = Sandbox().start()
    with ThreadPoolExecutor(1) as pool:
        asked = pool.submit(ask, sandbox, "sandbox:hang=true")
        sandbox.wait_for("openai", 1)
        started = time.monotonic()
        sandbox.stop()
        assert time.monotonic() - started < 2
        asked.exception(10)


def test_before_it_is_started_it_says_how():
    with pytest.raises(RuntimeError, match="with Sandbox"):
        _ = Sandbox().openai_base_url


def test_the_child_process_ends_with_its_parent():
    code = (
        "from tlm_tracing.testing import Sandbox\n"
        "import os\n"
        "sandbox = Sandbox(process=True).start()\n"
        "print(sandbox._server._child.pid, flush=True)\n"
        "os._exit(0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=30)
    # Both streams are closed only when the child that inherited them is gone.
    assert int(done.stdout)


def test_users_get_fixtures(pytester, store):
    pytester.makepyfile(
        """
        import openai
        import tlm_tracing as tt

        def test_application(tlm_sandbox, tlm_fake_scorer):
            tlm_sandbox.answer("What is 1+1?", "2")
            with tt.trusted_span(scorer=tlm_fake_scorer) as span:
                answer = openai.OpenAI().chat.completions.create(
                    model="gpt-4o", messages=[{"role": "user", "content": "What is 1+1?"}]
                )
            assert answer.choices[0].message.content == "2"
            assert span.trust.score == 0.9
            assert tlm_fake_scorer.exchanges[0].response == "2"
        """
    )
    pytester.runpytest_subprocess().assert_outcomes(passed=1)


def test_a_fake_scorer_gives_what_it_is_told(sandbox):
    async def later(exchange):
        return 0.4

    scorer = FakeScorer(
        0.1, tt.Trust(0.2), {"trustworthiness_score": 0.3}, later, ValueError("no"), default=0.5
    )
    with tt.trusted_span(scorer=scorer) as span:
        for _ in range(6):
            ask(sandbox)
    assert [trust.score for trust in span.trusts] == [0.1, 0.2, 0.3, 0.4, None, 0.5]
    assert len(scorer.exchanges) == 6
