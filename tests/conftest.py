"""One store for the session, and nothing of one test left for the next."""

from __future__ import annotations

import logging
import os
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

# Before MLflow is imported: no telemetry, and no call to the outside from a test.
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ.setdefault("MLFLOW_MODEL_CATALOG_URI", "")
os.environ.setdefault("LITELLM_LOCAL_MODEL_COST_MAP", "true")
# Flushing MLflow's asynchronous export takes a second; tests of it ask for it.
os.environ.setdefault("MLFLOW_ENABLE_ASYNC_TRACE_LOGGING", "false")

import mlflow
import openai
import pytest

import tlm_tracing as tt
from tlm_tracing import _asking, _config, _hook, _limits, _propagation, _scoring
from tlm_tracing.testing import FakeScorer, Sandbox

pytest_plugins = ["pytester"]

PATCHED = [
    lambda: openai.OpenAI._prepare_request,
    lambda: openai.AsyncOpenAI._prepare_request,
    lambda: ThreadPoolExecutor.submit,
]
ORIGINALS = [patched() for patched in PATCHED]
CLEANLABS = {
    "tlm_base_url": "/v0/trustworthy_llm",
    "tlm_rag_base_url": "/v1/rag_trustworthy_llm",
    "tlm_openai_base_url": "/v1/openai_trustworthy_llm",
    "tlm_explanation_base_url": "/v1/tlm_explanation",
}


@pytest.fixture(scope="session", autouse=True)
def store(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A real SQLite store, the embedded default of MLflow."""
    uri = f"sqlite:///{tmp_path_factory.mktemp('store') / 'mlflow.db'}"
    mlflow.set_tracking_uri(uri)
    return uri


@pytest.fixture(autouse=True)
def experiment(request: pytest.FixtureRequest) -> str:
    """An experiment of its own for each test."""
    name = request.node.nodeid
    return mlflow.set_experiment(name).experiment_id


@pytest.fixture(scope="session")
def running_sandbox():
    with Sandbox() as sandbox:
        yield sandbox


@pytest.fixture
def sandbox(running_sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch) -> Sandbox:
    """The far side of the wire: OpenAI and Cleanlab."""
    running_sandbox.clear()
    for name, value in running_sandbox.environment().items():
        monkeypatch.setenv(name, value)
    # Cleanlab's client reads its address when it is imported, which may have been long ago.
    if (api := sys.modules.get("cleanlab_tlm.internal.api.api")) is not None:
        for name, path in CLEANLABS.items():
            monkeypatch.setattr(api, name, running_sandbox.tlm_base_url + path)
    return running_sandbox


@pytest.fixture(autouse=True)
def clean_slate(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """No settings, no patches, no keys from outside; none left behind."""
    for name in list(os.environ):
        if name.startswith(("TLM_TRACING_", "CLEANLAB_", "OPENAI_")):
            monkeypatch.delenv(name)
    monkeypatch.chdir(tmp_path)
    _asking._resolved.cache_clear()
    _asking._warn_of_no_scorer.cache_clear()
    _scoring._runtime.warned.clear()
    _scoring._runtime.budget = _limits.Budget()
    yield
    tt.autolog(disable=True)
    _config._configured.clear()
    _config._from_environment.cache_clear()
    assert "request" not in vars(openai.OpenAI)
    assert "request" not in vars(openai.AsyncOpenAI)
    assert [patched() for patched in PATCHED] == ORIGINALS
    assert _hook.patches.users == _propagation.pools.users == 0


@pytest.fixture(autouse=True)
def no_bugs_of_ours(caplog: pytest.LogCaptureFixture):
    """What the guard swallows for users fails the test."""
    yield
    ours = [
        record.getMessage()
        for when in ("setup", "call")
        for record in caplog.get_records(when)
        if record.name == "tlm_tracing" and record.levelno >= logging.ERROR
    ]
    assert ours == []


@pytest.fixture
def asynchronous_export(monkeypatch: pytest.MonkeyPatch):
    """MLflow's default: traces are written from another thread, a moment after they ended."""
    monkeypatch.setenv("MLFLOW_ENABLE_ASYNC_TRACE_LOGGING", "true")
    mlflow.tracing.reset()
    yield
    mlflow.flush_trace_async_logging()
    monkeypatch.undo()
    mlflow.tracing.reset()


def _server(backend: str, folder: Path):
    from tlm_tracing.testing._tracking import TrackingServer, UnavailableError

    try:
        return TrackingServer(backend, folder=folder)
    except UnavailableError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def sqlite_server(tmp_path_factory: pytest.TempPathFactory):
    """A real MLflow server on SQLite, for all tests of a module. POSIX only."""
    with _server("sqlite", tmp_path_factory.mktemp("server")) as server:
        yield server


@pytest.fixture(scope="module")
def postgres_server(tmp_path_factory: pytest.TempPathFactory):
    """The same on PostgreSQL; skips where that is not installed."""
    with _server("postgresql", tmp_path_factory.mktemp("server")) as server:
        yield server


@pytest.fixture
def scorer() -> FakeScorer:
    """A scorer that gives what it is told."""
    return FakeScorer()


@pytest.fixture
def helpers():
    """Where ``parse`` and ``stream`` are: in ``beta`` until they came of age."""

    def find(client):
        completions = client.chat.completions
        return completions if hasattr(completions, "parse") else client.beta.chat.completions

    return find


@pytest.fixture
def traces(experiment: str):
    """Reads back what a user would read: the stored traces of this test, oldest first."""

    def read(count: int | None = None) -> list[mlflow.entities.Trace]:
        assert tt.flush(30)
        found = mlflow.search_traces(
            locations=[experiment], return_type="list", order_by=["timestamp_ms ASC"]
        )
        if count is not None:
            assert len(found) == count
        return found

    return read


@pytest.fixture
def trace(traces):
    """The one stored trace of this test."""
    return lambda: traces(1)[0]
