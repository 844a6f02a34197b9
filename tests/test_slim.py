"""An application needs nothing that mlflow-tracing, MLflow's small package, lacks.

``SLIM_PYTHON`` names an interpreter that has that one only; ``.ci/run`` makes it.
"""

import os
import socket
import subprocess
import sys
import time
import urllib.request

import mlflow
import pytest

SLIM_PYTHON = os.environ.get("SLIM_PYTHON")
pytestmark = pytest.mark.skipif(not SLIM_PYTHON, reason="SLIM_PYTHON names no interpreter")

APPLICATION = """
import asyncio, importlib.util
import mlflow, openai, tlm_tracing as tt
from tlm_tracing.openai import AsyncOpenAI, OpenAI

assert importlib.util.find_spec("sqlalchemy") is None, "this is the whole MLflow"
mlflow.set_experiment("slim")  # the small package traces nothing without one
ask = {"model": "gpt-4o", "messages": [{"role": "user", "content": "What is 1+1?"}]}


@tt.trusted
def answer():
    return OpenAI().chat.completions.create(**ask)


async def answer_async():
    async with AsyncOpenAI() as client:
        return await client.chat.completions.create(**ask)


assert tt.trust(answer()).score == 0.75
assert tt.trust(asyncio.run(answer_async())).score == 0.75
with tt.trusted_span("stream", mode="background") as span:
    list(openai.OpenAI().chat.completions.create(stream=True, **ask))
assert span.trusts[0].wait(30).score == 0.75
assert tt.flush(60)
assert tt.trust(span.trace_id).score == 0.75
"""


@pytest.fixture
def server(tmp_path):
    """A real MLflow server; the small package knows no other store."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = ["server", "--backend-store-uri", f"sqlite:///{tmp_path}/mlflow.db", "--workers", "1"]
    with subprocess.Popen(
        [sys.executable, "-m", "mlflow", *command, "--port", str(port)],
        env={**os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    ) as process:
        _wait_for(f"http://127.0.0.1:{port}/health", process)
        yield f"http://127.0.0.1:{port}"
        process.terminate()


def _wait_for(url, process):
    until = time.monotonic() + 120
    while not _answers(url):
        assert process.poll() is None, "MLflow's server has ended"
        assert time.monotonic() < until, "MLflow's server does not answer"
        time.sleep(0.2)


def _answers(url):
    try:
        with urllib.request.urlopen(url, timeout=1):
            return True
    except OSError:
        return False


def test_calls_are_recorded_and_scored(server, sandbox):
    sandbox.answer("What is 1+1?", "2", score=0.75)
    environment = {
        name: value for name, value in os.environ.items() if not name.startswith("MLFLOW_")
    }
    done = subprocess.run(
        [SLIM_PYTHON, "-c", APPLICATION],
        env={
            **environment,
            "MLFLOW_TRACKING_URI": server,
            "MLFLOW_DISABLE_TELEMETRY": "true",
        },
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    client = mlflow.MlflowClient(server)
    experiment = client.get_experiment_by_name("slim").experiment_id
    found = client.search_traces(locations=[experiment])
    assert sorted(len(trace.data.spans) for trace in found) == [3, 4, 4]
    assert {trace.info.tags["trust_score"] for trace in found} == {"0.7500"}
    assert {one.value for trace in found for one in trace.info.assessments} == {0.75}
