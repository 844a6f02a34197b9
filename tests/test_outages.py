"""Outages on either side: the caller hardly notices, and what was computed is not lost.

Cleanlab's faults are the Sandbox's. MLflow is a real server that is killed, paused and cut off, on
SQLite and PostgreSQL, or a database that is locked, not writable or full; there the application is
a process of its own, so that its first call and its end are seen, too.
"""

import asyncio
import contextlib
import ctypes
import json
import os
import queue
import re
import signal
import socket
import sqlite3
import subprocess
import sys
import textwrap
import threading
import time

import mlflow
import openai
import pytest

import tlm_tracing as tt

pytestmark = pytest.mark.skipif(os.name != "posix", reason="the servers of the tests need POSIX")
if os.name == "posix":
    from tlm_tracing.testing._tracking import Wire

QUESTION = [{"role": "user", "content": "What is the capital of France?"}]
FIRST_CALL, LATER_CALL, END = 15.0, 2.0, 20.0


# Cleanlab's side. What test_hosted has inline and sync, in the other ways to call.

FAULTS = {
    "429": ({"status": 429}, "scorer_unavailable"),
    "429 with Retry-After": ({"status": 429, "retry_after": 30}, "scorer_unavailable"),
    "500": ({"status": 500}, "scorer_unavailable"),
    "503": ({"status": 503}, "scorer_unavailable"),
    "rubbish": ({"garbage": True}, "scorer_unavailable"),
    "null": ({"score": None}, "scorer_error"),
    "NaN": ({"score": "nan"}, "scorer_error"),
    "disconnect": ({"disconnect": True}, "scorer_unavailable"),
    "disconnect in the body": ({"disconnect": "mid"}, "scorer_unavailable"),
    "slow": ({"delay": 5}, "timeout"),
    "hang": ({"hang": True}, "timeout"),
}
TIMEOUT = 1.5
ALL_FAULTS = pytest.mark.parametrize(("fault", "reason"), FAULTS.values(), ids=FAULTS)


def ask(client, **options):
    return client.chat.completions.create(model="gpt-4o", messages=QUESTION, **options)


def asked_synchronously(**settings):
    with openai.OpenAI() as client:
        return ask(tt.wrap_openai(client, **settings))


def asked_asynchronously(**settings):
    async def main():
        async with openai.AsyncOpenAI() as client:
            return await ask(tt.wrap_openai(client, **settings))

    return asyncio.run(main())


def fields(completion):
    return completion.model_dump(exclude={"id", "created", "tlm_metadata"})


@pytest.fixture
def bare(sandbox):
    """What a bare client gets."""
    sandbox.answer(QUESTION[0]["content"], "Paris.", score=0.98)
    return fields(ask(openai.OpenAI()))


@pytest.mark.parametrize(
    ("asked", "mode"),
    [
        (asked_asynchronously, "inline"),
        pytest.param(asked_synchronously, "background", marks=pytest.mark.long),
        pytest.param(asked_asynchronously, "background", marks=pytest.mark.long),
    ],
    ids=["async-inline", "sync-background", "async-background"],
)
@ALL_FAULTS
def test_a_fault_of_cleanlab_costs_the_score_and_nothing_else(
    fault, reason, asked, mode, bare, sandbox, trace
):
    sandbox.default("tlm", **fault)
    started = time.monotonic()
    completion = asked(mode=mode, timeout=TIMEOUT)
    assert time.monotonic() - started < (TIMEOUT + 2 if mode == "inline" else 0.9)
    assert fields(completion) == bare
    trust = tt.trust(completion).wait(TIMEOUT + 2)
    assert (trust.status, trust.reason) == ("unscored", reason)
    found = trace()
    assert found.info.tags["trust_status"] == "unscored"
    assert found.data.spans[0].attributes["tlm.reason"] == reason
    assert found.info.assessments == []


@pytest.mark.long
@ALL_FAULTS
def test_a_fault_of_cleanlab_does_not_keep_a_stream_open(fault, reason, bare, sandbox, trace):
    sandbox.default("tlm", **fault)
    client = tt.wrap_openai(openai.OpenAI(), timeout=TIMEOUT)
    started = time.monotonic()
    with ask(client, stream=True) as stream:
        text = "".join(chunk.choices[0].delta.content or "" for chunk in stream if chunk.choices)
    assert time.monotonic() - started < TIMEOUT + 2
    assert text == "Paris."
    assert tt.trust(stream).reason == reason
    assert trace().data.spans[0].attributes["tlm.reason"] == reason


@pytest.mark.parametrize("mode", ["inline", "background"])
def test_a_refused_connection_costs_one_timeout_for_many_calls(mode, bare, sandbox, traces):
    sandbox.stop_side("tlm")

    async def main():
        async with openai.AsyncOpenAI() as client:
            tt.wrap_openai(client, mode=mode, timeout=TIMEOUT)
            return await asyncio.gather(*(ask(client) for _ in range(5)))

    started = time.monotonic()
    completions = asyncio.run(main())
    assert time.monotonic() - started < TIMEOUT + 2
    for completion in completions:
        assert fields(completion) == bare
        assert tt.trust(completion).wait(TIMEOUT + 2).reason == "scorer_unavailable"
    traces(5)


# MLflow's side.

APPLICATION = """
    import asyncio, json, logging, os, sys, time
    import mlflow, openai
    import tlm_tracing as tt

    logging.basicConfig(format="%(name)s|%(message)s")
    sync, unsync = openai.OpenAI(), None
    tt.autolog()

    def request(question, stream=False):
        asked = [{"role": "user", "content": question}]
        return {"model": "gpt-4o", "messages": asked, "stream": stream}

    def text_of(chunks):
        return "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)

    async def aask(question):
        async with openai.AsyncOpenAI() as client:
            return await client.chat.completions.create(**request(question))

    def ask(question, way):
        started, error = time.monotonic(), None
        try:
            if way == "async":
                answer = asyncio.run(aask(question))
            else:
                answer = sync.chat.completions.create(**request(question, way == "stream"))
            text = text_of(answer) if way == "stream" else answer.choices[0].message.content
        except Exception as problem:
            return {"text": repr(problem), "seconds": time.monotonic() - started}
        return {"text": text, "seconds": time.monotonic() - started}

    def flush(timeout):
        return tt.flush(timeout)

    def dropped():
        return tt.stats().dropped

    def experiment():
        return os.environ["MLFLOW_EXPERIMENT_NAME"]

    def limit(size):
        import resource, signal
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        most = resource.RLIM_INFINITY
        resource.setrlimit(resource.RLIMIT_FSIZE, (most if size is None else size, most))

    print(json.dumps("ready"), flush=True)
    for line in sys.stdin:
        name, *arguments = json.loads(line)
        print(json.dumps(globals()[name](*arguments)), flush=True)
"""


class Application:
    """An application in a process of its own, which does what it is told.

    Attributes:
        name: What it is called when something is wrong.
        questions: What it asks, each once.
        problems: What a user would complain of.
    """

    def __init__(self, name, questions, folder, environment, **start):
        self.name = name
        self.questions = questions
        self.problems = []
        self._asked = 0
        self._log = folder / f"{name}.log"
        self._replies = queue.Queue()
        with self._log.open("w") as log:
            self._child = subprocess.Popen(
                [sys.executable, "-c", textwrap.dedent(APPLICATION)],
                env=environment,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                **start,
            )
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self):
        for line in self._child.stdout:
            self._replies.put(json.loads(line))
        self._child.stdout.close()

    def _reply(self):
        try:
            return self._replies.get(timeout=120)
        except queue.Empty:
            pytest.fail(f"{self.name} hangs: {self.said()}")

    def has_started(self):
        assert self._reply() == "ready", self.said()

    def do(self, name, *arguments):
        self._child.stdin.write(json.dumps([name, *arguments]) + "\n")
        self._child.stdin.flush()
        return self._reply()

    def ask(self, count, first):
        """Ask some questions, by sync, async and streaming calls.

        Args:
            count: So many.
            first: The seconds that the first of them may take.
        """
        for number in range(count):
            question = self.questions[self._asked]
            answer = self.do("ask", question, ("sync", "async", "stream")[self._asked % 3])
            self._asked += 1
            if answer["text"] != f"The Sandbox's answer to: {question}":
                self.complain(f"call {self._asked} gave {answer['text']}")
            if answer["seconds"] > (LATER_CALL if number else first):
                self.complain(f"call {self._asked} took {answer['seconds']:.1f} s")

    def flush(self, timeout, expected):
        """Flush, and compare what it tells."""
        started = time.monotonic()
        if self.do("flush", timeout) != expected:
            self.complain(f"flush({timeout}) did not tell {expected}")
        if time.monotonic() - started > timeout + 2:
            self.complain(f"flush({timeout}) took {time.monotonic() - started:.1f} s")

    def end(self):
        self._ended_at = time.monotonic()
        self._child.stdin.close()

    def has_ended(self, delivered):
        """Judge its end: in time, and with one line if something is not delivered."""
        try:
            status = self._child.wait(60)
        except subprocess.TimeoutExpired:
            pytest.fail(f"{self.name} does not end: {self.said()}")
        seconds = time.monotonic() - self._ended_at
        if status:
            self.complain(f"the exit status was {status}")
        if seconds > END:
            self.complain(f"the end took {seconds:.1f} s")
        lines = [line for line in self.said().splitlines() if line.startswith("tlm_tracing|")]
        told = [line for line in lines if "could not be delivered" in line]
        if len(told) != (0 if delivered else 1) or not all(re.search("[1-9]", one) for one in told):
            self.complain(f"of what was not delivered it told {told}")
        if re.search("tlm_tracing failed|Exception ignored|Exception in thread", self.said()):
            self.complain(f"it said {self.said()}")

    def complain(self, what):
        self.problems.append(f"{self.name}: {what}")

    def said(self):
        return self._log.read_text()

    def kill(self):
        self._child.kill()
        self._child.wait()
        self._reader.join()


@pytest.fixture
def application(request, sandbox, tmp_path):
    """Starts applications; gives each its store, its name and more of its environment."""
    started = []

    def start(uri, name, mode="inline", environment=None, **more):
        settings = {
            **{name: value for name, value in os.environ.items() if "MLFLOW_" not in name},
            **sandbox.environment(),
            "MLFLOW_DISABLE_TELEMETRY": "true",
            "MLFLOW_TRACKING_URI": uri,
            "TLM_TRACING_MODE": mode,
            **(environment or {}),
        }
        questions = [f"{request.node.name}, {name}, {number}?" for number in range(9)]
        started.append(Application(name, questions, tmp_path, settings, **more))
        return started[-1]

    yield start
    for one in started:
        one.kill()


def unique(name):
    return f"{name} {time.time_ns()}"


def veterans(application, uri, **more):
    """Applications that have done well until now, one in each mode."""
    apps = [application(uri, mode, mode, **more) for mode in ("inline", "background")]
    for app in apps:
        app.has_started()
        app.ask(1, first=FIRST_CALL)
        app.flush(60, expected=True)
    return apps


def newcomers(application, uri, *names, **more):
    """Applications that have not made a call yet, as they are told their experiment."""
    environments = {
        "by name": lambda: {"MLFLOW_EXPERIMENT_NAME": unique("by name")},
        "by id": lambda: {
            "MLFLOW_EXPERIMENT_ID": mlflow.MlflowClient(tracking_uri=uri).create_experiment(
                unique("by id")
            )
        },
        "by default": dict,
    }
    apps = [
        application(uri, name, environment=environments[name](), **more)
        for name in names or environments
    ]
    for app in apps:
        app.has_started()
    return apps


def meet(old, new, calls=2):
    """Make calls in an outage."""
    for app in old:
        app.ask(calls, first=LATER_CALL)
    for app in new:
        app.ask(calls, first=FIRST_CALL)


def assert_no_problems(apps):
    problems = [problem for app in apps for problem in app.problems]
    assert not problems, "\n".join(problems)


def assert_nothing_is_lost(apps, uri):
    """After an outage all comes into the store, once, and nobody has a complaint."""
    for app in apps:
        app.ask(1, first=LATER_CALL)
    for app in apps:
        app.flush(90, expected=True)
        if dropped := app.do("dropped"):
            app.complain(f"{dropped} were dropped")
        app.end()
    for app in apps:
        app.has_ended(delivered=True)
        look_up(app, uri)
    assert_no_problems(apps)


def look_up(app, uri):
    """Each question has to have one trace: complete, scored, with one assessment."""
    client = mlflow.MlflowClient(tracking_uri=uri)
    experiments = [one.experiment_id for one in client.search_experiments()]
    found = client.search_traces(locations=experiments, max_results=500)
    for question in app.questions[: app._asked]:
        traces = [trace for trace in found if question in trace.info.request_preview]
        if len(traces) != 1:
            app.complain(f"{len(traces)} traces of {question}")
        for trace in traces:
            names = sorted(span.name for span in trace.data.spans)
            if names != ["chat gpt-4o", "openai.chat.completions", "tlm.trustworthiness"]:
                app.complain(f"a trace of {names}")
            scores = [f"{assessment.value:.4f}" for assessment in trace.info.assessments]
            if scores != [trace.info.tags.get("trust_score")]:
                app.complain(f"assessments {scores}, tags {trace.info.tags}")


def assert_an_end_is_not_held_up(apps):
    """The processes end in time, and tell in one line what is left."""
    for app in apps:
        app.end()
    for app in apps:
        app.has_ended(delivered=False)
    assert_no_problems(apps)


@pytest.fixture(params=["sqlite", pytest.param("postgresql", marks=pytest.mark.long)])
def server(request):
    """A real server, on each back end; it runs when the test begins."""
    name = {"sqlite": "sqlite_server", "postgresql": "postgres_server"}[request.param]
    server = request.getfixturevalue(name)
    server.start()
    yield server
    server.resume()


on_sqlite = pytest.mark.parametrize("server", ["sqlite"], indirect=True)
on_postgres = pytest.mark.parametrize("server", ["postgresql"], indirect=True)


@pytest.mark.long  # .ci/run asks for it, on SQLite
def test_nothing_is_lost_when_the_server_is_killed_and_restarted(server, application):
    old = veterans(application, server.uri)
    server.kill()
    meet(old, [], calls=6)
    for app in old:
        app.flush(1, expected=False)
    server.restart()
    assert_nothing_is_lost(old, server.uri)


@pytest.mark.long
@on_sqlite
def test_nothing_is_lost_when_the_server_is_away_before_the_first_call(server, application):
    new = newcomers(application, server.uri)
    server.kill()
    meet([], new, calls=3)
    for app in new:
        app.flush(1, expected=False)
    server.restart()
    assert_nothing_is_lost(new, server.uri)


@pytest.mark.long
@on_sqlite
def test_what_was_kept_goes_to_its_own_experiment(server, application):
    client = mlflow.MlflowClient(tracking_uri=server.uri)
    (app,) = newcomers(application, server.uri, "by name")
    name = app.do("experiment")
    server.kill()
    meet([], [app], calls=2)
    server.restart()
    assert_nothing_is_lost([app], server.uri)
    experiment = client.get_experiment_by_name(name)
    assert len(client.search_traces(locations=[experiment.experiment_id])) == 3


@pytest.mark.long
@on_sqlite
def test_an_end_is_not_held_up_by_a_dead_server(server, application):
    old, new = veterans(application, server.uri), newcomers(application, server.uri, "by name")
    server.kill()
    meet(old, new)
    assert_an_end_is_not_held_up([*old, *new])


@pytest.mark.long
@pytest.mark.parametrize("since", ["of late", "before the first call"])
def test_nothing_is_lost_when_the_server_is_paused(since, server, application):
    old = veterans(application, server.uri) if since == "of late" else []
    new = [] if old else newcomers(application, server.uri)
    server.pause()
    meet(old, new)
    for app in [*old, *new]:
        app.flush(1, expected=False)
    server.resume()
    assert_nothing_is_lost([*old, *new], server.uri)


@pytest.mark.long
@on_sqlite
def test_an_end_is_not_held_up_by_a_paused_server(server, application):
    old, new = veterans(application, server.uri), newcomers(application, server.uri, "by name")
    server.pause()
    meet(old, new)
    assert_an_end_is_not_held_up([*old, *new])


WIRES = {
    "black hole": lambda wire: wire.swallow(),
    "reset": lambda wire: wire.reset(),
    "503": lambda wire: wire.answer(503),
    "429 with Retry-After": lambda wire: wire.answer(429, retry_after=1),
    "slow": lambda wire: wire.slow(0.5),
}


@pytest.mark.long
@pytest.mark.parametrize("since", ["of late", "before the first call"])
@pytest.mark.parametrize("trouble", WIRES.values(), ids=WIRES)
@on_sqlite
def test_nothing_is_lost_by_a_broken_network(trouble, since, server, application):
    with Wire(server.port) as wire:
        old = veterans(application, wire.uri) if since == "of late" else []
        new = [] if old else newcomers(application, wire.uri, "by name", "by default")
        trouble(wire)
        meet(old, new)
        wire.mend()
        assert_nothing_is_lost([*old, *new], server.uri)


@pytest.mark.long
@on_sqlite
def test_an_end_is_not_held_up_by_a_black_hole(server, application):
    with Wire(server.port) as wire:
        old, new = veterans(application, wire.uri), newcomers(application, wire.uri, "by name")
        wire.swallow()
        meet(old, new)
        assert_an_end_is_not_held_up([*old, *new])


@pytest.mark.long
@on_sqlite
def test_a_score_that_comes_while_the_server_is_away_is_kept(server, application, sandbox):
    """In the background a trace is open when the server dies, and its score comes later."""
    _, app = veterans(application, server.uri)
    sandbox.default("tlm", hang=True)
    app.ask(2, first=LATER_CALL)
    sandbox.wait_for("tlm", 4)
    server.kill()
    sandbox.default("tlm")
    sandbox.release()
    app.flush(3, expected=False)
    server.restart()
    assert_nothing_is_lost([app], server.uri)


@pytest.mark.long
@on_postgres
def test_nothing_is_lost_when_the_database_behind_the_server_dies(server, application):
    old = veterans(application, server.uri)
    server.database.kill()
    meet(old, [])
    for app in old:
        app.flush(1, expected=False)
    server.database.start()
    assert_nothing_is_lost(old, server.uri)


@contextlib.contextmanager
def locked(database):
    """Another process writes, and is not done."""
    connection = sqlite3.connect(database, timeout=30, isolation_level=None)
    with contextlib.closing(connection):
        connection.execute("BEGIN EXCLUSIVE")
        yield
        connection.execute("ROLLBACK")


@pytest.mark.long
@on_sqlite
def test_nothing_is_lost_when_the_database_behind_the_server_is_locked(server, application):
    old = veterans(application, server.uri)
    with locked(server.folder / "mlflow.db"):
        meet(old, [])
        for app in old:
            app.flush(1, expected=False)
    assert_nothing_is_lost(old, server.uri)


# A database file without a server.


@pytest.fixture(scope="module")
def template(tmp_path_factory):
    """A database of MLflow's with all its tables, to be copied."""
    database = tmp_path_factory.mktemp("template") / "mlflow.db"
    mlflow.MlflowClient(tracking_uri=f"sqlite:///{database}").search_experiments()
    return database


@pytest.fixture
def database(template, tmp_path):
    """A database of its own for a test, in a folder of its own."""
    folder = tmp_path / "database"
    folder.mkdir()
    path = folder / "mlflow.db"
    path.write_bytes(template.read_bytes())
    return path


@pytest.mark.long
@pytest.mark.parametrize("since", ["of late", "before the first call"])
def test_nothing_is_lost_when_the_database_is_locked(since, database, application):
    uri = f"sqlite:///{database}"
    old = veterans(application, uri) if since == "of late" else []
    new = [] if old else newcomers(application, uri)
    with locked(database):
        meet(old, new)
        for app in [*old, *new]:
            app.flush(1, expected=False)
    assert_nothing_is_lost([*old, *new], uri)


@pytest.mark.long
def test_an_end_is_not_held_up_by_a_locked_database(database, application):
    uri = f"sqlite:///{database}"
    old, new = veterans(application, uri), newcomers(application, uri, "by name")
    with locked(database):
        meet(old, new)
        assert_an_end_is_not_held_up([*old, *new])


needs_linux = pytest.mark.skipif(sys.platform != "linux", reason="needs Linux")


def obey_permissions():
    """Even root's process, which otherwise may write anywhere."""
    drop, may_write_anywhere = 24, 1  # PR_CAPBSET_DROP, CAP_DAC_OVERRIDE
    ctypes.CDLL(None).prctl(drop, may_write_anywhere, 0, 0, 0)


@pytest.mark.long
@needs_linux
def test_nothing_is_lost_when_the_database_is_not_writable_for_a_while(database, application):
    uri = f"sqlite:///{database}"
    old = veterans(application, uri, preexec_fn=obey_permissions)
    database.chmod(0o444)
    database.parent.chmod(0o555)
    meet(old, [])
    for app in old:
        app.flush(1, expected=False)
    database.parent.chmod(0o755)
    database.chmod(0o644)
    assert_nothing_is_lost(old, uri)


@pytest.mark.long
@needs_linux
@pytest.mark.parametrize("there_is", ["a database", "nothing yet"])
def test_a_store_that_was_never_writable_is_hardly_noticed(there_is, database, application):
    uri = f"sqlite:///{database}"
    new = [
        application(uri, name, environment=environment, preexec_fn=obey_permissions)
        for name, environment in {
            "by name": {"MLFLOW_EXPERIMENT_NAME": "new"},
            "by default": {},
        }.items()
    ]
    if there_is == "nothing yet":
        database.unlink()
    else:
        database.chmod(0o444)
    database.parent.chmod(0o555)
    for app in new:
        app.has_started()
    meet([], new)
    for app in new:
        app.flush(1, expected=False)
    assert_an_end_is_not_held_up(new)
    database.parent.chmod(0o755)


@pytest.mark.long
@needs_linux
def test_nothing_is_lost_when_the_database_may_not_grow_for_a_while(database, application):
    uri = f"sqlite:///{database}"
    old = veterans(application, uri)
    for app in old:
        app.do("limit", 1024)
    meet(old, [])
    for app in old:
        app.flush(1, expected=False)
        app.do("limit", None)
    assert_nothing_is_lost(old, uri)


@pytest.fixture
def small_disk(tmp_path):
    """A disk of 16 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=16m", "tmpfs", folder]
    with contextlib.suppress(OSError):
        if subprocess.run(mount, capture_output=True).returncode == 0:
            yield folder
            subprocess.run(["umount", "-l", folder], check=True)
            return
    pytest.skip("a small disk can't be mounted here")


@pytest.mark.long
def test_nothing_is_lost_when_the_disk_is_full_for_a_while(small_disk, template, application):
    database, filler = small_disk / "mlflow.db", small_disk / "filler"
    database.write_bytes(template.read_bytes())
    uri = f"sqlite:///{database}"
    old = veterans(application, uri)
    with filler.open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while file.write(bytes(4096)):
            pass
    meet(old, [])
    for app in old:
        app.flush(1, expected=False)
    filler.unlink()
    assert_nothing_is_lost(old, uri)


# The servers of these tests are themselves worth a test.


def listens(port):
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


@pytest.mark.long
def test_a_server_ends_with_the_process_that_started_it(tmp_path):
    code = f"""
    import os, signal
    from tlm_tracing.testing._tracking import TrackingServer
    server = TrackingServer(folder={str(tmp_path)!r})
    server.start()
    print(server.port, flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        stdout=subprocess.PIPE,
        text=True,
        timeout=120,
    )
    assert done.returncode == -signal.SIGKILL
    until = time.monotonic() + 10
    while listens(int(done.stdout)):
        assert time.monotonic() < until
