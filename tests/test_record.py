"""What a trace holds, read back from the store as a user would."""

import asyncio
import json

import mlflow
import openai
import pydantic
import pytest

import tlm_tracing as tt
from tlm_tracing.openai import AsyncOpenAI, OpenAI

QUESTION = [
    {"role": "system", "content": "You are a trivia master."},
    {"role": "user", "content": "What is the capital of France?"},
]
TOOL = {
    "type": "function",
    "function": {"name": "f", "description": "d", "parameters": {"type": "object"}},
}


@pytest.fixture(autouse=True)
def scored(scorer, sandbox):
    sandbox.answer(QUESTION[1]["content"], "Paris.")
    tt.configure(scorer=scorer)


def ask(client=None, model="gpt-4o", **options):
    client = client or OpenAI()
    return client.chat.completions.create(model=model, messages=QUESTION, **options)


def test_the_shape_of_a_trace(trace):
    ask()
    parent, llm, scoring = trace().data.spans
    assert [parent.span_type, llm.span_type, scoring.span_type] == [
        "CHAIN",
        "CHAT_MODEL",
        "EVALUATOR",
    ]
    assert parent.parent_id is None
    assert llm.parent_id == scoring.parent_id == parent.span_id
    assert [span.status.status_code.value for span in (parent, llm, scoring)] == ["OK"] * 3
    assert parent.start_time_ns <= llm.start_time_ns <= llm.end_time_ns <= scoring.start_time_ns
    assert scoring.end_time_ns <= parent.end_time_ns


def test_request_and_answer_are_recorded_as_they_were(trace):
    completion = ask(temperature=0.5, tools=[TOOL], tool_choice="none", seed=openai.NOT_GIVEN)
    found = trace()
    parent, llm, scoring = found.data.spans
    assert parent.inputs == llm.inputs
    assert llm.inputs == {
        "messages": QUESTION,
        "model": "gpt-4o",
        "temperature": 0.5,
        "tools": [TOOL],
        "tool_choice": "none",
    }
    assert llm.outputs == completion.model_dump(exclude_unset=True, exclude={"tlm_metadata"})
    assert parent.outputs == llm.outputs
    assert scoring.inputs["prompt"].startswith("System: You are a trivia master.")
    assert scoring.inputs["response"] == "Paris."
    assert scoring.outputs == {"trust_score": 0.9, "status": "scored"}
    assert "What is the capital of France?" in found.info.request_preview
    assert "Paris." in found.info.response_preview


def test_numbers_and_names_are_where_mlflow_looks_for_them(trace):
    completion = ask()
    found = trace()
    llm = found.data.spans[1]
    assert llm.attributes["mlflow.message.format"] == "openai"
    assert llm.attributes["mlflow.llm.model"] == "gpt-4o-2024-08-06"
    assert llm.attributes["mlflow.llm.provider"] == "openai"
    assert llm.attributes["gen_ai.response.finish_reasons"] == ["stop"]
    assert llm.attributes["gen_ai.response.id"] == completion.id
    assert llm.attributes["openai.request_id"] == completion._request_id
    assert llm.attributes["mlflow.chat.tokenUsage"]["input_tokens"] == 6
    assert found.info.token_usage["total_tokens"] == completion.usage.total_tokens


def test_the_trace_carries_tags_and_an_assessment(scorer, trace):
    tt.configure(
        scorer=tt.testing.FakeScorer(
            {"trustworthiness_score": 0.12345, "log": {"explanation": "why"}}
        )
    )
    ask()
    found = trace()
    parent = found.data.spans[0]
    assert {
        key: found.info.tags[key] for key in ("trust_score", "explanation", "trust_status")
    } == {
        "trust_score": "0.1235" if f"{0.12345:.4f}" == "0.1235" else "0.1234",
        "explanation": "why",
        "trust_status": "scored",
    }
    (assessment,) = found.info.assessments
    assert (assessment.name, assessment.value, assessment.rationale) == (
        "trustworthiness",
        0.12345,
        "why",
    )
    assert assessment.span_id == parent.span_id
    assert assessment.source.source_type == "LLM_JUDGE"
    assert assessment.source.source_id == "fake"
    assert parent.attributes["tlm.trustworthiness_score"] == 0.12345
    assert parent.attributes["tlm.status"] == "scored"


def test_no_secret_and_no_sentinel_is_in_the_trace(trace):
    ask(
        extra_headers={"Authorization": "Bearer sk-SECRET", "X-Other": "SECRET"},
        user=openai.NOT_GIVEN,
        timeout=12,
    )
    text = json.dumps(trace().to_dict())
    assert "SECRET" not in text
    assert "sk-sandbox" not in text
    assert "NOT_GIVEN" not in text
    assert "Omit" not in text


def test_structured_output_is_recorded_with_its_schema(trace, helpers):
    class City(pydantic.BaseModel):
        name: str

    completion = helpers(OpenAI()).parse(
        model="gpt-4o", messages=[{"role": "user", "content": "?"}], response_format=City
    )
    assert completion.choices[0].message.parsed == City(name="text")
    assert tt.trust(completion).score == 0.9
    llm = trace().data.spans[1]
    assert llm.inputs["response_format"]["json_schema"]["name"] == "City"
    assert llm.outputs["choices"][0]["message"]["content"] == '{"name": "text"}'


def test_content_can_be_kept_off_the_spans(trace):
    tt.configure(capture_content=False)
    tool = {**TOOL, "function": {**TOOL["function"], "description": "The rivers of France."}}
    ask(temperature=0.5, tools=[tool], tool_choice="none")
    found = trace()
    text = json.dumps([span.to_dict() for span in found.data.spans])
    assert "France" not in text
    assert "Paris" not in text
    assert found.data.spans[1].inputs["temperature"] == 0.5
    assert found.data.spans[1].inputs["messages"][0]["role"] == "system"
    assert found.info.tags["trust_score"] == "0.9000"


def test_a_mask_applies_to_whatever_is_recorded_and_not_to_what_is_sent(trace, sandbox):
    def mask(value):
        return json.loads(json.dumps(value).replace("France", "[country]"))

    tt.configure(mask=mask)
    tool = {**TOOL, "function": {**TOOL["function"], "description": "The rivers of France."}}
    ask(tools=[tool], tool_choice="none")
    text = json.dumps([span.to_dict() for span in trace().data.spans])
    assert "[country]" in text
    assert "France" not in text
    assert "France" in sandbox.requests("openai")[0].body.decode()


def test_a_mask_may_change_what_it_is_given(trace, sandbox, scorer):
    def mask(value):
        for message in value.get("asked", value).get("messages", []):
            message["content"] = "[masked]"
        for choice in value.get("choices", []):
            choice["message"]["content"] = "[masked]"
        return value

    @tt.trusted
    def answer(asked):
        return asked["messages"][0]["content"], ask().choices[0].message.content

    tt.configure(mask=mask)
    assert answer({"messages": [{"content": "mine"}]}) == ("mine", "Paris.")
    assert sandbox.requests("openai")[0].json["messages"] == QUESTION
    assert "France" in scorer.exchanges[0].prompt
    assert scorer.exchanges[0].response == "Paris."
    text = json.dumps([span.to_dict() for span in trace().data.spans[:3]])
    assert "[masked]" in text
    assert "mine" not in text
    assert "France" not in text


def test_a_broken_mask_lets_nothing_through(trace):
    tt.configure(mask=lambda value: 1 / 0)
    assert ask().choices[0].message.content == "Paris."
    text = json.dumps([span.to_dict() for span in trace().data.spans])
    assert "France" not in text


def test_what_leaves_for_the_scorer_can_be_masked(scorer):
    tt.configure(mask_scorer=lambda text: text.replace("France", "[country]"))
    ask()
    assert "[country]" in scorer.exchanges[0].prompt
    assert "France" not in scorer.exchanges[0].prompt


def test_a_broken_scorer_mask_keeps_the_text_here(scorer):
    tt.configure(mask_scorer=lambda text: 1 / 0)
    assert tt.trust(ask()).reason == "scorer_error"
    assert not scorer.exchanges


def test_an_answer_that_is_no_completion_reaches_the_caller(trace):
    assert ask(model="sandbox:garbage=true") == "this is { not JSON"
    assert trace().data.spans[0].attributes["tlm.reason"] == "unsupported_content"


def test_calls_are_children_of_the_users_own_span(trace):
    with mlflow.start_span("mine"):
        ask()
        ask()
    spans = trace().data.spans
    mine = next(span for span in spans if span.name == "mine")
    assert [span.parent_id for span in spans if span.name == "chat gpt-4o"] == [mine.span_id] * 2


def test_a_task_that_outlives_the_block_it_began_in_loses_nothing(traces):
    async def main():
        async with AsyncOpenAI() as client:
            go = asyncio.Event()

            async def late():
                await go.wait()
                return await ask(client)

            with tt.trusted_span("block"):
                task = asyncio.ensure_future(late())
                await asyncio.sleep(0)
            go.set()
            return await task

    assert tt.trust(asyncio.run(main())).score == 0.9
    assert sorted(len(found.data.spans) for found in traces(2)) == [1, 3]


def test_nothing_is_recorded_while_mlflow_is_switched_off(traces):
    mlflow.tracing.disable()
    try:
        completion = ask()
        assert tt.trust(completion).score == 0.9
        assert tt.trust(completion).trace_id is None
    finally:
        mlflow.tracing.enable()
    traces(0)


def test_half_a_character_does_not_cost_the_trace(trace, sandbox):
    sandbox.script("openai", {"content": "half \ud83d"})
    assert ask().choices[0].message.content == "half \ud83d"
    message = trace().data.spans[1].outputs["choices"][0]["message"]
    assert message["content"] == "half ?"


def test_a_scorers_own_openai_calls_are_not_the_applications(trace, sandbox):
    def judge(request, completion):
        return float(len(openai.OpenAI().models.list().data) > 0) if ask() else 0.0

    tt.autolog(scorer=judge)
    assert tt.trust(ask(openai.OpenAI())).score == 1.0
    assert len(trace().data.spans) == 3
