"""Export: how fast scored traces come to be stored, beside MLflow's own exporter.

Two processes take turns. Each makes calls to an LLM that answers at once, one after the other and
without pause, and then waits until all of it is written. Each call becomes a trace of three spans
(call, LLM request, score) with the tags ``trust_score`` and ``explanation`` and an assessment:

- ours: by ``tt.wrap_openai``, written by way of our exporter. The scorer is a function, so that no
  service takes time;
- MLflow's: the same spans, tags and assessment through MLflow's public API, all of it noted while
  the trace is open, so that it is written with it, by MLflow's own exporter. tlm_tracing is not
  imported.

Then the traces in the store are counted: whole ones, with all spans, tags and the assessment.

    python benchmarks/export.py [--calls 400] [--rounds 5] [--export server|sqlite]
                                [--backend postgresql] [--workers N]
                                [--out FILE.json] [--markdown FILE.md]

The exit status is 1 if a goal is missed.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

from _measure import (
    Found,
    Job,
    Rounds,
    Stage,
    Table,
    Verdict,
    about,
    add_server_options,
    at_least,
    parser,
    ratio,
    serve,
    spread,
    take_turns,
    tell,
)
from _rivals import Drain

OURS, MLFLOWS = "ours", "MLflow's own"
WARM_UP = 200
SPANS = 3
SCORE, EXPLANATION = 0.8125, "The answer is right, but it leaves out half of the question. " * 4
FASTER = 3.0


def request(number: int) -> dict[str, Any]:
    """A request to the LLM."""
    question = {"role": "user", "content": f"What is {number} times two, and why?"}
    return {"model": "gpt-4o", "messages": [question]}


def ours(client: Any) -> tuple[Callable[[int], None], Drain]:
    """Calls by the wrapped client."""
    import tlm_tracing as tt

    async def scorer(request: Any, completion: Any) -> dict[str, Any]:
        return {"trustworthiness_score": SCORE, "log": {"explanation": EXPLANATION}}

    tt.wrap_openai(client, scorer=scorer)
    return lambda number: client.chat.completions.create(**request(number)), lambda: tt.flush(900)


def mlflows(client: Any) -> tuple[Callable[[int], None], Drain]:
    """The same traces, by hand."""
    import mlflow
    from mlflow.entities import AssessmentSource

    source = AssessmentSource(source_type="LLM_JUDGE", source_id="scorer")
    score = {"trust_score": SCORE, "explanation": EXPLANATION, "status": "scored"}
    tags = {
        "trust_score": f"{SCORE:.4f}",
        "explanation": EXPLANATION,
        "trust_status": "scored",
    }

    def call(number: int) -> None:
        asked = request(number)
        with mlflow.start_span("chat gpt-4o", span_type="CHAIN") as whole:
            whole.set_inputs(asked)
            with mlflow.start_span("openai.chat.completions", span_type="CHAT_MODEL") as llm:
                llm.set_inputs(asked)
                answer = client.chat.completions.create(**asked).model_dump()
                llm.set_outputs(answer)
                usage = answer["usage"]
                llm.set_attributes(
                    {
                        "mlflow.message.format": "openai",
                        "mlflow.llm.model": answer["model"],
                        "mlflow.chat.tokenUsage": {
                            "input_tokens": usage["prompt_tokens"],
                            "output_tokens": usage["completion_tokens"],
                            "total_tokens": usage["total_tokens"],
                        },
                    }
                )
            with mlflow.start_span("tlm.trustworthiness", span_type="EVALUATOR") as scoring:
                said = answer["choices"][0]["message"]["content"]
                prompt = asked["messages"][0]["content"]
                scoring.set_inputs({"prompt": prompt, "response": said})
                scoring.set_outputs(score)
                scoring.set_attributes({"tlm.trustworthiness_score": SCORE})
            whole.set_outputs(answer)
            whole.set_attributes({"tlm.trustworthiness_score": SCORE})
            mlflow.update_current_trace(tags=tags)
            mlflow.log_feedback(
                trace_id=whole.trace_id,
                span_id=whole.span_id,
                name="trustworthiness",
                value=SCORE,
                rationale=EXPLANATION,
                source=source,
            )

    return call, mlflow.flush_trace_async_logging


WAYS = {OURS: ours, MLFLOWS: mlflows}


def caller(job: Job) -> Any:
    """What a variant's process does: calls, until all of them are stored."""
    import mlflow
    import openai

    mlflow.set_experiment(job["experiment"])
    call, drain = WAYS[job["way"]](openai.OpenAI(max_retries=0))

    def burst(calls: int) -> Found:
        cpu, begun = time.process_time(), time.perf_counter()
        for number in range(calls):
            call(number)
        asked = time.perf_counter() - begun
        drain()
        written = time.perf_counter() - begun
        return {
            "calls": calls,
            "rate": calls / written,
            "calls in": asked,
            "seconds": written,
            "cpu": 1000 * (time.process_time() - cpu) / calls,
        }

    return burst


def table(rounds: Rounds, kept: Mapping[str, int]) -> Table:
    """All of it."""
    found = Table(
        "Scored traces, from the first call until all are written: median over the rounds "
        "[quartiles]",
        [
            *("exporter", "times MLflow's", "traces/s", "calls made in s", "written in s"),
            *("client CPU ms/trace", "server CPU", "database CPU", "calls", "whole traces"),
        ],
    )
    for way, bursts in rounds.items():
        calls = sum(one["calls"] for one in bursts)
        times = ratio(rounds, way, "rate", to=MLFLOWS)
        own = [spread(rounds, way, name) for name in ("rate", "calls in", "seconds", "cpu")]
        far = [
            f"{1000 * sum(one[name] for one in bursts) / calls:.2f}"
            for name in ("server", "database")
        ]
        found.rows.append([way, times, *own, *far, calls, kept[way]])
    return found


def verdicts(rounds: Rounds, kept: Mapping[str, int]) -> list[Verdict]:
    """Compare with the goals."""
    calls = sum(one["calls"] for one in rounds[OURS])
    return [
        at_least(
            "traces a second beside MLflow's own exporter",
            ratio(rounds, OURS, "rate", to=MLFLOWS),
            FASTER,
        ),
        Verdict(
            f"ours: every one of {calls} traces is whole in the store",
            kept[OURS] == calls,
            f"{kept[OURS]}",
        ),
    ]


def run(options: argparse.Namespace) -> tuple[dict[str, list[Found]], dict[str, int]]:
    """Let both take turns; gives what they measured, and what is stored."""
    with Stage(__file__, options) as stage:
        children = {way: stage.child(way, {"way": way}, export=options.export) for way in WAYS}
        # Each of the server's workers takes seconds for the first spans that it gets.
        warm_up = min(WARM_UP, options.calls)
        take_turns(children, 1, calls=warm_up)
        rounds = take_turns(children, options.rounds, gauge=stage.gauge, calls=options.calls)
        kept = {
            way: stage.whole_traces(way, SPANS, export=options.export, is_scored=True) - warm_up
            for way in children
        }
    return rounds, kept


def main() -> int:
    """Run the benchmark; gives the exit status."""
    options_of = parser(__doc__, rounds=5, calls=400, ways=False)
    options_of.add_argument("--export", choices=["sqlite", "server"], default="server")
    add_server_options(options_of)
    options = options_of.parse_args()
    if options.serve:
        serve(caller(options.serve))
        return 0
    to = options.backend if options.export == "server" else ""
    where = about(rounds=options.rounds, export=f"{options.export} {to}".strip())
    rounds, kept = run(options)
    measured = {"rounds": rounds, "whole": kept}
    return tell(options, where, [table(rounds, kept)], verdicts(rounds, kept), measured)


if __name__ == "__main__":
    sys.exit(main())
