"""Several choices are scored each; a structured answer in each of its fields, too."""

import asyncio
import copy
import json

import openai
import pydantic
import pytest
from cleanlab_tlm.utils.chat_completions import TLMChatCompletion

import tlm_tracing as tt
from tlm_tracing.openai import AsyncOpenAI, OpenAI
from tlm_tracing.scorers import HostedTLM
from tlm_tracing.testing import FakeScorer

QUESTION = [{"role": "user", "content": "What is the capital of France?"}]


class City(pydantic.BaseModel):
    name: str
    population: int


def ask(client=None, **options):
    client = client or OpenAI()
    return client.chat.completions.create(**{"model": "gpt-4o", "messages": QUESTION, **options})


def span(trace, name="tlm.trustworthiness"):
    return next(span for span in trace.data.spans if span.name == name)


# Several choices.


def by_text(exchange):
    """A score for each text, so that it shows which was scored."""
    return {"(1)": 0.2, "(2)": 0.6}.get(exchange.response[-3:], 0.8)


@pytest.fixture
def judge(sandbox):
    scorer = FakeScorer(default=by_text)
    tt.configure(scorer=scorer)
    return scorer


def test_each_choice_is_scored_and_the_trust_is_the_first_ones(judge, trace):
    completion = ask(n=3)
    trust = tt.trust(completion)
    assert trust.score == 0.8
    assert [choice.score for choice in trust.choices] == [0.8, 0.2, 0.6]
    assert completion.tlm_metadata["trustworthiness_score"] == 0.8
    found = trace()
    assert found.info.tags["trust_score"] == "0.8000"
    assert [feedback.value for feedback in found.info.assessments] == [0.8]
    scoring = span(found)
    texts = [choice.message.content for choice in completion.choices]
    assert scoring.inputs["response"] == texts[0]
    assert scoring.inputs["choices"] == texts
    assert [told["trust_score"] for told in scoring.outputs["choices"]] == [0.8, 0.2, 0.6]
    assert scoring.attributes["tlm.trustworthiness_score"] == 0.8


@pytest.mark.parametrize("mode", ["inline", "background"])
def test_each_choice_of_a_stream_is_scored(mode, judge, trace):
    async def main():
        async with AsyncOpenAI() as client:
            stream = await ask(client, n=3, stream=True)
            async for _ in stream:
                pass
            return await tt.trust(stream)

    with tt.trusted_span(mode=mode):
        trust = asyncio.run(main())
    assert [choice.score for choice in trust.choices] == [0.8, 0.2, 0.6]
    assert len(span(trace()).outputs["choices"]) == 3


def test_a_function_gets_the_choice_that_it_is_to_score_as_the_first(sandbox):
    seen = []

    def judge(request, completion):
        seen.append(completion.choices[0].message.content)
        return 0.5

    completion = ask(tt.wrap_openai(openai.OpenAI(), scorer=judge), n=2)
    assert sorted(seen) == sorted(choice.message.content for choice in completion.choices)
    assert len(completion.choices) == 2


def test_one_choice_has_no_list_of_choices(judge, trace):
    assert tt.trust(ask()).choices == ()
    scoring = span(trace())
    assert "choices" not in scoring.inputs
    assert "choices" not in scoring.outputs


def test_a_choice_without_a_score_says_why_and_costs_the_others_nothing(sandbox, trace):
    tt.configure(scorer=FakeScorer(0.7, tt.ScoringError("No."), default=0.3))
    trust = tt.trust(ask(n=3))
    assert sorted(filter(None, (choice.score for choice in trust.choices))) == [0.3, 0.7]
    assert [choice.reason for choice in trust.choices].count("scorer_error") == 1
    assert len(span(trace()).outputs["choices"]) == 3


def test_a_sampled_call_is_scored_with_all_its_choices_or_none(judge):
    tt.configure(sample_rate=lambda request: request["n"] == 3)
    assert tt.trust(ask(n=2)).reason == "sampled_out"
    assert len(tt.trust(ask(n=3)).choices) == 3
    assert len(judge.exchanges) == 3


# Structured output.


@pytest.fixture
def hosted(sandbox):
    client = tt.wrap_openai(openai.OpenAI(), scorer=HostedTLM())
    sandbox.default("tlm", score=0.6, field_scores={"name": 0.95, "population": 0.2})
    return client


FORMAT = {
    "type": "json_schema",
    "json_schema": {"name": "City", "schema": City.model_json_schema(), "strict": True},
}


def test_a_structured_answer_is_scored_as_text_and_by_field(hosted, trace, sandbox):
    completion = ask(hosted, response_format=FORMAT)
    trust = tt.trust(completion)
    assert trust.score == 0.6
    assert trust.explanation
    assert {name: field.score for name, field in trust.fields.items()} == {
        "name": 0.95,
        "population": 0.2,
    }
    assert trust.untrustworthy_fields() == ["population"]
    assert trust.untrustworthy_fields(threshold=0.1) == []
    found = trace()
    for one in (found.data.spans[0], span(found)):
        assert one.attributes["tlm.untrustworthy_fields"] == ["population"]
    assert span(found).outputs["fields"]["population"]["trust_score"] == 0.2
    assert span(found).outputs["fields"]["population"]["explanation"]
    assert span(found).inputs["response"] == completion.choices[0].message.content
    text, fields = sorted(sandbox.requests("tlm"), key=lambda request: request.path)
    assert text.path.endswith("/get_confidence_score")
    assert fields.json["response_format"] == FORMAT
    assert fields.json["log"] == ["per_field_score"]


def test_a_schema_leaves_masked(hosted, sandbox):
    described = copy.deepcopy(FORMAT)
    for name, field in described["json_schema"]["schema"]["properties"].items():
        field["description"] = f"The SECRET {name}."
    tt.configure(mask_scorer=lambda text: text.replace("SECRET", "..."))
    completion = ask(hosted, response_format=described)
    assert tt.trust(completion).fields
    assert all(b"SECRET" not in request.body for request in sandbox.requests("tlm"))
    sent = next(one.json for one in sandbox.requests("tlm") if "response_format" in one.json)
    properties = sent["response_format"]["json_schema"]["schema"]["properties"]
    assert properties["name"] == {"title": "Name", "type": "string", "description": "The ... name."}


def test_cleanlabs_own_helper_reads_the_fields(hosted):
    completion = ask(hosted, response_format=FORMAT)
    tlm = TLMChatCompletion(api_key="sandbox")
    low = tlm.get_untrustworthy_fields(tlm_result=completion, display_details=False)
    assert low == ["population"] == tt.trust(completion).untrustworthy_fields()


def test_a_parsed_response_is_scored_by_field(hosted):
    if not hasattr(hosted, "responses"):
        pytest.skip("this openai has no Responses API")
    response = hosted.responses.parse(model="gpt-4o", input="Where?", text_format=City)
    assert tt.trust(response).untrustworthy_fields() == ["population"]


def test_fields_can_be_done_without(sandbox):
    client = tt.wrap_openai(openai.OpenAI(), scorer=HostedTLM(fields=False))
    trust = tt.trust(ask(client, response_format=FORMAT))
    assert (trust.fields, trust.untrustworthy_fields()) == (None, [])
    assert len(sandbox.requests("tlm")) == 1


@pytest.mark.parametrize(
    "options", [{}, {"response_format": {"type": "text"}}, {"response_format": FORMAT, "n": 1}]
)
def test_only_an_answer_with_fields_is_asked_about_them(options, sandbox):
    model = "sandbox:content=no JSON" if "n" in options else "gpt-4o"
    client = tt.wrap_openai(openai.OpenAI(), scorer=HostedTLM())
    assert tt.trust(ask(client, model=model, **options)).fields is None
    assert len(sandbox.requests("tlm")) == 1


@pytest.mark.parametrize("fault", [{"status": 500}, {"status": 404}, {"hang": True}])
def test_fields_that_do_not_come_cost_no_score(fault, sandbox):
    sandbox.default("tlm", score=0.6, field_fault=fault)
    client = tt.wrap_openai(openai.OpenAI(), scorer=HostedTLM(), timeout=2)
    trust = tt.trust(ask(client, response_format=FORMAT))
    assert (trust.score, trust.fields) == (0.6, None)


def test_what_leaves_for_the_fields_is_masked_like_all_that_leaves(sandbox):
    client = tt.wrap_openai(
        openai.OpenAI(),
        scorer=HostedTLM(),
        mask_scorer=lambda text: text.replace("France", "[country]").replace("text", "[name]"),
    )
    ask(client, response_format=FORMAT)
    requests = sandbox.requests("tlm")
    assert len(requests) == 2
    for request in requests:
        sent = json.dumps(request.json)
        assert "[country]" in sent
        assert "France" not in sent


def test_any_scorer_may_give_fields(sandbox):
    def judge(request, completion):
        fields = {"name": {"score": 0.1, "explanation": "No."}, "odd": {"score": "x"}, "worse": 1}
        return {"trustworthiness_score": 0.5, "log": {"per_field_score": fields}}

    trust = tt.trust(ask(tt.wrap_openai(openai.OpenAI(), scorer=judge)))
    assert trust.untrustworthy_fields() == ["name"]
    assert list(trust.fields) == ["name"]
