"""Cleanlab's own client, traced: an answer with its score, then a batch of pairs.

Needs CLEANLAB_TLM_API_KEY; without it, run it with --sandbox.
"""

import mlflow
from _sandbox import sandbox_if_asked

import tlm_tracing as tt

PAIRS = {
    "What is the capital of France?": "Paris",
    "How many seconds are in 100 years?": "3,155,760,000",
    "What is the 3rd month of the year in alphabetical order?": "March",
}

with sandbox_if_asked():
    from cleanlab_tlm import TLM  # reads its address when it is imported

    tlm = tt.wrap_tlm(TLM(options={"log": ["explanation"]}))

    answer = tlm.prompt("What is the capital of France?")
    print(f"{answer['response']}: trust {answer['trustworthiness_score']:.4f}")

    scores = tlm.get_trustworthiness_score(list(PAIRS), list(PAIRS.values()))
    for question, told in zip(PAIRS, scores, strict=True):
        print(f"{question} {PAIRS[question]}: trust {told['trustworthiness_score']:.4f}")

    tt.flush()
    trace = mlflow.get_trace(mlflow.get_last_active_trace_id())
    print(f"a span for each: {[span.name for span in trace.data.spans]}")
    print(f"the lowest on the trace: trust_score {trace.info.tags['trust_score']}")
