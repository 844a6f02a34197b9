"""MLflow's evaluations with trust scores, on a real server, read back by MLflow's client."""

import os
from pathlib import Path

import fresh
import mlflow
import openai
import pandas as pd
import pytest

import tlm_tracing as tt
from tlm_tracing import _cache, _outbox
from tlm_tracing.evaluation import TLMTrustworthiness, tlm_trustworthiness
from tlm_tracing.scorers import HostedTLM
from tlm_tracing.testing import FakeScorer

ROOT = Path(__file__).parent.parent
ROWS = [
    ("What is the capital of France?", "Paris", 0.9, "It is."),
    ("What is the capital of Spain?", "Lisbon", 0.1, "That is Portugal's."),
    ("How many r are in strawberry?", "2", 0.2, "There are 3."),
    ("What is 1+1?", "2", 0.8, "Did not find a reason to doubt trustworthiness."),
]
SCORES = {question: score for question, _, score, _ in ROWS}
DATA = [{"inputs": {"question": question}, "outputs": answer} for question, answer, *_ in ROWS]


@pytest.fixture(autouse=True)
def server(sqlite_server, sandbox, store, request, monkeypatch):
    """A server's experiment of this test, what TLM says of the rows, and no score known."""
    monkeypatch.setattr(_cache, "_cache", _cache._Cache())
    sandbox.load(
        {"prompt": question, "response": answer, "score": score, "explanation": explanation}
        for question, answer, score, explanation in ROWS
    )
    mlflow.set_tracking_uri(sqlite_server.uri)
    yield mlflow.set_experiment(request.node.nodeid).experiment_id
    mlflow.set_tracking_uri(store)


@pytest.fixture
def stored(server):
    """Reads back the traces of this test, with their assessments."""

    def read():
        found = mlflow.MlflowClient().search_traces(
            locations=[server], max_results=100, order_by=["timestamp_ms ASC"]
        )
        return {trace.data.spans[0].trace_id: trace for trace in found}.values()

    return read


def assessed(trace):
    """What a trace's valid assessments say, by name."""
    found = [one for one in trace.info.assessments if one.valid]
    assert len({one.name for one in found}) == len(found)
    return {one.name: one for one in found}


def evaluate(data=DATA, scorer=None, **more):
    return mlflow.genai.evaluate(data=data, scorers=[scorer or TLMTrustworthiness()], **more)


def prompts(sandbox):
    return [one.json["prompt"] for one in sandbox.requests("tlm")]


def answer(question):
    """An application that knows nothing of trust scores."""
    return openai.OpenAI().chat.completions.create(
        model="gpt-4o",
        messages=[
            {"role": "system", "content": "You are brief."},
            {"role": "user", "content": question},
        ],
    )


def record(*questions):
    """Have MLflow trace calls; gives the frame of the traces."""
    mlflow.openai.autolog()
    for question in questions:
        answer(question)
    mlflow.openai.autolog(disable=True)
    assert tt.flush(60)
    return mlflow.search_traces()


# mlflow.genai.evaluate: rows of inputs and outputs.


def test_every_row_is_scored_and_told(sandbox, stored):
    """One request for each row; the assessment on its trace is a live one's, the run has sums."""
    result = evaluate()
    assert sorted(prompts(sandbox)) == sorted(SCORES)
    assert {key: round(value, 6) for key, value in result.metrics.items()} == {
        "trustworthiness/mean": 0.5,
        "trustworthiness/min": 0.1,
        "trustworthiness/max": 0.9,
        "trustworthiness/p90": 0.87,
    }
    assert mlflow.get_run(result.run_id).data.metrics == result.metrics
    explanations = {question: explanation for question, _, _, explanation in ROWS}
    traces = list(stored())
    assert len(traces) == len(ROWS)
    for trace in traces:
        question = trace.data.spans[0].inputs["question"]
        told = assessed(trace)["trustworthiness"]
        assert (told.value, told.rationale) == (SCORES[question], explanations[question])
        assert (told.source.source_type, told.source.source_id) == (
            "LLM_JUDGE",
            "cleanlab-tlm/medium",
        )
        assert told.metadata["mlflow.assessment.sourceRunId"] == result.run_id


def test_the_assessment_is_like_that_of_a_live_call(stored):
    """Dashboards that know the one know the other."""
    with tt.trusted_span("live"):
        answer(ROWS[0][0])
    assert tt.flush(30)
    evaluate(DATA[:1])
    (live,), (evaluated,) = (assessed(trace).values() for trace in stored())
    assert live.name == evaluated.name
    assert live.source == evaluated.source
    own = {key for key in evaluated.metadata if not key.startswith("mlflow.assessment.")}
    assert own == set(live.metadata) - {"llm_model"}  # of a row, nobody has told that
    for key in own - {"seconds"}:
        assert live.metadata[key] == evaluated.metadata[key]


def test_the_same_answer_is_scored_once(sandbox):
    result = evaluate([*DATA, *DATA])
    assert len(prompts(sandbox)) == len(ROWS)
    assert len(result.result_df) == 2 * len(ROWS)


@pytest.mark.parametrize("stored_traces", [False, True])
def test_all_rows_can_be_asked_for_before(sandbox, stored_traces):
    """The evaluation then finds the scores, and asks for none again."""
    data = record(*SCORES) if stored_traces else DATA
    scorer = TLMTrustworthiness()
    assert scorer.prefetch(data) is data
    sandbox.wait_for("tlm", len(ROWS))
    assert evaluate(data, scorer).metrics["trustworthiness/mean"] == pytest.approx(0.5)
    assert len(prompts(sandbox)) == len(ROWS)


def test_two_scorers_ask_once(sandbox, stored):
    """The score and the pass or fail are told side by side."""
    passing = TLMTrustworthiness(threshold=0.5, pass_fail=True)
    result = mlflow.genai.evaluate(data=DATA, scorers=[TLMTrustworthiness(), passing])
    assert len(prompts(sandbox)) == len(ROWS)
    assert result.metrics["trustworthy/mean"] == 0.5
    for trace in stored():
        score = SCORES[trace.data.spans[0].inputs["question"]]
        told = assessed(trace)
        assert told["trustworthiness"].value == score
        assert told["trustworthy"].value == ("yes" if score >= 0.5 else "no")
        assert told["trustworthy"].metadata["score"] == f"{score:.4f}"
        assert told["trustworthy"].metadata["threshold"] == "0.5"
        assert told["trustworthy"].rationale


def test_a_threshold_gives_the_share_below_it_and_decides_what_passes():
    result = evaluate(scorer=TLMTrustworthiness(threshold=0.15))
    assert result.metrics["trustworthiness/share_below_threshold"] == 0.25
    assert not result.passed
    assert evaluate(scorer=TLMTrustworthiness(threshold=0.05)).passed


def test_a_row_without_a_score_says_why(sandbox, stored):
    """The others have theirs, and the sums are theirs."""
    scorer = FakeScorer(default=lambda exchange: SCORES[exchange.prompt])
    broken = [{"inputs": {"question": "Is it broken?"}, "outputs": "Yes."}]
    empty = [{"inputs": {"question": "Is it empty?"}, "outputs": ""}]
    result = evaluate([*DATA, *broken, *empty], TLMTrustworthiness(scorer=scorer))
    assert result.metrics["trustworthiness/mean"] == pytest.approx(0.5)
    errors = {
        trace.data.spans[0].inputs["question"]: told.error
        for trace in stored()
        if (told := assessed(trace)["trustworthiness"]).error is not None
    }
    assert {question: error.error_code for question, error in errors.items()} == {
        "Is it broken?": "scorer_error",
        "Is it empty?": "empty",
    }
    assert "KeyError" in errors["Is it broken?"].error_message


def test_without_a_scorer_every_row_says_so(monkeypatch, stored):
    monkeypatch.delenv("CLEANLAB_TLM_API_KEY")
    evaluate()
    codes = {assessed(trace)["trustworthiness"].error.error_code for trace in stored()}
    assert codes == {"no_scorer"}


def test_what_the_scorer_says_of_a_failure_is_cleared_of_secrets(stored):
    scorer = FakeScorer(default=RuntimeError("refused: Authorization: Bearer sk-1234567890abcdef"))
    evaluate(DATA[:1], TLMTrustworthiness(scorer=scorer))
    (trace,) = stored()
    message = assessed(trace)["trustworthiness"].error.error_message
    assert "refused" in message
    assert "sk-1234567890abcdef" not in message


# mlflow.genai.evaluate: traces that are there.


def test_a_trace_is_scored_with_the_request_of_its_llm(sandbox, stored):
    """Not by what MLflow takes as its inputs and outputs: the prompt is that of a live call."""
    with tt.trusted_span("live"):
        answer(ROWS[1][0])
    (live,) = prompts(sandbox)
    frame = record(ROWS[1][0], ROWS[0][0])
    evaluate(frame)
    assert "You are brief." in live
    assert live in prompts(sandbox)[1:]
    found = [assessed(trace)["trustworthiness"].value for trace in stored()]
    assert sorted(found) == [0.1, 0.1, 0.9]


def test_a_score_that_a_trace_tells_is_taken(sandbox, stored):
    """Live or from ``score_traces``: nobody is asked, and nothing is told twice."""
    with tt.trusted_span("live"):
        answer(ROWS[0][0])
    record(ROWS[1][0])
    assert tt.flush(30)
    tt.score_traces()
    asked = len(prompts(sandbox))
    before = [assessed(trace)["trustworthiness"] for trace in stored()]
    result = evaluate(mlflow.search_traces())
    assert len(prompts(sandbox)) == asked
    assert result.metrics["trustworthiness/mean"] == pytest.approx(0.5)
    for told, one in zip(stored(), before, strict=True):
        now = assessed(told)["trustworthiness"]
        assert now.assessment_id == one.assessment_id
        assert (now.value, now.rationale, now.source) == (one.value, one.rationale, one.source)
        assert now.metadata.items() >= one.metadata.items()
        assert now.metadata["mlflow.assessment.sourceRunId"] == result.run_id


@pytest.mark.parametrize("fresh_frame", [True, False])
def test_the_same_traces_again_cost_nothing_and_are_told_once(sandbox, stored, fresh_frame):
    """Also by a frame that was read before the first evaluation."""
    frame = record(*SCORES)
    evaluate(frame)
    asked = len(prompts(sandbox))
    result = evaluate(mlflow.search_traces() if fresh_frame else frame)
    assert len(prompts(sandbox)) == asked == len(ROWS)
    for trace in stored():
        told = assessed(trace)
        assert list(told) == ["trustworthiness"]
        assert told["trustworthiness"].metadata["mlflow.assessment.sourceRunId"] == result.run_id


def test_another_scorer_has_its_own_say(sandbox, stored):
    """A score by another preset is no score by this one; each is told once."""
    frame = record(ROWS[0][0])
    evaluate(frame)
    for _ in range(2):
        evaluate(mlflow.search_traces(), TLMTrustworthiness(scorer=HostedTLM("high")))
    assert len(prompts(sandbox)) == 2
    (trace,) = stored()
    sources = sorted(one.source.source_id for one in trace.info.assessments)
    assert sources == ["cleanlab-tlm/high", "cleanlab-tlm/medium"]


def test_a_new_score_takes_the_place_of_the_old_one(stored):
    frame = record(ROWS[0][0])
    evaluate(frame, TLMTrustworthiness(scorer=FakeScorer(0.3)))
    evaluate(frame, TLMTrustworthiness(scorer=FakeScorer(0.4), rescore=True))
    (trace,) = stored()
    assert assessed(trace)["trustworthiness"].value == 0.4


def test_a_failure_gives_way_to_a_score(stored):
    frame = record(ROWS[0][0])
    evaluate(frame, TLMTrustworthiness(scorer=FakeScorer(RuntimeError("no"))))
    (trace,) = stored()
    assert assessed(trace)["trustworthiness"].error is not None
    tt.score_traces(scorer=FakeScorer(0.7))
    (trace,) = stored()
    told = assessed(trace)["trustworthiness"]
    assert (told.value, told.error) == (0.7, None)
    evaluate(mlflow.search_traces(), TLMTrustworthiness(scorer=FakeScorer(0.8)))
    (trace,) = stored()
    assert assessed(trace)["trustworthiness"].value == 0.7


def test_a_trace_twice_in_the_data_is_no_harm(stored, monkeypatch):
    # Two at a time may both link the trace to the run, of which MLflow's store refuses one.
    monkeypatch.setenv("MLFLOW_GENAI_EVAL_MAX_WORKERS", "1")
    frame = record(ROWS[0][0])
    evaluate(pd.concat([frame, frame]), TLMTrustworthiness(scorer=FakeScorer(default=0.5)))
    (trace,) = stored()
    assert {one.value for one in trace.info.assessments} == {0.5}


def test_of_several_calls_the_lowest_score_is_told(sandbox, stored):
    mlflow.openai.autolog()
    with mlflow.start_span("both"):
        answer(ROWS[0][0])
        answer(ROWS[1][0])
    mlflow.openai.autolog(disable=True)
    assert tt.flush(60)
    evaluate(mlflow.search_traces())
    assert len(prompts(sandbox)) == 2
    (trace,) = stored()
    assert assessed(trace)["trustworthiness"].value == 0.1


def test_a_trace_without_a_call_is_scored_by_what_goes_in_and_out(sandbox, stored):
    @mlflow.trace
    def application(question):
        return ROWS[0][1]

    application(ROWS[0][0])
    assert tt.flush(60)
    for _ in range(2):
        evaluate(mlflow.search_traces())
    assert prompts(sandbox) == [ROWS[0][0]]
    (trace,) = stored()
    assert assessed(trace)["trustworthiness"].value == 0.9


def test_the_scorer_by_itself_changes_nothing(stored):
    """It gives what an evaluation would tell, with or without a trace."""
    record(ROWS[0][0])
    evaluate(mlflow.search_traces())
    (trace,) = stored()
    scorer = TLMTrustworthiness()
    assert scorer(trace=trace).value == 0.9
    assert scorer(inputs=ROWS[1][0], outputs=ROWS[1][1]).value == 0.1
    (after,) = stored()
    assert after.info.assessments == trace.info.assessments


# mlflow.genai.evaluate: an application that is called.


@pytest.mark.parametrize("mode", ["inline", "background"])
@pytest.mark.parametrize("is_async", [False, True])
def test_a_traced_application_is_not_scored_twice(sandbox, stored, is_async, mode):
    """Its live scores are taken; each trace tells one. That MLflow tries it out costs none."""
    tt.configure(mode=mode)

    @tt.trusted
    def ask(question):
        return answer(question).choices[0].message.content

    @tt.trusted
    async def aask(question):
        async with openai.AsyncOpenAI() as client:
            completion = await client.chat.completions.create(
                model="gpt-4o", messages=[{"role": "user", "content": question}]
            )
        return completion.choices[0].message.content

    inputs = [{"inputs": row["inputs"]} for row in DATA]
    result = evaluate(inputs, predict_fn=aask if is_async else ask)
    assert len(prompts(sandbox)) == len(ROWS)
    assert result.metrics["trustworthiness/mean"] == pytest.approx(0.5)
    traces = list(stored())
    assert len(traces) == len(ROWS)
    for trace in traces:
        told = assessed(trace)["trustworthiness"]
        assert f"{told.value:.4f}" == trace.info.tags["trust_score"]
        assert told.metadata["llm_model"] == "gpt-4o-2024-08-06"


def test_a_low_answer_in_background_mode_is_only_flagged(stored):
    """The caller waits for the score, but gets what it would get without."""
    scorer = FakeScorer(default=RuntimeError("no"))
    tt.configure(mode="background", threshold=0.5, on_low="raise", on_error="raise")

    @tt.trusted
    def ask(question):
        return answer(question).choices[0].message.content

    inputs = [{"inputs": row["inputs"]} for row in DATA[:2]]
    evaluate(inputs, predict_fn=ask)
    scores = {trace.info.tags["trust_score"] for trace in stored()}
    assert scores == {"0.9000", "0.1000"}
    tt.configure(scorer=scorer)
    evaluate(inputs[:1], predict_fn=ask)
    errors = [one.error for trace in stored() for one in assessed(trace).values() if one.error]
    assert [error.error_code for error in errors] == ["scorer_error"]


def test_an_evaluation_waits_for_a_slow_store(stored, monkeypatch):
    """Otherwise callers soon wait no more; MLflow reads each trace as soon as it has ended."""
    monkeypatch.setattr(_outbox, "_PATIENCE", 0.0)
    with tt.trusted_span("live"):
        answer(ROWS[0][0])
    evaluate()
    assert tt.flush(60)
    assert len(stored()) == 1 + len(ROWS)
    assert all(assessed(trace) for trace in stored())


def test_an_application_without_traces_of_ours_is_scored_from_its_trace(sandbox, stored):
    """MLflow's own tracing of OpenAI's client is enough."""
    mlflow.openai.autolog()
    result = evaluate([{"inputs": row["inputs"]} for row in DATA], predict_fn=answer)
    mlflow.openai.autolog(disable=True)
    assert len(prompts(sandbox)) == len(ROWS)
    assert all("You are brief." in prompt for prompt in prompts(sandbox))
    assert result.metrics["trustworthiness/mean"] == pytest.approx(0.5)
    assert {assessed(trace)["trustworthiness"].value for trace in stored()} == set(SCORES.values())


def test_an_application_that_fails_says_so(stored):
    @mlflow.trace
    def application(question):
        if question == ROWS[1][0]:
            raise RuntimeError("It has failed.")
        return answer(question).choices[0].message.content

    inputs = [{"inputs": row["inputs"]} for row in DATA[:2]]
    evaluate(inputs, predict_fn=application)
    told = {
        trace.data.spans[0].inputs["question"]: assessed(trace)["trustworthiness"]
        for trace in stored()
    }
    assert told[ROWS[0][0]].value == 0.9
    assert told[ROWS[1][0]].error.error_code == "empty"


# What rows may look like.

USER = {"role": "user", "content": "Why?"}
SAID = {"role": "assistant", "content": "So."}
RESPONSE = {
    "object": "response",
    "output": [{"type": "message", "content": [{"type": "output_text", "text": "So."}]}],
}


@pytest.mark.parametrize(
    ("inputs", "outputs", "prompt", "response"),
    [
        ("Why?", "So.", "Why?", "So."),
        ({"question": "Why?"}, {"answer": "So."}, "Why?", "So."),
        ({"question": "Why?", "user": None}, ["a", 1], "Why?", '["a", 1]'),
        ({"question": "Why?", "tone": "brief"}, 3, "question: Why?\n\ntone: brief", "3"),
        ({"messages": [USER]}, SAID, "Why?", "So."),
        ([USER, SAID, USER], [SAID], "User: Why?\n\nAssistant: So.\n\nUser: Why?", "So."),
        ({"messages": [USER]}, {"choices": [{"message": SAID}]}, "Why?", "So."),
        ({"messages": [USER]}, {"messages": [USER, SAID]}, "Why?", "So."),
        ({"question": "Why?"}, RESPONSE, "Why?", "So."),
        ({"input": [USER]}, RESPONSE, "Why?", "So."),
        ({"input": "Why?", "instructions": "Be kind."}, "So.", "System: Be kind.", "So."),
        ({"input": "Why?"}, openai.types.Completion.construct(text="So."), "Why?", "So."),
    ],
    ids=str,
)
def test_a_row_is_read(inputs, outputs, prompt, response):
    is_response = outputs is RESPONSE or "input" in inputs
    if is_response and not hasattr(openai.OpenAI, "responses"):
        pytest.skip("this openai has no Responses API")
    fake = FakeScorer()
    told = TLMTrustworthiness(scorer=fake)(inputs=inputs, outputs=outputs)
    assert told.value == 0.9
    (exchange,) = fake.exchanges
    assert exchange.prompt.startswith(prompt)
    assert exchange.response == response


def test_a_scorer_function_gets_request_and_completion():
    def brevity(request, completion):
        assert request["messages"] == [USER]
        return 1 / len(completion.choices[0].message.content)

    assert TLMTrustworthiness(scorer=brevity)(inputs="Why?", outputs="Thus").value == 0.25


def test_prompt_and_response_can_be_named(sandbox):
    """Then the row counts, and not the call in its trace."""
    scorer = TLMTrustworthiness(prompt="question", response=lambda said: said["text"])
    told = scorer(
        inputs={"question": ROWS[0][0], "user": 7}, outputs={"text": ROWS[0][1], "cost": 0.1}
    )
    assert told.value == 0.9
    assert prompts(sandbox) == [ROWS[0][0]]


@pytest.mark.parametrize(
    ("inputs", "outputs", "reason"),
    [
        ({}, "So.", "unsupported_content"),
        (None, "So.", "unsupported_content"),
        ("Why?", None, "empty"),
        ("Why?", float("nan"), "empty"),
        ("Why?", "  ", "empty"),
        ("Why?", {"role": "assistant", "content": None, "refusal": "No."}, "refusal"),
        pytest.param(
            [{"role": "user", "content": object()}], "So.", "unsupported_content", id="an object"
        ),
    ],
    ids=str,
)
def test_a_row_with_nothing_to_score_says_so(inputs, outputs, reason):
    told = TLMTrustworthiness(scorer=FakeScorer())(inputs=inputs, outputs=outputs)
    assert told.error.error_code == reason
    assert told.error.error_message


# Settings.


def test_the_settings_are_those_of_the_package(sandbox):
    """What is not given is as ``configure`` says, but that every row is scored."""
    fake = FakeScorer()
    tt.configure(scorer=fake, mask_scorer=str.upper, sample_rate=0.0, mode="off")
    assert TLMTrustworthiness()(inputs="Why?", outputs="So.").value == 0.9
    assert fake.exchanges[0].prompt == "WHY?"
    other = FakeScorer(0.4)
    scorer = TLMTrustworthiness(scorer=other, mask_scorer=None, timeout=3)
    assert scorer(inputs="Why?", outputs="So.").value == 0.4
    assert (other.exchanges[0].prompt, other.exchanges[0].timeout) == ("Why?", 3)


def test_a_threshold_may_come_from_the_environment(monkeypatch):
    monkeypatch.setenv("TLM_TRACING_THRESHOLD", "0.95")
    scorer = TLMTrustworthiness(scorer=FakeScorer(), pass_fail=True)
    assert scorer(inputs="Why?", outputs="So.").value == "no"


@pytest.mark.parametrize(
    "settings",
    [{"treshold": 0.5}, {"threshold": 2}, {"timeout": 0}, {"scorer": 3}, {"pass_fail": True}],
    ids=str,
)
def test_what_cannot_work_is_refused(settings):
    with pytest.raises(tt.ConfigurationError):
        TLMTrustworthiness(**settings)


def test_a_mask_hides_what_the_scorer_says():
    fake = FakeScorer({"trustworthiness_score": 0.5, "log": {"explanation": "Ann is wrong."}})
    scorer = TLMTrustworthiness(scorer=fake, mask=lambda text: text.replace("Ann", "[name]"))
    assert scorer(inputs="Why?", outputs="So.").rationale == "[name] is wrong."
    tt.configure(capture_content=False)
    assert scorer(inputs="Why?", outputs="Because.").rationale is None


def test_the_switch_is_heeded(monkeypatch):
    monkeypatch.setenv("TLM_TRACING_ENABLED", "false")
    fake = FakeScorer()
    told = TLMTrustworthiness(scorer=fake)(inputs="Why?", outputs="So.")
    assert told.error.error_code == "off"
    assert fake.exchanges == []


def test_a_budget_of_nothing_leaves_rows_unscored():
    scorer = TLMTrustworthiness(scorer=FakeScorer(), max_scores_per_minute=0)
    assert scorer(inputs="Why?", outputs="So.").error.error_code == "budget"


@pytest.mark.long
def test_a_budget_is_waited_for():
    """Of two rows and one score a minute, the second one waits for its turn."""
    metric = tlm_trustworthiness(scorer=FakeScorer(), max_scores_per_minute=1)
    frame = pd.DataFrame({"inputs": ["Why?", "What?"], "response": ["So.", "That."]})
    assert metric.eval_fn(frame["response"], frame["inputs"]).scores == [0.9, 0.9]


# mlflow.evaluate.

FRAME = pd.DataFrame(
    {
        "prompt": [question for question, *_ in ROWS],
        "response": [said for _, said, *_ in ROWS],
        "right": ["Paris", "Madrid", "3", "2"],
    }
)


def models_evaluate(metric, frame=FRAME, **more):
    return mlflow.models.evaluate(
        data=frame,
        predictions="response",
        extra_metrics=[metric],
        evaluator_config={"col_mapping": {"inputs": "prompt"}},
        **more,
    )


@pytest.mark.parametrize("evaluate", [mlflow.evaluate, mlflow.models.evaluate])
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_the_metric_agrees_with_the_notebooks(evaluate, sandbox):
    """The notebook's cell runs beside ours, on the same data, with the same numbers."""
    from cleanlab_tlm import TLM
    from mlflow.metrics import MetricValue, make_metric

    tlm = TLM(options={"log": ["explanation"]})

    def _tlm_eval_fn(predictions, inputs, metrics=None):
        evaluations = tlm.get_trustworthiness_score(inputs.to_list(), predictions.to_list())
        scores = [evaluation["trustworthiness_score"] for evaluation in evaluations]
        return MetricValue(
            scores=scores,
            aggregate_results={
                "mean": sum(scores) / len(scores),
                "min": min(scores),
                "max": max(scores),
            },
        )

    theirs = make_metric(eval_fn=_tlm_eval_fn, greater_is_better=True, name="tlm_trustworthiness")
    results = []
    for metric in (theirs, tlm_trustworthiness()):
        with mlflow.start_run():
            result = evaluate(
                data=FRAME,
                targets="right",
                predictions="response",
                extra_metrics=[metric],
                evaluator_config={"col_mapping": {"inputs": "prompt"}},
            )
            results.append(result)
        (table,) = result.tables.values()
        stored = mlflow.load_table("eval_results_table.json", run_ids=[result.run_id])
        assert list(table["tlm_trustworthiness/score"]) == list(SCORES.values())
        assert list(stored["tlm_trustworthiness/score"]) == list(SCORES.values())
    assert results[0].metrics == results[1].metrics
    assert results[1].metrics == {
        f"tlm_trustworthiness/{name}": pytest.approx(value)
        for name, value in {"mean": 0.5, "min": 0.1, "max": 0.9}.items()
    }
    assert mlflow.get_run(results[1].run_id).data.metrics == results[1].metrics
    why = list(stored["tlm_trustworthiness/justification"])
    assert why == [explanation for *_, explanation in ROWS]


def test_the_metric_asks_once_for_each_row(sandbox):
    """Though MLflow has it score the first row, and then all of them."""
    models_evaluate(tlm_trustworthiness())
    assert sorted(prompts(sandbox)) == sorted(SCORES)


def test_a_row_that_fails_costs_the_metric_nothing_else(sandbox):
    scorer = FakeScorer(default=lambda exchange: SCORES[exchange.prompt])
    frame = pd.concat(
        [FRAME, pd.DataFrame({"prompt": ["Is it broken?", "Why?"], "response": ["Yes.", None]})]
    )
    result = models_evaluate(tlm_trustworthiness(scorer=scorer), frame)
    (table,) = result.tables.values()
    scores = list(table["tlm_trustworthiness/score"])
    assert scores[:4] == list(SCORES.values())
    assert pd.isna(scores[4:]).all()
    why = list(table["tlm_trustworthiness/justification"])[4:]
    assert why[0].startswith("No score, scorer_error: KeyError")
    assert why[1].startswith("No score, empty: ")
    assert result.metrics["tlm_trustworthiness/mean"] == pytest.approx(0.5)


def test_when_no_row_has_a_score_there_are_no_sums():
    result = models_evaluate(tlm_trustworthiness(scorer=FakeScorer(default=RuntimeError("no"))))
    assert result.metrics == {}


def test_the_metric_is_told_by_its_name_and_greater_is_better():
    metric = tlm_trustworthiness(name="trust", scorer=FakeScorer())
    assert metric.greater_is_better
    assert set(models_evaluate(metric).metrics) == {"trust/mean", "trust/min", "trust/max"}


def test_a_setting_of_the_metric_that_cannot_work_is_refused():
    with pytest.raises(tt.ConfigurationError):
        tlm_trustworthiness(threshold=2)


# The page of the examples.


def test_two_models_are_compared(sqlite_server):
    """Each has a run in the same experiment, on the same questions, with its sums."""
    example = ROOT / "examples" / "compare_models.py"
    env = {**os.environ, "MLFLOW_TRACKING_URI": sqlite_server.uri}
    done = fresh.run(example, "--sandbox", env=env)
    assert done.returncode == 0, done.stderr
    assert "trust" in done.stdout
    runs = mlflow.search_runs(experiment_names=["compare models"], output_format="list")
    means = {run.info.run_name: run.data.metrics["trustworthiness/mean"] for run in runs}
    assert means["gpt-4o-mini"] < means["gpt-4o"]
