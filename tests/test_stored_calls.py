"""The LLM calls in a stored trace: from us, and from ``mlflow.openai.autolog()``."""

import asyncio
import contextlib
import json
import re

import mlflow
import openai
import pydantic
import pytest
from mlflow.entities import Span, SpanEvent

import tlm_tracing as tt
from tlm_tracing._messages import Unscorable, render
from tlm_tracing._stored._calls import calls

QUESTION = [{"role": "user", "content": "What is the capital of France?"}]
CHAT = {"model": "gpt-4o", "messages": QUESTION}
RESPOND = {"model": "gpt-4o", "input": "What is the capital of France?"}
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "lookup",
            "description": "Finds a city.",
            "parameters": {"type": "object", "properties": {"query": {"type": "string"}}},
        },
    }
]
FLAT_TOOLS = [{"type": "function", "strict": False, **TOOLS[0]["function"]}]
PIXEL = "data:image/png;base64,iVBORw0KGgo="
HISTORY = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Hello", "name": "Bob"},
    {"role": "assistant", "content": "Hi."},
    *QUESTION,
]
AFTER_TOOLS = [
    *QUESTION,
    {
        "role": "assistant",
        "content": None,
        "tool_calls": [
            {
                "id": "call_1",
                "type": "function",
                "function": {"name": "lookup", "arguments": '{"query": "France"}'},
            }
        ],
    },
    {"role": "tool", "tool_call_id": "call_1", "content": "Paris"},
]
PICTURE = [
    {
        "role": "user",
        "content": [
            {"type": "text", "text": "What is this?"},
            {"type": "image_url", "image_url": {"url": PIXEL}},
            {"type": "text", "text": "And where?"},
        ],
    }
]
CITY = {
    "type": "object",
    "properties": {"name": {"type": "string"}},
    "required": ["name"],
    "additionalProperties": False,
}
FORMAT = {"type": "json_schema", "json_schema": {"name": "City", "strict": True, "schema": CITY}}
TEXT = {"format": {"type": "json_schema", "name": "City", "strict": True, "schema": CITY}}
ITEMS = [
    {"role": "user", "content": [{"type": "input_text", "text": "Where is the Louvre?"}]},
    {"type": "function_call", "call_id": "call_1", "name": "lookup", "arguments": "{}"},
    {"type": "function_call_output", "call_id": "call_1", "output": "In Paris."},
    {"role": "user", "content": [{"type": "input_image", "image_url": PIXEL}]},
    {"role": "user", "content": "And what is it?"},
]

# Each the request, and how the Sandbox answers it.
CHATS = {
    "plain": (CHAT, {}),
    "history": ({**CHAT, "messages": HISTORY}, {}),
    "tools that are not called": ({**CHAT, "tools": TOOLS}, {}),
    "tools that are called": ({**CHAT, "tools": TOOLS}, {"tools": 2}),
    "tools called with a word": ({**CHAT, "tools": TOOLS}, {"tools": 1, "content": "One moment."}),
    "arguments that are no JSON": ({**CHAT, "tools": TOOLS}, {"tools": 1, "tool_args": "{broken"}),
    "results of tools": ({**CHAT, "tools": TOOLS, "messages": AFTER_TOOLS}, {}),
    "a picture": ({**CHAT, "messages": PICTURE}, {}),
    "two choices": ({**CHAT, "n": 2}, {}),
    "two choices with tools": ({**CHAT, "n": 2, "tools": TOOLS}, {"tools": 1}),
    "structured": ({**CHAT, "response_format": FORMAT}, {}),
    "a function": (
        {**CHAT, "functions": [TOOLS[0]["function"]]},
        {"function_call": True},
    ),
    "cut short": (CHAT, {"finish_reason": "length"}),
    "many pieces": (CHAT, {"content": "word " * 100, "chunks": 100}),
}
RESPONSES = {
    "plain": (RESPOND, {}),
    "instructions": ({**RESPOND, "instructions": "Be brief."}, {}),
    "items": ({**RESPOND, "input": ITEMS}, {}),
    "tools that are called": ({**RESPOND, "tools": FLAT_TOOLS}, {"tools": 2}),
    "structured": ({**RESPOND, "text": TEXT}, {}),
    "reasoning": (RESPOND, {"reasoning": "France it is."}),
    "cut short": (RESPOND, {"finish_reason": "length"}),
    **{
        tool: ({**RESPOND, "tools": [{"type": tool}]}, {"builtin": tool})
        for tool in ("web_search", "code_interpreter", "image_generation")
    },
    "file_search": (
        {**RESPOND, "tools": [{"type": "file_search", "vector_store_ids": ["vs_1"]}]},
        {"builtin": "file_search"},
    ),
    "mcp": (
        {
            **RESPOND,
            "tools": [
                {
                    "type": "mcp",
                    "server_label": "wiki",
                    "server_url": "https://example.com/mcp",
                    "authorization": "secret",
                }
            ],
        },
        {"builtin": "mcp"},
    ),
}
REFUSED = {
    "chat": (CHAT, {"refusal": "I cannot."}, "refusal"),
    "chat, filtered": (CHAT, {"null_content": True, "finish_reason": "content_filter"}, "refusal"),
    "chat, empty": (CHAT, {"empty": True}, "empty"),
    "response": (RESPOND, {"refusal": "I cannot."}, "refusal"),
    "response, empty": (RESPOND, {"null_content": True}, "empty"),
    "response, failed": (RESPOND, {"failed": True}, "call_failed"),
}
ALL = {
    **{f"chat, {name}": one for name, one in CHATS.items()},
    **{f"response, {name}": one for name, one in RESPONSES.items()},
}
streamed = pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
each = pytest.mark.parametrize("name", ALL)


class City(pydantic.BaseModel):
    """What a structured answer is parsed into."""

    name: str


@pytest.fixture(autouse=True)
def scored(scorer, sandbox):
    tt.configure(scorer=scorer)


@pytest.fixture
def mlflow_autolog():
    mlflow.openai.autolog()
    yield
    mlflow.openai.autolog(disable=True)


def needs_responses_api():
    if not hasattr(openai.OpenAI, "responses"):
        pytest.skip("this openai has no Responses API")


@pytest.fixture
def ask(sandbox):
    """Sends a request, reads its answer to the end."""

    def send(client, request, behaviour=None, **options):
        if "input" in request:
            needs_responses_api()
        sandbox.script("openai", behaviour or {})
        create = client.responses.create if "input" in request else client.chat.completions.create
        answer = create(**request, **options)
        return list(answer) if options.get("stream") else answer

    return send


def ours():
    return tt.wrap_openai(openai.OpenAI(max_retries=0))


def texts(call):
    """Prompt and responses as they are asked for."""
    assert call.reason is None
    call.endpoint.construct(call.answer)
    asked, given = call.endpoint.as_chat(call.request, call.answer)
    rendered = [render(asked, given, choice) for choice in range(len(given["choices"]))]
    return {"prompt": rendered[0][0], "responses": [response for _, response in rendered]}


def scored_texts(trace):
    """The same as they were, live."""
    inputs = next(span.inputs for span in trace.data.spans if span.name == "tlm.trustworthiness")
    return {
        "prompt": inputs["prompt"],
        "responses": inputs.get("choices") or [inputs["response"]],
    }


def without_ids(told):
    """The texts of two calls that are answered alike differ in the ids of items alone."""
    return re.sub("[0-9a-f]{32}", "*", json.dumps(told))


def only(trace):
    (call,) = calls(trace)
    return call


def record(inputs, outputs=None, kind="CHAT_MODEL", name="llm", **attributes):
    """Record a span of somebody's own."""
    with mlflow.start_span(name=name, span_type=kind) as span:
        span.set_inputs(inputs)
        span.set_outputs(outputs)
        span.set_attributes({key.replace("__", "."): item for key, item in attributes.items()})


# Calls of ours.


@streamed
@each
def test_a_call_of_ours_is_read_as_it_was_scored(name, stream, ask, trace):
    """The stored trace gives the very texts that the live call was scored by."""
    ask(ours(), *ALL[name], **({"stream": True} if stream else {}))
    found = trace()
    call = only(found)
    assert texts(call) == scored_texts(found)
    by_name = {span.name.partition(" ")[0]: span.span_id for span in found.data.spans}
    verb, llm = ("chat", "chat.completions") if "messages" in ALL[name][0] else ("response",) * 2
    llm = "responses" if llm == "response" else llm
    assert call.span_id == call.parent.span_id == by_name[verb]
    assert call.llm.span_id == by_name[f"openai.{llm}"]
    assert call.scoring.span_id == by_name["tlm.trustworthiness"]


@streamed
@pytest.mark.parametrize("name", REFUSED)
def test_an_answer_of_ours_without_content_has_the_same_reason(name, stream, ask, traces):
    """What live calls are unscored for, stored ones are, too."""
    request, behaviour, reason = REFUSED[name]
    answer = ask(ours(), request, behaviour, stream=stream)
    call = only(traces(1)[0])
    assert reason_of(call) == reason
    assert stream or tt.trust(answer).reason == reason


def reason_of(call):
    if call.reason is None:
        try:
            texts(call)
        except Unscorable as nothing:
            return nothing.reason
    return call.reason


def test_a_call_that_was_not_scored_has_no_scoring_span(ask, trace):
    """It can be scored now."""
    tt.configure(mode="off")
    ask(ours(), CHAT)
    call = only(trace())
    assert (call.scoring, call.reason) == (None, None)


def test_a_failed_call_of_ours_is_told_as_failed(trace):
    """There is no answer to score."""
    with pytest.raises(openai.BadRequestError):
        ours().chat.completions.create(**{**CHAT, "model": "sandbox:status=400"})
    assert only(trace()).reason == "call_failed"


@pytest.mark.parametrize("how", ["left", "truncated", "broken"])
def test_a_stream_of_ours_that_did_not_end_well_is_partial(how, trace):
    """Half an answer is not scored."""
    model = {"left": "gpt-4o", "truncated": "sandbox:truncate=2", "broken": "sandbox:disconnect=2"}
    stream = ours().chat.completions.create(**{**CHAT, "model": model[how]}, stream=True)
    with stream, contextlib.suppress(openai.APIError, Exception):
        next(stream)
        if how != "left":
            list(stream)
    assert only(trace()).reason == "partial_stream"


@pytest.mark.parametrize(
    "setting", [{"capture_content": False}, {"mask": lambda value: value}], ids=["shape", "masked"]
)
def test_what_was_recorded_without_its_words_is_not_scored(setting, ask, trace):
    """Shapes and masked texts are not what the model saw."""
    tt.configure(**setting)
    ask(ours(), CHAT)
    assert only(trace()).reason == "unsupported_content"


def test_a_span_that_has_not_ended_is_partial(ask, trace):
    """Its answer may still come."""
    ask(ours(), CHAT)
    found = trace()
    spans = [span.to_dict() for span in found.data.spans]
    for span in spans:
        span["end_time_unix_nano"] = None
    found.data.spans = [Span.from_dict(span) for span in spans]
    assert only(found).reason == "partial_stream"


def test_spans_that_go_round_in_circles_are_no_trouble(ask, trace):
    """Ids come from anywhere."""
    ask(ours(), CHAT)
    found = trace()
    spans = [span.to_dict() for span in found.data.spans]
    spans[0]["parent_span_id"] = spans[1]["span_id"]
    found.data.spans = [Span.from_dict(span) for span in spans]
    assert len(calls(found)) == 1


def test_a_call_inside_a_block_among_other_spans_is_found(ask, trace):
    """Only LLM calls count, in the order in which they began."""
    with tt.trusted_span("block"), mlflow.start_span("tool", span_type="TOOL"):
        ask(ours(), CHAT)
        ask(ours(), RESPOND)
    assert [call.parent.name for call in calls(trace())] == ["chat gpt-4o", "response gpt-4o"]


# Calls that MLflow's autolog has recorded.


@streamed
@each
def test_a_call_of_autologs_is_read_as_ours_would_be_scored(name, stream, ask, traces):
    """It makes no difference to the texts who has recorded a call."""
    request, behaviour = ALL[name]
    options = {"stream": True} if stream else {}
    ask(ours(), request, behaviour, **options)
    mlflow.openai.autolog()
    try:
        ask(openai.OpenAI(), request, behaviour, **options)
    finally:
        mlflow.openai.autolog(disable=True)
    live, stored = traces(2)
    call = only(stored)
    assert without_ids(texts(call)) == without_ids(scored_texts(live))
    assert call.span_id == call.llm.span_id == stored.data.spans[0].span_id
    assert (call.parent, call.scoring) == (None, None)
    assert call.request["model"] == "gpt-4o"


@streamed
@pytest.mark.parametrize("name", REFUSED)
def test_an_answer_of_autologs_without_content_has_the_same_reason(
    name, stream, ask, trace, mlflow_autolog
):
    """Refusals are told from answers, whoever has recorded them."""
    request, behaviour, reason = REFUSED[name]
    ask(openai.OpenAI(), request, behaviour, stream=stream)
    assert reason_of(only(trace())) == reason


@pytest.mark.parametrize("helper", ["parse", "stream"])
@pytest.mark.parametrize("base", ["chat", "responses"])
def test_the_helpers_of_openai_are_read(base, helper, helpers, trace, mlflow_autolog, sandbox):
    """Parameters that were not given are no part of the request."""
    if base == "responses":
        needs_responses_api()
    sandbox.script("openai", {"content": '{"name": "Paris"}'})
    client = openai.OpenAI()
    on, request = (helpers(client), CHAT) if base == "chat" else (client.responses, RESPOND)
    wanted = {"response_format" if base == "chat" else "text_format": City}
    if helper == "parse":
        on.parse(**request, **wanted)
    else:
        with on.stream(**request, **wanted) as stream:
            list(stream)
    call = only(trace())
    assert texts(call) == {
        "prompt": "What is the capital of France?",
        "responses": ['{"name": "Paris"}'],
    }
    sent = sandbox.requests("openai")[0].json
    told = ("model", "messages", "input")
    assert {key: call.request.get(key) for key in told} == {key: sent.get(key) for key in told}
    assert not any("Omit" in str(value) for value in call.request.values())


def test_a_parsed_response_has_its_format(trace, mlflow_autolog, sandbox):
    """The format is in the answer, though the request tells of a class alone."""
    needs_responses_api()
    openai.OpenAI().responses.parse(**RESPOND, text_format=City)
    call = only(trace())
    sent = sandbox.requests("openai")[0].json
    given = call.endpoint.response_format(call.request)["json_schema"]
    assert given["schema"] == sent["text"]["format"]["schema"]


@streamed
def test_an_async_call_is_read(stream, trace, mlflow_autolog):
    """So is what was read from a stream of it."""

    async def main():
        async with openai.AsyncOpenAI() as client:
            answer = await client.chat.completions.create(**CHAT, stream=stream)
            return [chunk async for chunk in answer] if stream else answer

    asyncio.run(main())
    assert texts(only(trace()))["responses"] == [
        "The Sandbox's answer to: What is the capital of France?"
    ]


@streamed
def test_a_raw_response_is_read(stream, trace, mlflow_autolog):
    """The answer is in the span, whoever parses it."""
    create = openai.OpenAI().chat.completions.with_raw_response.create
    answer = create(**CHAT, stream=stream).parse()
    if stream:
        list(answer)
    assert texts(only(trace()))["prompt"] == "What is the capital of France?"


def test_a_response_that_was_left_to_the_caller_is_not_scored(trace, mlflow_autolog):
    """Of it, MLflow stores no more than that it is an object."""
    create = openai.OpenAI().chat.completions.with_streaming_response.create
    with create(**CHAT) as response:
        response.parse()
    assert only(trace()).reason == "unsupported_content"


def test_a_failed_call_is_told_as_failed(trace, mlflow_autolog):
    """There is no answer to score."""
    client = openai.OpenAI(max_retries=0)
    with pytest.raises(openai.BadRequestError):
        client.chat.completions.create(**{**CHAT, "model": "sandbox:status=400"})
    assert only(trace()).reason == "call_failed"


@pytest.mark.parametrize("how", ["truncate", "stream_error"])
@pytest.mark.parametrize("request_", [CHAT, RESPOND], ids=["chat", "response"])
def test_a_stream_that_broke_off_is_partial(how, request_, ask, traces, mlflow_autolog):
    """Though autolog says of every end that it was a good one."""
    with contextlib.suppress(openai.APIError):
        ask(openai.OpenAI(max_retries=0), request_, {how: 2}, stream=True)
    if not (found := traces()):
        pytest.skip("this MLflow loses the trace of a stream that failed")
    assert only(found[0]).reason == "partial_stream"


LONG = {"content": "word " * 300, "chunks": 300}


def test_a_long_stream_without_tools_is_read(ask, trace, mlflow_autolog):
    """MLflow keeps its last events only, but those tell that it has ended well."""
    ask(openai.OpenAI(), CHAT, LONG, stream=True)
    assert texts(only(trace()))["responses"] == ["word " * 300]


@pytest.mark.parametrize(
    ("options", "behaviour"),
    [({"tools": TOOLS}, {}), ({"tools": TOOLS}, {"tools": 1}), ({"n": 2}, {})],
    ids=["tools", "tools called", "two choices"],
)
def test_a_long_stream_that_may_have_said_more_is_not_scored(
    options, behaviour, ask, trace, mlflow_autolog
):
    """Tool calls and other choices would be in the events that MLflow has dropped."""
    ask(openai.OpenAI(), {**CHAT, **options}, {**LONG, **behaviour}, stream=True)
    assert only(trace()).reason == "unsupported_content"


def test_a_long_stream_that_broke_off_is_partial(ask, trace, mlflow_autolog):
    """Its last events do not tell why it ended."""
    ask(openai.OpenAI(), CHAT, {**LONG, "truncate": 200}, stream=True)
    assert only(trace()).reason == "partial_stream"


def test_embeddings_and_pictures_are_no_calls(trace, mlflow_autolog):
    """They answer nobody, whatever type their span has."""
    record({"input": "a text"}, {"object": "list", "data": [{"embedding": [0.1]}]}, "LLM")
    assert calls(trace()) == []


def test_parameters_that_the_sdk_does_not_know_are_merged(trace, mlflow_autolog, sandbox):
    """Tools may come by ``extra_body``, as they do from clients of other servers."""
    client = openai.OpenAI()
    client.chat.completions.create(**CHAT, extra_body={"tools": TOOLS}, extra_headers={"x-a": "b"})
    call = only(trace())
    assert call.request == sandbox.requests("openai")[0].json


# Spans in spans.


def test_of_llm_spans_inside_each_other_the_innermost_is_the_call(ask, trace, mlflow_autolog):
    """A wrapper tells of the same call once more."""
    with mlflow.start_span("ChatOpenAI", span_type="CHAT_MODEL") as span:
        span.set_inputs({"messages": QUESTION})
        ask(openai.OpenAI(), CHAT)
        ask(openai.OpenAI(), RESPOND)
        span.set_outputs({"choices": []})
    assert [call.llm.name for call in calls(trace())] == ["Completions", "Responses"]


def test_what_an_evaluator_asks_is_not_the_applications(ask, trace, mlflow_autolog):
    """A judge's own calls are not scored."""
    with mlflow.start_span("judge", span_type="EVALUATOR"), mlflow.start_span("inside"):
        ask(openai.OpenAI(), CHAT)
    assert calls(trace()) == []


def test_a_trace_of_a_scorers_own_has_no_calls(trace):
    """MLflow tags those that its evaluation has made."""
    with mlflow.start_span("judge", span_type="CHAT_MODEL") as span:
        span.set_inputs({"messages": QUESTION})
        span.set_outputs({"choices": [{"message": {"role": "assistant", "content": "yes"}}]})
        mlflow.update_current_trace(tags={"mlflow.trace.sourceScorer": "safety"})
    assert calls(trace()) == []


# Spans of somebody's own.


COMPLETION = {"choices": [{"message": {"role": "assistant", "content": "Paris"}}]}
READ = {
    "a completion": ({"messages": QUESTION}, COMPLETION),
    "a list of messages": (QUESTION, COMPLETION),
    "a message": ({"messages": QUESTION}, {"role": "assistant", "content": "Paris"}),
    "a list of one message": ({"messages": QUESTION}, [{"role": "assistant", "content": "Paris"}]),
    "a text": ({"messages": QUESTION}, "Paris"),
    "a prompt": (
        {"prompt": QUESTION[0]["content"], "model": "m"},
        {"choices": [{"text": "Paris", "finish_reason": "stop"}]},
    ),
    "thoughts": (
        {"messages": QUESTION},
        {
            "choices": [
                {
                    "message": {
                        "role": "assistant",
                        "content": [
                            {"type": "thinking", "thinking": []},
                            {"type": "text", "text": "Paris"},
                        ],
                    }
                }
            ]
        },
    ),
}


@pytest.mark.parametrize("name", READ)
def test_shapes_of_openais_are_read_without_a_named_format(name, trace):
    """Whoever has recorded them."""
    record(*READ[name])
    assert texts(only(trace())) == {
        "prompt": "What is the capital of France?",
        "responses": ["Paris"],
    }


def test_tools_that_only_mlflow_tells_of_are_the_requests(trace):
    """Autologgers put them into an attribute of MLflow's."""
    record({"messages": QUESTION}, COMPLETION, mlflow__chat__tools=TOOLS)
    assert only(trace()).request["tools"] == TOOLS


def test_the_model_is_that_of_mlflows_attribute(trace):
    """If the request does not have it."""
    record({"messages": QUESTION}, COMPLETION, mlflow__llm__model="gpt-4o")
    assert only(trace()).request["model"] == "gpt-4o"


def test_a_conversation_of_an_older_mlflow_is_read(trace):
    """Its last message is the answer."""
    answer = {"role": "assistant", "content": "Paris"}
    record({"q": 1}, {"a": 2}, mlflow__chat__messages=[*HISTORY, answer])
    assert texts(only(trace()))["prompt"].startswith("System: Be brief.\n\nBob: Hello")


# Formats of others, as their integrations write them; test_neighbours_stored has the live ones.

LC_CALL = {"name": "lookup", "args": {"query": "x"}, "id": "ID", "type": "tool_call"}
LC_QUESTION = {"type": "human", "content": QUESTION[0]["content"]}
PART_CALL = {"type": "tool_call", "id": "ID", "name": "lookup", "arguments": {"query": "x"}}
PART_RESULT = {"type": "tool_call_response", "id": "ID", "response": "Paris"}
VERCEL_CALL = {"toolCallId": "ID", "toolName": "lookup", "input": {"query": "x"}}
CALLED = {"name": "lookup", "arguments": {"query": "x"}, "call_id": "ID"}
FOUND = {"name": "lookup", "call_id": "ID", "output": "Paris"}
TALK = (
    "System: Be brief.\n\nUser: Hello\n\n"
    f"Assistant: <tool_call>\n{json.dumps(CALLED, indent=2)}\n</tool_call>\n\n"
    f"Tool: <tool_response>\n{json.dumps(FOUND, indent=2)}\n</tool_response>\n\nAssistant:"
)
ALONE = "What is the capital of France?"
FORMATS = {
    "langchain's own": (
        "langchain",
        [
            [
                {"type": "system", "content": "Be brief."},
                {"type": "human", "content": "Hello"},
                {"type": "ai", "content": "", "tool_calls": [LC_CALL]},
                {"type": "tool", "content": "Paris", "tool_call_id": "ID"},
            ]
        ],
        {
            "generations": [
                [{"text": "It is.", "message": {"type": "ai", "content": "It is."}}],
            ]
        },
        {},
        TALK,
    ),
    "a langchain LLM": (
        "langchain",
        [ALONE],
        {"choices": [{"message": {"role": "assistant", "content": "It is."}}]},
        {},
        ALONE,
    ),
    "opentelemetry's": (
        None,
        None,
        None,
        {
            "gen_ai.operation.name": "chat",
            "gen_ai.request.model": "m",
            "gen_ai.system_instructions": json.dumps([{"type": "text", "content": "Be brief."}]),
            "gen_ai.input.messages": json.dumps(
                [
                    {"role": "user", "parts": [{"type": "text", "content": "Hello"}]},
                    {"role": "assistant", "parts": [PART_CALL]},
                    {"role": "tool", "parts": [PART_RESULT]},
                ]
            ),
            "gen_ai.output.messages": json.dumps(
                [
                    {
                        "role": "assistant",
                        "parts": [
                            {"type": "reasoning", "content": "Hm."},
                            {"type": "text", "content": "It is."},
                        ],
                        "finish_reason": "stop",
                    }
                ]
            ),
        },
        TALK,
    ),
    "vercel's": (
        None,
        None,
        None,
        {
            "ai.operationId": "ai.generateText.doGenerate",
            "ai.prompt.messages": json.dumps(
                [
                    {"role": "system", "content": "Be brief."},
                    {"role": "user", "content": [{"type": "text", "text": "Hello"}]},
                    {"role": "assistant", "content": [{"type": "tool-call", **VERCEL_CALL}]},
                    {
                        "role": "tool",
                        "content": [
                            {
                                "type": "tool-result",
                                "toolCallId": "ID",
                                "toolName": "lookup",
                                "output": {"type": "text", "value": "Paris"},
                            }
                        ],
                    },
                ]
            ),
            "ai.response.text": "It is.",
            "ai.response.finishReason": "stop",
        },
        TALK,
    ),
    "dspy's": ("dspy", {"messages": QUESTION, "prompt": None}, ["It is."], {}, ALONE),
    "crewai's": ("crewai", {"messages": QUESTION, "tools": None}, "It is.", {}, ALONE),
    "bedrock's streams": (
        "bedrock",
        {"messages": [{"role": "user", "content": [{"text": ALONE}]}]},
        {"stopReason": "end_turn", "output": {"message": {"content": [{"text": "It is."}]}}},
        {},
        ALONE,
    ),
}


@pytest.mark.parametrize("name", FORMATS)
def test_formats_of_others_are_read(name, trace):
    """With roles, tool calls and their results, without thoughts."""
    form, inputs, outputs, attributes, prompt = FORMATS[name]
    named = {"mlflow.message.format": form} if form else {}
    kind = "CHAT_MODEL" if form else "UNKNOWN"
    with mlflow.start_span(name="llm", span_type=kind) as span:
        if form:
            span.set_inputs(inputs)
            span.set_outputs(outputs)
        span.set_attributes({**named, **attributes})
    assert texts(only(trace())) == {"prompt": prompt, "responses": ["It is."]}


BEDROCK_EVENTS = [
    ("messageStart", {"role": "assistant"}),
    ("contentBlockDelta", {"contentBlockIndex": 0, "delta": {"text": "Wait."}}),
    *(
        event
        for index in (1, 2)
        for event in [
            (
                "contentBlockStart",
                {
                    "contentBlockIndex": index,
                    "start": {"toolUse": {"toolUseId": f"t{index}", "name": "lookup"}},
                },
            ),
            (
                "contentBlockDelta",
                {"contentBlockIndex": index, "delta": {"toolUse": {"input": '{"query": '}}},
            ),
            (
                "contentBlockDelta",
                {"contentBlockIndex": index, "delta": {"toolUse": {"input": f"{index}}}"}}},
            ),
        ]
    ),
    ("messageStop", {"stopReason": "tool_use"}),
]


@pytest.mark.parametrize("is_whole", [True, False])
def test_bedrocks_streamed_tool_calls_are_all_read(is_whole, trace):
    """MLflow's own outputs have the last one only; without the first events nobody can tell."""
    with mlflow.start_span(name="BedrockRuntime.converse_stream", span_type="CHAT_MODEL") as span:
        span.set_inputs(
            {
                "messages": [{"role": "user", "content": [{"text": ALONE}]}],
                "toolConfig": {"tools": [{"toolSpec": {"name": "lookup"}}]},
            }
        )
        span.set_outputs(
            {"stopReason": "tool_use", "output": {"message": {"content": [{"text": "Wait."}]}}}
        )
        span.set_attribute("mlflow.message.format", "bedrock")
        for name, event in BEDROCK_EVENTS[0 if is_whole else 1 :]:
            span.add_event(SpanEvent(name=name, attributes={"json": json.dumps(event)}))
    call = only(trace())
    if not is_whole:
        assert call.reason == "unsupported_content"
        return
    made = [{"name": "lookup", "arguments": {"query": index}} for index in (1, 2)]
    tagged = [f"<tool_call>\n{json.dumps(one, indent=2)}\n</tool_call>" for one in made]
    assert texts(call)["responses"] == ["\n".join(["Wait.", *tagged])]


@pytest.mark.parametrize(
    ("form", "inputs", "outputs"),
    [
        ("langchain", [[LC_QUESTION], [LC_QUESTION]], {"generations": [[], []]}),
        ("langchain", ["one", "two"], COMPLETION),
        ("openai-agent", QUESTION, [{"role": "assistant", "content": "Paris"}]),
        ("nobody's", {"messages": QUESTION}, COMPLETION),
        ("crewai", {"messages": QUESTION, "tools": TOOLS}, "a tool's result"),
        ("dspy", {"messages": QUESTION, "tools": TOOLS}, ["Paris"]),
    ],
    ids=["conversations", "prompts", "agent", "unknown", "crew's tools", "dspy's tools"],
)
def test_what_a_format_leaves_out_is_never_guessed(form, inputs, outputs, trace):
    """Batches, and formats that do not tell of instructions or tools."""
    record(inputs, outputs, mlflow__message__format=form)
    assert only(trace()).reason == "unsupported_content"


UNREADABLE = {
    "nothing": (None, None),
    "a question of a function's": ({"question": "Where?"}, "In Paris"),
    "a text alone": ("Where?", "In Paris"),
    "an object": ({"messages": "<generator object ask at 0x7f>"}, COMPLETION),
    "an answer that is an object": ({"messages": QUESTION}, "<openai.Stream object at 0x7f>"),
    "messages that are objects": ({"messages": ["Message(role='user')"]}, COMPLETION),
    "messages of another format": (
        {"messages": [{"role": "user", "blocks": [{"block_type": "text", "text": "Hi"}]}]},
        COMPLETION,
    ),
    "tools that are objects": (
        {"messages": QUESTION, "tools": ["<function f at 0x7f>"]},
        COMPLETION,
    ),
    "a text where tools may be called": ({"messages": QUESTION, "tools": TOOLS}, "Paris"),
    "several conversations": ([QUESTION, QUESTION], COMPLETION),
    "several prompts": ({"prompt": ["a", "b"]}, {"choices": [{"text": "1"}, {"text": "2"}]}),
    "several answers": ({"messages": QUESTION}, [{"role": "assistant"}, {"role": "assistant"}]),
    "no choices": ({"messages": QUESTION}, {"choices": "none"}),
    "choices without messages": ({"messages": QUESTION}, {"choices": [{"text": "Paris"}]}),
    "chunks": ({"messages": QUESTION, "stream": True}, [{"choices": []}]),
}


@pytest.mark.parametrize("name", UNREADABLE)
def test_what_cannot_be_read_is_never_guessed(name, trace):
    """It is told, and left alone."""
    record(*UNREADABLE[name])
    call = only(trace())
    assert (call.reason, call.request, call.answer) == ("unsupported_content", {}, {})


@pytest.mark.parametrize("name", ["anthropic", "langchain", "gemini", "bedrock", "llamaindex"])
@pytest.mark.parametrize("inputs", [None, 1, "text", [], {}, {"messages": 1}, [[]]])
@pytest.mark.parametrize("outputs", [None, "text", [], {}, {"content": 1}])
def test_odd_spans_are_no_trouble(name, inputs, outputs):
    """Whatever a span holds, the others of its trace are read."""
    with mlflow.start_span("llm.chat", span_type="LLM") as span:
        span.set_inputs(inputs)
        span.set_outputs(outputs)
        span.set_attribute("mlflow.message.format", name)
    found = mlflow.get_trace(span.trace_id)
    assert [call.reason in ("unsupported_content", "partial_stream") for call in calls(found)] in (
        [True],
        [],
    )
