"""Traces that MLflow has recorded already are scored afterwards.

Needs OPENAI_API_KEY and CLEANLAB_TLM_API_KEY; without them, run it with --sandbox.
"""

import mlflow
import openai
from _sandbox import sandbox_if_asked

import tlm_tracing as tt

QUESTIONS = [
    "What is the 3rd month of the year in alphabetical order?",
    "What is the capital of France?",
    "How many seconds are in 100 years?",
]


def record() -> None:
    """An application that knows nothing of trust scores."""
    mlflow.openai.autolog()
    for question in QUESTIONS:
        openai.OpenAI().chat.completions.create(
            model="gpt-4o", messages=[{"role": "user", "content": question}]
        )
    mlflow.openai.autolog(disable=True)
    mlflow.flush_trace_async_logging()


with sandbox_if_asked():
    mlflow.set_experiment("stored traces")
    record()
    scores = tt.score_traces(since="1h")
    print(f"{len(scores)} scored; the least trustworthy:")
    worst = scores.iloc[0]
    print(f"trust {worst.trust_score:.4f}: {worst.prompt} {worst.response}")
