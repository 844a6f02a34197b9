"""Answers with a named context: Cleanlab's RAG scores on the object and as an assessment each."""

import asyncio
import json
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import cleanlab_tlm
import fresh
import mlflow
import openai
import pytest

import tlm_tracing as tt
from tlm_tracing import _annotate, _span, set_context
from tlm_tracing.exceptions import ConfigurationError
from tlm_tracing.openai import AsyncOpenAI, OpenAI
from tlm_tracing.scorers import HostedTLM
from tlm_tracing.testing import FakeScorer

QUERY = "Since when has Paris been the capital of France?"
DOCUMENTS = ["Paris has been the capital of France since 987.", "Lyon lies on the Rhône."]
CONTEXT = "\n\n".join(DOCUMENTS)
SYSTEM = {"role": "system", "content": f"Answer by these documents:\n{CONTEXT}"}
PROMPT = [SYSTEM, {"role": "user", "content": QUERY}]
EVALS = {
    "context_sufficiency": 0.125,
    "response_groundedness": 0.25,
    "response_helpfulness": 0.75,
    "query_ease": 1.0,
}
RAG = "/api/v1/rag_trustworthy_llm/score"
PLAIN = "/api/v0/trustworthy_llm/get_confidence_score"
EXPLAIN = "/api/v1/tlm_explanation/get_explanation"
EXAMPLES = Path(__file__).parent.parent / "examples"


@pytest.fixture(autouse=True)
def canned(sandbox):
    _span._warn_of_no_block.cache_clear()
    sandbox.answer(QUERY, "Since 987.", score=0.9, explanation="The documents say so.")
    sandbox.default("tlm", eval_scores=EVALS)


def ask(client=None, **options):
    client = client or openai.OpenAI()
    return client.chat.completions.create(**{"model": "gpt-4o", "messages": PROMPT, **options})


def paths(sandbox):
    return [request.path for request in sandbox.requests("tlm")]


def assessed(trace):
    """The values of a trace's assessments by their names."""
    found = {one.name: one.value for one in trace.info.assessments}
    assert len(found) == len(trace.info.assessments)
    return found


def named(trace, name="tlm.trustworthiness"):
    return next(span for span in trace.data.spans if span.name == name)


# What a user gets.


def test_an_answer_with_a_context_gets_an_assessment_for_each_score(sandbox, trace):
    with tt.trusted_span("block", query=QUERY, context=DOCUMENTS) as span:
        completion = ask()
    assert (span.trust.score, span.trust.evals) == (0.9, EVALS)
    assert tt.trust(completion) == span.trust
    assert completion.tlm_metadata == {"trustworthiness_score": 0.9, "log": {}, "evals": EVALS}
    assert paths(sandbox) == [RAG]
    found = trace()
    assert assessed(found) == {"trustworthiness": 0.9, **EVALS}
    _, call, _, scoring = found.data.spans
    for one in found.info.assessments:
        assert one.span_id == call.span_id == span.trust.span_id
        assert (one.source.source_type, one.source.source_id) == (
            "LLM_JUDGE",
            "cleanlab-tlm/medium",
        )
        assert one.metadata["mlflow.scorer.framework"] == "cleanlab-tlm"
        assert one.metadata["model"] == "gpt-4.1-mini"
        assert float(one.metadata["seconds"]) > 0
    assert found.info.tags["trust_score"] == "0.9000"
    assert found.info.tags["trust_status"] == "scored"
    assert scoring.inputs["prompt"].startswith("System: Answer by these documents:")
    assert scoring.inputs["response"] == "Since 987."
    assert (scoring.inputs["query"], scoring.inputs["context"]) == (QUERY, CONTEXT)
    assert scoring.outputs["trust_score"] == 0.9
    assert scoring.outputs["evals"] == EVALS
    for one in (call, scoring):
        assert one.attributes["tlm.trustworthiness_score"] == 0.9
        assert {name: one.attributes[f"tlm.evals.{name}"] for name in EVALS} == EVALS


def chat(client):
    return tt.trust(ask(client))


def chat_stream(client):
    stream = ask(client, stream=True)
    list(stream)
    return tt.trust(stream)


def response(client):
    return tt.trust(client.responses.create(model="gpt-4o", input=PROMPT))


def response_stream(client):
    stream = client.responses.create(model="gpt-4o", input=PROMPT, stream=True)
    list(stream)
    return tt.trust(stream)


async def async_chat(client):
    return tt.trust(await ask(client))


async def async_chat_stream(client):
    stream = await ask(client, stream=True)
    async for _ in stream:
        pass
    return tt.trust(stream)


async def async_response(client):
    return tt.trust(await client.responses.create(model="gpt-4o", input=PROMPT))


ROUTES = [chat, chat_stream, response, response_stream]
ASYNC_ROUTES = [async_chat, async_chat_stream, async_response]


def skip_without_responses(route):
    if "response" in route.__name__ and not hasattr(openai.OpenAI, "responses"):
        pytest.skip("this openai has no Responses API")


def check_route(trust, trace):
    trust = trust.wait(10)
    assert (trust.score, trust.evals) == (0.9, EVALS)
    found = trace()
    assert assessed(found) == {"trustworthiness": 0.9, **EVALS}
    assert (named(found).inputs["query"], named(found).inputs["context"]) == (QUERY, CONTEXT)


@pytest.mark.parametrize("mode", ["inline", "background"])
@pytest.mark.parametrize("route", ROUTES)
def test_every_route_gets_them(route, mode, sandbox, trace):
    skip_without_responses(route)
    with tt.trusted_span(context=DOCUMENTS, mode=mode):
        trust = route(openai.OpenAI())
    check_route(trust, trace)


@pytest.mark.parametrize("mode", ["inline", "background"])
@pytest.mark.parametrize("route", ASYNC_ROUTES)
def test_every_async_route_gets_them(route, mode, sandbox, trace):
    skip_without_responses(route)

    async def main():
        async with openai.AsyncOpenAI() as client, tt.trusted_span(context=DOCUMENTS, mode=mode):
            return await route(client)

    check_route(asyncio.run(main()), trace)


@pytest.mark.parametrize("export", ["synchronous", "asynchronous"])
def test_a_background_score_after_the_users_trace_has_ended_brings_them_all(
    export, sandbox, trace, request
):
    if export == "asynchronous":
        request.getfixturevalue("asynchronous_export")
    scorer = FakeScorer(tt.Trust(0.9, evals=EVALS))
    scorer.hold()
    with (
        mlflow.start_span("mine"),
        tt.trusted_span(context=DOCUMENTS, mode="background", scorer=scorer),
    ):
        completion = ask()
    scorer.release()
    assert tt.trust(completion).wait(10).evals == EVALS
    assert assessed(trace()) == {"trustworthiness": 0.9, **EVALS}


def test_each_choice_has_its_own(sandbox, trace):
    sandbox.default("tlm")
    with tt.trusted_span(context=DOCUMENTS):
        trust = tt.trust(ask(n=3, model="sandbox:content=It is."))
        other = tt.trust(ask())
    assert len(trust.choices) == 3
    assert all(choice.evals.keys() == EVALS.keys() for choice in trust.choices)
    assert trust.evals == trust.choices[0].evals
    # What looks at the query alone says the same of all answers, what looks at them does not.
    assert other.evals["query_ease"] == trust.evals["query_ease"]
    assert other.evals["response_groundedness"] != trust.evals["response_groundedness"]
    found = trace()
    scores = [one.value for one in found.info.assessments if one.name == "query_ease"]
    assert len(scores) == 2
    assert all(one["evals"] for one in named(found).outputs["choices"])


def test_a_structured_answer_has_them_beside_its_fields(sandbox):
    schema = {"type": "object", "properties": {"year": {"type": "integer"}}}
    wanted = {"type": "json_schema", "json_schema": {"name": "Year", "schema": schema}}
    sandbox.answer(QUERY, '{"year": 987}', score=0.9)
    with tt.trusted_span(context=DOCUMENTS):
        trust = tt.trust(ask(response_format=wanted))
    assert trust.evals == EVALS
    assert list(trust.fields) == ["year"]


def test_a_call_for_tools_is_asked_only_what_it_can_be_asked(sandbox):
    tool = {"type": "function", "function": {"name": "search", "parameters": {"type": "object"}}}
    with tt.trusted_span(query=QUERY, context=DOCUMENTS):
        trust = tt.trust(ask(tools=[tool], tool_choice="required"))
    assert trust.evals.keys() == {"context_sufficiency", "query_ease"}


def test_calls_without_a_context_are_scored_as_before(sandbox, trace):
    with tt.trusted_span():
        completion = ask()
    assert tt.trust(completion).evals is None
    assert "evals" not in completion.tlm_metadata
    assert paths(sandbox) == [PLAIN]
    found = trace()
    assert assessed(found) == {"trustworthiness": 0.9}
    assert named(found).inputs.keys() == {"prompt", "response"}


def test_a_fallbacks_own_calls_are_judged_by_the_same_context(sandbox):
    def again(completion, trust):
        return ask(model="gpt-5")

    with tt.trusted_span(context=DOCUMENTS, threshold=0.95, on_low=again) as span:
        ask()
    assert [trust.evals for trust in span.trusts] == [EVALS, EVALS]


# Where a context is named.


def test_a_context_that_is_found_inside_the_block_counts_from_then_on(sandbox):
    with tt.trusted_span() as span:
        ask()
        span.set_context(CONTEXT, QUERY)
        ask()
        span.set_context(None)
        ask()
    assert [trust.evals for trust in span.trusts] == [None, EVALS, None]
    assert paths(sandbox) == [PLAIN, RAG, PLAIN]


def test_a_decorated_function_names_what_it_has_retrieved(sandbox, trace):
    def retrieve():
        set_context(DOCUMENTS, query=QUERY)

    @tt.trusted
    def answer():
        retrieve()
        return ask()

    assert tt.trust(answer()).evals == EVALS
    assert assessed(trace()) == {"trustworthiness": 0.9, **EVALS}


def test_coroutines_and_generators_do_so_likewise(sandbox):
    @tt.trusted
    async def answer(client):
        set_context(DOCUMENTS)
        return await ask(client)

    @tt.trusted
    def answers():
        set_context(DOCUMENTS)
        yield ask()
        yield ask()

    async def main():
        async with openai.AsyncOpenAI() as client:
            return await answer(client)

    assert [tt.trust(one).evals for one in (asyncio.run(main()), *answers())] == [EVALS] * 3


def test_a_context_goes_along_into_thread_pools(sandbox):
    with tt.trusted_span(context=DOCUMENTS), ThreadPoolExecutor(1) as pool:
        assert tt.trust(pool.submit(ask).result()).evals == EVALS


def test_of_blocks_inside_each_other_the_innermost_that_names_one_counts(sandbox):
    with tt.trusted_span(query="outer?", context="outer"), tt.trusted_span() as middle:
        ask()
        with tt.trusted_span(context="inner"):
            ask()
        middle.set_context("middle")
        ask()
    sent = [(one.json["query"], one.json["context"]) for one in sandbox.requests("tlm")]
    assert sent == [("outer?", "outer"), (QUERY, "inner"), (QUERY, "middle")]


def test_blocks_at_the_same_time_do_not_mix(sandbox):
    async def answer(client, number):
        with tt.trusted_span() as span:
            span.set_context(f"context {number}", f"query {number}")
            await asyncio.sleep(0)
            await ask(client)

    async def main():
        async with openai.AsyncOpenAI() as client:
            await asyncio.gather(*(answer(client, number) for number in range(10)))

    asyncio.run(main())
    sent = {(one.json["query"], one.json["context"]) for one in sandbox.requests("tlm")}
    assert sent == {(f"query {number}", f"context {number}") for number in range(10)}


def test_outside_of_a_block_it_is_said_once(sandbox, caplog):
    for _ in range(2):
        set_context(DOCUMENTS)
    assert tt.trust(ask(OpenAI())).evals is None
    (warning,) = [one.getMessage() for one in caplog.records if one.name == "tlm_tracing"]
    for way in ("trusted", "trusted_span", "propagate"):
        assert way in warning


def test_a_switched_off_sdk_takes_a_context_too(monkeypatch, sandbox, traces):
    monkeypatch.setenv("TLM_TRACING_ENABLED", "false")
    with tt.trusted_span(context=DOCUMENTS) as span:
        span.set_context("another")
        set_context("a third")
        ask()
    traces(0)


# What is meant by it.


@pytest.mark.parametrize(
    ("messages", "query"),
    [
        (PROMPT, QUERY),
        (
            [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}, *PROMPT],
            QUERY,
        ),
        ([{"role": "user", "content": [{"type": "text", "text": QUERY}]}], QUERY),
        ([*PROMPT, {"role": "assistant", "content": "Since"}], QUERY),
        ([{"role": "system", "content": "Speak."}], "System: Speak.\n\nAssistant:"),
    ],
    ids=["one turn", "several turns", "parts", "prefill", "none"],
)
def test_without_a_query_it_is_what_the_user_asked_last(messages, query, sandbox):
    with tt.trusted_span(context=DOCUMENTS):
        assert tt.trust(ask(messages=messages)).score is not None
    (request,) = sandbox.requests("tlm")
    assert request.json["query"] == query


@pytest.mark.parametrize(
    ("context", "sent"),
    [
        (CONTEXT, CONTEXT),
        (DOCUMENTS, CONTEXT),
        (tuple(DOCUMENTS), CONTEXT),
        ([DOCUMENTS[0], "  ", DOCUMENTS[1]], CONTEXT),
        ([], ""),
        ("half \ud83d", "half ?"),
    ],
    ids=["text", "list", "tuple", "an empty document", "nothing found", "half a character"],
)
def test_documents_are_joined(context, sent, sandbox):
    with tt.trusted_span(context=context):
        assert tt.trust(ask()).evals == EVALS
    (request,) = sandbox.requests("tlm")
    assert request.json["context"] == sent


WRONG = {
    "query without context": ({"query": QUERY}, "set_context"),
    "empty text": ({"context": " "}, r"context=\[\]"),
    "no text": ({"context": 7}, "not int"),
    "bytes": ({"context": b"Paris"}, "not bytes"),
    "a dict": ({"context": {"text": "Paris"}}, "not dict"),
    "documents": ({"context": [Path("Paris")]}, "page_content"),
    "a list with None": ({"context": ["Paris", None]}, "list of NoneType and str"),
    "empty query": ({"context": CONTEXT, "query": ""}, "Leave it out"),
    "query that is no text": ({"context": CONTEXT, "query": [QUERY]}, "query must be a text"),
}


@pytest.mark.parametrize(("given", "said"), WRONG.values(), ids=WRONG)
def test_what_can_not_be_meant_is_refused_with_what_to_do(given, said):
    with pytest.raises(ConfigurationError, match=said):
        tt.trusted_span(**given)
    with tt.trusted_span(mode="off") as span:
        for name in (span.set_context, set_context):
            with pytest.raises(ConfigurationError, match=said):
                name(given.get("context"), given.get("query"))


def test_a_refusal_does_not_quote_the_documents():
    with pytest.raises(ConfigurationError) as caught:
        tt.trusted_span(context=[b"SECRET"])
    assert "SECRET" not in str(caught.value)


def test_a_decorator_says_where_a_functions_context_is_named():
    with pytest.raises(ConfigurationError, match="set_context"):
        tt.trusted(context=DOCUMENTS)


# What leaves for Cleanlab.


@pytest.fixture
def theirs(sandbox, monkeypatch):
    """Has Cleanlab's own client score the same answer."""
    from cleanlab_tlm.internal.api import api

    base = f"{sandbox.tlm_base_url}/v1/rag_trustworthy_llm"
    monkeypatch.setattr(api, "tlm_rag_base_url", base)

    def score(prompt, response="Since 987.", **options):
        rag = cleanlab_tlm.TrustworthyRAG(**options, timeout=30.0)
        return rag.score(response=response, query=QUERY, context=CONTEXT, prompt=prompt)

    return score


@pytest.mark.parametrize(
    ("ours", "options"),
    [
        ({}, {}),
        ({"quality_preset": "base"}, {"quality_preset": "base"}),
        (
            {"quality_preset": "high"},
            {"quality_preset": "high", "options": {"log": ["explanation"]}},
        ),
        ({"quality_preset": "best", "explanation": False}, {"quality_preset": "best"}),
        (
            {"options": {"model": "gpt-4.1", "reasoning_effort": "high"}},
            {"options": {"model": "gpt-4.1", "reasoning_effort": "high", "log": ["explanation"]}},
        ),
        (
            {"options": {"custom_eval_criteria": [{"name": "n", "criteria": "c"}]}},
            {"options": {}},
        ),
        ({"options": {"log": ["explanation", "perplexity"]}}, {"options": {"log": ["perplexity"]}}),
    ],
    ids=["default", "base", "high", "unexplained", "options", "criteria", "log"],
)
def test_what_is_sent_is_what_cleanlabs_own_client_sends(ours, options, theirs, sandbox, trace):
    sandbox.default("tlm")
    with tt.trusted_span(query=QUERY, context=DOCUMENTS, scorer=HostedTLM(**ours), timeout=30.0):
        trust = tt.trust(ask())
    result = theirs(named(trace()).inputs["prompt"], **options)
    sent, wanted = sandbox.requests("tlm")
    assert sent.json == wanted.json
    assert sent.path == wanted.path == RAG
    for header in ("authorization", "content-type", "client-type", "x-tlm-origin"):
        assert sent.headers[header] == wanted.headers[header]
    told = {name: one["score"] for name, one in result.items()}
    assert {"trustworthiness": trust.score, **trust.evals} == told
    assert len(set(told.values())) == 5
    assert trust.explanation == result["trustworthiness"].get("log", {}).get("explanation")


def test_a_call_for_tools_is_sent_as_cleanlabs_own_client_sends_it(theirs, sandbox, trace):
    tool = {"type": "function", "function": {"name": "search", "parameters": {"type": "object"}}}
    with tt.trusted_span(query=QUERY, context=DOCUMENTS):
        trust = tt.trust(ask(tools=[tool], tool_choice="required"))
    texts = named(trace()).inputs
    result = theirs(texts["prompt"], texts["response"])
    sent, wanted = sandbox.requests("tlm")
    assert sent.json == wanted.json
    scores = {name: one["score"] for name, one in result.items() if name != "trustworthiness"}
    assert trust.evals == {name: score for name, score in scores.items() if score is not None}


@pytest.mark.parametrize("explanation", [None, True, False])
@pytest.mark.parametrize("preset", ["base", "low", "medium", "high", "best"])
def test_the_explanation_is_asked_for_wherever_the_preset_gives_it(preset, explanation, sandbox):
    scorer = HostedTLM(preset, explanation=explanation)
    with tt.trusted_span(context=DOCUMENTS, scorer=scorer):
        trust = tt.trust(ask())
    along = preset in ("high", "best")
    wanted = explanation or (explanation is None and along)
    assert (trust.score, trust.evals) == (0.9, EVALS)
    assert trust.explanation == ("The documents say so." if wanted else None)
    assert paths(sandbox) == ([RAG, EXPLAIN] if explanation and not along else [RAG])
    assert ("log" in sandbox.requests("tlm")[0].json["options"]) == bool(wanted and along)


def test_own_evals_are_asked(sandbox, trace):
    clarity = cleanlab_tlm.Eval("clarity", "Is the Response clear?", response_identifier="Response")
    ease = cleanlab_tlm.get_default_evals()[-1]
    sandbox.default("tlm", eval_scores={"clarity": 0.5, "query_ease": 0.25})
    with tt.trusted_span(context=DOCUMENTS, scorer=HostedTLM(evals=[clarity, ease])):
        trust = tt.trust(ask())
    assert trust.evals == {"clarity": 0.5, "query_ease": 0.25}
    assert assessed(trace()) == {"trustworthiness": 0.9, "clarity": 0.5, "query_ease": 0.25}


def test_evals_that_cleanlab_does_not_take_are_refused_at_once():
    with pytest.raises(ConfigurationError, match="Eval objects"):
        HostedTLM(evals=["clarity"])


def test_masks_apply_to_query_and_context(sandbox, trace):
    def hide(value):
        return json.loads(json.dumps(value).replace("987", "[year]"))

    with tt.trusted_span(
        query="SECRET?",
        context=["A SECRET.", CONTEXT],
        mask_scorer=lambda text: text.replace("SECRET", "[hidden]"),
        mask=hide,
    ):
        assert tt.trust(ask()).evals == EVALS
    (request,) = sandbox.requests("tlm")
    assert b"SECRET" not in request.body
    assert request.json["query"] == "[hidden]?"
    assert request.json["context"] == f"A [hidden].\n\n{CONTEXT}"
    texts = named(trace()).inputs
    assert texts["query"] == "[hidden]?"
    assert texts["context"].startswith("A [hidden].\n\nParis has been")
    assert "987" not in texts["context"]


@pytest.mark.parametrize("text", ["query?", "the context"])
def test_what_can_not_be_masked_does_not_leave(text, sandbox):
    def mask(given):
        if given == text:
            raise ValueError(given)
        return given

    with tt.trusted_span(query="query?", context="the context", mask_scorer=mask):
        assert tt.trust(ask()).reason == "scorer_error"
    assert sandbox.requests("tlm") == []


def test_without_content_only_the_numbers_are_recorded(sandbox, trace):
    with tt.trusted_span(query=QUERY, context=DOCUMENTS, capture_content=False):
        ask()
    found = trace()
    assert named(found).inputs["context"] == f"[{len(CONTEXT)} characters]"
    assert named(found).inputs["query"] == f"[{len(QUERY)} characters]"
    assert assessed(found) == {"trustworthiness": 0.9, **EVALS}
    assert "Lyon" not in found.to_json()


def test_the_same_answer_is_scored_anew_for_another_context(sandbox):
    tt.configure(cache_size=10)
    for context, query in [("a", "q"), ("b", "q"), ("a", "r"), ("a", "q"), (None, None)]:
        with tt.trusted_span(context=context, query=query) as span:
            ask()
        assert span.trust.evals == (None if context is None else EVALS)
    sent = [(one.json.get("context"), one.json.get("query")) for one in sandbox.requests("tlm")]
    assert sent == [("a", "q"), ("b", "q"), ("a", "r"), (None, None)]


# Trouble.


@pytest.mark.parametrize(
    ("scores", "kept"),
    [
        ({**EVALS, "query_ease": None}, 3),
        ({**EVALS, "query_ease": "easy", "context_sufficiency": 1.5}, 2),
        (dict.fromkeys(EVALS), 0),
    ],
)
def test_an_eval_without_a_score_costs_nothing_else(scores, kept, sandbox, trace):
    sandbox.default("tlm", eval_scores=scores)
    with tt.trusted_span(context=DOCUMENTS):
        trust = tt.trust(ask())
    usable = {name: score for name, score in scores.items() if score == EVALS[name]}
    assert len(usable) == kept
    assert (trust.score, trust.evals) == (0.9, usable or None)
    assert assessed(trace()) == {"trustworthiness": 0.9, **usable}


@pytest.mark.parametrize("status", [400, 404, 422, 500])
def test_where_the_context_is_refused_the_trust_comes_without_it(status, sandbox, trace, caplog):
    sandbox.default("tlm", eval_fault={"status": status})
    with tt.trusted_span(context=DOCUMENTS) as span:
        for _ in range(2):
            ask()
    assert [(one.score, one.evals) for one in span.trusts] == [(0.9, None)] * 2
    assert span.trust.explanation == "The documents say so."
    warnings = [one.getMessage() for one in caplog.records if one.name == "tlm_tracing"]
    assert len(warnings) == 1
    assert str(status) in warnings[0]
    assert {one.name for one in trace().info.assessments} == {"trustworthiness"}


def test_evals_without_a_trust_score_are_kept_and_the_trust_is_asked_for(sandbox):
    sandbox.default("tlm", eval_fault={"no_score": True}, eval_scores=EVALS)
    with tt.trusted_span(context=DOCUMENTS):
        trust = tt.trust(ask())
    assert (trust.score, trust.evals) == (0.9, EVALS)
    assert paths(sandbox) == [RAG, PLAIN]


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        ({"status": 401}, "scorer_unavailable"),
        ({"status": 429, "retry_after": 60}, "scorer_unavailable"),
        ({"status": 503, "retry_after": 60}, "scorer_unavailable"),
        ({"hang": True}, "timeout"),
    ],
    ids=["401", "429", "503", "hang"],
)
def test_an_outage_is_not_asked_twice(fault, reason, sandbox, trace):
    sandbox.default("tlm", **fault)
    with tt.trusted_span(context=DOCUMENTS, timeout=1.5):
        trust = tt.trust(ask())
    assert (trust.status, trust.reason, trust.evals) == ("unscored", reason, None)
    assert set(paths(sandbox)) == {RAG}
    assert trace().info.assessments == []


# Other scorers.


def test_any_scorer_sees_query_and_context_and_may_give_evals(sandbox, trace):
    scorer = FakeScorer(tt.Trust(0.5, "why", evals={"coverage": 0.25}), name="mine")
    with tt.trusted_span(query=QUERY, context=DOCUMENTS, scorer=scorer):
        trust = tt.trust(ask())
        ask()
    assert [(one.query, one.context) for one in scorer.exchanges] == [(QUERY, CONTEXT)] * 2
    assert trust.evals == {"coverage": 0.25}
    first = {one.name: one for one in trace().info.assessments if one.span_id == trust.span_id}
    assert {name: one.value for name, one in first.items()} == {
        "trustworthiness": 0.5,
        "coverage": 0.25,
    }
    assert {name: one.rationale for name, one in first.items()} == {
        "trustworthiness": "why",
        "coverage": None,
    }
    for one in first.values():
        assert one.source.source_id == "mine"
        assert one.metadata["mlflow.scorer.framework"] == "tlm-tracing"


def test_without_a_context_a_scorer_sees_none(sandbox):
    scorer = FakeScorer()
    with tt.trusted_span(scorer=scorer):
        ask()
    (exchange,) = scorer.exchanges
    assert (exchange.query, exchange.context) == (None, None)


@pytest.mark.parametrize(
    "result",
    [
        {"trustworthiness_score": 0.5, "log": {"explanation": "why"}, "evals": {"a": 0.25}},
        {
            "trustworthiness_score": 0.5,
            "log": {"explanation": "why"},
            "evals": {"a": {"score": 0.25}},
        },
        {
            "response": "0.5",
            "trustworthiness": {"score": 0.5, "log": {"explanation": "why"}},
            "a": {"score": 0.25},
            "b": {"score": None},
        },
        cleanlab_tlm.utils.rag.TrustworthyRAGScore(
            trustworthiness={"score": 0.5, "log": {"explanation": "why"}}, a={"score": 0.25}
        ),
        tt.Trust(
            0.5,
            "why",
            evals={"a": 0.25, "trustworthiness": 1.0, "": 0.1, "x" * 251: 0.1, "a\x00b": 0.1},
        ),
        tt.Trust(0.5, "why", evals={"a": 0.25, "b": float("nan"), "c": "x", "d": 2}),
    ],
    ids=["numbers", "mappings", "TrustworthyRAG", "its class", "odd names", "odd scores"],
)
def test_every_form_of_evals_is_read(result, sandbox, trace):
    trust = tt.trust(ask(tt.wrap_openai(openai.OpenAI(), scorer=FakeScorer(result))))
    assert (trust.score, trust.explanation, trust.evals) == (0.5, "why", {"a": 0.25})
    assert assessed(trace()) == {"trustworthiness": 0.5, "a": 0.25}


# Stored traces, and stores.


def test_scores_reach_a_stored_trace_and_later_ones_take_their_place(sandbox, trace):
    with mlflow.start_span("stored") as span:
        pass
    mlflow.flush_trace_async_logging()
    for score in (0.75, 0.25):
        trust = tt.Trust(
            score,
            trace_id=span.trace_id,
            span_id=span.span_id,
            scorer="mine",
            evals={"coverage": score / 2},
        )
        assert not _annotate.annotate_live(trust, _annotate.Notes())
        assert _annotate.annotate_stored(trust, _annotate.Notes())
    assert assessed(trace()) == {"trustworthiness": 0.25, "coverage": 0.125}


def test_a_stored_answer_is_scored_again_by_its_context_in_place(sandbox, trace):
    with tt.trusted_span("block", query=QUERY, context=DOCUMENTS):
        ask()
    before = trace()
    again = dict.fromkeys(EVALS, 0.5)
    sandbox.default("tlm", score=0.25, eval_scores=again)
    tt.score_traces(rescore=True)
    after = trace()
    assert assessed(before) == {"trustworthiness": 0.9, **EVALS}
    assert assessed(after) == {"trustworthiness": 0.25, **again}
    ids = [{one.assessment_id for one in found.info.assessments} for found in (before, after)]
    assert ids[0] == ids[1]
    assert named(after).inputs == named(before).inputs
    assert named(after).outputs["evals"] == again
    call = named(after, "chat gpt-4o")
    assert {name: call.attributes[f"tlm.evals.{name}"] for name in EVALS} == again
    assert paths(sandbox) == [RAG, RAG]


def test_what_an_outage_left_unscored_is_scored_by_its_context_later(sandbox, trace):
    sandbox.default("tlm", status=400)
    with tt.trusted_span(context=DOCUMENTS):
        assert tt.trust(ask()).reason == "scorer_error"
    sandbox.default("tlm", eval_scores=EVALS)
    scores = tt.score_traces()
    assert list(scores["trust_score"]) == [0.9]
    assert assessed(trace()) == {"trustworthiness": 0.9, **EVALS}


@pytest.mark.parametrize("query", [QUERY, None])
@pytest.mark.parametrize("settings", [{"mode": "off"}, {"sample_rate": 0.0}, {"scorer": None}])
def test_what_is_recorded_now_is_scored_by_its_context_later(settings, query, sandbox, trace):
    with tt.trusted_span(query=query, context=DOCUMENTS, **settings):
        assert tt.trust(ask()).score is None
    assert sandbox.requests("tlm") == []
    scores = tt.score_traces(scorer=HostedTLM())
    assert list(scores["trust_score"]) == [0.9]
    found = trace()
    assert assessed(found) == {"trustworthiness": 0.9, **EVALS}
    assert (named(found).inputs["query"], named(found).inputs["context"]) == (QUERY, CONTEXT)


def test_what_is_noted_for_later_is_masked(sandbox, trace):
    with tt.trusted_span(
        query="SECRET?", context=["A SECRET."], mode="off", mask=lambda value: "[hidden]"
    ):
        ask()
    assert "SECRET" not in trace().to_json()


def test_a_stored_answer_without_a_context_is_scored_as_before(sandbox, trace):
    with tt.trusted_span():
        ask()
    tt.score_traces(rescore=True)
    assert assessed(trace()) == {"trustworthiness": 0.9}
    assert paths(sandbox) == [PLAIN, PLAIN]


@pytest.mark.skipif(os.name != "posix", reason="the servers of the tests need POSIX")
def test_a_server_finds_answers_by_their_scores(sandbox, sqlite_server, store, request):
    mlflow.set_tracking_uri(sqlite_server.uri)
    try:
        experiment = mlflow.set_experiment(request.node.nodeid).experiment_id
        found = {}
        for score in (0.25, 0.75):
            evals = {**EVALS, "context_sufficiency": score}
            sandbox.default("tlm", eval_scores=evals)
            with tt.trusted_span(context=DOCUMENTS) as span:
                ask()
            found[score] = span.trace_id
        assert tt.flush(30)
        client = mlflow.MlflowClient(tracking_uri=sqlite_server.uri)

        def ids(filter_string):
            traces = client.search_traces(locations=[experiment], filter_string=filter_string)
            return {trace.info.trace_id for trace in traces}

        assert ids("feedback.context_sufficiency < 0.5") == {found[0.25]}
        assert ids("feedback.context_sufficiency >= 0.5") == {found[0.75]}
        assert ids("feedback.query_ease > 0.9") == set(found.values())
        assert ids("feedback.trustworthiness < 0.5") == set()
        sandbox.default("tlm", eval_scores=dict.fromkeys(EVALS, 0.5))
        tt.score_traces(experiment, rescore=True)
        for trace_id in found.values():
            stored = client.get_trace(trace_id)
            wanted = dict.fromkeys(EVALS, 0.5)
            assert assessed(stored) == {"trustworthiness": 0.9, **wanted}
    finally:
        mlflow.set_tracking_uri(store)


def test_the_drop_in_import_is_scored_likewise(sandbox):
    async def main():
        async with AsyncOpenAI() as client, tt.trusted_span(context=DOCUMENTS):
            return tt.trust(await ask(client))

    assert asyncio.run(main()).evals == EVALS


def test_the_example_runs(sandbox, store):
    env = {**os.environ, **sandbox.environment(), "MLFLOW_TRACKING_URI": store}
    done = fresh.run(EXAMPLES / "rag.py", "--sandbox", env=env)
    assert done.returncode == 0, done.stderr
    assert "trust" in done.stdout
    assert "context_sufficiency" in done.stdout


# The far side of the wire.


@pytest.mark.parametrize("missing", ["prompt", "query", "context", "response", "evals", "quality"])
def test_the_sandbox_refuses_what_lacks_something(missing, sandbox):
    assert refused(sandbox, lambda body: body.pop(missing))


@pytest.mark.parametrize(
    "spoil",
    [
        lambda body: body.update(query=None),
        lambda body: body.update(context=DOCUMENTS),
        lambda body: body.update(response="Since 987."),
        lambda body: body.update(quality="excellent"),
        lambda body: body["evals"].append(body["evals"][0]),
        lambda body: body["evals"].append({"name": "clarity"}),
        lambda body: body["evals"].append({"name": "clarity", "criteria": "Is it clear?"}),
        lambda body: body["evals"][0].update(query_identifier="Enquiry"),
        lambda body: body["options"].update(log=["explanation"]),
        lambda body: body["options"].update(custom_eval_criteria=[]),
    ],
)
def test_the_sandbox_refuses_what_cleanlab_would(spoil, sandbox):
    assert refused(sandbox, spoil)


def test_the_sandbox_takes_what_is_right(sandbox):
    assert not refused(sandbox, lambda body: None)


def refused(sandbox, spoil):
    """Whether the Sandbox refuses the body of a real request when something is done to it."""
    with tt.trusted_span(context=DOCUMENTS):
        ask()
    body = sandbox.requests("tlm")[-1].json
    spoil(body)
    sandbox.default("tlm")

    async def send():
        import aiohttp

        async with (
            aiohttp.ClientSession() as session,
            session.post(
                f"{sandbox.tlm_base_url}/v1/rag_trustworthy_llm/score",
                json=body,
                headers={"Authorization": "bearer any"},
            ) as answer,
        ):
            return answer.status

    return asyncio.run(send()) == 400
