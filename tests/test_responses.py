"""The Responses API: recorded and scored like chat, with what the model was really given."""

import asyncio
import random
import warnings

import openai
import pydantic
import pytest
from cleanlab_tlm.utils.chat import form_prompt_string

import tlm_tracing as tt
from tlm_tracing import _asking, _endpoints
from tlm_tracing._endpoints import _items, responses
from tlm_tracing._messages import Unscorable, render
from tlm_tracing.openai import AsyncOpenAI, OpenAI

if not hasattr(openai.OpenAI, "responses"):
    pytest.skip("this openai has no Responses API", allow_module_level=True)

FUNCTION = {
    "type": "function",
    "name": "lookup",
    "description": "Looks up.",
    "parameters": {"type": "object", "properties": {"query": {"type": "string"}}},
}
ANSWERED = {"status": "completed", "output": [{"type": "message", "content": "Yes."}]}
CALL = {"type": "function_call", "call_id": "c1", "name": "f", "arguments": "{}"}


@pytest.fixture(autouse=True)
def scored(scorer, sandbox):
    tt.configure(scorer=scorer)


def ask(client, question="What is the capital of France?", model="gpt-4o", **options):
    return client.responses.create(model=model, input=question, **options)


def text_of(request, answer=ANSWERED):
    return render(*responses.as_chat(request, answer))


def span(trace, name="openai.responses"):
    return next(span for span in trace.data.spans if span.name == name)


# What is recorded.


def test_a_response_is_recorded_and_scored_like_a_chat(trace, sandbox):
    sandbox.answer("What is the capital of France?", "Paris.")
    response = ask(OpenAI(), model="sandbox:cached_tokens=3,reasoning_tokens=2")
    assert tt.trust(response).score == 0.9
    assert response.tlm_metadata["trustworthiness_score"] == 0.9
    found = trace()
    call, llm, scoring = found.data.spans
    assert call.name == "response sandbox:cached_tokens=3,reasoning_tokens=2"
    assert (llm.name, llm.span_type) == ("openai.responses", "CHAT_MODEL")
    assert llm.inputs["input"] == "What is the capital of France?"
    assert llm.outputs == call.outputs
    assert llm.outputs == response.model_dump(
        mode="json", exclude_unset=True, exclude={"tlm_metadata"}
    )
    assert llm.attributes["openai.request_id"] == response._request_id
    assert llm.attributes["gen_ai.response.finish_reasons"] == ["completed"]
    assert llm.attributes["gen_ai.usage.reasoning.output_tokens"] == 2
    usage = llm.attributes["mlflow.chat.tokenUsage"]
    assert usage["cache_read_input_tokens"] == 3
    assert usage["total_tokens"] == usage["input_tokens"] + usage["output_tokens"] > 0
    assert scoring.inputs == {"prompt": "What is the capital of France?", "response": "Paris."}
    assert found.info.tags["trust_score"] == "0.9000"


def test_an_async_response_is_scored_and_knows_its_trust():
    async def main():
        async with AsyncOpenAI() as client:
            return tt.trust(await ask(client))

    assert asyncio.run(main()).score == 0.9


def test_mlflow_lists_a_response_by_its_texts(traces, sandbox):
    sandbox.answer("Where?", "Here.")
    ask(OpenAI(), "Where?")
    with tt.trusted_span("block"):
        ask(openai.OpenAI(), "Where?", instructions="Be brief.")
    previews = {(t.info.request_preview, t.info.response_preview) for t in traces(2)}
    assert previews == {("Where?", "Here.")}


class City(pydantic.BaseModel):
    name: str


def test_a_parsed_response_is_recorded_with_its_schema(trace):
    response = OpenAI().responses.parse(model="gpt-4o", input="Where?", text_format=City)
    assert isinstance(response.output_parsed, City)
    assert tt.trust(response).score == 0.9
    llm = span(trace())
    assert llm.inputs["text"]["format"]["schema"]["properties"]["name"]["type"] == "string"
    assert llm.outputs["output"][0]["content"][0]["parsed"] == {"name": "text"}


@pytest.mark.parametrize("base", [openai.AzureOpenAI, openai.AsyncAzureOpenAI])
def test_azures_responses_are_recorded_as_such(base, trace, sandbox):
    client = tt.wrap_openai(
        base(
            azure_endpoint=sandbox.openai_base_url.removesuffix("/v1"),
            api_key="key",
            api_version="2025-03-01-preview",
        )
    )

    async def main():
        answer = ask(client)
        return await answer if asyncio.iscoroutine(answer) else answer

    assert tt.trust(asyncio.run(main())).score == 0.9
    assert span(trace()).attributes["mlflow.llm.provider"] == "azure"


def test_a_failed_response_is_an_error_and_unscored(trace, scorer):
    response = ask(OpenAI(), model="sandbox:failed=true")
    assert response.status == "failed"
    assert tt.trust(response).reason == "call_failed"
    found = trace()
    assert [span.status.status_code.value for span in found.data.spans] == ["ERROR", "ERROR"]
    assert response.error.message in span(found).status.description
    assert not scorer.exchanges


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        ("refusal=I will not", "refusal"),
        ("empty=true", "empty"),
        ("null_content=true", "empty"),
        ("empty=true,finish_reason=content_filter", "refusal"),
    ],
)
def test_what_is_no_answer_is_not_scored_and_says_why(model, reason):
    assert tt.trust(ask(OpenAI(), model=f"sandbox:{model}")).reason == reason


def test_an_answer_that_was_cut_short_is_scored_as_in_chat(trace):
    assert tt.trust(ask(OpenAI(), model="sandbox:finish_reason=length")).score == 0.9
    reasons = span(trace()).attributes["gen_ai.response.finish_reasons"]
    assert reasons == ["max_output_tokens"]


def test_tools_are_recorded_as_mlflow_shows_them(trace):
    ask(OpenAI(), model="sandbox:tools=2", tools=[FUNCTION, {"type": "web_search"}])
    tools = span(trace()).attributes["mlflow.chat.tools"]
    assert [tool["function"]["name"] for tool in tools] == ["lookup", "web_search"]


# Streams.

VARIANTS = {
    "text": {},
    "reasoning": {"model": "sandbox:reasoning=let me think"},
    "refusal": {"model": "sandbox:refusal=I will not do that"},
    "tools": {"model": "sandbox:tools=2", "tools": [FUNCTION]},
    "length": {"model": "sandbox:finish_reason=length"},
    "failed": {"model": "sandbox:failed=true"},
    **{
        name: {"model": f"sandbox:builtin={name}"}
        for name in ("web_search", "file_search", "code_interpreter", "mcp", "image_generation")
    },
}


def same(answer):
    """An answer without what the server makes up anew for each, its items' ids included."""
    if isinstance(answer, dict):
        volatile = ("id", "created_at", "completed_at", "call_id", "item_id", "container_id")
        return {key: same(value) for key, value in answer.items() if key not in volatile}
    return [same(item) for item in answer] if isinstance(answer, list) else answer


@pytest.mark.parametrize("options", VARIANTS.values(), ids=VARIANTS)
def test_a_stream_adds_up_to_the_response_that_is_not_streamed(options):
    client = openai.OpenAI()
    wanted = same(ask(client, **options).model_dump(mode="json", exclude_unset=True))
    events = list(ask(client, stream=True, **options))
    assert same(responses.assemble(events)) == wanted
    assert responses.is_whole(responses.assemble(events))
    in_pieces = responses.assemble(events[:-1])
    assert not responses.is_whole(in_pieces)
    assert same(in_pieces["output"]) == wanted["output"]


@pytest.mark.parametrize("options", VARIANTS.values(), ids=VARIANTS)
def test_events_and_type_are_those_of_the_bare_client(options):
    def told(stream):
        return [same(event.model_dump(mode="json")) for event in stream]

    bare, ours = ask(openai.OpenAI(), stream=True, **options), ask(OpenAI(), stream=True, **options)
    assert type(ours) is type(bare)
    assert told(ours) == told(bare)


def test_a_stream_is_scored_when_it_is_exhausted(trace):
    stream = ask(OpenAI(), stream=True)
    text = "".join(event.delta for event in stream if event.type == "response.output_text.delta")
    assert tt.trust(stream).score == 0.9
    llm = span(trace())
    assert llm.outputs["output"][0]["content"][0]["text"] == text
    assert llm.attributes["stream.outcome"] == "complete"
    assert llm.attributes["mlflow.chat.tokenUsage"]["total_tokens"] > 0
    assert 0 < llm.attributes["time_to_first_token"] < 10


def test_the_stream_helper_is_recorded_and_scored(trace):
    with OpenAI().responses.stream(model="gpt-4o", input="Where?", text_format=City) as stream:
        final = stream.get_final_response()
    assert isinstance(final.output_parsed, City)
    assert tt.trust(stream).score == tt.trust(final).score == 0.9
    assert span(trace()).attributes["stream.outcome"] == "complete"


def test_the_helper_left_early_is_ended_at_the_exit(traces):
    with OpenAI().responses.stream(model="gpt-4o", input="Why?") as stream:
        next(event for event in stream if event.type == "response.output_text.delta")

    async def main():
        async with (
            AsyncOpenAI() as client,
            client.responses.stream(model="gpt-4o", input="Why?") as astream,
        ):
            async for event in astream:
                if event.type == "response.output_text.delta":
                    break
        return tt.trust(astream)

    assert tt.trust(stream).reason == asyncio.run(main()).reason == "partial_stream"
    for found in traces(2):
        assert span(found).attributes["stream.outcome"] == "abandoned"
        assert span(found).outputs["output"][0]["content"][0]["text"]


@pytest.mark.parametrize(
    ("fault", "outcome", "status"),
    [
        ("truncate=7", "truncated", "OK"),
        ("disconnect=7", "error", "ERROR"),
        ("stream_error=7", "error", "ERROR"),
    ],
)
def test_a_stream_that_breaks_keeps_its_text_and_is_not_scored(
    fault, outcome, status, trace, scorer
):
    stream = ask(OpenAI(), model=f"sandbox:{fault}", stream=True)
    try:
        events = list(stream)
    except Exception:
        events = []
    assert tt.trust(stream).reason == "partial_stream"
    llm = span(trace())
    assert llm.attributes["stream.outcome"] == outcome
    assert llm.outputs["output"][0]["content"][0]["text"]
    if fault.startswith("stream_error"):
        assert events  # OpenAI's client hands the error over like any other event
        assert outcome == "error"
    assert llm.status.status_code.value == status
    assert not scorer.exchanges


# What is scored.


@pytest.mark.parametrize("seed", range(10))
def test_the_prompt_is_cleanlabs_wherever_cleanlab_gives_one(seed):
    rng = random.Random(seed)
    for _ in range(50):
        roles = ["user", "assistant"] * rng.randint(1, 3)
        items = [{"role": role, "content": rng.choice(["hi", "  x ", "é{}"])} for role in roles]
        items += [{"role": "user", "content": "And now?"}]
        if rng.random() < 0.5:
            items[:0] = [{"role": "developer", "content": "Be brief."}]
        given = {"instructions": "Be kind."} if rng.random() < 0.5 else {}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            wanted = form_prompt_string(items, use_responses=True, **given)
        assert text_of({"input": items, **given})[0] == wanted


def test_an_input_of_text_alone_is_sent_as_it_is():
    assert text_of({"input": "What?"}) == ("What?", "Yes.")


def test_function_calls_and_their_results_are_told():
    items = [
        {"role": "user", "content": [{"type": "input_text", "text": "Weather?"}]},
        {"type": "reasoning", "summary": []},
        CALL,
        {**CALL, "call_id": "c2"},
        {"type": "function_call_output", "call_id": "c1", "output": "rain"},
        {"type": "function_call_output", "call_id": "c2", "output": [{"text": "sun"}]},
    ]
    prompt, response = text_of({"input": items, "tools": [FUNCTION]})
    assert prompt.count("<tool_call>\n{\n") == prompt.count("<tool_response>\n{") == 2
    assert '"name":"lookup","description":"Looks up."' in prompt
    assert '"name": "f",\n  "call_id": "c2",\n  "output": "sun"' in prompt
    assert prompt.endswith("Assistant:")
    assert response == "Yes."


def test_parallel_calls_are_one_answer():
    message = {"type": "message", "content": [{"type": "output_text", "text": "I look it up."}]}
    _, response = text_of({"input": "x"}, {"output": [message, CALL, {**CALL, "call_id": "c2"}]})
    assert response.startswith("I look it up.\n<tool_call>")
    assert response.count("<tool_call>") == 2


@pytest.mark.parametrize(
    ("builtin", "told"),
    [
        ("web_search", "https://"),
        ("file_search", '"queries"'),
        ("code_interpreter", '"code"'),
        ("mcp", '"arguments"'),
        ("image_generation", "Response is not shown"),
    ],
)
def test_what_a_built_in_tool_did_is_part_of_the_prompt(builtin, told, scorer):
    response = ask(OpenAI(), model=f"sandbox:builtin={builtin},content=Done.")
    (exchange,) = scorer.exchanges
    assert exchange.response == "Done." == response.output_text
    assert told in exchange.prompt
    assert exchange.prompt.count("<tool_call>") == exchange.prompt.count("<tool_response>") == 1
    assert len(exchange.prompt) < 2000  # no image


def test_a_call_that_the_application_must_run_is_the_answer(scorer):
    ask(OpenAI(), model="sandbox:builtin=computer")
    assert '"name": "computer"' in scorer.exchanges[0].response


def test_images_and_files_are_not_sent_to_the_scorer():
    url = "data:image/png;base64," + "A" * 1000
    picture = {"type": "input_image", "image_url": url}
    asked = [{"role": "user", "content": [{"type": "input_text", "text": "What?"}, picture]}]
    assert text_of({"input": asked})[0] == "What?\n[input_image]"
    with pytest.raises(Unscorable, match="unsupported_content"):
        text_of({"input": [{"role": "user", "content": [picture]}]})


def test_a_picture_that_a_tool_made_is_not_sent_to_the_scorer():
    plot = {"type": "image", "url": "data:image/png;base64," + "A" * 1000}
    ran = {"type": "code_interpreter_call", "id": "ci_1", "code": "plot()", "outputs": [plot]}
    message = {"type": "message", "content": "Here it is."}
    prompt, response = text_of({"input": "Plot it."}, {"output": [ran, message]})
    assert response == "Here it is."
    assert "plot()" in prompt
    assert "AAAA" not in prompt


@pytest.mark.parametrize("given", [None, [], 5, [5], ["text"], {"role": "user"}])
def test_an_input_of_an_unheard_of_kind_is_unsupported(given):
    with pytest.raises(Unscorable, match="unsupported_content"):
        render(*_asking._as_chat(responses, {"input": given}, ANSWERED))


def test_the_answer_is_scored_whatever_class_it_is_cast_to():
    class Mine(openai.BaseModel):
        status: str

    client = OpenAI()
    mine = client.post("/responses", cast_to=Mine, body={"model": "gpt-4o", "input": "x"})
    assert type(mine) is Mine
    assert tt.trust(mine).score == 0.9


# Earlier turns.


def test_earlier_turns_are_part_of_the_prompt(trace, traces, scorer, sandbox):
    sandbox.answer("What is the capital of France?", "Paris.")
    sandbox.answer("How many live there?", "2 million.")
    client = OpenAI()
    first = ask(client, instructions="Be brief.")
    second = ask(client, "How many live there?", previous_response_id=first.id)
    ask(client, "Since when?", previous_response_id=second.id, instructions="Be exact.")
    assert scorer.exchanges[2].prompt == (
        "System: Be exact.\n\n"
        "User: What is the capital of France?\n\nAssistant: Paris.\n\n"
        "User: How many live there?\n\nAssistant: 2 million.\n\n"
        "User: Since when?\n\nAssistant:"
    )
    last = traces(3)[2]
    assert span(last).attributes["openai.previous_response_id"] == second.id
    assert "tlm.prompt_is_partial" not in span(last, "tlm.trustworthiness").attributes


def test_a_prompt_that_lacks_turns_of_another_process_says_so(trace, scorer):
    ask(OpenAI(), "And now?", previous_response_id="resp_elsewhere")
    assert scorer.exchanges[0].prompt == "And now?"
    assert span(trace(), "tlm.trustworthiness").attributes["tlm.prompt_is_partial"] is True


def test_streamed_turns_are_remembered_and_recording_only_does_too(scorer):
    client = OpenAI()
    with tt.trusted_span(mode="off"):
        events = list(ask(client, stream=True))
    ask(client, "Really?", previous_response_id=events[-1].response.id)
    assert scorer.exchanges[0].prompt.startswith("User: What is the capital of France?")


def test_no_more_turns_are_remembered_than_there_is_room_for(monkeypatch):
    monkeypatch.setattr(_items, "_MOST_CHARACTERS", 10_000)
    turns = _items.Turns()
    for number in range(100):
        message = {"role": "user", "content": "x" * 100}
        turns.remember({}, {"id": f"r{number}"}, [message])
        turns.remember({}, {"id": f"r{number}"}, [message])
    assert 5 <= len(turns._known) <= 10
    assert turns.before({"previous_response_id": "r99"})[0]
    assert turns.before({"previous_response_id": "r0"}) == ([], True)


def test_turns_that_name_each_other_come_to_an_end():
    turns = _items.Turns()
    turns.remember({"previous_response_id": "b"}, {"id": "a"}, [{"role": "user", "content": "1"}])
    turns.remember({"previous_response_id": "a"}, {"id": "b"}, [{"role": "user", "content": "2"}])
    earlier, is_partial = turns.before({"previous_response_id": "b"})
    assert [message["content"] for message in earlier] == ["1", "2"]
    assert is_partial


def test_a_stored_prompt_is_what_it_amounted_to():
    request = {"prompt": {"id": "pmpt_1", "variables": {"city": "Paris"}}, "input": "Go on."}
    filled = [{"type": "message", "role": "developer", "content": "You know all about Paris."}]
    prompt, _ = text_of(request, {**ANSWERED, "instructions": filled})
    assert prompt == "System: You know all about Paris.\n\nUser: Go on.\n\nAssistant:"


def test_both_endpoints_are_known_by_their_path():
    assert _endpoints.at("/responses").NAME == "responses"
    assert _endpoints.at("/chat/completions").NAME == "chat.completions"
    assert _endpoints.at("/embeddings") is None


def test_what_is_not_to_be_scored_says_so_whatever_the_answer(scorer):
    with tt.trusted_span(mode="off"):
        assert tt.trust(ask(OpenAI(), model="sandbox:failed=true")).reason == "off"
