"""The prompt and response that TLM sees; every input on which Cleanlab's formatter fails."""

import random
import warnings

import openai
import pydantic
import pytest
from cleanlab_tlm.utils.chat import (
    form_prompt_string,
    form_response_string_chat_completions_api,
)
from openai.types.chat import ChatCompletionMessage

import tlm_tracing as tt
from tlm_tracing._messages import Unscorable, render
from tlm_tracing.openai import OpenAI

USER = {"role": "user", "content": "What is the weather?"}
ANSWER = {"choices": [{"message": {"role": "assistant", "content": "Sunny."}}]}
TOOL = {
    "type": "function",
    "function": {"name": "f", "description": "d", "parameters": {"type": "object"}},
}


def call(arguments="{}", call_id="c1", **more):
    function = {"name": "f", "arguments": arguments}
    return {"id": call_id, "type": "function", "function": function, **more}


def conversation(rng):
    messages = []
    for _ in range(rng.randint(1, 7)):
        role = rng.choice(["system", "developer", "user", "user", "assistant", "tool", "narrator"])
        message = {"role": role, "content": rng.choice(["hi", "  x ", "a\n\nb", "é{}", "?"])}
        if rng.random() < 0.2 and role in ("system", "user"):
            message["name"] = rng.choice(["bob", "system", "assistant"])
        if role == "assistant" and rng.random() < 0.5:
            message["content"] = rng.choice(["text", "", None])
            message["tool_calls"] = [call(rng.choice(['{"a":1}', "", "[1]", '"s"'])), call()]
        if role == "tool":
            message["tool_call_id"] = rng.choice(["c1", "c2"])
        messages.append(message)
    return messages


@pytest.mark.parametrize("seed", range(20))
def test_the_prompt_is_cleanlabs_wherever_cleanlab_gives_one(seed):
    rng = random.Random(seed)
    for _ in range(50):
        messages, tools = conversation(rng), rng.choice([None, [], [TOOL], [TOOL, TOOL]])
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            wanted = form_prompt_string(messages, tools, use_responses=False)
        assert render({"messages": messages, "tools": tools}, ANSWER)[0] == wanted


@pytest.mark.parametrize(
    "message",
    [
        {"content": "yes"},
        {"content": " kept as it is\n"},
        {"content": "text\n", "tool_calls": [call('{"x": [1]}'), call()]},
        {"content": None, "tool_calls": [call("")]},
        {"content": "", "tool_calls": [call('{"é": "é"}')]},
    ],
)
def test_the_response_is_cleanlabs_wherever_cleanlab_gives_one(message):
    wanted = form_response_string_chat_completions_api(message)
    assert render({"messages": [USER]}, {"choices": [{"message": message}]})[1] == wanted


def test_a_single_question_is_sent_as_it_is():
    assert render({"messages": [USER]}, ANSWER) == ("What is the weather?", "Sunny.")


IMAGE = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}
HISTORY = {
    "tool without description and parameters": (
        {"tools": [{"type": "function", "function": {"name": "lookup"}}]},
        '"name":"lookup"',
    ),
    "custom tool": (
        {"tools": [{"type": "custom", "custom": {"name": "sql", "description": "runs it"}}]},
        '"name":"sql"',
    ),
    "legacy functions": ({"functions": [{"name": "old", "parameters": {}}]}, '"name":"old"'),
    "tool_calls null": ({"messages": [{"role": "assistant", "tool_calls": None}, USER]}, "User:"),
    "arguments that are no JSON": (
        {"messages": [USER, {"role": "assistant", "tool_calls": [call("{broken")]}, USER]},
        "{broken",
    ),
    "messages as a tuple": ({"messages": (USER, USER)}, "User: What is the weather?"),
    "message without content": ({"messages": [{"role": "system"}, USER]}, "weather"),
    "content null": ({"messages": [{"role": "system", "content": None}, USER]}, "weather"),
    "image beside text": (
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "What?"}, IMAGE]}]},
        "What?\n[image_url]",
    ),
    "text in parts": (
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "one"}, "two"]}]},
        "one\ntwo",
    ),
    "legacy function_call": (
        {
            "messages": [
                USER,
                {"role": "assistant", "function_call": {"name": "old", "arguments": "{}"}},
                {"role": "function", "name": "old", "content": "rain"},
            ]
        },
        '"output": "rain"',
    ),
    "refusal in the history": (
        {"messages": [USER, {"role": "assistant", "content": None, "refusal": "no"}, USER]},
        "Assistant: no",
    ),
    "result of an unknown call": (
        {"messages": [USER, {"role": "tool", "content": "x"}]},
        '"name": "function"',
    ),
    "message without role": ({"messages": [{"content": "hi"}, USER]}, "User: hi"),
    "half a surrogate pair": ({"messages": [{"role": "user", "content": "\ud83d"}]}, "?"),
    "nul": ({"messages": [{"role": "user", "content": "a\x00b"}]}, "a\x00b"),
    "object in messages": (
        {"messages": [USER, ChatCompletionMessage(role="assistant", content="Rain."), USER]},
        "Assistant: Rain.",
    ),
}


@pytest.mark.parametrize(("request_", "expected"), HISTORY.values(), ids=HISTORY)
def test_inputs_that_crash_or_mislead_cleanlabs_formatter(request_, expected):
    prompt, response = render({"messages": [USER], **request_}, ANSWER)
    assert expected in prompt
    assert "base64" not in prompt
    assert response == "Sunny."


RESPONSES = {
    "tool call with broken arguments": ({"tool_calls": [call("{broken")]}, "{broken"),
    "custom tool call": (
        {"tool_calls": [{"id": "1", "type": "custom", "custom": {"name": "sql", "input": "x"}}]},
        '"name": "sql"',
    ),
    "legacy function_call": (
        {"function_call": {"name": "old", "arguments": "{}"}},
        '"name": "old"',
    ),
    "spoken answer": ({"content": None, "audio": {"transcript": "Sunny."}}, "Sunny."),
    "content in parts": ({"content": [{"type": "text", "text": "Sunny."}]}, "Sunny."),
}


@pytest.mark.parametrize(("message", "expected"), RESPONSES.values(), ids=RESPONSES)
def test_answers_that_crash_or_mislead_cleanlabs_formatter(message, expected):
    answer = {"choices": [{"message": message}]}
    assert expected in render({"messages": [USER]}, answer)[1]


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        ({"choices": []}, "empty"),
        ({}, "empty"),
        ({"choices": [{"message": {"content": ""}}]}, "empty"),
        ({"choices": [{"message": {"content": " \n"}}]}, "empty"),
        ({"choices": [{"message": {"content": None}}]}, "empty"),
        ({"choices": [{"message": {"refusal": "no"}}]}, "refusal"),
        ({"choices": [{"message": {}, "finish_reason": "content_filter"}]}, "refusal"),
        ({"choices": [{"message": {"audio": {"data": "AAAA"}}}]}, "unsupported_content"),
    ],
)
def test_an_answer_with_nothing_to_score_says_why(answer, reason):
    with pytest.raises(Unscorable) as found:
        render({"messages": [USER]}, answer)
    assert found.value.reason == reason


@pytest.mark.parametrize(
    "messages",
    [[], None, "a text", {"role": "user"}, 3, [[]], [{"role": "user", "content": [IMAGE]}]],
)
def test_a_question_without_text_says_so(messages):
    with pytest.raises(Unscorable) as found:
        render({"messages": messages}, ANSWER)
    assert found.value.reason == "unsupported_content"


def junk(rng, depth=3):
    if depth == 0 or rng.random() < 0.3:
        return rng.choice([None, 0, 1.5, "x", "", True, b"x", "\ud83d", object(), [], {}])
    if rng.random() < 0.5:
        return [junk(rng, depth - 1) for _ in range(rng.randint(0, 3))]
    keys = ["role", "content", "tool_calls", "function", "type", "text", "name", "message", "id"]
    return {rng.choice(keys): junk(rng, depth - 1) for _ in range(rng.randint(0, 4))}


def test_no_shape_makes_it_raise_anything_else():
    rng = random.Random(7)
    for _ in range(3000):
        request = {"messages": junk(rng), "tools": junk(rng)}
        try:
            texts = render(request, {"choices": [{"message": junk(rng)}]})
        except Unscorable as found:
            texts = (found.reason,)
        assert all(text.encode() for text in texts if text)


class Weather(pydantic.BaseModel):
    city: str


REQUESTS = {
    "sentinels": {"tools": openai.NOT_GIVEN, "user": openai.NOT_GIVEN},
    "pydantic tool": {"tools": [openai.pydantic_function_tool(Weather)]},
    "tool without description": {
        "tools": HISTORY["tool without description and parameters"][0]["tools"]
    },
    "completion put back": {
        "messages": [USER, ChatCompletionMessage(role="assistant", content="Rain."), USER]
    },
    "tuple": {"messages": (USER, USER)},
    "generator": {"messages": (message for message in [USER, USER])},
    "image": HISTORY["image beside text"][0],
    "broken arguments": HISTORY["arguments that are no JSON"][0],
    "custom tool": HISTORY["custom tool"][0],
    "tool_calls null": HISTORY["tool_calls null"][0],
    "json schema": {
        "response_format": {"type": "json_schema", "json_schema": {"name": "w", "schema": {}}}
    },
    "several choices": {"n": 2},
    "transport options": {"timeout": 9, "extra_headers": {"X-A": "b"}, "metadata": {"a": "b"}},
    "broken tool call": {"model": "sandbox:tools=1,tool_args={broken"},
    "function call": {"model": "sandbox:function_call=true"},
}


@pytest.mark.parametrize("options", REQUESTS.values(), ids=REQUESTS)
def test_through_the_real_client_the_answer_arrives_and_is_scored(options, sandbox, trace):
    completion = OpenAI().chat.completions.create(
        **{"model": "gpt-4o", "messages": [USER], **options}
    )
    message = completion.choices[0].message
    assert message.content or message.tool_calls or message.function_call
    assert tt.trust(completion).score is not None
    sent = sandbox.requests("tlm")[0].json
    assert sent["prompt"]
    assert sent["response"]["response"]
    assert "base64" not in sent["prompt"]
    assert trace().info.tags["trust_status"] == "scored"
