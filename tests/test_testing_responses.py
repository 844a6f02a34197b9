"""The Sandbox speaks OpenAI's Responses API: OpenAI's own client and helpers are content."""

from __future__ import annotations

import asyncio
import itertools
import json
import time
from concurrent.futures import ThreadPoolExecutor

import openai
import pydantic
import pytest

if not hasattr(openai.OpenAI, "responses"):
    pytest.skip(f"openai {openai.__version__} has no Responses API", allow_module_level=True)

from openai.types.responses import Response

SINCE_1_99 = pytest.mark.skipif(
    tuple(map(int, openai.__version__.split(".")[:2])) < (1, 99),
    reason=f"openai {openai.__version__} knows fewer kinds of events",
)

TOOL = {"type": "function", "name": "add", "parameters": {}, "strict": False}
BUILTINS = [
    "web_search",
    "file_search",
    "code_interpreter",
    "mcp",
    "image_generation",
    "computer",
]
# What the API adds to an answer only when it is asked for it.
INCLUDE = [
    "message.output_text.logprobs",
    "file_search_call.results",
    "code_interpreter_call.outputs",
]
ANSWERS = [
    {},
    {"reasoning": "Let me think."},
    {"refusal": "I had rather not."},
    {"tools": 2},
    {"content": "I ask.", "tools": 1},
    {"empty": True},
    {"null_content": True},
    {"finish_reason": "length"},
    {"failed": True},
    *({"builtin": tool} for tool in BUILTINS),
]


class Person(pydantic.BaseModel):
    name: str
    age: int


class Lookup(pydantic.BaseModel):
    query: str


@pytest.fixture
def client(sandbox):
    with openai.OpenAI(max_retries=0, timeout=5) as client:
        yield client


def ask(client, given="What is 1+1?", model="gpt-4o", **options):
    return client.responses.create(model=model, input=given, **options)


def iter_events(client, **options):
    with ask(client, stream=True, **options) as stream:
        yield from stream


def events_of(client, **options):
    return list(iter_events(client, **options))


def types_of(client):
    """The types of a stream's events, each run of the same once."""
    return [kind for kind, _ in itertools.groupby(event.type for event in events_of(client))]


def lasting(data):
    """Data without what differs each time."""
    if isinstance(data, list):
        return [lasting(one) for one in data]
    if not isinstance(data, dict):
        return data
    new = ("id", "call_id", "container_id", "created_at", "completed_at")
    return {name: lasting(value) for name, value in data.items() if name not in new}


def sound(model):
    """That everything the wire format wants is there, and of the right kind."""
    return type(model).model_validate(model.to_dict())


def for_each(stream, note):
    for event in stream:
        note(event)


# The whole answer


def test_a_response_is_whole(client):
    response = ask(client)
    assert response.id.startswith("resp_")
    assert response.object == "response"
    assert response.model == "gpt-4o-2024-08-06"
    assert response.status == "completed"
    assert abs(response.created_at - time.time()) < 60
    assert response.output_text == "The Sandbox's answer to: What is 1+1?"
    (message,) = response.output
    assert (message.type, message.role, message.status) == ("message", "assistant", "completed")
    assert message.id.startswith("msg_")
    assert (response.error, response.incomplete_details) == (None, None)
    assert response._request_id.startswith("req_")
    assert sound(response)


def test_tokens_are_counted(client):
    usage = ask(client).usage
    assert usage.input_tokens == 3
    assert usage.output_tokens == 7
    assert usage.total_tokens == 10
    assert usage.input_tokens_details.cached_tokens == 0
    assert usage.output_tokens_details.reasoning_tokens == 0


def test_cached_and_reasoning_tokens_count_too(client):
    usage = ask(client, model="sandbox:cached_tokens=100,reasoning_tokens=20").usage
    assert usage.input_tokens_details.cached_tokens == 100
    assert usage.output_tokens_details.reasoning_tokens == 20
    assert (usage.input_tokens, usage.output_tokens, usage.total_tokens) == (103, 27, 130)


def test_the_request_is_repeated(client):
    asked = {
        "instructions": "Be brief.",
        "max_output_tokens": 500,
        "metadata": {"a": "b"},
        "parallel_tool_calls": False,
        "previous_response_id": "resp_1",
        "temperature": 0.5,
        "tool_choice": "required",
        "tools": [TOOL],
        "top_p": 0.25,
    }
    given = ask(client, **asked).to_dict()
    assert {name: given[name] for name in asked} == asked


def test_what_is_not_asked_for_is_openais_default(client):
    response = ask(client)
    assert (response.tools, response.tool_choice) == ([], "auto")
    assert (response.temperature, response.top_p) == (1.0, 1.0)
    assert (response.instructions, response.previous_response_id) == (None, None)
    assert (response.parallel_tool_calls, response.metadata) == (True, {})
    assert response.text.format.type == "text"
    assert response.reasoning.effort is None


def test_partly_given_settings_are_filled_up(client):
    response = ask(client, reasoning={"effort": "low"}, text={"verbosity": "high"})
    assert (response.reasoning.effort, response.reasoning.summary) == ("low", None)
    assert (response.text.verbosity, response.text.format.type) == ("high", "text")


@pytest.mark.parametrize(
    ("asked", "given"), [(None, "default"), ("auto", "default"), ("flex", "flex")]
)
def test_the_service_tier_is_a_concrete_one(client, asked, given):
    assert ask(client, service_tier=asked).service_tier == given


# The question


@pytest.mark.parametrize(
    "given",
    [
        "What is 1+1?",
        [{"role": "user", "content": "What is 1+1?"}],
        [{"type": "message", "role": "user", "content": "What is 1+1?"}],
        [
            {"role": "developer", "content": "Be brief."},
            {"role": "user", "content": "Hi"},
            {"role": "assistant", "content": "Hello"},
            {"role": "user", "content": [{"type": "input_text", "text": "What is 1+1?"}]},
        ],
        [
            {
                "role": "user",
                "content": [
                    {"type": "input_image", "image_url": "data:,", "detail": "auto"},
                    {"type": "input_text", "text": "What is 1+1?"},
                    {"type": "input_file", "file_id": "file-1"},
                ],
            }
        ],
    ],
)
def test_the_last_user_message_is_answered(client, sandbox, given):
    sandbox.answer("What is 1+1?", "2")
    assert ask(client, given).output_text == "2"


def test_earlier_output_can_be_given_back(client, sandbox):
    sandbox.answer("What is 1+1?", "2")
    asked = [{"role": "user", "content": "What is 1+1?"}]
    first = ask(client, asked, model="sandbox:reasoning=hm,tools=1", tools=[TOOL])
    call = first.output[-1]
    result = {"type": "function_call_output", "call_id": call.call_id, "output": "2"}
    second = ask(client, [*asked, *first.output, result])
    assert second.output_text == "2"
    sent = sandbox.requests("openai")[-1].json["input"]
    kinds = [item.get("type") for item in sent]
    assert kinds == [None, "reasoning", "function_call", "function_call_output"]
    assert ask(client, [*asked, *second.output]).output_text == "2"


@pytest.mark.parametrize("name", ["prompt", "previous_response_id", "conversation"])
def test_some_requests_need_no_input(client, name):
    given = {"id": "pmpt_1"} if name == "prompt" else "some_1"
    response = client.responses.create(model="gpt-4o", extra_body={name: given})
    assert response.status == "completed"


@pytest.mark.parametrize("body", [{}, {"input": None}, {"input": 1}, {"input": ["hi"]}, []])
def test_bad_requests_are_refused(client, body):
    with pytest.raises(openai.BadRequestError) as caught:
        client.post("/responses", cast_to=object, body=body)
    assert set(caught.value.body) == {"message", "type", "param", "code"}


def test_what_nobody_expects_is_refused(client):
    with pytest.raises(openai.BadRequestError, match="not as this endpoint expects"):
        ask(client, text="json")


def test_unknown_behaviour_is_refused(client):
    with pytest.raises(openai.BadRequestError, match="statsu"):
        ask(client, model="sandbox:statsu=500")
    with pytest.raises(openai.BadRequestError, match=r"no built-in tool .*tarot.*web_search"):
        ask(client, model="sandbox:builtin=tarot")


# The answer is as told


def test_a_schema_is_met(client):
    response = client.responses.parse(model="gpt-4o", input="Who?", text_format=Person)
    assert response.output_parsed == Person(name="text", age=1)
    assert response.text.format.type == "json_schema"
    assert response.text.format.name == "Person"


def test_the_text_is_as_told(client, sandbox):
    sandbox.script("openai", {"content": "so"}, {"empty": True}, {"null_content": True})
    assert ask(client).output_text == "so"
    assert ask(client).output[0].content[0].text == ""
    assert ask(client).output == []


def test_a_refusal_takes_the_place_of_the_text(client):
    response = ask(client, model="sandbox:refusal=No.")
    (part,) = response.output[0].content
    assert (part.type, part.refusal) == ("refusal", "No.")
    assert response.output_text == ""


def test_reasoning_comes_before_the_message(client):
    reasoning, message = ask(client, model="sandbox:reasoning=hm").output
    assert reasoning.id.startswith("rs_")
    assert [part.text for part in reasoning.summary] == ["hm"]
    assert message.type == "message"


def test_tools_are_called_only_when_told(client):
    assert [item.type for item in ask(client, tools=[TOOL]).output] == ["message"]
    other = {**TOOL, "name": "subtract"}
    tools = [TOOL, other, {"type": "web_search"}]
    named = {"type": "function", "name": "subtract"}
    for choice, expected in (("required", "add"), (named, "subtract")):
        (call,) = ask(client, tools=tools, tool_choice=choice).output
        assert (call.type, call.name) == ("function_call", expected)
    answer = ask(client, tools=tools, tool_choice={"type": "web_search"})
    assert [item.type for item in answer.output] == ["message"]


def test_so_many_tools_are_called_as_told(client, sandbox):
    sandbox.default("openai", tools=3, tool_args={"a": 1})
    other = {**TOOL, "name": "subtract"}
    calls = ask(client, tools=[TOOL, other]).output
    assert [call.name for call in calls] == ["add", "subtract", "add"]
    assert [json.loads(call.arguments) for call in calls] == [{"a": 1}] * 3
    assert len({call.call_id for call in calls}) == len({call.id for call in calls}) == 3


def test_a_message_may_come_with_the_calls(client):
    output = ask(client, model="sandbox:content=I ask.,tools=1").output
    assert [item.type for item in output] == ["message", "function_call"]


@pytest.mark.parametrize(
    ("finish", "reason"), [("length", "max_output_tokens"), ("content_filter", "content_filter")]
)
def test_an_answer_can_be_cut_short(client, finish, reason):
    response = ask(client, model=f"sandbox:finish_reason={finish}")
    assert response.status == response.output[0].status == "incomplete"
    assert response.incomplete_details.reason == reason
    assert response.output_text
    assert ask(client, model="sandbox:finish_reason=stop").status == "completed"


def test_a_response_can_fail(client):
    response = ask(client, model="sandbox:failed=true")
    assert response.status == "failed"
    assert response.error.code == "server_error"
    assert response.error.message
    assert (response.output, response.usage) == ([], None)


@pytest.mark.parametrize("tool", BUILTINS)
def test_a_builtin_tool_is_called_before_the_answer(client, tool):
    call, *others = ask(client, model=f"sandbox:builtin={tool}").output
    assert (call.type, call.status) == (f"{tool}_call", "completed")
    assert [item.type for item in others] == ([] if tool == "computer" else ["message"])


def test_a_builtin_tool_tells_what_it_did(client, sandbox):
    sandbox.script("openai", *({"builtin": tool} for tool in BUILTINS))
    web, files, code, mcp, image, computer = (ask(client).output[0] for _ in BUILTINS)
    assert web.action.query == "What is 1+1?"
    assert files.queries == ["What is 1+1?"]
    assert (code.code, bool(code.container_id)) == ("print(1 + 1)", True)
    assert (mcp.name, json.loads(mcp.arguments)) == ("lookup", {"query": "sandbox"})
    assert mcp.output
    assert image.result
    assert (computer.action.type, bool(computer.call_id)) == ("click", True)


def test_a_search_is_cited(client, sandbox):
    sandbox.script("openai", {"builtin": "web_search", "content": "It is 2."})
    (part,) = ask(client).output[1].content
    (citation,) = part.annotations
    assert citation.type == "url_citation"
    assert part.text[citation.start_index : citation.end_index] == "It is 2."
    (part,) = ask(client, model="sandbox:builtin=file_search").output[1].content
    assert part.annotations[0].filename == "sandbox.txt"


def test_some_things_come_only_when_asked_for(client, sandbox):
    def details(include):
        sandbox.script("openai", {}, {"builtin": "file_search"}, {"builtin": "code_interpreter"})
        text, files, code = (ask(client, include=include).output[0] for _ in range(3))
        return text.content[0].logprobs, files.results, code.outputs

    assert details([]) == ([], None, None)
    logprobs, results, outputs = details(INCLUDE)
    assert "".join(one.token for one in logprobs) == "The Sandbox's answer to: What is 1+1?"
    assert results[0].filename
    assert outputs[0].logs == "2\n"


# Streams


def test_a_stream_is_server_sent_events(client):
    with client.responses.with_streaming_response.create(
        model="gpt-4o", input="Q?", stream=True
    ) as raw:
        content = raw.read().decode()
    assert raw.headers["content-type"].startswith("text/event-stream")
    *events, nothing = content.split("\n\n")
    assert nothing == ""
    for number, event in enumerate(events):
        name, data = event.split("\n")
        told = json.loads(data.removeprefix("data: "))
        assert name == f"event: {told['type']}"
        assert told["sequence_number"] == number


def test_a_streamed_text_comes_in_openais_order(client):
    assert types_of(client) == [
        "response.created",
        "response.in_progress",
        "response.output_item.added",
        "response.content_part.added",
        "response.output_text.delta",
        "response.output_text.done",
        "response.content_part.done",
        "response.output_item.done",
        "response.completed",
    ]


@pytest.mark.parametrize(
    ("behaviour", "expected"),
    [
        ({"refusal": "No."}, ["content_part.added", "refusal.delta", "refusal.done"]),
        (
            {"reasoning": "hm", "null_content": True},
            [
                "reasoning_summary_part.added",
                "reasoning_summary_text.delta",
                "reasoning_summary_text.done",
                "reasoning_summary_part.done",
            ],
        ),
        (
            {"tools": 1},
            ["function_call_arguments.delta", "function_call_arguments.done"],
        ),
        (
            {"builtin": "mcp"},
            [
                "mcp_call.in_progress",
                "mcp_call_arguments.delta",
                "mcp_call_arguments.done",
                "mcp_call.completed",
            ],
        ),
        (
            {"builtin": "code_interpreter"},
            [
                "code_interpreter_call.in_progress",
                "code_interpreter_call_code.delta",
                "code_interpreter_call_code.done",
                "code_interpreter_call.interpreting",
                "code_interpreter_call.completed",
            ],
        ),
        (
            {"builtin": "image_generation"},
            [
                "image_generation_call.in_progress",
                "image_generation_call.generating",
                "image_generation_call.completed",
            ],
        ),
        ({"builtin": "computer"}, ["output_item.done", "completed"]),
        ({"failed": True}, ["failed"]),
    ],
)
def test_each_item_is_streamed_in_its_own_events(client, sandbox, behaviour, expected):
    sandbox.script("openai", behaviour)
    found = [kind.removeprefix("response.") for kind in types_of(client)]
    begin = 2 if "failed" in behaviour else 3
    assert found[begin : begin + len(expected)] == expected


@pytest.mark.parametrize("behaviour", ANSWERS, ids=str)
def test_a_stream_says_the_same_as_the_whole(client, sandbox, behaviour):
    sandbox.default("openai", cached_tokens=2, **behaviour)
    whole = ask(client, tools=[TOOL], include=INCLUDE)
    events = events_of(client, tools=[TOOL], include=INCLUDE)
    last = events[-1]
    assert last.type == f"response.{whole.status}"
    assert lasting(last.response.to_dict()) == lasting(whole.to_dict())
    done = [event.item for event in events if event.type == "response.output_item.done"]
    assert done == last.response.output


@SINCE_1_99
@pytest.mark.parametrize("behaviour", ANSWERS, ids=str)
def test_every_event_is_as_openai_defines_it(client, sandbox, behaviour):
    sandbox.default("openai", **behaviour)
    events = events_of(client, tools=[TOOL], include=INCLUDE)
    assert [event.sequence_number for event in events] == list(range(len(events)))
    assert all(sound(event) for event in events)
    places = {item.id: index for index, item in enumerate(events[-1].response.output)}
    placed = [event for event in events if hasattr(event, "item_id")]
    assert [places[event.item_id] for event in placed] == [event.output_index for event in placed]


@pytest.mark.parametrize(
    ("behaviour", "kind"),
    [
        ({"content": "Two words."}, "output_text"),
        ({"refusal": "Two words."}, "refusal"),
        ({"reasoning": "Two words."}, "reasoning_summary_text"),
        ({"tools": 1, "tool_args": "Two words."}, "function_call_arguments"),
    ],
)
def test_the_pieces_make_the_whole(client, sandbox, behaviour, kind):
    sandbox.script("openai", behaviour)
    events = events_of(client)
    pieces = [event.delta for event in events if event.type == f"response.{kind}.delta"]
    assert pieces == ["Two", " words."]


def test_a_streamed_response_is_empty_until_it_is_there(client):
    created, in_progress, *_, completed = events_of(client)
    for event in (created, in_progress):
        assert event.response.status == "in_progress"
        assert event.response.output == []
        assert event.response.usage is None
        assert event.response.id == completed.response.id
    assert completed.response.usage.total_tokens == 10


def test_an_item_is_empty_until_it_is_there(client):
    events = events_of(client, model="sandbox:reasoning=hm,tools=1,content=I ask.")
    added = [event.item for event in events if event.type == "response.output_item.added"]
    reasoning, message, call = added
    assert (reasoning.summary, message.content, call.arguments) == ([], [], "")
    assert message.status == call.status == "in_progress"


def test_the_number_of_pieces_is_as_told(client, sandbox):
    sandbox.script("openai", {"content": "abcdefgh", "chunks": 4})
    events = events_of(client)
    pieces = [event.delta for event in events if event.type == "response.output_text.delta"]
    assert pieces == ["ab", "cd", "ef", "gh"]


def test_events_take_their_time(client):
    started = time.monotonic()
    events = events_of(client, model="sandbox:chunk_delay=0.02")
    assert time.monotonic() - started >= 0.02 * len(events)


# OpenAI's own helpers


def test_the_stream_helper_gathers_the_response(client):
    with client.responses.stream(model="gpt-4o", input="Q?") as stream:
        text = [event.delta for event in stream if event.type == "response.output_text.delta"]
        response = stream.get_final_response()
    assert "".join(text) == response.output_text == "The Sandbox's answer to: Q?"


def test_the_stream_helper_parses(client):
    with client.responses.stream(model="gpt-4o", input="Q?", text_format=Person) as stream:
        parsed = [event.parsed for event in stream if event.type == "response.output_text.done"]
        response = stream.get_final_response()
    assert parsed == [response.output_parsed] == [Person(name="text", age=1)]


@pytest.mark.parametrize("behaviour", ANSWERS, ids=str)
def test_the_stream_helper_follows_every_answer(client, sandbox, behaviour):
    sandbox.default("openai", **behaviour)
    with client.responses.stream(model="gpt-4o", input="Q?") as stream:
        events = list(stream)
    status = events[-1].response.status
    assert events[-1].type == f"response.{status}"
    if status == "completed":
        assert stream.get_final_response().output == events[-1].response.output


def test_tools_are_parsed(client):
    asked = {"model": "sandbox:tools=1", "input": "Q?"}
    asked["tools"] = [openai.pydantic_function_tool(Lookup)]
    response = client.responses.parse(**asked)
    assert response.output[0].parsed_arguments == Lookup(query="sandbox")
    with client.responses.stream(**asked) as stream:
        deltas = [event for event in stream if event.type.endswith("arguments.delta")]
        response = stream.get_final_response()
    assert deltas[-1].snapshot == '{"query": "sandbox"}'
    assert response.output[0].parsed_arguments == Lookup(query="sandbox")


def test_raw_answers(client):
    raw = client.responses.with_raw_response.create(model="gpt-4o", input="Q?")
    assert raw.headers["x-request-id"].startswith("req_")
    assert isinstance(raw.parse(), Response)
    raw = client.responses.with_raw_response.create(model="gpt-4o", input="Q?", stream=True)
    assert [event.type for event in raw.parse()][-1] == "response.completed"
    raw = client.responses.with_raw_response.parse(model="m", input="Q?", text_format=Person)
    assert raw.parse().output_parsed.age == 1


@pytest.mark.parametrize("stream", [False, True])
def test_streamed_raw_answers(client, stream):
    create = client.responses.with_streaming_response.create
    with create(model="gpt-4o", input="Q?", stream=stream) as raw:
        found = raw.parse()
        last = list(found)[-1].response if stream else found
    assert last.output_text == "The Sandbox's answer to: Q?"


def test_the_asynchronous_client_can_do_all_that(sandbox):
    question = {"model": "gpt-4o", "input": "Q?"}

    async def every_way(responses):
        yield await responses.create(**question)
        async for event in await responses.create(**question, stream=True):
            last = event
        yield last.response
        async with responses.stream(**question) as stream:
            yield await stream.get_final_response()
        yield (await responses.with_raw_response.create(**question)).parse()
        async with responses.with_streaming_response.create(**question) as raw:
            yield await raw.parse()

    async def ask_all():
        async with openai.AsyncOpenAI(max_retries=0, timeout=5) as client:
            texts = [found.output_text async for found in every_way(client.responses)]
            parsed = await client.responses.parse(**question, text_format=Person)
            async with client.responses.stream(**question, text_format=Person) as stream:
                streamed = await stream.get_final_response()
        return texts, [parsed.output_parsed, streamed.output_parsed]

    texts, parsed = asyncio.run(ask_all())
    assert texts == ["The Sandbox's answer to: Q?"] * 5
    assert parsed == [Person(name="text", age=1)] * 2


@pytest.mark.parametrize("stem", ["", "/v1"])
def test_azure_finds_it(sandbox, stem):
    endpoint = sandbox.openai_base_url.removesuffix("/v1") + stem
    options = {"azure_endpoint": endpoint, "api_key": "k", "api_version": "2025-03-01-preview"}
    with openai.AzureOpenAI(**options) as azure:
        assert ask(azure).status == "completed"
    (request,) = sandbox.requests("openai")
    assert request.path == f"{stem}/openai/responses?api-version=2025-03-01-preview"


def test_azures_newer_address_is_served_too(sandbox):
    base_url = sandbox.openai_base_url.replace("/v1", "/openai/v1/")
    with openai.OpenAI(base_url=base_url, api_key="k") as azure:
        assert ask(azure).status == "completed"


# Troubles


@pytest.mark.parametrize("stream", [False, True])
def test_a_status_with_what_openai_says(client, sandbox, stream):
    sandbox.script("openai", {"status": 429, "retry_after": 2})
    with pytest.raises(openai.RateLimitError) as caught:
        ask(client, stream=stream)
    assert caught.value.response.headers["retry-after"] == "2"
    assert set(caught.value.body) == {"message", "type", "param", "code"}


def test_the_first_tries_fail(client, sandbox):
    sandbox.default("openai", fail_first=1)
    assert ask(client.with_options(max_retries=1)).status == "completed"
    assert len(sandbox.requests("openai")) == 2


def test_a_hanging_request_is_let_go(client, sandbox):
    sandbox.script("openai", {"hang": True})
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(ask, client)
        sandbox.wait_for("openai", 1)
        assert not answer.done()
        sandbox.release()
        assert answer.result(5).status == "completed"


def test_a_stream_that_just_ends(client):
    events = events_of(client, model="sandbox:truncate=3")
    assert [event.sequence_number for event in events] == [0, 1, 2]
    with client.responses.stream(model="sandbox:truncate=3", input="Q?") as stream:
        list(stream)
        with pytest.raises(RuntimeError, match=r"response\.completed"):
            stream.get_final_response()


@SINCE_1_99
def test_an_error_within_a_stream(client):
    *events, error = events_of(client, model="sandbox:stream_error=3")
    assert [event.sequence_number for event in events] == [0, 1, 2]
    assert (error.type, error.sequence_number) == ("error", 3)
    assert (error.code, bool(error.message), error.param) == ("server_error", True, None)
    assert sound(error)


@pytest.mark.parametrize("after", [0, 3])
def test_a_dropped_connection(client, after):
    # Older clients let the HTTP library's own exception through.
    broken = (openai.APIConnectionError, Exception)
    model, seen = f"sandbox:disconnect={after}", []
    with pytest.raises(broken) as caught:
        ask(client, model=model)
    assert not isinstance(caught.value, openai.APIStatusError)
    with pytest.raises(broken) as caught:
        for_each(iter_events(client, model=model), seen.append)
    assert not isinstance(caught.value, openai.APIStatusError)
    assert [event.sequence_number for event in seen] == list(range(after))


def test_garbage(client, sandbox):
    sandbox.default("openai", garbage=True)
    assert isinstance(ask(client), str)
    with pytest.raises(json.JSONDecodeError):
        events_of(client)
    sandbox.default("openai", html=True)
    raw = client.responses.with_raw_response.create(model="gpt-4o", input="Q?")
    assert raw.headers["content-type"].startswith("text/html")


def test_a_client_may_leave_a_stream_early(client, sandbox, caplog):
    sandbox.default("openai", content="word " * 10_000)
    with ask(client, stream=True) as stream:
        for _ in range(5):
            next(stream)
    sandbox.default("openai")
    assert ask(client).status == "completed"
    assert [record for record in caplog.records if record.name == "aiohttp.server"] == []


def test_requests_are_recorded(client, sandbox):
    ask(client, temperature=0.5)
    (request,) = sandbox.requests("openai")
    assert (request.method, request.path) == ("POST", "/v1/responses")
    assert (request.json["input"], request.json["temperature"]) == ("What is 1+1?", 0.5)
