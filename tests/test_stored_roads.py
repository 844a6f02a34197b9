"""Roads to the store: real MLflow servers, what lies between, stores of older ones, outages."""

import asyncio
import base64
import http.client
import json
import os
import threading
import time
import uuid
from concurrent.futures import ThreadPoolExecutor

import mlflow
import openai
import pytest
from gateway import Gateway
from mlflow.entities import Span, TraceData, TraceInfo, TraceLocation, TraceState
from mlflow.tracing.client import TracingClient
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

import tlm_tracing as tt
from tlm_tracing._stored import _run
from tlm_tracing.testing import FakeScorer

pytestmark = pytest.mark.skipif(os.name != "posix", reason="the servers of the tests need POSIX")
if os.name == "posix":
    from tlm_tracing.testing._tracking import Wire

TAGS = ("trust_score", "explanation", "trust_status")
OTLP = "/v1/traces"


@pytest.fixture
def through(store):
    """Has MLflow's client go by another address."""
    yield mlflow.set_tracking_uri
    mlflow.set_tracking_uri(store)


@pytest.fixture(params=["sqlite", pytest.param("postgresql", marks=pytest.mark.long)])
def server(request, through):
    """A real server, with an experiment of this test's that is the active one."""
    server = request.getfixturevalue(
        {"sqlite": "sqlite_server", "postgresql": "postgres_server"}[request.param]
    )
    server.start()
    through(server.uri)
    server.experiment = mlflow.set_experiment(request.node.nodeid).experiment_id
    return server


on_sqlite = pytest.mark.parametrize("server", ["sqlite"], indirect=True)


def chat(text):
    return {"model": "gpt-4o", "messages": [{"role": "user", "content": text}]}


def record(*texts):
    """Record calls as somebody's own code does; gives the ids of their traces."""
    ids = []
    for text in texts:
        with mlflow.start_span("llm", span_type="CHAT_MODEL") as span:
            span.set_inputs(chat(text))
            span.set_outputs("an answer")
        ids.append(span.trace_id)
    return ids


def read(server, count):
    """The stored traces, by the server's own address."""
    assert tt.flush(30)
    client = mlflow.MlflowClient(tracking_uri=server.uri)
    found = client.search_traces(locations=[server.experiment])
    assert len(found) == count
    return found


def tags(trace):
    return {key: tag for key, tag in trace.info.tags.items() if key in TAGS}


def scoring_spans(trace):
    return [span for span in trace.data.spans if span.name == "tlm.trustworthiness"]


def assert_scored_once(trace, score, *, spans=1):
    assert tags(trace)["trust_score"] == f"{score:.4f}"
    assert tags(trace)["trust_status"] == "scored"
    assert [one.value for one in trace.info.assessments] == [pytest.approx(score)]
    assert [span.outputs["trust_score"] for span in scoring_spans(trace)] == [
        pytest.approx(score)
    ] * spans


@pytest.mark.parametrize("form", ["sync", "async"])
def test_a_servers_traces_are_scored(form, server, sandbox):
    """As those of a database: once, in place, and nothing else of them changes."""
    sandbox.answer("France?", "Lyon.", score=0.125, explanation="It is Paris.")
    mlflow.openai.autolog()
    try:
        with openai.OpenAI() as client:
            client.chat.completions.create(**chat("France?"))
    finally:
        mlflow.openai.autolog(disable=True)
    with openai.OpenAI() as client:
        tt.wrap_openai(client, mode="off").chat.completions.create(**chat("France?"))
    before = {trace.info.trace_id: trace for trace in read(server, 2)}

    def score(**options):
        if form == "sync":
            return tt.score_traces(**options)

        async def main():
            return await tt.ascore_traces(**options)

        return asyncio.run(main())

    assert list(score()["trust_score"]) == [0.125] * 2
    once = read(server, 2)
    for trace in once:
        assert_scored_once(trace, 0.125)
        (assessment,) = trace.info.assessments
        assert assessment.rationale == tags(trace)["explanation"] == "It is Paris."
        assert assessment.source.source_id == "cleanlab-tlm/medium"
        (span,) = scoring_spans(trace)
        assert span.parent_id == assessment.span_id == trace.data.spans[0].span_id
        assert span.inputs == {"prompt": "France?", "response": "Lyon."}
        old = before[trace.info.trace_id].info
        for name in ("state", "execution_duration", "request_time", "token_usage"):
            assert getattr(trace.info, name) == getattr(old, name), name

    assert len(score()) == 0
    assert [trace.to_dict() for trace in read(server, 2)] == [trace.to_dict() for trace in once]
    sandbox.default("tlm", score=0.75, no_log=True)
    score(rescore=True)
    for trace in read(server, 2):
        assert_scored_once(trace, 0.75)
        assert "explanation" not in tags(trace)
        assert not trace.info.assessments[0].rationale
        assert "tlm.reason" not in trace.data.spans[0].attributes


def test_several_experiments_are_written_each_to_its_own(server, request):
    """Spans travel by experiment."""
    ids = record("a", "b")
    other = mlflow.set_experiment(f"{request.node.nodeid} other").experiment_id
    ids += record("c")
    tt.score_traces([server.experiment, other], scorer=lambda request, completion: 0.5)
    for trace_id in ids:
        trace = mlflow.get_trace(trace_id)
        assert trace.info.experiment_id == (other if trace_id == ids[2] else server.experiment)
        assert_scored_once(trace, 0.5)


@pytest.mark.parametrize(
    "text",
    ["a" * 5_000, "läßt größe 🎉", "half a pair \ud83d", "nul \x00 end"],
    ids=["long", "not ASCII", "half a pair", "nul"],
)
def test_odd_explanations_are_written(text, server):
    """Cut to a tag's length, without what no database takes."""
    record("a")
    trust = {"trustworthiness_score": 0.5, "log": {"explanation": text}}
    tt.score_traces(scorer=FakeScorer(trust))
    (trace,) = read(server, 1)
    assert_scored_once(trace, 0.5)
    assert len(tags(trace)["explanation"]) <= 4096
    assert tags(trace)["explanation"][:4] == text[:4]


# What lies between.


@pytest.fixture
def gateway(server):
    """A gateway before the server."""
    with Gateway(server.port) as gateway:
        yield gateway


def score_through(gateway, server, through, **options):
    through(gateway.uri)
    try:
        return tt.score_traces(server.experiment, **options)
    finally:
        through(server.uri)


@on_sqlite
def test_many_traces_travel_in_few_requests(gateway, server, through, scorer):
    """Spans and tags together; assessments one by one; nothing else is written."""
    record(*map(str, range(12)))
    score_through(gateway, server, through, scorer=scorer)
    for trace in read(server, 12):
        assert_scored_once(trace, 0.9)
    assert gateway.count("POST", OTLP) <= 3
    # By path: while SQLite is locked, the server may refuse one, which is sent again.
    posted = {path for method, path, _ in gateway.seen if method == "POST"}
    assert sum(path.endswith("/assessments") for path in posted) == 12
    assert gateway.count("PATCH", "/tags") == 0


@on_sqlite
def test_credentials_go_with_every_request(gateway, server, through, scorer, monkeypatch):
    """A token of MLflow's is sent on each road."""
    monkeypatch.setenv("MLFLOW_TRACKING_TOKEN", "a-token")
    record("a")
    score_through(gateway, server, through, scorer=scorer)
    assert gateway.count("POST", OTLP) == 1
    assert {headers.get("Authorization") for _, _, headers in gateway.seen} == {"Bearer a-token"}


def without_resources(path, body):
    if path != OTLP:
        return body
    request = ExportTraceServiceRequest.FromString(body)
    for part in request.resource_spans:
        part.ClearField("resource")
    return request.SerializeToString()


@on_sqlite
def test_a_server_that_keeps_no_resources_is_found_out(gateway, server, through):
    """The tags then go by MLflow's own calls, the spans together as before."""
    gateway.rule = without_resources
    record("a", "b", "c")
    trust = {"trustworthiness_score": 0.5, "log": {"explanation": "Read it."}}
    score_through(gateway, server, through, scorer=FakeScorer(default=trust))
    for trace in read(server, 3):
        assert_scored_once(trace, 0.5)
        assert tags(trace)["explanation"] == "Read it."
    assert gateway.count("PATCH", "/tags") == 9
    assert len(score_through(gateway, server, through, scorer=FakeScorer())) == 0


@on_sqlite
@pytest.mark.parametrize(
    "status", [404, *(pytest.param(status, marks=pytest.mark.long) for status in (405, 501))]
)
def test_a_server_that_takes_no_spans_gets_tags_and_assessments(
    status, gateway, server, through, scorer, caplog, monkeypatch
):
    """It is said once, and the next run has nothing to do."""
    monkeypatch.setattr(_run, "_BATCH", 2)
    gateway.rule = lambda path, body: status if path == OTLP else body
    record(*map(str, range(7)))
    score_through(gateway, server, through, scorer=scorer)
    for trace in read(server, 7):
        assert_scored_once(trace, 0.9, spans=0)
    said = [one for one in caplog.records if "spans" in one.getMessage()]
    assert len([one for one in said if one.name == "tlm_tracing"]) == 1
    assert len(score_through(gateway, server, through, scorer=scorer)) == 0
    assert len(scorer.exchanges) == 7


# Stores of older MLflows.


def record_as_older_mlflow(server, text):
    """A trace whose spans are a file in the artifact repository."""
    (model,) = record(text)
    number = uuid.uuid4()
    trace_id = f"tr-{number.hex}"
    spans = []
    for span in mlflow.get_trace(model).data.spans:
        told = span.to_dict()
        told["trace_id"] = base64.b64encode(number.bytes).decode()
        told["attributes"]["mlflow.traceRequestId"] = json.dumps(trace_id)
        spans.append(Span.from_dict(told))
    mlflow.MlflowClient().delete_traces(server.experiment, trace_ids=[model])
    client = TracingClient()
    stored = client.start_trace(
        TraceInfo(
            trace_id=trace_id,
            trace_location=TraceLocation.from_experiment_id(server.experiment),
            request_time=int(time.time() * 1_000),
            state=TraceState.OK,
            execution_duration=5,
            trace_metadata={"mlflow.trace_schema.version": "3"},
            tags={},
        )
    )
    client._upload_trace_data(stored, TraceData(spans=spans))
    return trace_id


@on_sqlite
def test_a_trace_with_its_spans_elsewhere_keeps_them(server, scorer):
    """Tags and assessment are written; a span beside would hide those that there are."""
    trace_id = record_as_older_mlflow(server, "old")
    record("new")
    (before,) = [one for one in read(server, 2) if one.info.trace_id == trace_id]
    assert "mlflow.trace.spansLocation" not in before.info.tags
    assert sorted(tt.score_traces(scorer=scorer)["prompt"]) == ["new", "old"]
    for trace in read(server, 2):
        is_old = trace.info.trace_id == trace_id
        assert_scored_once(trace, 0.9, spans=0 if is_old else 1)
        assert [span.name for span in trace.data.spans if span.span_type == "CHAT_MODEL"] == ["llm"]
    assert len(tt.score_traces(scorer=scorer)) == 0
    tt.score_traces(scorer=FakeScorer(default=0.2), rescore=True)
    (after,) = [one for one in read(server, 2) if one.info.trace_id == trace_id]
    assert_scored_once(after, 0.2, spans=0)


@on_sqlite
@pytest.mark.parametrize(
    ("age", "told"), [(3_600, ("unscored", "unsupported_content")), (0, ("pending", None))]
)
def test_a_trace_without_its_spans_is_told(age, told, server, scorer):
    """It is left alone, and holds up no other; of a new one the spans may be on their way."""
    client = TracingClient()
    info = TraceInfo(
        trace_id=f"tr-{uuid.uuid4().hex}",
        trace_location=TraceLocation.from_experiment_id(server.experiment),
        request_time=int((time.time() - age) * 1_000),
        state=TraceState.OK,
    )
    client.start_trace(info)
    record("a")
    found = tt.score_traces(scorer=scorer).set_index("trace_id").sort_values("status")
    (row,) = found.loc[[info.trace_id]].itertuples()
    assert (row.status, row.reason) == told
    assert list(found["trust_score"].dropna()) == [0.9]


@on_sqlite
def test_what_the_process_itself_has_recorded_is_found(server, sandbox, through):
    """Its last traces are written first; a trace goes to the store before its spans do."""
    order, is_told, is_searched = [], threading.Event(), threading.Event()

    def rule(path, body):
        if path == OTLP:
            is_told.set()
            is_searched.wait(0.5)
            order.append("spans")
        elif path.endswith("/traces/search"):
            order.append("search")
            is_searched.set()
        return body

    sandbox.answer("France?", "Lyon.", score=0.125)
    with Gateway(server.port) as gateway, openai.OpenAI() as client:
        gateway.rule = rule
        through(gateway.uri)
        tt.wrap_openai(client, mode="off").chat.completions.create(**chat("France?"))
        assert is_told.wait(30)
        assert list(tt.score_traces()["trust_score"]) == [0.125]
        assert tt.flush(30)
    assert order.index("spans") < order.index("search")


# Two at once.


@pytest.mark.parametrize("on", ["server", "database"])
def test_two_workers_on_the_same_traces_do_no_harm(on, request, sandbox):
    """Without shards both may ask, but each call ends with one assessment, soon."""
    if on == "server":
        server = request.getfixturevalue("sqlite_server")
        request.getfixturevalue("through")(server.uri)
        mlflow.set_experiment(request.node.nodeid)
    ids = record(*map(str, range(8)))
    both = threading.Barrier(2)

    def worker(score):
        met = []

        async def scorer(request, completion):
            if not met:  # both have read by then
                met.append(True)
                await asyncio.to_thread(both.wait, 30)
            return score

        return tt.score_traces(scorer=scorer, traces=ids)

    with ThreadPoolExecutor(2) as pool:
        frames = list(pool.map(worker, [0.25, 0.75]))
    assert [set(frame["status"]) for frame in frames] == [{"scored"}] * 2
    for trace_id in ids:
        trace = mlflow.get_trace(trace_id)
        (assessment,) = trace.info.assessments
        assert assessment.value in (0.25, 0.75)
        assert tags(trace)["trust_status"] == "scored"
        assert len(scoring_spans(trace)) == 1


# Outages.


@pytest.fixture
def beginning(scorer):
    """Begins a run that waits for its scores."""
    scorer.hold()
    found = []

    def run(**options):
        try:
            found.append(tt.score_traces(scorer=scorer, **options))
        except Exception as error:
            found.append(error)

    def begin(count, **options):
        thread = threading.Thread(target=run, kwargs=options)
        thread.start()
        scorer.wait_for(count)

        def end():
            thread.join(90)
            return found[0]

        return end

    yield begin
    scorer.release()


@pytest.mark.long
@pytest.mark.parametrize("how", ["killed", "paused"])
def test_a_store_that_is_away_for_a_while_is_waited_for(
    how, server, scorer, beginning, monkeypatch
):
    """What was scored is written when it is back, once."""
    monkeypatch.setattr(_run, "_PAUSES", (0.2,) * 300)
    record("a", "b", "c")
    end = beginning(3, experiment_ids=server.experiment)
    if how == "killed":
        server.kill()
        scorer.release()
        server.restart()
    else:
        server.pause()
        scorer.release()
        server.resume()
    assert list(end()["status"]) == ["scored"] * 3
    for trace in read(server, 3):
        assert_scored_once(trace, 0.9)
    assert len(scorer.exchanges) == 3


@pytest.mark.long
@on_sqlite
def test_a_store_that_stays_away_is_told(server, scorer, beginning, monkeypatch):
    """The next run scores what could not be written; nothing is there twice."""
    monkeypatch.setattr(_run, "_PAUSES", (0.01,))
    record("a", "b", "c")
    end = beginning(3, experiment_ids=server.experiment)
    server.kill()
    scorer.release()
    error = end()
    assert isinstance(error, tt.TLMTracingError)
    assert "store" in str(error)
    server.restart()
    assert len(tt.score_traces(scorer=scorer)) == 3
    for trace in read(server, 3):
        assert_scored_once(trace, 0.9)


@on_sqlite
@pytest.mark.parametrize("after", [1, 2, 4])
def test_a_road_that_breaks_between_two_writes_is_taken_again(
    after, gateway, server, through, scorer, monkeypatch
):
    """Whatever had arrived already."""
    monkeypatch.setattr(_run, "_PAUSES", (0.01,) * 20)
    record("a", "b", "c")
    writes = []

    def broken(path, body):
        if "assessments" in path or path == OTLP:
            writes.append(path)
            if after <= len(writes) < after + 3:
                return 503
        return body

    gateway.rule = broken
    score_through(gateway, server, through, scorer=scorer)
    for trace in read(server, 3):
        assert_scored_once(trace, 0.9)
    assert len(scorer.exchanges) == 3


@on_sqlite
def test_an_answer_that_is_lost_costs_no_second_assessment(
    gateway, server, through, scorer, monkeypatch
):
    """What has been made is found, not made again."""
    monkeypatch.setattr(_run, "_PAUSES", (0.01,) * 20)
    record("a", "b")
    lost = []

    def losing(path, body):
        if path.endswith("/assessments") and path not in lost:
            lost.append(path)
            connection = http.client.HTTPConnection("127.0.0.1", server.port)
            connection.request("POST", path, body, {"Content-Type": "application/json"})
            assert connection.getresponse().status == 200
            return 502
        return body

    gateway.rule = losing
    score_through(gateway, server, through, scorer=scorer)
    assert len(lost) == 2
    for trace in read(server, 2):
        assert_scored_once(trace, 0.9)


@pytest.mark.long
@on_sqlite
@pytest.mark.parametrize("trouble", ["reset", "swallow"])
def test_a_broken_network_is_waited_for(trouble, server, through, scorer, beginning, monkeypatch):
    """As a server that is away."""
    monkeypatch.setattr(_run, "_PAUSES", (0.2,) * 300)
    record("a", "b", "c")
    with Wire(server.port) as wire:
        through(wire.uri)
        end = beginning(3, experiment_ids=server.experiment)
        getattr(wire, trouble)()
        scorer.release()
        wire.mend()
        assert list(end()["status"]) == ["scored"] * 3
    for trace in read(server, 3):
        assert_scored_once(trace, 0.9)
