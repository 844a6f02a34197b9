"""OpenTelemetry: the application's meters and event loggers are told of every settled call."""

import importlib
import inspect
import os
import subprocess
import sys
import textwrap

import mlflow
import pytest
from opentelemetry import metrics, trace
from opentelemetry.sdk import _logs as sdk_logs
from opentelemetry.sdk._logs import export
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader

import tlm_tracing as tt
from tlm_tracing import _telemetry, _threads
from tlm_tracing._scoring import later
from tlm_tracing.openai import OpenAI
from tlm_tracing.testing import FakeScorer

QUESTION = [{"role": "user", "content": "What is the capital of France?"}]
METERS = importlib.import_module("opentelemetry.metrics._internal")
LOGS = importlib.import_module("opentelemetry._logs._internal")


def ask(**options):
    return OpenAI().chat.completions.create(model="gpt-4o", messages=QUESTION, **options)


@pytest.fixture
def settable(monkeypatch):
    """Providers can be set once in a process; here, once in a test."""
    for home, kind in ((METERS, "METER"), (LOGS, "LOGGER")):
        monkeypatch.setattr(home, f"_{kind}_PROVIDER", None)
        once = type(getattr(home, f"_{kind}_PROVIDER_SET_ONCE"))
        monkeypatch.setattr(home, f"_{kind}_PROVIDER_SET_ONCE", once())


@pytest.fixture
def reader(sandbox, settable):
    """The application's meter provider, set after the package was imported."""
    reader = InMemoryMetricReader()
    provider = MeterProvider([reader], shutdown_on_exit=False)
    metrics.set_meter_provider(provider)
    yield reader
    provider.shutdown()


def points(reader):
    """What was measured: by instrument, its unit and its points."""
    data = reader.get_metrics_data()
    found = [
        metric
        for one in data.resource_metrics
        for scope in one.scope_metrics
        for metric in scope.metrics
        if scope.scope.name == "tlm_tracing"
    ]
    return {metric.name: (metric.unit, metric.data.data_points) for metric in found}


def test_calls_are_counted_by_status_reason_and_scorer(reader):
    tt.configure(scorer=FakeScorer(0.5, 0.7, RuntimeError("no")))
    for _ in range(3):
        ask()
    with tt.trusted_span(sample_rate=0.0):
        ask()
    unit, found = points(reader)["tlm_tracing.calls"]
    assert unit == "{call}"
    counted = {tuple(sorted(point.attributes.items())): point.value for point in found}
    assert counted == {
        (("tlm.scorer", "fake"), ("tlm.status", "scored")): 2,
        (
            ("tlm.reason", "scorer_error"),
            ("tlm.scorer", "fake"),
            ("tlm.status", "unscored"),
        ): 1,
        (("tlm.reason", "sampled_out"), ("tlm.status", "unscored")): 1,
    }


def test_scores_and_durations_are_measured(reader):
    tt.configure(scorer=FakeScorer(0.25, 0.75))
    seconds = sum(tt.trust(ask()).seconds for _ in range(2))
    found = points(reader)
    unit, (scores,) = found["tlm_tracing.score"]
    assert (unit, scores.count, scores.sum, scores.min, scores.max) == ("1", 2, 1.0, 0.25, 0.75)
    unit, (durations,) = found["tlm_tracing.scoring.duration"]
    assert (unit, durations.count) == ("s", 2)
    assert durations.sum == pytest.approx(seconds)
    assert dict(scores.attributes) == dict(durations.attributes) == {"tlm.scorer": "fake"}


@pytest.mark.skipif(
    "explicit_bucket_boundaries_advisory"
    not in inspect.signature(metrics.Meter.create_histogram).parameters,
    reason="needs opentelemetry-api 1.30",
)
def test_the_bounds_of_the_histograms_tell_scores_and_seconds_apart(reader):
    tt.configure(scorer=FakeScorer(0.62))
    ask()
    found = points(reader)
    (scores,) = found["tlm_tracing.score"][1]
    assert len(scores.explicit_bounds) == 19
    assert max(scores.explicit_bounds) < 1
    (durations,) = found["tlm_tracing.scoring.duration"][1]
    assert min(durations.explicit_bounds) == 0.01


def test_a_known_score_took_no_scorers_time(reader):
    tt.configure(scorer=lambda request, completion: 0.5, cache_size=1)
    for _ in range(2):
        ask()
    found = points(reader)
    assert found["tlm_tracing.score"][1][0].count == 2
    assert found["tlm_tracing.scoring.duration"][1][0].count == 1


def test_what_is_pending_and_what_was_dropped_can_be_observed(reader, scorer, monkeypatch):
    monkeypatch.setattr(_threads, "_KEEP_TRYING", 0.1)
    scorer.hold()
    tt.configure(scorer=scorer, mode="background")
    before = tt.stats().dropped
    pending = [tt.trust(ask()) for _ in range(2)]
    unit, (point,) = points(reader)["tlm_tracing.pending"]
    assert (unit, point.value) == ("{score}", 2)
    scorer.release()
    for trust in pending:
        trust.wait(10)
    later(lambda: False)
    assert tt.flush(30)
    found = points(reader)
    assert found["tlm_tracing.pending"][1][0].value == 0
    unit, (point,) = found["tlm_tracing.dropped"]
    assert (unit, point.value) == ("{item}", before + 1)


def run(code, sandbox, store):
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        env={**os.environ, **sandbox.environment(), "MLFLOW_TRACKING_URI": store},
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_a_meter_provider_may_be_set_after_the_first_call(sandbox, store, request):
    code = f"""
    import mlflow, openai, tlm_tracing as tt
    from opentelemetry import metrics
    from opentelemetry.sdk.metrics import MeterProvider
    from opentelemetry.sdk.metrics.export import InMemoryMetricReader
    mlflow.set_experiment({request.node.nodeid!r})
    tt.autolog(scorer=lambda request, completion: 0.5)
    def ask():
        question = [{{"role": "user", "content": "?"}}]
        openai.OpenAI().chat.completions.create(model="gpt-4o", messages=question)
    ask()
    reader = InMemoryMetricReader()
    metrics.set_meter_provider(MeterProvider([reader]))
    ask()
    for metric in reader.get_metrics_data().resource_metrics[0].scope_metrics[0].metrics:
        print(metric.name, getattr(metric.data.data_points[0], "value", ""))
    """
    done = run(code, sandbox, store)
    assert done.returncode == 0, done.stderr
    lines = [line.strip() for line in done.stdout.splitlines() if line.startswith("tlm_tracing.")]
    assert sorted(lines) == [
        "tlm_tracing.calls 1",
        "tlm_tracing.dropped 0",
        "tlm_tracing.pending 0",
        "tlm_tracing.score",
        "tlm_tracing.scoring.duration",
    ]


@pytest.fixture
def provider(sandbox, settable, monkeypatch):
    """The application's logger provider, set as its version of OpenTelemetry has it."""
    provider = sdk_logs.LoggerProvider(shutdown_on_exit=False)
    importlib.import_module("opentelemetry._logs").set_logger_provider(provider)
    if getattr(_telemetry._emitter(), "func", None) is not _telemetry._emit:
        sdk_events = pytest.importorskip("opentelemetry.sdk._events")
        events = importlib.import_module("opentelemetry._events")
        monkeypatch.setattr(
            events, "_EVENT_LOGGER_PROVIDER", sdk_events.EventLoggerProvider(provider)
        )
    yield provider
    provider.shutdown()


@pytest.fixture
def events(provider):
    """The events so far; older versions have the name among the attributes."""
    names = ("InMemoryLogRecordExporter", "InMemoryLogExporter")
    exporter = next(getattr(export, name) for name in names if hasattr(export, name))()
    provider.add_log_record_processor(export.SimpleLogRecordProcessor(exporter))

    def read():
        records = [one.log_record for one in exporter.get_finished_logs()]
        exporter.clear()
        for record in records:
            attributes = dict(record.attributes)
            name = attributes.pop("event.name", None) or record.event_name
            assert name == "gen_ai.evaluation.result"
            yield record, attributes

    return lambda: list(read())


def test_a_scored_call_is_an_event_of_its_span(events, sandbox, trace):
    sandbox.answer(QUESTION[0]["content"], "Paris.", score=0.75, explanation="It is.")
    tt.configure(evaluation_events=True)
    completion = ask()
    ((record, attributes),) = events()
    assert attributes == {
        "gen_ai.evaluation.name": "trustworthiness",
        "gen_ai.evaluation.score.value": 0.75,
        "gen_ai.evaluation.explanation": "It is.",
        "gen_ai.response.id": completion.id,
    }
    found = trace()
    assert f"tr-{record.trace_id:032x}" == found.info.trace_id
    assert f"{record.span_id:016x}" == found.data.spans[0].span_id
    assert record.timestamp > 0


@pytest.mark.parametrize("mode", ["inline", "background"])
def test_streams_and_background_calls_are_events_too(mode, events, scorer, trace):
    tt.configure(scorer=scorer, mode=mode, evaluation_events=True)
    list(ask(stream=True))
    found = trace()
    ((record, attributes),) = events()
    assert attributes["gen_ai.evaluation.score.value"] == 0.9
    assert attributes["gen_ai.response.id"].startswith("chatcmpl-")
    assert f"tr-{record.trace_id:032x}" == found.info.trace_id


@pytest.mark.parametrize(("score", "label"), [(0.3, "fail"), (0.5, "pass")])
def test_with_a_threshold_an_event_has_a_label(score, label, events):
    tt.configure(scorer=FakeScorer(score), threshold=0.5, evaluation_events=True)
    ask()
    ((_, attributes),) = events()
    assert attributes["gen_ai.evaluation.score.label"] == label


def test_an_unscored_call_is_an_event_with_its_reason(events):
    tt.configure(scorer=FakeScorer(RuntimeError("no")), threshold=0.5, evaluation_events=True)
    completion = ask()
    ((_, attributes),) = events()
    assert attributes == {
        "gen_ai.evaluation.name": "trustworthiness",
        "gen_ai.response.id": completion.id,
        "error.type": "scorer_error",
    }


def fails(value):
    raise ValueError(value)


@pytest.mark.parametrize(
    ("settings", "shown"),
    [
        ({"capture_content": False}, None),
        ({"mask": lambda value: "masked" if isinstance(value, str) else value}, "masked"),
        ({"mask": fails}, "[not recorded: the mask failed]"),
    ],
    ids=["no content", "mask", "broken mask"],
)
def test_the_explanation_is_content(settings, shown, events):
    tt.configure(scorer=FakeScorer(tt.Trust(0.5, "It is Ann's.")), evaluation_events=True)
    tt.configure(**settings)
    ask()
    ((_, attributes),) = events()
    assert attributes.get("gen_ai.evaluation.explanation") == shown
    assert "Ann" not in str(attributes)


def test_what_is_not_recorded_is_an_event_of_the_callers_span(events, scorer):
    tt.configure(scorer=scorer, evaluation_events=True)
    mlflow.tracing.disable()
    try:
        own = trace.NonRecordingSpan(trace.SpanContext(1, 2, False))
        with trace.use_span(own):
            ask()
    finally:
        mlflow.tracing.enable()
    ((record, attributes),) = events()
    assert (record.trace_id, record.span_id) == (1, 2)
    assert "gen_ai.response.id" in attributes


def test_without_being_asked_for_there_are_no_events(events, scorer):
    tt.configure(scorer=scorer)
    ask()
    assert events() == []


class Broken(sdk_logs.LogRecordProcessor):
    def on_emit(self, *_):
        raise OSError("no room")

    emit = on_emit

    def shutdown(self):
        pass

    def force_flush(self, timeout_millis=0):
        return True


def test_what_others_fail_to_do_with_an_event_is_told_once_and_costs_no_call(
    provider, scorer, caplog, traces
):
    provider.add_log_record_processor(Broken())
    tt.configure(scorer=scorer, evaluation_events=True)
    assert [tt.trust(ask()).score for _ in range(3)] == [0.9] * 3
    assert [one.info.tags["trust_status"] for one in traces(3)] == ["scored"] * 3
    (told,) = [one.getMessage() for one in caplog.records if one.name == "tlm_tracing"]
    assert "OSError" in told


def test_without_a_logger_provider_nothing_is_said(sandbox, scorer, caplog):
    tt.configure(scorer=scorer, evaluation_events=True)
    assert tt.trust(ask()).score == 0.9
    assert not [one for one in caplog.records if one.name == "tlm_tracing"]
