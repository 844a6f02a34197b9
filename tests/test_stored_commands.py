"""The commands ``score`` and ``watch``: what they say, and that no signal or kill does harm."""

import json
import os
import random
import re
import signal
import subprocess
import sys
import threading
from pathlib import Path

import mlflow
import openai
import pytest

import tlm_tracing as tt
from tlm_tracing._commands import _score
from tlm_tracing.cli import main

pytestmark = pytest.mark.skipif(os.name != "posix", reason="signals are POSIX's")
if os.name == "posix":
    from tlm_tracing.testing._tracking import TrackingServer

TAGS = ("trust_score", "explanation", "trust_status")
PATIENCE = 120


def chat(text):
    return {"model": "gpt-4o", "messages": [{"role": "user", "content": text}]}


def record(*texts):
    """Record calls as somebody's own code does; gives the ids of their traces."""
    ids = []
    for text in texts:
        with mlflow.start_span("llm", span_type="CHAT_MODEL") as span:
            span.set_inputs(chat(text))
            span.set_outputs(f"An answer to {text}")
        ids.append(span.trace_id)
    return ids


@pytest.fixture
def stock(sandbox):
    """Records so many calls, each with a score of its own; gives the scores by trace id."""

    def fill(count):
        texts = [f"Question {number}?" for number in range(count)]
        scores = [(number + 0.5) / count for number in range(count)]
        sandbox.load(
            {"prompt": text, "response": f"An answer to {text}", "score": score}
            for text, score in zip(texts, scores, strict=True)
        )
        return dict(zip(record(*texts), scores, strict=True))

    return fill


def tags(trace):
    return {key: tag for key, tag in trace.info.tags.items() if key in TAGS}


def scored(traces):
    return [trace for trace in traces if tags(trace).get("trust_status") == "scored"]


def assert_scored_once(traces, scores):
    """Each trace has its own score, once in each place."""
    assert {trace.info.trace_id for trace in traces} == set(scores)
    for trace in traces:
        score = scores[trace.info.trace_id]
        assert tags(trace)["trust_score"] == f"{score:.4f}"
        assert tags(trace)["trust_status"] == "scored"
        assert [one.value for one in trace.info.assessments] == [pytest.approx(score)]
        spans = [span for span in trace.data.spans if span.name == "tlm.trustworthiness"]
        assert [span.outputs["trust_score"] for span in spans] == [pytest.approx(score)]


class Command:
    """A command as a process; what it says on standard error can be waited for."""

    def __init__(self, *arguments, **environment):
        self.process = subprocess.Popen(
            [Path(sys.executable).with_name("tlm-tracing"), *map(str, arguments)],
            env={**os.environ, "COLUMNS": "200", **environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            # A shell's background job, as CI's, has it ignored.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )
        self.said = ""
        self._changed = threading.Condition()
        self._listener = threading.Thread(target=self._listen)
        self._listener.start()

    def _listen(self):
        for line in self.process.stderr:
            with self._changed:
                self.said += line
                self._changed.notify_all()

    def wait_for(self, words, times=1):
        with self._changed:
            heard = self._changed.wait_for(lambda: self.said.count(words) >= times, PATIENCE)
            assert heard, self.said

    def send(self, number):
        self.process.send_signal(number)

    def end(self):
        """Wait for its end; gives its exit status and what it printed."""
        printed = self.process.stdout.read()
        status = self.process.wait(PATIENCE)
        self._listener.join()
        self.process.stdout.close()
        self.process.stderr.close()
        return status, printed


@pytest.fixture
def command(store, experiment, sandbox):
    """Starts a command on this test's experiment."""
    started = []

    def start(name, *arguments, **environment):
        environment = {"MLFLOW_TRACKING_URI": store, **environment}
        one = Command(name, "--experiment-id", experiment, *arguments, **environment)
        started.append(one)
        return one

    yield start
    for one in started:
        if one.process.poll() is None:
            one.process.kill()
            one.end()


# What score says.


def test_score_shows_the_least_trustworthy_and_counts(stock, traces, capsys):
    """The lowest score first, as many as asked for."""
    scores = stock(4)
    with mlflow.start_span("no call"):
        pass
    assert main(["score", "-n", "2"]) == 0
    said = capsys.readouterr().out
    assert said.index("Question 0?") < said.index("Question 1?")
    assert "Question 2?" not in said
    assert "Scored 4 calls in 5 traces" in said
    assert "Unscored: 1 empty." in said
    assert_scored_once(scored(traces(5)), scores)


def test_where_nothing_is_left_score_says_so(stock, capsys):
    """And no table of nothing."""
    stock(1)
    assert main(["score", "--quiet"]) == 0
    capsys.readouterr()
    assert main(["score", "--quiet"]) == 0
    assert capsys.readouterr().out == "Nothing to score: no trace without a score was found.\n"


def test_score_gives_programs_one_object(stock, sandbox, capsys):
    """With all that the sentences tell."""
    scores = stock(3)
    sandbox.script("openai", {"refusal": "I cannot."})
    with openai.OpenAI() as client:
        tt.wrap_openai(client, mode="off").chat.completions.create(**chat("refused"))
    assert main(["score", "--json", "-n", "1"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["traces"], told["scored"], told["pending"]) == (4, 3, 0)
    assert (told["dry_run"], told["stopped"]) == (False, False)
    assert told["unscored"] == {"refusal": 1}
    (row,) = told["least_trustworthy"]
    assert row["trust_score"] == min(scores.values())
    assert (row["prompt"], row["response"]) == ("Question 0?", "An answer to Question 0?")
    assert row["trace_id"] in scores
    assert row["timestamp"].endswith("+00:00")
    sent = (request.json for request in sandbox.requests("tlm"))
    assert told["characters"] == sum(
        len(one["prompt"] + one["response"]["response"]) for one in sent
    )


@pytest.mark.parametrize("as_json", [False, True])
def test_a_dry_run_tells_how_much_would_be_sent(
    as_json, stock, sandbox, traces, capsys, monkeypatch
):
    """It needs no key, sends nothing and writes nothing."""
    monkeypatch.delenv("CLEANLAB_TLM_API_KEY")
    stock(3)
    length = sum(len(f"Question {n}?An answer to Question {n}?") for n in range(3))
    assert main(["score", "--dry-run", *(["--json"] if as_json else [])]) == 0
    said = capsys.readouterr().out
    if as_json:
        told = json.loads(said)
        assert (told["dry_run"], told["pending"], told["characters"]) == (True, 3, length)
    else:
        assert f"Would score 3 calls in 3 traces: {length} characters would be sent." in said
    assert sandbox.requests("tlm") == []
    assert not any(tags(trace) for trace in traces(3))


def test_score_says_how_far_it_is_where_there_is_no_terminal(stock, capsys, monkeypatch):
    """In lines on standard error; quiet says nothing there."""
    monkeypatch.setattr(_score, "_SAY_EVERY", 0.0)
    stock(3)
    assert main(["score", "--limit", "1"]) == 0
    assert re.search(
        r"^1 of 1 traces, 1 scored, 0 not, \d+ a second", capsys.readouterr().err, re.M
    )
    assert main(["score", "--quiet"]) == 0
    assert capsys.readouterr().err == ""


def test_options_choose_what_is_scored(stock, sandbox, capsys, experiment):
    """Limit, time, part, place, filter, and again."""
    scores = stock(6)

    def run(*options):
        before = len(sandbox.requests("tlm"))
        assert main(["score", "--json", *options]) == 0
        sent = len(sandbox.requests("tlm")) - before
        assert json.loads(capsys.readouterr().out)["scored"] == sent
        return sent

    assert run("--until", "1h") == 0
    assert run("--since", "1h", "--limit", "2") == 2
    assert run("--filter", "trace.status = 'ERROR'") == 0
    assert run("--experiment-id", "0", "--since", "1s", "--limit", "1") == 0
    assert run("--shard", "1/2") + run("--shard", "2/2") == 4
    assert run() == 0
    assert run("--rescore", "--limit", "3") == 3
    name = mlflow.get_experiment(experiment).name
    assert run("--experiment", name, "--rescore") == len(scores)


@pytest.mark.parametrize(
    "options",
    [
        ["--since", "yesterday"],
        ["--limit", "0"],
        ["--shard", "9/8"],
        ["--experiment", "nobody's"],
        ["--filter", "trust is low"],
        ["--max-scores-per-minute", "0"],
        ["--sample-rate", "2"],
    ],
)
@pytest.mark.parametrize("name", ["score", "watch"])
def test_what_cannot_be_done_ends_with_2_and_a_word_on_why(name, options, stock, sandbox, capsys):
    """Without a traceback, and before anything is sent."""
    if name == "watch" and options[0] == "--limit":
        pytest.skip("watch has no limit")
    stock(1)
    assert main([name, *options]) == 2
    said = capsys.readouterr()
    assert f"tlm-tracing {name}: " in said.err
    assert "Traceback" not in said.err
    assert said.out == ""
    assert sandbox.requests("tlm") == []


def test_without_a_key_score_ends_with_2(stock, capsys, monkeypatch):
    """And says where one is to be had."""
    stock(1)
    monkeypatch.delenv("CLEANLAB_TLM_API_KEY")
    assert main(["score"]) == 2
    assert "CLEANLAB_TLM_API_KEY" in capsys.readouterr().err


def test_what_could_not_be_scored_ends_with_1(stock, sandbox, traces, capsys):
    """And is said to be tried again."""
    stock(2)
    sandbox.script("tlm", {"score": "nan"})
    assert main(["score"]) == 1
    said = capsys.readouterr()
    assert "Unscored: 1 scorer_error." in said.out
    assert "goes on from here" in said.err
    assert main(["score"]) == 0
    assert len(scored(traces(2))) == 2


# Signals.


@pytest.mark.parametrize(
    "number", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.long)]
)
def test_a_stop_waits_for_what_was_sent_and_says_how_to_go_on(
    number, command, stock, sandbox, traces
):
    """The same command again finishes; nothing is paid for twice."""
    scores = stock(6)
    sandbox.default("tlm", hang=True)
    running = command("score", "--max-concurrency", 2)
    sandbox.wait_for("tlm", 2, PATIENCE)
    running.send(number)
    running.wait_for("Stopping")
    sandbox.default("tlm")
    sandbox.release()
    status, printed = running.end()
    assert status == 130
    assert "Traceback" not in running.said
    assert "The same command again goes on from here." in running.said
    assert "Scored 2 calls in 2 traces" in printed
    done = scored(traces(6))
    assert_scored_once(done, {one.info.trace_id: scores[one.info.trace_id] for one in done})
    assert len(done) == len(sandbox.requests("tlm")) == 2
    assert main(["score", "--quiet"]) == 0
    assert_scored_once(traces(6), scores)
    assert len(sandbox.requests("tlm")) == 6


@pytest.mark.long
def test_a_second_stop_does_not_wait(command, stock, sandbox, traces):
    """What was sent is lost; the next run asks again."""
    scores = stock(2)
    sandbox.default("tlm", hang=True)
    running = command("score")
    sandbox.wait_for("tlm", 2, PATIENCE)
    running.send(signal.SIGINT)
    running.wait_for("Stopping")
    running.send(signal.SIGINT)
    status, _ = running.end()
    assert status == 130
    assert "Traceback" not in running.said
    sandbox.default("tlm")
    sandbox.release()
    assert main(["score", "--quiet"]) == 0
    assert_scored_once(traces(2), scores)


# Kills.

CONCURRENCY = 4


@pytest.mark.parametrize(
    ("kills", "seed"),
    [(2, 1), *(pytest.param(5, seed, marks=pytest.mark.long) for seed in range(3))],
)
def test_a_run_that_is_killed_again_and_again_ends_with_each_trace_scored_once(
    kills, seed, command, stock, sandbox, traces
):
    """With the right score; what is lost at each kill is what was in flight or not written yet."""
    count = 12 * kills
    scores = stock(count)
    sandbox.default("tlm", delay=0.1)
    moments = random.Random(seed)
    for _ in range(kills):
        running = command("score", "--max-concurrency", CONCURRENCY)
        seen = len(sandbox.requests("tlm"))
        try:
            sandbox.wait_for("tlm", seen + moments.randint(1, 10), PATIENCE)
        finally:
            running.send(signal.SIGKILL)
            running.end()
        for trace in scored(traces(count)):
            assert len(trace.info.assessments) == 1
    assert main(["score", "--quiet"]) == 0
    assert_scored_once(traces(count), scores)
    # At each kill some are in flight, as many wait to be written, or are being written.
    assert len(sandbox.requests("tlm")) <= count + kills * 4 * CONCURRENCY


@pytest.mark.parametrize("workers", [2, pytest.param(8, marks=pytest.mark.long)])
def test_workers_with_shards_score_each_trace_exactly_once(
    workers, command, stock, sandbox, traces
):
    """At the same time, without a word between them."""
    count = 6 * workers
    scores = stock(count)
    running = [command("score", "--shard", f"{k}/{workers}") for k in range(1, workers + 1)]
    assert [one.end()[0] for one in running] == [0] * workers
    assert_scored_once(traces(count), scores)
    assert len(sandbox.requests("tlm")) == count


@pytest.mark.long
def test_workers_without_shards_do_no_harm(command, stock, sandbox, traces):
    """Both ask, as both have read before either writes; each call has one assessment."""
    scores = stock(6)
    sandbox.default("tlm", hang=True)
    running = [command("score"), command("score")]
    sandbox.wait_for("tlm", 12, PATIENCE)
    sandbox.default("tlm")
    sandbox.release()
    assert [one.end()[0] for one in running] == [0, 0]
    assert_scored_once(traces(6), scores)


# Watching.


@pytest.mark.parametrize(
    "number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.long)]
)
def test_watch_scores_what_arrives(number, command, sandbox, traces):
    """Whoever records it, once it has ended; stopped, it ends well, and all sent is written."""
    watching = command("watch", "--interval", 0.1)
    watching.wait_for("Watching")
    left_open = mlflow.start_span_no_context("in progress")
    inner = mlflow.start_span_no_context("llm", span_type="CHAT_MODEL", parent_span=left_open)
    inner.set_inputs(chat("early"))
    inner.set_outputs("late")
    inner.end()
    mlflow.openai.autolog()
    try:
        with openai.OpenAI() as client:
            client.chat.completions.create(**chat("by autolog"))
    finally:
        mlflow.openai.autolog(disable=True)
    with openai.OpenAI() as client:
        tt.wrap_openai(client, mode="off").chat.completions.create(**chat("by us"))
    sandbox.wait_for("tlm", 2, PATIENCE)
    watching.wait_for("Scored")
    asked = [request.json["prompt"] for request in sandbox.requests("tlm")]
    assert sorted(asked) == ["by autolog", "by us"]
    assert [tags(trace) for trace in traces(3) if trace.info.trace_id == left_open.trace_id] == [{}]
    sandbox.default("tlm", hang=True)
    left_open.end()
    sandbox.wait_for("tlm", 3, PATIENCE)
    watching.send(number)
    sandbox.default("tlm")
    sandbox.release()
    assert watching.end()[0] == 0
    assert "Scored 3 calls" in watching.said
    assert "Traceback" not in watching.said
    for trace in traces(3):
        assert tags(trace)["trust_status"] == "scored"
        assert len(trace.info.assessments) == 1


@pytest.mark.long
def test_several_may_watch(command, stock, sandbox, traces):
    """Each its own part."""
    watching = [command("watch", "--interval", 0.1, "--shard", f"{k}/2") for k in (1, 2)]
    for one in watching:
        one.wait_for("Watching")
    scores = stock(10)
    sandbox.wait_for("tlm", 10, PATIENCE)
    for one in watching:
        one.send(signal.SIGTERM)
    assert [one.end()[0] for one in watching] == [0, 0]
    assert_scored_once(traces(10), scores)
    assert len(sandbox.requests("tlm")) == 10


@pytest.mark.long
def test_watch_outlives_a_store_that_is_away(request, sandbox, store, tmp_path):
    """It says so and goes on; stopped meanwhile, it ends at once."""
    with TrackingServer(folder=tmp_path) as server:
        mlflow.set_tracking_uri(server.uri)
        try:
            experiment = mlflow.set_experiment(request.node.nodeid).experiment_id
            watching = Command(
                *("watch", "--interval", 0.1, "--experiment-id", experiment),
                MLFLOW_TRACKING_URI=server.uri,
                MLFLOW_HTTP_REQUEST_MAX_RETRIES="0",
            )
            watching.wait_for("Watching")
            first = record("a")
            watching.wait_for("Scored 1 calls")
            server.kill()
            watching.wait_for("can't be read or written now")
            server.restart()
            second = record("b")
            sandbox.wait_for("tlm", 2, PATIENCE)
            watching.wait_for("Scored 1 calls", times=2)
            server.kill()
            watching.send(signal.SIGTERM)
            assert watching.end()[0] == 0
            server.restart()
            found = mlflow.search_traces(locations=[experiment], return_type="list")
            assert {trace.info.trace_id for trace in scored(found)} == {*first, *second}
            assert all(len(trace.info.assessments) == 1 for trace in found)
        finally:
            mlflow.set_tracking_uri(store)
