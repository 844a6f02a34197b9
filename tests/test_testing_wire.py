"""The Sandbox keeps to both wires, in good times and bad; the FakeScorer to what it is told."""

from __future__ import annotations

import asyncio
import http.client
import json
import math
import socket
import subprocess
import sys
import threading
import time
import urllib.parse
from concurrent.futures import ThreadPoolExecutor

import openai
import pytest

from tlm_tracing._data import Exchange, Trust
from tlm_tracing.testing import FakeScorer, Sandbox

SCORE = "/v0/trustworthy_llm/get_confidence_score"
ASK = [{"role": "user", "content": "What is 1+1?"}]
PERSON = {
    "type": "object",
    "properties": {"name": {"type": "string"}, "age": {"type": "integer"}},
}


@pytest.fixture(params=[False, True], ids=["thread", "process"])
def either(request):
    """A Sandbox of each kind, fresh."""
    with Sandbox(process=request.param) as sandbox:
        yield sandbox


@pytest.fixture
def client(sandbox):
    with openai.OpenAI(max_retries=0, timeout=5) as client:
        yield client


def ask(client, content="What is 1+1?", model="gpt-4o", **kwargs):
    messages = [{"role": "user", "content": content}]
    return client.chat.completions.create(model=model, messages=messages, **kwargs)


def chunks_of(client, **kwargs):
    with ask(client, stream=True, **kwargs) as stream:
        return list(stream)


def post(base_url, path, body, *, headers=None, timeout=5):
    """Status, headers and bytes of an answer, with nothing between us and the socket."""
    url = urllib.parse.urlsplit(base_url)
    connection = http.client.HTTPConnection(url.hostname, url.port, timeout=timeout)
    try:
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        connection.request("POST", url.path + path, content, headers or {})
        response = connection.getresponse()
        return response.status, response.headers, response.read()
    finally:
        connection.close()


def score(sandbox, prompt, response="2", *, options=None, path=SCORE, key="bearer any", **more):
    body = {"prompt": prompt, "response": {"response": response}, "options": options or {}, **more}
    return post(sandbox.tlm_base_url, path, body, headers={"Authorization": key})


def scored(*args, **kwargs):
    status, _, content = score(*args, **kwargs)
    assert status == 200
    return json.loads(content)


def refuses(base_url):
    url = urllib.parse.urlsplit(base_url)
    try:
        socket.create_connection((url.hostname, url.port), 1).close()
    except ConnectionRefusedError:
        return True
    return False


def for_each(stream, note):
    for chunk in stream:
        note(chunk)


def exchange(prompt="q"):
    return Exchange(request={}, completion=None, prompt=prompt, response="a", timeout=1)


# Canned answers


def test_a_canned_answer_and_its_score(client, sandbox):
    sandbox.answer("What is 1+1?", "3", score=0.02, explanation="It is 2.")
    assert ask(client).choices[0].message.content == "3"
    found = scored(sandbox, "What is 1+1?", "3", options={"log": ["explanation"]})
    assert found["confidence_score"] == 0.02
    assert found["log"]["explanation"] == "It is 2."


@pytest.mark.parametrize(
    "prompt",
    [
        "Q?",
        "System: Be brief.\n\nUser: Q?\n\nAssistant:",
        "User: Hi\n\nAssistant: Hello\n\nUser: Q?\n\nAssistant:",
        "User: Q?\n\nAssistant: <tool_call>\n{}\n</tool_call>\n\nTool: 2\n\nAssistant:",
    ],
)
def test_the_score_belongs_to_the_last_question(sandbox, prompt):
    sandbox.answer("Q?", "2", score=0.97)
    assert scored(sandbox, prompt)["confidence_score"] == 0.97


def test_a_question_may_look_like_a_conversation(sandbox):
    question = "Why does\n\nUser: hi\n\nAssistant:"
    sandbox.answer(question, "2", score=0.4)
    assert scored(sandbox, question)["confidence_score"] == 0.4


def test_made_up_answers_are_the_same_each_time(client, sandbox):
    assert "What is 1+1?" in ask(client).choices[0].message.content
    first, again = scored(sandbox, "Q?"), scored(sandbox, "Q?")
    assert first == again
    assert 0 <= first["confidence_score"] <= 1
    assert first != scored(sandbox, "Q?", "3")


def test_explanations_come_only_when_asked_for(sandbox):
    assert "explanation" not in scored(sandbox, "Q?").get("log", {})
    assert scored(sandbox, "Q?", options={"log": ["explanation"]})["log"]["explanation"]


def test_thousands_of_rows_load_fast(either):
    rows = ({"prompt": f"Q{i}", "response": f"A{i}", "score": i / 5000} for i in range(5000))
    started = time.monotonic()
    either.load(rows)
    assert time.monotonic() - started < 2
    assert scored(either, "Q2500", "A2500")["confidence_score"] == 0.5


def test_rows_may_come_as_cleanlab_publishes_them(sandbox):
    sandbox.load([{"prompt": "Q?", "response": "2", "trustworthiness_score": 0.3}])
    assert scored(sandbox, "Q?")["confidence_score"] == 0.3


def test_the_last_user_message_counts_in_parts_too(client, sandbox):
    sandbox.answer("What is 1+1?", "2")
    parts = [{"type": "text", "text": "What is 1+1?"}]
    assert ask(client, parts).choices[0].message.content == "2"


# OpenAI's wire


def test_a_completion_is_whole(client, sandbox):
    answer = ask(client)
    assert answer.model == "gpt-4o-2024-08-06"
    assert answer.system_fingerprint == "fp_sandbox"
    assert answer.service_tier == "default"
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens
    assert answer.usage.prompt_tokens_details.cached_tokens == 0
    assert answer.usage.completion_tokens_details.reasoning_tokens == 0
    assert answer._request_id.startswith("req_")


def test_cached_and_reasoning_tokens_count_too(client, sandbox):
    sandbox.default("openai", cached_tokens=100, reasoning_tokens=20, content="It is 2.")
    *_, last = chunks_of(client, stream_options={"include_usage": True})
    for usage in (ask(client).usage, last.usage):
        assert usage.prompt_tokens_details.cached_tokens == 100
        assert usage.completion_tokens_details.reasoning_tokens == 20
        counted = (usage.prompt_tokens, usage.completion_tokens, usage.total_tokens)
        assert counted == (103, 23, 126)


@pytest.mark.parametrize(
    ("asked", "given"), [(None, "default"), ("auto", "default"), ("flex", "flex")]
)
def test_the_service_tier_is_a_concrete_one(client, asked, given):
    assert ask(client, service_tier=asked).service_tier == given
    assert {chunk.service_tier for chunk in chunks_of(client, service_tier=asked)} == {given}


def test_a_stream_says_the_same_as_the_whole(client, sandbox):
    chunks = chunks_of(client, stream_options={"include_usage": True})
    *worded, usage = chunks
    text = "".join(chunk.choices[0].delta.content or "" for chunk in worded)
    assert text == ask(client).choices[0].message.content
    assert len({chunk.id for chunk in chunks}) == 1
    assert worded[0].choices[0].delta.role == "assistant"
    assert [chunk.choices[0].finish_reason for chunk in worded][-1] == "stop"
    assert usage.choices == []
    assert usage.usage.total_tokens > 0


def test_a_stream_is_server_sent_events(sandbox):
    body = {"model": "gpt-4o", "messages": ASK, "stream": True}
    _, headers, content = post(sandbox.openai_base_url, "/chat/completions", body)
    assert headers["Content-Type"].startswith("text/event-stream")
    assert headers["x-request-id"].startswith("req_")
    assert content.endswith(b"data: [DONE]\n\n")


def test_choices_differ_and_interleave(client, sandbox):
    sandbox.answer("What is 1+1?", "It is 2")
    contents = [choice.message.content for choice in ask(client, n=3).choices]
    assert contents == ["It is 2", "It is 2 (1)", "It is 2 (2)"]
    order = [chunk.choices[0].index for chunk in chunks_of(client, n=2)]
    assert order[:4] == [0, 1, 0, 1]


def test_log_probabilities_cover_the_text(client, sandbox):
    choice = ask(client, logprobs=True).choices[0]
    assert "".join(token.token for token in choice.logprobs.content) == choice.message.content
    chunks = chunks_of(client, logprobs=True)
    streamed = [one for chunk in chunks if (one := chunk.choices[0].logprobs)]
    assert "".join(t.token for one in streamed for t in one.content) == choice.message.content


def test_a_schema_is_met(client, sandbox):
    wanted = {"type": "json_schema", "json_schema": {"name": "person", "schema": PERSON}}
    person = json.loads(ask(client, response_format=wanted).choices[0].message.content)
    assert isinstance(person["name"], str)
    assert isinstance(person["age"], int)


def test_tools_are_called_only_when_told(client, sandbox):
    tool = {"type": "function", "function": {"name": "add", "parameters": {}}}
    assert ask(client, tools=[tool]).choices[0].message.tool_calls is None
    forced = ask(client, tools=[tool], tool_choice="required").choices[0]
    assert [call.function.name for call in forced.message.tool_calls] == ["add"]
    assert forced.finish_reason == "tool_calls"
    named = {"type": "function", "function": {"name": "add"}}
    assert len(ask(client, tools=[tool], tool_choice=named).choices[0].message.tool_calls) == 1


def test_what_nobody_expects_is_refused(client):
    with pytest.raises(openai.BadRequestError, match="not as this endpoint expects"):
        ask(client, response_format="json")


def test_streamed_tool_calls_interleave(client, sandbox):
    chunks = chunks_of(client, model='sandbox:tools=2,tool_args={"a": 1}')
    calls = [call for chunk in chunks for call in chunk.choices[0].delta.tool_calls or []]
    pieces = [call.index for call in calls if call.function.arguments]
    assert pieces[:2] == [0, 1]
    assert len(pieces) > 2
    arguments = "".join(call.function.arguments for call in calls if call.index == 1)
    assert json.loads(arguments) == {"a": 1}


@pytest.mark.parametrize(
    ("behaviour", "holds"),
    [
        ({"content": "as told"}, lambda c: c.message.content == "as told"),
        ({"empty": True}, lambda c: c.message.content == ""),
        ({"null_content": True}, lambda c: c.message.content is None),
        ({"refusal": "No."}, lambda c: c.message.refusal == "No."),
        ({"reasoning": "hm"}, lambda c: c.message.reasoning_content == "hm"),
        ({"finish_reason": "length"}, lambda c: c.finish_reason == "length"),
        ({"function_call": True}, lambda c: c.message.function_call.arguments),
        ({"tools": 3}, lambda c: len(c.message.tool_calls) == 3),
    ],
)
def test_the_answer_is_as_scripted(client, sandbox, behaviour, holds):
    sandbox.script("openai", behaviour)
    assert holds(ask(client).choices[0])


def test_an_answer_may_have_no_choices(client, sandbox):
    sandbox.default("openai", no_choices=True)
    assert ask(client).choices == []
    assert all(chunk.choices == [] for chunk in chunks_of(client))


def test_the_number_of_chunks_is_as_told(client, sandbox):
    sandbox.script("openai", {"content": "abcdefgh", "chunks": 4})
    texts = [chunk.choices[0].delta.content for chunk in chunks_of(client)]
    assert [text for text in texts if text] == ["ab", "cd", "ef", "gh"]


def test_azure_paths_models_and_embeddings(client, sandbox):
    endpoint = sandbox.openai_base_url.removesuffix("/v1")
    azure = openai.AzureOpenAI(azure_endpoint=endpoint, api_key="k", api_version="2024-10-21")
    with azure:
        assert ask(azure).choices[0].message.content
    path = "/openai/deployments/d/chat/completions"
    assert post(sandbox.openai_base_url, path, {"messages": ASK})[0] == 200
    assert client.models.retrieve("gpt-4o").id == "gpt-4o"
    assert client.models.list().data
    assert client.embeddings.create(model="e", input=["a", "b"]).data[1].embedding


def test_bad_requests_are_refused(client, sandbox):
    with pytest.raises(openai.NotFoundError):
        client.post("/nowhere", cast_to=object)
    for body in ({}, {"messages": "hi"}, b"{", b"[]"):
        status, _, content = post(sandbox.openai_base_url, "/chat/completions", body)
        assert status == 400
        assert json.loads(content)["error"]["message"]
    for body in ({"messages": ["hi"]}, {"messages": [{"role": "user", "content": [1]}]}):
        status, _, content = post(sandbox.openai_base_url, "/chat/completions", body)
        assert status < 500


# OpenAI's troubles


def test_a_status_with_what_openai_says(client, sandbox):
    sandbox.script("openai", {"status": 429, "retry_after": 2})
    with pytest.raises(openai.RateLimitError) as caught:
        ask(client)
    assert caught.value.response.headers["retry-after"] == "2"
    assert set(caught.value.body) == {"message", "type", "param", "code"}


def test_the_first_tries_fail(client, sandbox):
    sandbox.default("openai", fail_first=2)
    retrying = client.with_options(max_retries=0)
    for _ in range(2):
        with pytest.raises(openai.InternalServerError):
            ask(retrying)
    assert ask(retrying).choices
    with pytest.raises(openai.InternalServerError):
        ask(retrying, "Another question?")


def test_a_scripted_fail_first_counts_too(client, sandbox):
    sandbox.script("openai", {"fail_first": 1, "status": 503})
    with pytest.raises(openai.InternalServerError) as caught:
        ask(client)
    assert caught.value.status_code == 503
    assert ask(client).choices


@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize("after", [0, 2])
def test_a_dropped_connection(client, sandbox, streamed, after):
    sandbox.script("openai", {"disconnect": after})
    with pytest.raises((openai.APIConnectionError, Exception)) as caught:
        chunks_of(client) if streamed else ask(client)
    assert not isinstance(caught.value, openai.APIStatusError)


def test_a_stream_that_just_ends(client, sandbox):
    sandbox.script("openai", {"truncate": 2})
    chunks = chunks_of(client)
    assert len(chunks) == 2
    assert chunks[-1].choices[0].finish_reason is None
    body = {"model": "sandbox:truncate=2", "messages": ASK, "stream": True}
    _, _, content = post(sandbox.openai_base_url, "/chat/completions", body)
    assert content.count(b"data: ") == 2


def test_an_error_within_a_stream(client, sandbox):
    sandbox.script("openai", {"stream_error": 2})
    seen = []
    with ask(client, stream=True) as stream, pytest.raises(openai.APIError):
        for_each(stream, seen.append)
    assert len(seen) == 2


def test_garbage(client, sandbox):
    sandbox.default("openai", garbage=True)
    assert isinstance(ask(client), str)
    with pytest.raises(json.JSONDecodeError):
        chunks_of(client)
    sandbox.default("openai", html=True)
    body = {"messages": ASK}
    status, headers, _ = post(sandbox.openai_base_url, "/chat/completions", body)
    assert (status, headers.get_content_type()) == (200, "text/html")


def test_delays_do_not_hold_up_others(client, sandbox):
    sandbox.script("openai", {"delay": 0.3}, {"delay": 0.3}, {"chunk_delay": 0.02, "chunks": 5})
    started = time.monotonic()
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda _: ask(client), range(2)))
    assert 0.3 <= time.monotonic() - started < 0.55
    started = time.monotonic()
    chunks_of(client)
    assert time.monotonic() - started >= 0.1


def test_a_hanging_request_is_let_go(client, sandbox):
    sandbox.script("openai", {"hang": True}, {"hang": True})
    with ThreadPoolExecutor(2) as pool:
        for number, let_go in ((1, sandbox.release), (2, sandbox.clear)):
            answer = pool.submit(ask, client)
            sandbox.wait_for("openai", number)
            let_go()
            assert answer.result(5).choices


def test_what_hangs_ends_with_its_client(sandbox, client):
    sandbox.default("openai", hang=True)
    with pytest.raises(openai.APITimeoutError):
        ask(client, timeout=0.1)
    sandbox.default("openai")
    ask(client)
    assert sandbox.max_in_flight("openai") <= 2


def test_a_client_may_leave_a_stream_early(client, sandbox, caplog):
    sandbox.default("openai", content="word " * 10_000)
    for _ in range(30):  # whether the server is just writing then is up to chance
        with ask(client, stream=True) as stream:
            for _ in range(4):
                next(stream)
    sandbox.default("openai")
    assert ask(client).choices
    assert [record for record in caplog.records if record.name == "aiohttp.server"] == []


# Cleanlab's wire


def test_each_endpoint_answers_in_its_own_shape(sandbox):
    sandbox.answer("Q?", "2", score=0.5, explanation="Even odds.")
    log = {"log": ["explanation"]}
    told = scored(sandbox, "Q?", options=log, path="/v0/trustworthy_llm/prompt")
    assert (told["response"], told["confidence_score"]) == ("2", 0.5)
    assert told["deberta_success"] is True
    explained = scored(sandbox, "Q?", path="/v1/tlm_explanation/get_explanation")
    assert explained["explanation"] == "Even odds."
    completion = {"choices": [{"message": {"content": "2"}}]}
    asked = {"messages": [{"role": "user", "content": "Q?"}], "response": completion, **log}
    path = "/v1/openai_trustworthy_llm/score"
    headers = {"Authorization": "bearer any"}
    _, _, content = post(sandbox.tlm_base_url, path, asked, headers=headers)
    assert json.loads(content)["trustworthiness_score"] == 0.5
    assert json.loads(content)["log"]["explanation"] == "Even odds."


@pytest.mark.parametrize("task", ["score", "generate"])
def test_retrieval_is_scored_with_its_evals(sandbox, task):
    path = f"/v1/rag_trustworthy_llm/{task}"
    sandbox.answer("Q?", "2", score=0.5)
    clarity = {
        "name": "clarity",
        "criteria": "Is the Answer clear?",
        "response_identifier": "Answer",
    }
    asked = {"query": "Q?", "context": "C", "evals": [clarity], "quality": "medium"}
    found = scored(sandbox, "long prompt", **asked, path=path)
    assert found["trustworthiness"]["score"] == 0.5
    assert 0 <= found["clarity"]["score"] <= 1
    assert (found.get("response") == "2") == (task == "generate")


def test_cleanlabs_own_client_is_content(sandbox, monkeypatch):
    api = pytest.importorskip("cleanlab_tlm.internal.api.api")
    from cleanlab_tlm import TLM

    base = sandbox.tlm_base_url
    monkeypatch.setattr(api, "tlm_base_url", f"{base}/v0/trustworthy_llm")
    monkeypatch.setattr(api, "tlm_explanation_base_url", f"{base}/v1/tlm_explanation")
    sandbox.answer("Q?", "2", score=0.5, explanation="Even odds.")

    async def score_and_explain():
        tlm = TLM("medium", options={"log": ["explanation"]}, timeout=5)
        bare = TLM("base", timeout=5)
        return (
            await tlm.get_trustworthiness_score_async("Q?", "2"),
            await tlm.prompt_async("Q?"),
            await bare.get_explanation_async(
                prompt="Q?", tlm_result={"response": "2", "trustworthiness_score": 0.5}
            ),
        )

    score_result, prompt_result, explanation = asyncio.run(score_and_explain())
    assert score_result == {"trustworthiness_score": 0.5, "log": {"explanation": "Even odds."}}
    assert prompt_result["response"] == "2"
    assert explanation == "Even odds."


@pytest.fixture
def score_fields(client, sandbox, monkeypatch):
    """Has Cleanlab's own client score a structured answer: the answer, the client, its result."""
    api = pytest.importorskip("cleanlab_tlm.internal.api.api")
    from cleanlab_tlm.utils.chat_completions import TLMChatCompletion

    base = f"{sandbox.tlm_base_url}/v1/openai_trustworthy_llm"
    monkeypatch.setattr(api, "tlm_openai_base_url", base)
    wanted = {"type": "json_schema", "json_schema": {"name": "person", "schema": PERSON}}

    async def score_fields():
        answer = ask(client, response_format=wanted)
        tlm = TLMChatCompletion(options={"log": ["per_field_score"]}, timeout=5)
        told = await tlm.score_async(response=answer, messages=ASK, response_format=wanted)
        return answer, tlm, told

    return lambda: asyncio.run(score_fields())


def test_cleanlabs_own_client_finds_the_score_of_each_field(sandbox, score_fields):
    sandbox.answer("What is 1+1?", '{"name": "Ada", "age": 7}', score=0.5)
    sandbox.default("tlm", field_scores={"age": 0.125, "name": 0.875, "height": 0.0})
    answer, tlm, told = score_fields()
    assert told["trustworthiness_score"] == 0.5
    found = told["log"]["per_field_score"]
    assert {field: one["score"] for field, one in found.items()} == {"name": 0.875, "age": 0.125}
    assert all(one["explanation"] for one in found.values())
    assert tlm.get_untrustworthy_fields(response=answer, tlm_result=told) == ["age"]


def test_the_scores_of_fields_are_made_up_the_same_each_time(sandbox, score_fields):
    sandbox.script("tlm", {}, {}, {"field_scores": {"age": 0.5}})
    logs = [told["log"]["per_field_score"] for _, _, told in (score_fields() for _ in range(3))]
    assert logs[0] == logs[1]
    name, age = (logs[0][field]["score"] for field in ("name", "age"))
    assert name != age
    assert 0 <= min(name, age) <= max(name, age) <= 1
    assert (logs[2]["name"]["score"], logs[2]["age"]["score"]) == (name, 0.5)


@pytest.mark.parametrize("content", ["no JSON", "[1]"])
def test_an_answer_without_fields_has_an_error_in_their_place(sandbox, score_fields, content):
    sandbox.script("openai", {"content": content})
    _, _, told = score_fields()
    assert told["log"]["per_field_score"] == {"error": "The response is no JSON object."}


def test_cleanlabs_own_client_tells_the_error(sandbox, score_fields, capsys):
    sandbox.script("openai", {"content": "[1]"})
    answer, tlm, told = score_fields()
    assert tlm.get_untrustworthy_fields(response=answer, tlm_result=told) == []
    assert "no JSON object" in capsys.readouterr().out


def test_fields_are_scored_only_when_asked_for(sandbox):
    completion = {"choices": [{"message": {"content": '{"age": 7}'}}]}
    asked = {"messages": ASK, "response": completion, "log": ["explanation"]}
    headers = {"Authorization": "bearer any"}
    path = "/v1/openai_trustworthy_llm/score"
    _, _, content = post(sandbox.tlm_base_url, path, asked, headers=headers)
    assert list(json.loads(content)["log"]) == ["explanation"]


@pytest.mark.parametrize("key", [None, "bearer invalid", "Bearer invalid"])
def test_a_key_is_needed(sandbox, key):
    headers = {"Authorization": key} if key else {}
    body = {"prompt": "Q?", "response": {"response": "2"}}
    status, _, content = post(sandbox.tlm_base_url, SCORE, body, headers=headers)
    assert status == 401
    assert json.loads(content)["code"] == "invalid_api_key"


def test_malformed_questions_are_refused(sandbox):
    headers = {"Authorization": "bearer any"}
    for path in (SCORE, "/v1/openai_trustworthy_llm/score", "/v0/trustworthy_llm/prompt"):
        status, _, content = post(sandbox.tlm_base_url, path, {}, headers=headers)
        assert status == 400
        assert json.loads(content)["error"]
    assert post(sandbox.tlm_base_url, "/nowhere", {}, headers=headers)[0] == 404


# Cleanlab's troubles


@pytest.mark.parametrize(
    ("behaviour", "expected"),
    [({"score": None}, None), ({"score": 1.5}, 1.5), ({"score": "high"}, "high")],
)
def test_a_score_may_be_anything(sandbox, behaviour, expected):
    sandbox.script("tlm", behaviour)
    assert scored(sandbox, "Q?")["confidence_score"] == expected


def test_a_score_may_be_no_number(sandbox):
    sandbox.script("tlm", {"score": "nan"})
    _, _, content = score(sandbox, "Q?")
    assert b"NaN" in content
    assert math.isnan(json.loads(content)["confidence_score"])


def test_parts_of_the_answer_may_be_missing(sandbox):
    log = {"log": ["explanation"]}
    sandbox.script("tlm", {"no_score": True}, {"no_log": True}, {"explanation": None})
    assert "confidence_score" not in scored(sandbox, "Q?", options=log)
    assert "log" not in scored(sandbox, "Q?", options=log)
    assert scored(sandbox, "Q?", options=log)["log"] == {"explanation": None}


def test_a_failure_has_the_body_it_is_given(sandbox):
    body = {"error": {"code": "UNSUPPORTED_PROJECT_CONFIGURATION"}}
    sandbox.script("tlm", {"status": 422, "body": body}, {"status": 502, "html": True})
    status, _, content = score(sandbox, "Q?")
    assert (status, json.loads(content)) == (422, body)
    status, headers, _ = score(sandbox, "Q?")
    assert (status, headers.get_content_type()) == (502, "text/html")


def test_a_rate_limit_says_when_it_ends(sandbox):
    sandbox.script("tlm", {"status": 429, "retry_after": 1.5}, {"status": 429})
    assert score(sandbox, "Q?")[1]["Retry-After"] == "1.5"
    status, headers, content = score(sandbox, "Q?")
    assert (status, headers["Retry-After"]) == (429, None)
    assert json.loads(content)["error"]


@pytest.mark.parametrize("behaviour", [{"garbage": True}, {"empty_body": True}])
def test_a_body_without_json(sandbox, behaviour):
    sandbox.script("tlm", behaviour)
    status, _, content = score(sandbox, "Q?")
    assert status == 200
    with pytest.raises(ValueError, match="Expecting value"):
        json.loads(content)


def test_a_body_that_is_cut_short(sandbox):
    sandbox.script("tlm", {"partial": True}, {"disconnect": "mid"}, {"disconnect": True})
    _, headers, content = score(sandbox, "Q?")
    assert headers["Content-Length"] is None
    with pytest.raises(ValueError, match=r"Expecting|Unterminated"):
        json.loads(content)
    with pytest.raises((http.client.IncompleteRead, ConnectionError)):
        score(sandbox, "Q?")
    with pytest.raises((http.client.RemoteDisconnected, ConnectionError)):
        score(sandbox, "Q?")


def test_a_body_that_drips(sandbox):
    sandbox.script("tlm", {"drip": 0.002})
    started = time.monotonic()
    assert "confidence_score" in scored(sandbox, "Q?")
    assert time.monotonic() - started > 0.05


# Steering


def test_a_script_beats_the_model_which_beats_the_default(client, sandbox):
    sandbox.default("openai", content="default", finish_reason="length")
    sandbox.script("openai", {"content": "script"})
    answers = [ask(client, model="sandbox:content=model") for _ in range(2)]
    assert [answer.choices[0].message.content for answer in answers] == ["script", "model"]
    assert answers[1].choices[0].finish_reason == "length"
    assert answers[1].model == "sandbox:content=model"
    sandbox.default("openai")
    assert ask(client).choices[0].finish_reason == "stop"


def test_unknown_behaviour_is_refused_with_what_is_known(either):
    for attempt in (
        lambda: either.script("tlm", {"content": "x"}),
        lambda: either.default("openai", statsu=500),
    ):
        with pytest.raises(ValueError, match="status"):
            attempt()
    with pytest.raises(ValueError, match="tlm"):
        either.default("olm", status=500)


def test_an_unknown_steering_is_a_bad_request(client, sandbox):
    with pytest.raises(openai.BadRequestError, match="statsu"):
        ask(client, model="sandbox:statsu=500")


# What is noted


def test_requests_are_recorded_in_order(either):
    headers = {"Authorization": "bearer any", "X-Twice": "yes"}
    for prompt in ("first", "second"):
        body = {"prompt": prompt, "response": "2"}
        post(either.tlm_base_url, SCORE + "?a=1", body, headers=headers)
    either.wait_for("tlm", 2, timeout=1)
    first, second = either.requests("tlm")
    assert [first.json["prompt"], second.json["prompt"]] == ["first", "second"]
    assert (first.side, first.method, first.path) == ("tlm", "POST", f"/api{SCORE}?a=1")
    assert first.headers["x-twice"] == "yes"
    assert ("X-Twice", "yes") in first.raw_headers
    assert isinstance(first.body, bytes)
    assert either.requests("openai") == []


def test_waiting_in_vain_ends(either):
    with pytest.raises(TimeoutError):
        either.wait_for("openai", 1, timeout=0.05)


def test_another_thread_may_act_while_one_waits(either):
    either.default("tlm", hang=True)
    with ThreadPoolExecutor(2) as pool:
        waiting = pool.submit(either.wait_for, "openai", 1, 3)
        hanging = pool.submit(score, either, "Q?")
        either.wait_for("tlm", 1, timeout=2)
        started = time.monotonic()
        either.release()
        assert hanging.result(2)[0] == 200
        assert time.monotonic() - started < 1
        post(either.openai_base_url, "/chat/completions", {"messages": ASK})
        waiting.result(2)


def test_connections_are_counted(client, sandbox):
    for _ in range(3):
        ask(client)
        score(sandbox, "Q?")
    assert sandbox.connections("openai") == 1
    assert sandbox.connections("tlm") == 3


def test_two_hundred_at_once(either):
    either.default("openai", delay=0.2)

    async def ask_all():
        limits = {"max_retries": 0, "timeout": 10, "api_key": "k"}
        async with openai.AsyncOpenAI(base_url=either.openai_base_url, **limits) as client:
            return await asyncio.gather(*(ask(client, f"{number}") for number in range(200)))

    answers = asyncio.run(ask_all())
    assert len(answers) == 200
    assert either.max_in_flight("openai") > 50
    assert either.connections("openai") > 50


def test_clear_forgets_everything(sandbox, client):
    sandbox.answer("What is 1+1?", "3", score=0.1)
    sandbox.script("openai", {}, {"status": 500})
    sandbox.default("openai", content="default")
    ask(client)
    sandbox.clear()
    assert ask(client).choices[0].message.content not in ("3", "default")
    assert len(sandbox.requests("openai")) == 1
    assert sandbox.max_in_flight("openai") == 1
    assert scored(sandbox, "What is 1+1?", "3")["confidence_score"] != 0.1


# Life


def test_a_side_can_be_down_and_up_again(either):
    address = either.tlm_base_url
    either.default("tlm", hang=True)
    with ThreadPoolExecutor(1) as pool:
        hanging = pool.submit(score, either, "Q?")
        either.wait_for("tlm", 1)
        either.stop_side("tlm")
        with pytest.raises((http.client.HTTPException, ConnectionError)):
            hanging.result(2)
    assert refuses(address)
    assert not refuses(either.openai_base_url)
    assert either.tlm_base_url == address
    either.default("tlm")
    either.start_side("tlm")
    assert scored(either, "Q?")


def test_a_stop_is_fast_whatever_hangs(either):
    either.default("openai", hang=True)
    address = either.openai_base_url
    body = {"messages": ASK}
    with ThreadPoolExecutor(5) as pool:
        hanging = [pool.submit(post, address, "/chat/completions", body) for _ in range(5)]
        either.wait_for("openai", 5)
        started = time.monotonic()
        either.stop()
        assert time.monotonic() - started < 1
        assert refuses(address)
        for one in hanging:
            one.exception(2)


def test_nothing_is_left_open(tmp_path):
    script = tmp_path / "leaks.py"
    script.write_text(
        "import gc, threading, urllib.request\n"
        "from tlm_tracing.testing import Sandbox\n"
        "for process in (False, True):\n"
        "    with Sandbox(process=process) as sandbox:\n"
        "        sandbox.stop_side('tlm')\n"
        "        url = sandbox.openai_base_url + '/models'\n"
        "        urllib.request.build_opener(urllib.request.ProxyHandler({})).open(url).read()\n"
        "    gc.collect()\n"
        "assert threading.active_count() == 1\n"
    )
    command = [sys.executable, "-X", "dev", "-W", "error", str(script)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def test_the_child_dies_with_its_parent():
    program = (
        "import os, sys; from tlm_tracing.testing import Sandbox\n"
        "sandbox = Sandbox(process=True).start()\n"
        "print(sandbox.openai_base_url, flush=True); os._exit(1)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=20, check=False
    )
    until = time.monotonic() + 5
    while not refuses(done.stdout.strip()):
        assert time.monotonic() < until


def test_it_must_run_to_be_used():
    with pytest.raises(RuntimeError, match="not running"):
        _ = Sandbox().openai_base_url


def test_the_testing_modules_need_none_of_the_big_three():
    program = (
        "import sys, tlm_tracing.testing.plugin; assert 'aiohttp' not in sys.modules\n"
        "from tlm_tracing.testing import FakeScorer, RecordedRequest, Sandbox\n"
        "Sandbox().start().stop()\n"
        "assert not {'mlflow', 'openai', 'cleanlab_tlm'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=20)


def test_the_fixtures_serve_an_applications_tests(pytester):
    pytester.makepyfile(
        """
        import os

        def test_it_points_here(tlm_sandbox, tlm_fake_scorer):
            assert os.environ["OPENAI_BASE_URL"] == tlm_sandbox.openai_base_url
            assert os.environ["CLEANLAB_API_BASE_URL"] == tlm_sandbox.tlm_base_url
            assert tlm_fake_scorer.name == "fake"
            tlm_sandbox.script("tlm", {"status": 500})

        def test_it_is_fresh(tlm_sandbox):
            assert tlm_sandbox.requests("tlm") == []
        """
    )
    pytester.runpytest_subprocess().assert_outcomes(passed=2)


# The fake scorer


def test_it_gives_each_result_in_turn():
    async def later(exchange):
        return 0.3 if exchange.prompt == "q" else 0.0

    given = [0.1, Trust(score=0.2), {"trustworthiness_score": 0.4}, lambda _: 0.5, later]
    scorer = FakeScorer(*given, default=0.9)

    async def score_all():
        return [await scorer.score(exchange()) for _ in range(6)]

    assert asyncio.run(score_all()) == [0.1, Trust(score=0.2), given[2], 0.5, 0.3, 0.9]
    assert len(scorer.exchanges) == 6


def test_it_raises_what_it_is_given():
    with pytest.raises(ValueError, match="no"):
        asyncio.run(FakeScorer(ValueError("no")).score(exchange()))


def test_it_holds_scores_back_from_another_thread():
    scorer = FakeScorer(0.1)
    scorer.hold()
    results = []
    thread = threading.Thread(target=lambda: results.append(asyncio.run(scorer.score(exchange()))))
    thread.start()
    scorer.wait_for(1, timeout=5)
    assert results == []
    scorer.release()
    thread.join(5)
    assert results == [0.1]


def test_a_release_survives_a_loop_that_is_gone():
    scorer = FakeScorer()
    scorer.hold()

    async def give_up():
        await asyncio.wait_for(scorer.score(exchange()), 0.01)

    with pytest.raises(asyncio.TimeoutError):
        asyncio.run(give_up())
    scorer.release()
    assert asyncio.run(scorer.score(exchange())) == 0.9


def test_it_notes_its_end_and_waits_not_for_ever():
    scorer = FakeScorer(name="other")
    asyncio.run(scorer.aclose())
    assert scorer.closed
    assert scorer.name == "other"
    with pytest.raises(TimeoutError):
        scorer.wait_for(1, timeout=0.01)
