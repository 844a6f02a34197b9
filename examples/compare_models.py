"""Two models answer the same questions, and MLflow shows how far each can be trusted.

Each model has an evaluation run. To see them side by side, start `mlflow ui`, open the experiment
"compare models", then "Evaluation runs", choose both and compare.

Needs OPENAI_API_KEY and CLEANLAB_TLM_API_KEY; without them, run it with --sandbox.
"""

import contextlib
import os
import sys
from collections.abc import Callable, Iterator

import mlflow
import openai

import tlm_tracing as tt
from tlm_tracing.evaluation import TLMTrustworthiness

QUESTIONS = [
    "What is the 3rd month of the year in alphabetical order?",
    "How many r are in strawberry?",
    "What is the capital of Australia?",
    "Which is larger, 9.11 or 9.9?",
    "Who wrote The Name of the Rose?",
    "How many seconds are in 100 years?",
]


def application(model: str) -> Callable[[str], str | None]:
    """An application with this model: its calls are traced and scored as in production."""

    @tt.trusted
    def answer(question: str) -> str | None:
        completion = openai.OpenAI().chat.completions.create(
            model=model, messages=[{"role": "user", "content": question}]
        )
        return completion.choices[0].message.content

    return answer


def evaluate(model: str) -> dict[str, float]:
    """Have a model answer all questions; its live scores are what the evaluation tells."""
    with mlflow.start_run(run_name=model):
        result = mlflow.genai.evaluate(
            data=[{"inputs": {"question": question}} for question in QUESTIONS],
            predict_fn=application(model),
            scorers=[
                TLMTrustworthiness(threshold=0.7),
                TLMTrustworthiness(threshold=0.7, pass_fail=True),
            ],
        )
    return result.metrics


# What the Sandbox answers for each model, and how it scores that.
CANNED = {
    "gpt-4o-mini": [
        ("March", 0.03, "In alphabetical order the months begin April, August, December."),
        ("There are 2.", 0.11, "There are three: st-r-awbe-rr-y."),
        ("Canberra", 0.97, "Did not find a reason to doubt trustworthiness."),
        ("9.11 is larger.", 0.22, "9.9 is 9.90, which is larger than 9.11."),
        ("Umberto Eco", 0.98, "Did not find a reason to doubt trustworthiness."),
        ("About 3.15 billion.", 0.74, "It does not tell whether leap years are counted."),
    ],
    "gpt-4o": [
        ("December", 0.94, "Did not find a reason to doubt trustworthiness."),
        ("There are 3.", 0.91, "Did not find a reason to doubt trustworthiness."),
        ("Canberra", 0.98, "Did not find a reason to doubt trustworthiness."),
        ("9.9 is larger.", 0.89, "Did not find a reason to doubt trustworthiness."),
        ("Umberto Eco", 0.99, "Did not find a reason to doubt trustworthiness."),
        ("3,155,760,000", 0.64, "This is so for years of 365.25 days only."),
    ],
}


@contextlib.contextmanager
def far_side() -> Iterator[Callable[[str], None]]:
    """Gives what has the Sandbox be a model, if that is asked for; else it does nothing."""
    if "--sandbox" not in sys.argv:
        yield lambda model: None
        return
    from tlm_tracing.testing import Sandbox

    with Sandbox() as sandbox:
        os.environ.update(sandbox.environment())

        def be(model: str) -> None:
            for question, (text, score, why) in zip(QUESTIONS, CANNED[model], strict=True):
                sandbox.answer(question, text, score=score, explanation=why)

        yield be


mlflow.set_experiment("compare models")
with far_side() as be:
    for model in CANNED:
        be(model)
        metrics = evaluate(model)
        print(
            f"{model}: mean trust {metrics['trustworthiness/mean']:.2f}, "
            f"{metrics['trustworthiness/share_below_threshold']:.0%} below 0.7"
        )
