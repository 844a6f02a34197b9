"""The model that MLflow logs and serves: its answers, their trust, and where it asks nothing."""

import gc
import json
import os
import pickle
import signal
import sys
import threading
import time
import urllib.error
import urllib.request
from importlib.metadata import packages_distributions
from pathlib import Path

import fresh
import mlflow
import openai
import pytest
from mlflow.exceptions import MlflowException
from mlflow.types.responses import ResponsesAgentRequest, ResponsesAgentResponse

import tlm_tracing as tt
from tlm_tracing import _ready
from tlm_tracing.model import TrustedChatAgent
from tlm_tracing.scorers import HostedTLM
from tlm_tracing.testing import FakeScorer
from tlm_tracing.testing._tracking import _Process, free_port

pytest.importorskip("openai.resources.responses", reason="this openai has no Responses API")

EXAMPLES = Path(__file__).parent.parent / "examples"
QUESTION = "What is the capital of France?"
ASKED = {"input": [{"role": "user", "content": QUESTION}]}
LOOKUP = {"type": "function", "name": "lookup", "parameters": {"type": "object", "properties": {}}}
APIS = pytest.mark.parametrize("api", ["responses", "chat"])
PARENTS = {"responses": "response gpt-4o", "chat": "chat gpt-4o"}
LLMS = {"responses": "openai.responses", "chat": "openai.chat.completions"}


@pytest.fixture(autouse=True)
def running(sandbox, scorer):
    sandbox.answer(QUESTION, "It is Paris.", score=0.4, explanation="Hm.")
    tt.configure(scorer=scorer)


def agent(model="gpt-4o", **options):
    return TrustedChatAgent(model, **options)


def low(**settings):
    return {"scorer": FakeScorer(default=0.3), "threshold": 0.5, **settings}


def text_of(response):
    """MLflow's own ``output_text`` fails on the contents that it has read itself."""
    parts = [part for item in response.output if item.type == "message" for part in item.content]
    return "".join(part["text"] for part in parts if part["type"] == "output_text")


def kinds(events):
    return [event.type for event in events]


def sent(sandbox):
    return [request.json for request in sandbox.requests("openai")]


def streamed(agent, request=ASKED):
    return list(agent.predict_stream(request))


# What it gives, and what is recorded.


@APIS
def test_an_answer_comes_with_its_trust(api, trace):
    response = agent(api=api).predict(ResponsesAgentRequest(**ASKED))
    assert isinstance(response, ResponsesAgentResponse)
    assert text_of(response) == "It is Paris."
    assert (response.status, response.usage.total_tokens > 0) == ("completed", True)
    assert response.custom_outputs == {
        "trust_score": 0.9,
        "explanation": None,
        "status": "scored",
        "reason": None,
        "action": None,
        "trace_id": trace().info.trace_id,
    }


@APIS
@pytest.mark.parametrize("is_streamed", [False, True], ids=["plain", "streamed"])
def test_a_trace_is_that_of_an_agent_with_the_call_inside(api, is_streamed, trace):
    model = agent(
        api=api, scorer=FakeScorer({"trustworthiness_score": 0.4, "log": {"explanation": "Hm."}})
    )
    streamed(model) if is_streamed else model.predict(ASKED)
    found = trace()
    root, call, llm, scoring = found.data.spans
    assert root.name == ("predict_stream" if is_streamed else "predict")
    assert (root.span_type, root.status.status_code) == ("AGENT", "OK")
    assert (call.name, call.span_type, call.parent_id) == (PARENTS[api], "CHAIN", root.span_id)
    assert (llm.name, llm.span_type, llm.parent_id) == (LLMS[api], "CHAT_MODEL", call.span_id)
    assert (scoring.name, scoring.parent_id) == ("tlm.trustworthiness", call.span_id)
    assert root.inputs["request"]["input"][0]["content"] == QUESTION
    assert root.outputs["output"][0]["content"][0]["text"] == "It is Paris."
    assert root.outputs["custom_outputs"]["trace_id"] == found.info.trace_id
    tags = found.info.tags
    assert (tags["trust_score"], tags["explanation"]) == ("0.4000", "Hm.")
    assert [(a.name, a.value, a.span_id) for a in found.info.assessments] == [
        ("trustworthiness", 0.4, call.span_id)
    ]
    assert found.info.request_preview == QUESTION
    assert found.info.response_preview == "It is Paris."


def test_a_conversation_is_sent_as_it_is(sandbox):
    tools = [{**LOOKUP, "strict": True, "description": "Looks up."}]
    turns = [
        {"role": "user", "content": "Hi"},
        {"type": "function_call", "call_id": "c1", "name": "lookup", "arguments": "{}"},
        {"type": "function_call_output", "call_id": "c1", "output": "Paris"},
        {"role": "user", "content": [{"type": "input_text", "text": QUESTION}]},
    ]
    parameters = {
        "temperature": 0.2,
        "top_p": 0.5,
        "max_output_tokens": 99,
        "tools": tools,
        "tool_choice": "auto",
        "metadata": {"a": "b"},
        "text": {"format": {"type": "text"}},
        "user": "u",
        "store": False,
    }
    asked = {"input": turns, **parameters, "stream": True, "custom_inputs": {"secret": 1}}
    agent(instructions="Be brief.", parameters={"temperature": 1.0, "top_k": 5}).predict(
        {**asked, "context": {"conversation_id": "c"}}
    )
    (body,) = sent(sandbox)
    turns[0]["type"] = turns[3]["type"] = "message"
    assert body == {
        "model": "gpt-4o",
        "instructions": "Be brief.",
        "input": turns,
        "top_k": 5,
        **parameters,
    }


def test_a_conversation_is_told_in_the_words_of_chat_completions(sandbox):
    image = {"type": "input_image", "image_url": "https://example.com/a.png", "detail": "low"}
    schema = {"type": "json_schema", "name": "city", "schema": {"type": "object"}}
    turns = [
        {"role": "user", "content": "Hi"},
        {"type": "function_call", "call_id": "c1", "name": "lookup", "arguments": "{}"},
        {"type": "function_call", "call_id": "c2", "name": "lookup", "arguments": "{}"},
        {"type": "function_call_output", "call_id": "c1", "output": "Paris"},
        {"type": "function_call_output", "call_id": "c2", "output": [{"text": "Rome"}]},
        {"role": "user", "content": [{"type": "input_text", "text": QUESTION}, image]},
    ]
    agent(api="chat", instructions="Be brief.", parameters={"seed": 1}).predict(
        {
            "input": turns,
            "max_output_tokens": 99,
            "temperature": 0.2,
            "reasoning": {"effort": "low"},
            "text": {"format": schema, "verbosity": "low"},
            "tools": [LOOKUP],
            "tool_choice": {"type": "function", "name": "lookup"},
        }
    )
    (body,) = sent(sandbox)
    function = {"name": "lookup", "arguments": "{}"}
    nested = {"name": "lookup", "parameters": LOOKUP["parameters"]}
    assert body == {
        "model": "gpt-4o",
        "messages": [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": "Hi"},
            {
                "role": "assistant",
                "content": None,
                "tool_calls": [
                    {"id": "c1", "type": "function", "function": function},
                    {"id": "c2", "type": "function", "function": function},
                ],
            },
            {"role": "tool", "tool_call_id": "c1", "content": "Paris"},
            {"role": "tool", "tool_call_id": "c2", "content": '[{"text": "Rome"}]'},
            {
                "role": "user",
                "content": [
                    {"type": "text", "text": QUESTION},
                    {
                        "type": "image_url",
                        "image_url": {"url": "https://example.com/a.png", "detail": "low"},
                    },
                ],
            },
        ],
        "seed": 1,
        "max_completion_tokens": 99,
        "temperature": 0.2,
        "reasoning_effort": "low",
        "verbosity": "low",
        "response_format": {
            "type": "json_schema",
            "json_schema": {"name": "city", "schema": {"type": "object"}},
        },
        "tools": [{"type": "function", "function": nested}],
        "tool_choice": {"type": "function", "function": {"name": "lookup"}},
    }


@APIS
def test_calls_of_tools_come_back_as_items_and_may_be_sent_again(api, sandbox):
    model = agent("sandbox:tools=2", api=api)
    response = model.predict({**ASKED, "tools": [LOOKUP]})
    assert [(item.type, item.name) for item in response.output] == [("function_call", "lookup")] * 2
    items = [item.model_dump(exclude_none=True) for item in response.output]
    results = [
        {"type": "function_call_output", "call_id": item["call_id"], "output": "Paris"}
        for item in items
    ]
    assert model.predict({"input": [*ASKED["input"], *items, *results]}).output
    stream = streamed(model, {**ASKED, "tools": [LOOKUP]})
    assert kinds(stream).count("response.output_item.done") == 2
    assert [event.item["name"] for event in stream if event.type.endswith("item.done")] == [
        "lookup",
        "lookup",
    ]


@APIS
def test_a_refusal_of_the_model_is_given_and_unscored(api):
    response = agent("sandbox:refusal=I will not", api=api).predict(ASKED)
    (part,) = response.output[0].content
    assert (part["type"], part["refusal"]) == ("refusal", "I will not")
    assert response.custom_outputs["reason"] == "refusal"


def test_items_that_mlflow_does_not_know_are_left_out_and_the_answer_is_not(sandbox):
    response = agent("sandbox:builtin=code_interpreter").predict(ASKED)
    assert [item.type for item in response.output] == ["message"]
    found = agent("sandbox:builtin=web_search").predict(ASKED)
    assert [item.type for item in found.output] == ["web_search_call", "message"]
    assert found.output[1].content[0]["annotations"][0]["type"] == "url_citation"
    stream = streamed(agent("sandbox:builtin=code_interpreter"))
    done = [event.item["type"] for event in stream if event.type.endswith("item.done")]
    assert done == ["message"]


def test_the_operators_instructions_are_not_told_to_the_caller():
    model = agent(instructions="The password is swordfish.")
    assert "swordfish" not in model.predict(ASKED).model_dump_json()
    assert "swordfish" not in "".join(event.model_dump_json() for event in streamed(model))


def test_a_conversation_and_its_user_are_known_to_mlflow(traces):
    context = {"conversation_id": "c-1", "user_id": "u-1"}
    agent().predict({**ASKED, "context": context})
    streamed(agent(), {**ASKED, "context": context})
    for trace in traces(2):
        assert trace.info.trace_metadata["mlflow.trace.session"] == "c-1"
        assert trace.info.trace_metadata["mlflow.trace.user"] == "u-1"


def test_custom_inputs_are_for_a_subclass(sandbox, trace):
    class Tenants(TrustedChatAgent):
        def request_body(self, request):
            return {**super().request_body(request), "user": request.custom_inputs["tenant"]}

    Tenants("gpt-4o").predict({**ASKED, "custom_inputs": {"tenant": "shop"}})
    assert sent(sandbox)[0]["user"] == "shop"
    assert trace().data.spans[0].inputs["request"]["custom_inputs"] == {"tenant": "shop"}


def test_texts_that_are_not_to_be_recorded_are_not_in_the_agents_span_either(traces):
    model = agent(capture_content=False, instructions="Be brief.")
    assert text_of(model.predict(ASKED)) == "It is Paris."
    streamed(model)
    for trace in traces(2):
        stored = trace.to_json()
        assert QUESTION not in stored
        assert "Paris" not in stored
        assert trace.data.spans[0].span_type == "AGENT"


def test_a_client_of_the_users_own_is_asked_and_stays_as_it_was(sandbox, trace):
    client = openai.OpenAI(default_headers={"x-mine": "yes"})
    assert agent(client=client).predict(ASKED).custom_outputs["trust_score"] == 0.9
    assert type(client) is openai.OpenAI
    assert sandbox.requests("openai")[0].headers["x-mine"] == "yes"


# Without a score.


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"scorer": None}, "no_scorer"),
        ({"mode": "off"}, "off"),
        ({"enabled": False}, "off"),
        ({"sample_rate": 0.0}, "sampled_out"),
        ({"scorer": FakeScorer(default=ValueError("no"))}, "scorer_error"),
    ],
    ids=lambda value: str(value)[:30],
)
@pytest.mark.parametrize("is_streamed", [False, True], ids=["plain", "streamed"])
def test_an_answer_without_a_score_says_why(settings, reason, is_streamed):
    model = agent(**settings)
    told = (streamed(model)[-1] if is_streamed else model.predict(ASKED)).custom_outputs
    assert (told["trust_score"], told["status"], told["reason"]) == (None, "unscored", reason)


def test_scores_by_a_named_context_are_told_as_well():
    told = {"trustworthiness_score": 0.9, "log": {}, "evals": {"context_sufficiency": 0.7}}
    with tt.trusted_span(context="Paris is the capital of France."):
        response = agent(scorer=FakeScorer(told)).predict(ASKED)
    assert response.custom_outputs["evals"] == {"context_sufficiency": 0.7}


def test_in_the_background_the_score_is_found_by_the_trace(scorer, trace):
    scorer.hold()
    model = agent(mode="background")
    plain, last = model.predict(ASKED).custom_outputs, streamed(model)[-1].custom_outputs
    assert plain["status"] == last["status"] == "pending"
    scorer.release()
    assert tt.flush(30)
    for told in (plain, last):
        assert told["trust_score"] is None
        assert tt.trust(told["trace_id"]).score == 0.9


def test_where_nothing_is_recorded_there_is_no_trace(traces):
    assert agent(enabled=False).predict(ASKED).custom_outputs["trace_id"] is None
    assert streamed(agent(enabled=False, api="chat"))[-1].custom_outputs["trace_id"] is None
    traces(0)


@pytest.mark.parametrize("is_streamed", [False, True], ids=["plain", "streamed"])
def test_where_mlflow_records_nothing_the_answer_has_its_score(is_streamed):
    mlflow.tracing.disable()
    try:
        model = agent()
        told = (streamed(model)[-1] if is_streamed else model.predict(ASKED)).custom_outputs
    finally:
        mlflow.tracing.enable()
    assert (told["trust_score"], told["trace_id"]) == (0.9, None)


def test_a_question_before_mlflow_is_ready_is_an_agents_too(monkeypatch, trace):
    monkeypatch.setattr(_ready, "wait", lambda: False)
    told = agent().predict({**ASKED, "context": {"conversation_id": "c-1"}}).custom_outputs
    assert (told["trust_score"], told["trace_id"]) == (0.9, None)
    found = trace()
    assert found.data.spans[0].span_type == "AGENT"
    assert found.info.trace_metadata["mlflow.trace.session"] == "c-1"


# A low score.


def not_sure(completion, trust):
    answer = completion.model_copy(deep=True)
    if hasattr(answer, "choices"):
        answer.choices[0].message.content = "I am not sure."
    else:
        answer.output[0].content[0].text = "I am not sure."
    return answer


@APIS
def test_a_low_answer_is_flagged(api, trace):
    response = agent(api=api, **low()).predict(ASKED)
    assert text_of(response) == "It is Paris."
    assert response.custom_outputs["action"] == "flagged"
    assert trace().data.spans[1].attributes["tlm.action"] == "flagged"


@APIS
@pytest.mark.parametrize("is_streamed", [False, True], ids=["plain", "streamed"])
def test_a_low_answer_is_withheld_for_raise(api, is_streamed, trace):
    model = agent(api=api, **low(on_low="raise"))
    if is_streamed:
        *_, done, last = streamed(model)
        assert done.custom_outputs == last.custom_outputs
        assert last.type == "response.incomplete"
        response = ResponsesAgentResponse(**last.response, custom_outputs=last.custom_outputs)
        assert done.item == last.response["output"][0]
    else:
        response = model.predict(ASKED)
    assert text_of(response) == ""
    assert (response.status, response.incomplete_details.reason) == ("incomplete", "content_filter")
    (part,) = response.output[0].content
    assert part["type"] == "refusal"
    assert part["refusal"].startswith("The answer is withheld.")
    assert "0.3000 is below the threshold 0.5000" in part["refusal"]
    told = response.custom_outputs
    assert (told["trust_score"], told["action"], told["status"]) == (0.3, "raised", "scored")
    root, call, llm, _ = trace().data.spans
    assert call.attributes["tlm.action"] == "raised"
    assert "Paris" in json.dumps(llm.outputs)
    assert "Paris" not in json.dumps(root.outputs)
    assert root.status.status_code == "OK"


@APIS
@pytest.mark.parametrize(
    "fallback", [not_sure, lambda completion, trust: "I am not sure."], ids=["answer", "text"]
)
@pytest.mark.parametrize("is_streamed", [False, True], ids=["plain", "streamed"])
def test_a_low_answer_is_replaced(api, fallback, is_streamed, trace):
    model = agent(api=api, **low(on_low=fallback))
    if is_streamed:
        *_, done, last = streamed(model)
        assert last.type == "response.completed"
        assert done.item["content"][0]["text"] == "I am not sure."
        response = ResponsesAgentResponse(**last.response, custom_outputs=last.custom_outputs)
    else:
        response = model.predict(ASKED)
    assert text_of(response) == "I am not sure."
    told = response.custom_outputs
    assert (told["trust_score"], told["action"]) == (0.3, "replaced")
    found = trace()
    assert told["trace_id"] == found.info.trace_id
    assert found.data.spans[0].outputs["output"][0]["content"][0]["text"] == "I am not sure."


@pytest.mark.parametrize("is_streamed", [False, True], ids=["plain", "streamed"])
def test_the_answer_of_a_stronger_model_has_its_own_score(is_streamed, trace):
    def ask_again(completion, trust):
        return openai.OpenAI().responses.create(model="gpt-5", input=QUESTION)

    model = agent(scorer=FakeScorer(0.3, 0.95), threshold=0.5, on_low=ask_again)
    told = (streamed(model)[-1] if is_streamed else model.predict(ASKED)).custom_outputs
    assert (told["trust_score"], told["action"]) == (0.95, "replaced")
    found = trace()
    assert told["trace_id"] == found.info.trace_id
    assert "response gpt-5" in [span.name for span in found.data.spans]
    assert found.info.tags["trust_score"] == "0.3000"


def test_a_fallback_that_gives_no_answer_is_told_what_to_give(caplog):
    with pytest.raises(TypeError, match="on_low gave a int"):
        agent(**low(on_low=lambda completion, trust: 42)).predict(ASKED)


def test_an_answer_that_could_not_be_scored_is_withheld_if_asked_for():
    model = agent(scorer=FakeScorer(default=tt.ScoringError("secret")), on_error="raise")
    for response in (model.predict(ASKED), streamed(model)[-1]):
        told = response.custom_outputs
        assert (told["action"], told["reason"]) == ("raised", "scorer_error")
        assert "withheld" in response.model_dump_json()
        assert "secret" not in response.model_dump_json()
        assert "Paris" not in response.model_dump_json()


def test_a_stream_whose_end_is_not_held_is_flagged_only():
    *_, last = streamed(agent(**low(on_low="raise", hold_last_chunk=False)))
    assert last.type == "response.completed"
    assert last.custom_outputs["action"] == "flagged"


# Streams.


@APIS
def test_a_stream_brings_its_text_at_once_and_its_trust_at_the_end(api, scorer, sandbox):
    scorer.hold()
    steps = agent("sandbox:chunks=3", api=api).predict_stream(ASKED)
    said = ""
    while said != "It is Paris.":
        event = next(steps)
        said += event.delta if event.type == "response.output_text.delta" else ""
        assert event.custom_outputs is None
    rest = []
    reader = threading.Thread(target=lambda: rest.extend(steps))
    reader.start()
    scorer.wait_for(1)
    assert [
        event for event in rest if event.custom_outputs or event.type.endswith("completed")
    ] == []
    scorer.release()
    reader.join(30)
    done, last = [event for event in rest if event.custom_outputs]
    assert (done.type, last.type) == ("response.output_item.done", "response.completed")
    assert done.item["content"][0]["text"] == "It is Paris."
    assert done.custom_outputs == last.custom_outputs
    assert last.custom_outputs["trust_score"] == 0.9
    assert rest[-1] is last


def test_items_before_the_last_are_not_held(scorer):
    scorer.hold()
    steps = agent("sandbox:reasoning=I think").predict_stream(ASKED)
    for event in steps:
        if event.type == "response.output_item.done":
            break
    assert (event.item["type"], event.custom_outputs) == ("reasoning", None)
    scorer.release()
    assert list(steps)[-1].custom_outputs["trust_score"] == 0.9


@APIS
def test_a_stream_that_is_left_early_is_kept(api, trace):
    steps = agent("sandbox:chunks=20", api=api).predict_stream(ASKED)
    next(event for event in steps if event.type == "response.output_text.delta")
    steps.close()
    gc.collect()
    found = trace()
    root, _, llm = found.data.spans
    assert (root.name, root.span_type, root.status.status_code) == ("predict_stream", "AGENT", "OK")
    assert llm.attributes["stream.outcome"] == "abandoned"
    assert found.info.tags["trust_status"] == "unscored"


@APIS
def test_a_stream_that_breaks_off_says_so_at_the_end(api, sandbox):
    last = streamed(agent("sandbox:chunks=9,truncate=6", api=api))[-1]
    assert last.type == "response.incomplete"
    assert last.response["status"] == "incomplete"
    assert last.custom_outputs["reason"] == "partial_stream"


def test_a_stream_that_nobody_reads_asks_nothing(sandbox, traces):
    agent().predict_stream(ASKED)
    assert sandbox.requests("openai") == []
    traces(0)


# What goes wrong.


@pytest.mark.parametrize(
    ("steered", "status"),
    [("status=429", 429), ("status=400", 400), ("status=401", 500), ("status=503", 503)],
)
@pytest.mark.parametrize("is_streamed", [False, True], ids=["plain", "streamed"])
def test_an_error_of_openais_has_the_status_that_a_caller_understands(
    steered, status, is_streamed, trace
):
    model = agent(f"sandbox:{steered}", client=lambda: openai.OpenAI(max_retries=0))
    with pytest.raises(MlflowException) as raised:
        streamed(model) if is_streamed else model.predict(ASKED)
    assert raised.value.get_http_status_code() == status
    assert isinstance(raised.value.__cause__, openai.APIStatusError)
    assert trace().data.spans[0].status.status_code == "ERROR"


def test_a_missing_key_is_told_when_it_is_needed(monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY")
    model = agent()
    with pytest.raises(MlflowException, match="OPENAI_API_KEY"):
        model.predict(ASKED)


def test_a_response_in_the_background_of_openai_is_refused(sandbox):
    with pytest.raises(MlflowException, match="background"):
        agent().predict({**ASKED, "background": True})
    assert sandbox.requests("openai") == []


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"threshold": 2}, "threshold"),
        ({"on_low": "explode"}, "on_low"),
        ({"treshold": 0.5}, "treshold"),
        ({"api": "soap"}, "api"),
        ({"model": ""}, "model"),
        ({"client": "sk-key"}, "client"),
        ({"client": openai.AsyncOpenAI(api_key="any")}, "client"),
    ],
    ids=lambda value: str(value)[:25],
)
def test_what_cannot_work_is_refused_where_it_is_written(options, told):
    with pytest.raises(tt.ConfigurationError, match=told):
        TrustedChatAgent(**{"model": "gpt-4o", **options})


def test_keys_are_never_pickled(monkeypatch):
    model = agent(client=openai.OpenAI, scorer="hosted", threshold=0.5)
    model.predict(ASKED)
    pickled = pickle.dumps(model)
    assert b"sk-sandbox" not in pickled
    assert pickle.loads(pickled).predict(ASKED).custom_outputs["trust_score"] == 0.4
    for options in ({"client": openai.OpenAI()}, {"scorer": HostedTLM()}):
        with pytest.raises(tt.ConfigurationError, match="Log it from a file"):
            pickle.dumps(agent(**options))


# Logged, loaded and served.

CODE = """
import mlflow
from tlm_tracing.model import TrustedChatAgent

mlflow.models.set_model(TrustedChatAgent("gpt-4o", scorer="hosted", threshold=0.5))
"""
REQUIREMENTS = {"pip_requirements": ["mlflow", "tlm_tracing"]}


@pytest.fixture
def code(tmp_path):
    path = tmp_path / "agent.py"
    path.write_text(CODE)
    return path


def check(told):
    assert told["output"][0]["content"][0]["text"] == "It is Paris."
    outputs = told["custom_outputs"]
    assert (outputs["trust_score"], outputs["explanation"]) == (0.4, "Hm.")
    assert outputs["action"] == "flagged"
    return outputs["trace_id"]


def test_a_logged_model_answers_as_before(code, sandbox, trace):
    logged = mlflow.pyfunc.log_model(name="agent", python_model=str(code), **REQUIREMENTS)
    assert sandbox.requests("openai") == sandbox.requests("tlm") == []
    model = mlflow.pyfunc.load_model(logged.model_uri)
    assert sandbox.requests("openai") == []
    trace_id = check(model.predict({**ASKED, "temperature": 0.2}))
    assert sent(sandbox)[0]["temperature"] == 0.2
    found = trace()
    assert found.info.trace_id == trace_id
    assert found.info.trace_metadata["mlflow.modelId"] == logged.model_id
    *_, done, last = model.predict_stream(ASKED)
    assert done["custom_outputs"]["trust_score"] == last["custom_outputs"]["trust_score"] == 0.4


@pytest.mark.long
def test_mlflow_finds_out_what_the_model_requires_and_nothing_is_asked(code, sandbox):
    logged = mlflow.pyfunc.log_model(
        name="agent", python_model=str(code), input_example={**ASKED, "temperature": 0.5}
    )
    assert sandbox.requests("openai") == sandbox.requests("tlm") == []
    folder = Path(mlflow.artifacts.download_artifacts(logged.model_uri))
    required = (folder / "requirements.txt").read_text()
    if "tlm_tracing" in packages_distributions():  # MLflow does not see an editable install
        assert f"tlm_tracing=={tt.__version__}" in required.replace("-", "_")
    assert f"openai=={openai.__version__}" in required
    kept = b"".join(path.read_bytes() for path in folder.rglob("*") if path.is_file())
    assert b"sk-sandbox" not in kept


class Served:
    """A server in a process of its own, called by HTTP."""

    def __init__(self, command, port, folder, env, ping):
        self.address = f"http://127.0.0.1:{port}"
        self._process = _Process(command, folder / "served.log", env={**os.environ, **env})
        self._ping = ping
        self._process.until(self._is_up)

    def _is_up(self):
        try:
            with urllib.request.urlopen(self.address + self._ping, timeout=5) as response:
                return response.status == 200
        except OSError:
            return False

    def ask(self, body, path="/invocations", **headers):
        request = urllib.request.Request(
            self.address + path,
            json.dumps(body).encode(),
            {"Content-Type": "application/json", **headers},
        )
        try:
            with urllib.request.urlopen(request, timeout=60) as response:
                return response.status, response.read().decode()
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode()

    def stop(self):
        self._process.send(signal.SIGTERM)

    def end(self):
        self._process.end(signal.SIGKILL)


@pytest.fixture
def serve(request, tmp_path, sandbox):
    def start(command, ping, **env):
        port = free_port()
        command = [str(port) if word == "PORT" else word for word in command]
        # MLflow runs uvicorn by its name.
        path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
        env = {**sandbox.environment(), "PATH": path, **env}
        served = Served(command, port, tmp_path, env, ping)
        request.addfinalizer(served.end)
        return served

    return start


def models_serve(uri):
    return [
        *(sys.executable, "-m", "mlflow", "models", "serve", "-m", uri),
        *("--env-manager", "local", "--host", "127.0.0.1", "--port", "PORT"),
    ]


def stored(trace_id):
    """A trace as soon as the served process has written it."""
    until = time.monotonic() + 60
    while (found := mlflow.get_trace(trace_id)) is None and time.monotonic() < until:
        time.sleep(0.1)
    return found


def by_name(trace):
    return {span.name: span for span in trace.data.spans}


def serve_logged(code, serve, uri, workers=1, **env):
    """What is served by MLflow, and the experiment that its traces go to."""
    experiment = mlflow.set_experiment("served").experiment_id
    logged = mlflow.pyfunc.log_model(name="agent", python_model=str(code), **REQUIREMENTS)
    served = serve(
        [
            *(sys.executable, "-m", "mlflow", "models", "serve", "-m", logged.model_uri),
            *("--env-manager", "local", "--workers", str(workers)),
            *("--host", "127.0.0.1", "--port", "PORT"),
        ],
        "/ping",
        MLFLOW_TRACKING_URI=uri,
        MLFLOW_EXPERIMENT_ID=experiment,
        MLFLOW_ENABLE_ASYNC_TRACE_LOGGING="true",
        **env,
    )
    return served, experiment


def test_mlflow_serves_the_model_and_loses_nothing_when_it_is_stopped(code, store, serve, sandbox):
    served, experiment = serve_logged(code, serve, store)
    assert sandbox.requests("openai") == []
    sandbox.script("openai", {"status": 400})
    status, body = served.ask(ASKED)
    assert (status, "Traceback" in body, "stack_trace" in body) == (400, False, False)
    assert "BadRequestError" in json.loads(body)["message"]
    status, body = served.ask({**ASKED, "stream": True})
    assert status == 200
    trace_id = check(json.loads(body))
    served.stop()
    found = stored(trace_id)
    assert found.info.experiment_id == experiment
    spans = by_name(found)
    assert spans["predict"].span_type == "AGENT"
    assert spans["response gpt-4o"].parent_id == spans["predict"].span_id
    assert found.info.tags["trust_score"] == "0.4000"


@pytest.mark.long
@pytest.mark.parametrize("workers", [1, 2])
def test_scores_that_are_pending_when_a_server_is_stopped_follow_on_the_tracking_server(
    workers, code, sqlite_server, store, serve, sandbox, request
):
    mlflow.set_tracking_uri(sqlite_server.uri)
    request.addfinalizer(lambda: mlflow.set_tracking_uri(store))
    sandbox.default("tlm", delay=3)
    served, experiment = serve_logged(
        code, serve, sqlite_server.uri, workers=workers, TLM_TRACING_MODE="background"
    )
    _, body = served.ask(ASKED)
    told = json.loads(body)["custom_outputs"]
    assert told["status"] == "pending"
    served.stop()
    found = stored(told["trace_id"])
    assert found.info.experiment_id == experiment
    assert found.info.tags["trust_score"] == "0.4000"


def test_the_agent_server_serves_it_streams_included(serve, sandbox, store):
    pytest.importorskip("httpx", reason="MLflow's agent server needs httpx")
    pytest.importorskip("fastapi")
    experiment = mlflow.set_experiment("agent server").experiment_id
    served = serve(
        [
            *(sys.executable, "-m", "uvicorn", "--app-dir", str(EXAMPLES), "agent_server:app"),
            "--port",
            "PORT",
        ],
        "/health",
        MLFLOW_TRACKING_URI=store,
        MLFLOW_EXPERIMENT_ID=experiment,
        MLFLOW_ENABLE_ASYNC_TRACE_LOGGING="false",
    )
    status, body = served.ask(ASKED, **{"x-mlflow-return-trace-id": "true"})
    assert status == 200
    told = json.loads(body)
    trace_id = check(told)
    assert told["metadata"]["trace_id"] == trace_id
    found = stored(trace_id)
    spans = by_name(found)
    assert spans["predict"].parent_id == spans["answer"].span_id
    assert spans["response gpt-4o"].parent_id == spans["predict"].span_id
    _, body = served.ask({**ASKED, "stream": True}, "/responses")
    *events, end = [line.removeprefix("data: ") for line in body.split("\n\n") if line]
    assert end == "[DONE]"
    events = [json.loads(event) for event in events]
    said = "".join(event.get("delta", "") for event in events)
    assert said == "It is Paris."
    assert events[-1]["type"] == "response.completed"
    assert events[-1]["custom_outputs"]["trust_score"] == 0.4
    assert stored(events[-1]["custom_outputs"]["trace_id"]).info.state == "OK"
    client = openai.OpenAI(base_url=served.address)
    response = client.responses.create(model="any", input=ASKED["input"])
    assert response.output_text == "It is Paris."
    assert response.custom_outputs["trust_score"] == 0.4


@pytest.mark.long
def test_the_example_runs(sandbox, store):
    done = fresh.run(
        EXAMPLES / "agent.py", "--sandbox", env={**os.environ, "MLFLOW_TRACKING_URI": store}
    )
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    assert "'trust_score': 0." in done.stdout
