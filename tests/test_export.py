"""How traces reach MLflow's server: whole, many at a time, and none lost for another's sake."""

import threading
import time
from concurrent.futures import ThreadPoolExecutor

import mlflow
import pytest
from gateway import Gateway

import tlm_tracing as tt
from tlm_tracing import _exporter, _outbox, _pipeline
from tlm_tracing.openai import OpenAI

QUESTION = [{"role": "user", "content": "What is the capital of France?"}]
WHOLE = '"POST /api/3.0/mlflow/traces HTTP'
SPANS = '"POST /v1/traces HTTP'


def ask(**options):
    return OpenAI().chat.completions.create(model="gpt-4o", messages=QUESTION, **options)


@pytest.fixture
def server(sqlite_server, sandbox, scorer, asynchronous_export, request):
    """A real server, with an experiment for the test."""
    tt.configure(scorer=scorer)
    before = mlflow.get_tracking_uri()
    sqlite_server.start()
    mlflow.set_tracking_uri(sqlite_server.uri)
    mlflow.set_experiment(request.node.nodeid)
    yield sqlite_server
    mlflow.set_tracking_uri(before)


@pytest.fixture
def requests(server):
    """What the server was asked since the last time, tracing alone."""
    log = server.folder / "server.log"
    known = 0

    def read():
        nonlocal known
        lines = [line for line in log.read_text().splitlines() if "traces" in line]
        since, known = lines[known:], len(lines)
        return since

    read()
    return read


def until(condition):
    end = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


def is_kept(trace_id):
    with _exporter.kept(trace_id) as trace:
        return trace is not None


def is_resting():
    """Whether no write is tried for a while, as the server is away."""
    outbox = _outbox._outbox
    return outbox.is_away and outbox._away_until > time.monotonic() + 1


def stored():
    assert tt.flush(30)
    return mlflow.search_traces(return_type="list")


def assert_whole(trace):
    parent, llm, scoring = trace.data.spans
    assert [parent.name, llm.name, scoring.name] == [
        "chat gpt-4o",
        "openai.chat.completions",
        "tlm.trustworthiness",
    ]
    assert trace.info.tags["trust_score"] == "0.9000"
    assert trace.info.tags["trust_status"] == "scored"
    assert trace.info.tags["mlflow.traceName"] == "chat gpt-4o"
    assert [one.value for one in trace.info.assessments] == [0.9]
    assert trace.info.request_preview == QUESTION[0]["content"]
    assert trace.info.response_preview
    assert trace.info.trace_metadata["mlflow.source.name"]
    assert trace.info.token_usage["total_tokens"] > 0
    assert trace.info.state.value == "OK"


def test_many_traces_take_few_requests(server, requests, caplog):
    """One request a trace for what is known of it, and one for the spans of many."""
    for _ in range(40):
        ask()
    found = stored()
    asked = requests()
    assert len(found) == 40
    for trace in found:
        assert_whole(trace)
    assert sum(WHOLE in line for line in asked) == 40
    assert 2 <= sum(SPANS in line for line in asked) <= 10
    assert "pool is full" not in caplog.text  # more threads than MLflow keeps connections


def test_an_open_trace_is_shown_and_completed_later(server):
    """What has ended of a trace is to be seen before the whole of it has."""
    with tt.trusted_span("agent"):
        ask()
        (open_one,) = stored()
        assert open_one.info.state.value == "IN_PROGRESS"
        assert {span.name for span in open_one.data.spans} == {
            "chat gpt-4o",
            "openai.chat.completions",
            "tlm.trustworthiness",
        }
    (whole,) = stored()
    assert whole.info.state.value == "OK"
    assert whole.data.spans[0].name == "agent"
    assert len(whole.data.spans) == 4
    assert whole.info.tags["trust_score"] == "0.9000"


def test_a_trace_that_the_server_refuses_costs_no_other(server, caplog):
    """The experiment of one is gone: the others are stored, and one is counted as dropped."""
    here = mlflow.search_experiments(max_results=1)[0].experiment_id
    gone = mlflow.create_experiment("gone")
    dropped = tt.stats().dropped
    for _ in range(5):
        ask()
    with mlflow.tracing.context(metadata={"of": "the refused"}):
        span = mlflow.start_span_no_context("refused", experiment_id=gone)
        span.end()
    mlflow.delete_experiment(gone)
    for _ in range(5):
        ask()
    assert tt.flush(30)
    found = mlflow.search_traces(locations=[here], return_type="list")
    assert len(found) == 10
    for trace in found:
        assert_whole(trace)
    assert tt.stats().dropped == dropped + 1


def test_spans_of_an_experiment_that_is_gone_cost_no_others(server):
    """The server answers them as it would if it took no spans at all."""
    ask()
    stored()
    root = mlflow.start_span_no_context("open", experiment_id="987654321")
    mlflow.start_span_no_context("inside", parent_span=root).end()
    assert tt.flush(30)
    ask()
    found = stored()
    root.end()
    assert len(found) == 2
    for trace in found:
        assert_whole(trace)
        assert trace.info.tags["mlflow.trace.spansLocation"] == "TRACKING_STORE"


def test_a_server_that_fails_twice_is_asked_again_at_once(server):
    """MLflow's client would rest for seconds after the second time, with all that waits behind."""
    ask()
    stored()
    asked = []

    def refuse(path, body):
        if path != "/v1/traces":
            return body
        asked.append(time.monotonic())
        return 503 if len(asked) <= 2 else body

    with Gateway(server.port) as gateway:
        gateway.rule = refuse
        mlflow.set_tracking_uri(gateway.uri)
        mlflow.tracing.reset()
        trace_id = tt.trust(ask()).trace_id
        assert tt.flush(30)
        mlflow.set_tracking_uri(server.uri)
        mlflow.tracing.reset()
    assert_whole(mlflow.get_trace(trace_id))
    assert len(asked) == 3
    assert asked[2] - asked[1] < 2


def test_a_score_that_comes_before_its_trace_is_written_travels_with_it(
    server, requests, scorer, monkeypatch
):
    """While the server is away, late scores need no requests of their own afterwards."""
    ask()
    stored()
    monkeypatch.setattr(_pipeline, "_MOST_HELD", 0)
    server.kill()
    scorer.hold()
    tt.configure(scorer=scorer, mode="background")
    trusts = [tt.trust(ask()) for _ in range(8)]
    threading.Thread(target=mlflow.flush_trace_async_logging, daemon=True).start()
    until(lambda: all(is_kept(trust.trace_id) for trust in trusts))
    until(is_resting)  # what is just being tried takes no score with it
    scorer.release()
    assert [trust.wait(10).score for trust in trusts] == [0.9] * 8
    requests()
    server.start()
    found = stored()
    asked = requests()
    assert len(found) == 9
    for trace in found:
        assert_whole(trace)
    assert not [line for line in asked if "assessments" in line or "tags" in line]


def test_the_time_that_a_late_score_takes_is_not_its_traces(server, scorer):
    """A trace lasts as long as its call, also where the answer tells no tokens."""
    tt.configure(scorer=scorer, mode="background")
    scorer.hold()
    with tt.trusted_span("agent"):
        list(ask(stream=True))
    over = time.monotonic() + 0.05
    until(lambda: time.monotonic() > over)
    scorer.release()
    (trace,) = stored()
    root, *_, scoring = trace.data.spans
    assert scoring.end_time_ns > root.end_time_ns
    assert trace.info.execution_duration <= (root.end_time_ns - root.start_time_ns) / 1e6 + 1


@pytest.mark.long
def test_nothing_of_a_burst_is_lost(server):
    """More calls than MLflow has room for traces, spans and tasks are all there, and whole."""
    dropped = tt.stats().dropped
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda _: ask(), range(1500)))
    assert tt.flush(120)
    found = mlflow.search_traces(return_type="list", max_results=2000)
    assert len(found) == 1500
    for trace in found:
        assert_whole(trace)
    assert tt.stats().dropped == dropped
