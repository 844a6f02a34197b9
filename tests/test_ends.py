"""Whatever way a process ends, forks or is frozen, what it has called is kept, and scored."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import textwrap
import threading
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import mlflow
import pytest

EXAMPLES = Path(__file__).parent.parent / "examples"
PATIENCE = 300  # an application that has not ended by then never will
BOUND = 40  # seconds that an end may take, on a busy machine

APPLICATION = """
import asyncio, atexit, multiprocessing, os, signal, sys, threading, time
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor

import mlflow, openai, tlm_tracing as tt

mlflow.set_experiment({experiment!r})
tt.autolog(mode={mode!r})


def ask(number, **options):
    question = [{{"role": "user", "content": str(number)}}]
    with openai.OpenAI(max_retries=0) as client:
        return client.chat.completions.create(model="gpt-4o", messages=question, **options)


def say(word):
    os.write(1, (str(word) + "\\n").encode())  # one line, whoever else is writing


"""

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")


def one_short(first, *others):
    """Parameters of which the first is tried each time, the others by -m long."""
    return [first, *(pytest.param(*as_tuple(one), marks=pytest.mark.long) for one in others)]


def as_tuple(value):
    return value if isinstance(value, tuple) else (value,)


MODES = pytest.mark.parametrize("mode", one_short("background", "inline"))


class Application:
    """A process of its own, as a user would start one, and what it says."""

    def __init__(self, command, environment, folder, **options):
        self._stderr = folder / f"stderr-{time.monotonic_ns()}"
        with self._stderr.open("w") as stderr:
            self._process = subprocess.Popen(
                command,
                env=environment,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=stderr,
                text=True,
                start_new_session=True,
                **options,
            )
        self._watchdog = threading.Timer(PATIENCE, self.kill)
        self._watchdog.start()

    @property
    def stderr(self):
        return self._stderr.read_text()

    @property
    def pid(self):
        return self._process.pid

    def hear(self):
        """The next line that it says; empty if it has ended."""
        return self._process.stdout.readline().rstrip("\n")

    def wait_for(self, line):
        heard = self.hear()
        assert heard == line, self.stderr

    def tell(self, line):
        self._process.stdin.write(f"{line}\n")
        self._process.stdin.flush()

    def send(self, number):
        # Python's handlers wait for the end of a blocking call that was about to begin.
        time.sleep(0.3)
        self._process.send_signal(number)

    def end(self):
        """How it ends, how long that takes, and what else it says meanwhile."""
        started = time.monotonic()
        said, _ = self._process.communicate()
        self._watchdog.cancel()
        return self._process.returncode, time.monotonic() - started, said.splitlines()

    def kill(self):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)

    def close(self):
        self._watchdog.cancel()
        self.kill()
        self._process.communicate()


@pytest.fixture
def start(request, sandbox, store, tmp_path):
    """Starts an application, or a server of one."""
    applications = []

    def begin(code, *server, mode="background", pass_fds=(), **more):
        path = tmp_path / "application.py"
        beginning = APPLICATION.format(experiment=request.node.nodeid, mode=mode)
        path.write_text(beginning + textwrap.dedent(code))
        environment = {**os.environ, **sandbox.environment(), "MLFLOW_TRACKING_URI": store, **more}
        # MLflow's default: traces are written from another thread, a moment after they ended.
        environment.pop("MLFLOW_ENABLE_ASYNC_TRACE_LOGGING", None)
        command = [sys.executable, *(("-m", *server) if server else (path,))]
        applications.append(
            Application(command, environment, tmp_path, cwd=tmp_path, pass_fds=pass_fds)
        )
        return applications[-1]

    yield begin
    sandbox.release()
    for application in applications:
        application.close()


@pytest.fixture
def kept(experiment):
    """Reads back the stored calls: what each has asked, and its status or the reason for none."""

    def read():
        found = mlflow.search_traces(
            locations=[experiment], return_type="list", max_results=1000, include_spans=True
        )
        return sorted(call for trace in found for call in _calls(trace))

    return read


def _calls(trace):
    spans = {span.span_id: span for span in trace.data.spans}
    for llm in spans.values():
        if llm.span_type == "CHAT_MODEL":
            call = spans[llm.parent_id].attributes if llm.parent_id in spans else {}
            outcome = call.get("tlm.status", "without its parent")
            if outcome == "unscored":
                outcome = call["tlm.reason"]
            ours = [one for one in trace.info.assessments if one.span_id == llm.parent_id]
            if outcome == "scored" and (len(ours) != 1 or "trust_score" not in trace.info.tags):
                outcome = f"scored, with {len(ours)} assessments and {trace.info.tags}"
            yield int(llm.inputs["messages"][0]["content"]), outcome


def scored(*numbers):
    return [(number, "scored") for number in numbers]


def assert_nothing_is_said(application):
    """No word of ours, no exception of anybody's."""
    words = ["tlm_tracing", "tlm-tracing", "Traceback", "Exception ignored", "Unclosed", "Error:"]
    for word in words:
        assert word not in application.stderr, application.stderr


# A program comes to its end


ENDS = {
    "normally": ("", 0),
    "by sys.exit": ("sys.exit(3)", 3),
    "by an exception": ("raise ArithmeticError('of the user')", 1),
    "by os._exit after a flush": ("assert tt.flush(30)\nos._exit(4)", 4),
}


@MODES
@pytest.mark.parametrize(("end", "status"), one_short(*ENDS.values()), ids=ENDS)
def test_what_was_called_is_kept_when_a_program_ends(end, status, mode, start, sandbox, kept):
    sandbox.default("tlm", delay=0.3)
    application = start("ask(1)\nask(2)\n" + end, mode=mode)
    assert application.end()[0] == status, application.stderr
    if "raise" in end:
        assert application.stderr.count("Traceback") == 1
        assert "tlm_tracing" not in application.stderr
    else:
        assert_nothing_is_said(application)
    assert kept() == scored(1, 2)


@pytest.mark.long
def test_many_scores_are_waited_for_at_the_end(start, sandbox, kept):
    sandbox.default("tlm", delay=1)
    application = start("with ThreadPoolExecutor(8) as pool:\n    list(pool.map(ask, range(24)))")
    assert application.end()[0] == 0, application.stderr
    assert_nothing_is_said(application)
    assert kept() == scored(*range(24))


@pytest.mark.long
def test_a_burst_is_written_when_a_program_ends(start, kept):
    """Though that takes longer than a process that is told to end is given."""
    burst = "with ThreadPoolExecutor(8) as pool:\n    list(pool.map(ask, range(600)))"
    application = start(burst, mode="off")
    status, seconds, _ = application.end()
    assert status == 0, application.stderr
    assert "could not be delivered" not in application.stderr
    assert kept() == [(number, "off") for number in range(600)], seconds


@pytest.mark.long
def test_a_scorer_that_hangs_holds_an_exit_up_for_a_bounded_time(start, sandbox, kept):
    sandbox.default("tlm", hang=True)
    application = start("for number in range(4): ask(number)\nsay('called')")
    application.wait_for("called")
    status, seconds, _ = application.end()
    assert status == 0, application.stderr
    assert seconds < BOUND
    assert "Traceback" not in application.stderr
    assert kept() == [(number, "timeout") for number in range(4)]


# A signal ends it


WAITS = {
    "in a sleep": "time.sleep(600)",
    "in an event loop": "asyncio.run(asyncio.sleep(600))",
    "in a read": "os.read(0, 1)",
    "for a lock": "threading.Event().wait()",
}


@pytest.mark.parametrize("wait", one_short(*WAITS.values()), ids=WAITS)
def test_sigterm_ends_a_program_with_its_calls_kept_and_scored(wait, start, sandbox, kept):
    sandbox.default("tlm", delay=0.5)
    application = start(f"ask(1)\nask(2)\nsay('waiting')\n{wait}")
    application.wait_for("waiting")
    application.send(signal.SIGTERM)
    status, seconds, _ = application.end()
    assert status == -signal.SIGTERM, application.stderr
    assert seconds < BOUND
    assert_nothing_is_said(application)
    assert kept() == scored(1, 2)


@pytest.mark.long
def test_sigterm_keeps_inline_calls_that_mlflow_has_not_written_yet(start, kept):
    application = start("ask(1)\nsay('waiting')\ntime.sleep(600)", mode="inline")
    application.wait_for("waiting")
    application.send(signal.SIGTERM)
    assert application.end()[0] == -signal.SIGTERM, application.stderr
    assert kept() == scored(1)


@pytest.mark.long
def test_sigterm_is_obeyed_in_bounded_time_when_the_scorer_hangs(start, sandbox, kept):
    sandbox.default("tlm", hang=True)
    application = start("ask(1)\nsay('waiting')\ntime.sleep(600)")
    application.wait_for("waiting")
    sandbox.wait_for("tlm", 1)
    application.send(signal.SIGTERM)
    status, seconds, _ = application.end()
    assert status == -signal.SIGTERM, application.stderr
    assert seconds < BOUND
    assert kept() == [(1, "timeout")]


@pytest.mark.long
@MODES
def test_sigterm_amid_calls_loses_none_that_were_answered_before(mode, start, kept):
    code = """
    for number in range(100_000):
        ask(number)
        say(number)
    """
    application = start(code, mode=mode)
    for number in range(12):
        application.wait_for(str(number))
    application.send(signal.SIGTERM)
    status, seconds, _ = application.end()
    assert status == -signal.SIGTERM, application.stderr
    assert seconds < BOUND
    # The calls go on meanwhile, perhaps faster than they can be written; then that is said.
    assert "Traceback" not in application.stderr
    assert kept()[:12] == scored(*range(12))


def test_sigterm_keeps_what_other_threads_have_called(start, sandbox, kept):
    sandbox.default("tlm", delay=0.5)
    code = """
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(ask, range(4)))
    say("waiting")
    time.sleep(600)
    """
    application = start(code)
    application.wait_for("waiting")
    application.send(signal.SIGTERM)
    assert application.end()[0] == -signal.SIGTERM, application.stderr
    assert_nothing_is_said(application)
    assert kept() == scored(*range(4))


OWN = """
def own(number, frame):
    say("own handler")
    sys.exit(7)
"""
SET_BEFORE = "signal.signal(signal.SIGTERM, own)\nask(1)\n"
SET_AFTER = "ask(1)\nsignal.signal(signal.SIGTERM, own)\n"


@pytest.mark.long
@pytest.mark.parametrize("beginning", one_short(SET_BEFORE, SET_AFTER), ids=["before", "after"])
def test_a_handler_of_ones_own_is_not_touched_and_runs(beginning, start, sandbox, kept):
    sandbox.default("tlm", delay=0.5)
    code = OWN + beginning + "assert signal.getsignal(signal.SIGTERM) is own\nsay('waiting')\n"
    application = start(code + "time.sleep(600)")
    application.wait_for("waiting")
    application.send(signal.SIGTERM)
    status, _, said = application.end()
    assert (status, said) == (7, ["own handler"]), application.stderr
    assert_nothing_is_said(application)
    assert kept() == scored(1)


@pytest.mark.long
def test_a_handler_of_ones_event_loop_is_not_touched_and_runs(start, sandbox, kept):
    sandbox.default("tlm", delay=0.5)
    code = """
    async def main():
        over = asyncio.Event()
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, over.set)
        async with openai.AsyncOpenAI() as client:
            question = [{"role": "user", "content": "1"}]
            await client.chat.completions.create(model="gpt-4o", messages=question)
        say("waiting")
        await over.wait()
        say("own handler")

    asyncio.run(main())
    """
    application = start(code)
    application.wait_for("waiting")
    application.send(signal.SIGTERM)
    status, _, said = application.end()
    assert (status, said) == (0, ["own handler"]), application.stderr
    assert_nothing_is_said(application)
    assert kept() == scored(1)


@pytest.mark.long
def test_a_handler_that_calls_the_one_before_it_ends_the_program(start, sandbox, kept):
    sandbox.default("tlm", delay=0.5)
    code = """
    ask(1)
    before = signal.getsignal(signal.SIGTERM)

    def own(number, frame):
        say("own handler")
        before(number, frame)

    signal.signal(signal.SIGTERM, own)
    say("waiting")
    time.sleep(600)
    """
    application = start(code)
    application.wait_for("waiting")
    application.send(signal.SIGTERM)
    status, _, said = application.end()
    assert (status, said) == (-signal.SIGTERM, ["own handler"]), application.stderr
    assert_nothing_is_said(application)
    assert kept() == scored(1)


@pytest.mark.long
def test_a_program_that_ignores_sigterm_goes_on(start, kept):
    code = """
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    ask(1)
    say("waiting")
    sys.stdin.readline()
    ask(2)
    """
    application = start(code)
    application.wait_for("waiting")
    application.send(signal.SIGTERM)
    application.tell("go on")
    assert application.end()[0] == 0, application.stderr
    assert kept() == scored(1, 2)


@pytest.mark.long
@MODES
def test_sigint_ends_a_program_as_ever_with_its_calls_kept(mode, start, sandbox, kept):
    sandbox.default("tlm", delay=0.3)
    # Where the tests run in the background, their children would ignore it.
    heed = "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
    application = start(heed + "ask(1)\nsay('waiting')\ntime.sleep(600)", mode=mode)
    application.wait_for("waiting")
    application.send(signal.SIGINT)
    # MLflow's own work at exit makes Python forget what it ended by.
    assert application.end()[0] in (-signal.SIGINT, 1), application.stderr
    assert application.stderr.count("Traceback") == 1
    assert "tlm_tracing" not in application.stderr
    assert kept() == scored(1)


# A server ends


@pytest.fixture
def listener():
    """A socket that a server takes over: requests wait in it until there are workers."""
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        listening.listen(64)
        yield listening


def get(listener, number):
    host, port = listener.getsockname()
    with urllib.request.urlopen(f"http://{host}:{port}/{number}", timeout=PATIENCE) as answer:
        return answer.read().decode()


WSGI = """
if os.environ.get("PRELOADED"):
    ask(0)


def application(environ, start_response):
    ask(environ["PATH_INFO"].strip("/"))
    start_response("200 OK", [("Content-Type", "text/plain")])
    return [str(os.getpid()).encode()]
"""


@MODES
@pytest.mark.parametrize("preload", one_short(True, False), ids=["preloaded", "not preloaded"])
def test_gunicorn_keeps_every_request_of_every_worker(
    preload, mode, start, sandbox, listener, kept
):
    pytest.importorskip("gunicorn")
    sandbox.default("tlm", delay=0.2)
    server = start(
        WSGI,
        *("gunicorn", "application:application", "--workers", "2", "--log-level", "warning"),
        *("--bind", f"fd://{listener.fileno()}", *(["--preload"] if preload else [])),
        mode=mode,
        pass_fds=[listener.fileno()],
        **({"PRELOADED": "1"} if preload else {}),
    )
    with ThreadPoolExecutor(8) as pool:
        if preload:
            sandbox.wait_for("openai", 1, PATIENCE)
        # A worker serves one request at a time, so two that hang are in two workers.
        sandbox.script("openai", {"hang": True}, {"hang": True})
        first = [pool.submit(get, listener, number) for number in (1, 2)]
        sandbox.wait_for("openai", 2 + preload, PATIENCE)
        sandbox.release()
        assert len({one.result() for one in first}) == 2
        list(pool.map(lambda number: get(listener, number), range(3, 9)))
        # The last one is being answered when the server is told to stop.
        sandbox.script("openai", {"hang": True})
        last = pool.submit(get, listener, 9)
        sandbox.wait_for("openai", 9 + preload)
        server.send(signal.SIGTERM)
        sandbox.release()
        assert last.result()
    status, seconds, _ = server.end()
    assert status == 0, server.stderr
    assert seconds < BOUND
    assert_nothing_is_said(server)
    assert kept() == scored(*range(0 if preload else 1, 10))


@MODES
def test_uvicorn_keeps_every_request_with_a_flush_in_its_lifespan(
    mode, start, sandbox, listener, experiment, kept
):
    pytest.importorskip("uvicorn")
    pytest.importorskip("fastapi")
    sandbox.default("tlm", delay=0.2)
    server = start(
        "",
        *("uvicorn", "web_app:app", "--app-dir", str(EXAMPLES), "--log-level", "warning"),
        *("--fd", str(listener.fileno())),
        pass_fds=[listener.fileno()],
        TLM_TRACING_MODE=mode,
        MLFLOW_EXPERIMENT_ID=experiment,
    )
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda number: get(listener, f"answer?question={number}"), range(6)))
        sandbox.script("openai", {"hang": True})
        last = pool.submit(get, listener, "answer?question=6")
        sandbox.wait_for("openai", 7)
        server.send(signal.SIGTERM)
        sandbox.release()
        assert last.result()
    status, seconds, _ = server.end()
    assert status in (0, -signal.SIGTERM), server.stderr
    assert seconds < BOUND
    assert_nothing_is_said(server)
    assert kept() == scored(*range(7))


# A process forks


CHILD_ENDS = {
    "by os._exit after a flush": "assert tt.flush(10)\nos._exit(0)",
    "normally": "sys.exit()",
}


@MODES
@pytest.mark.parametrize("end", one_short(*CHILD_ENDS.values()), ids=CHILD_ENDS)
def test_a_parent_and_its_child_both_go_on(end, mode, start, sandbox, kept):
    sandbox.default("tlm", delay=0.5)
    code = f"""
child = None
ask(0)
child = os.fork()  # in the background the first score is still to come
if not child:
    assert tt.stats() == tt.Stats(scored=0, pending=0, unscored={{}}, dropped=0, seconds=0.0)
    ask(1)
    {textwrap.indent(end, "    ").strip()}
ask(2)
assert os.waitpid(child, 0)[1] == 0
ask(3)
"""
    application = start(code, mode=mode)
    assert application.end()[0] == 0, application.stderr
    assert_nothing_is_said(application)
    assert kept() == scored(0, 1, 2, 3)


@pytest.mark.long
def test_children_of_children_go_on(start, kept):
    code = """
    for generation in range(4):
        ask(generation)
        child = os.fork()
        if child:
            assert os.waitpid(child, 0)[1] == 0
            break
    """
    application = start(code)
    assert application.end()[0] == 0, application.stderr
    assert_nothing_is_said(application)
    assert kept() == scored(*range(4))


@pytest.mark.long
def test_a_child_does_not_wait_for_what_its_parent_asked_for(start, sandbox, kept):
    sandbox.default("tlm", hang=True)
    code = """
    ask(0)
    child = os.fork()
    if not child:
        assert tt.flush(10)
        sys.exit()
    assert os.waitpid(child, 0)[1] == 0
    say("child is over")
    """
    application = start(code)
    application.wait_for("child is over")
    sandbox.release()
    assert application.end()[0] == 0, application.stderr
    assert_nothing_is_said(application)
    assert kept() == scored(0)
    assert len(sandbox.requests("tlm")) == 1


@pytest.mark.long
def test_forks_from_a_pool_while_other_threads_are_calling(start, kept):
    code = """
    def calling(first):
        for number in range(first, first + 10):
            ask(number)

    def forking(number):
        child = os.fork()
        if not child:
            try:
                ask(number)
                os._exit(0 if tt.flush(20) else 2)
            finally:
                os._exit(3)
        return os.waitpid(child, 0)[1]

    ask(36)  # a child of a thread that imports modules would wait for it for ever
    with ThreadPoolExecutor(5) as pool:
        callers = [pool.submit(calling, first) for first in (0, 10, 20)]
        forks = list(pool.map(forking, range(30, 36)))
        for caller in callers:
            caller.result()
    assert forks == [0] * 6, forks
    """
    application = start(code)
    assert application.end()[0] == 0, application.stderr
    assert_nothing_is_said(application)
    assert kept() == scored(*range(37))


@pytest.mark.long
@pytest.mark.parametrize("end", CHILD_ENDS.values(), ids=CHILD_ENDS)
def test_a_block_that_is_open_across_a_fork_costs_neither_side_a_call(end, start, kept):
    code = f"""
with tt.trusted_span("block") as span:
    ask(0)
    child = os.fork()
    ask(2 if child else 1)
if not child:
    assert span.trust is not None or span.trusts[-1].wait(10).score is not None
    {textwrap.indent(end, "    ").strip()}
assert os.waitpid(child, 0)[1] == 0
"""
    application = start(code, mode="inline")
    assert application.end()[0] == 0, application.stderr
    assert_nothing_is_said(application)
    assert kept() == scored(0, 1, 2)


FAMILY = """
def work(number):
    return ask(number).choices[0].message.content is not None


if __name__ == "__main__":
    context = multiprocessing.get_context({method!r})
    ask(0)

    process = context.Process(target=work, args=(1,))
    process.start()
    process.join()
    assert process.exitcode == 0

    pool = context.Pool({workers})
    assert pool.map(work, (2, 3)) == [True, True]
    pool.close()
    pool.join()

    with context.Pool({workers}) as pool:  # which ends its workers by SIGTERM
        assert pool.map(work, (4, 5)) == [True, True]

    with ProcessPoolExecutor({workers}, mp_context=context) as pool:
        assert list(pool.map(work, (6, 7))) == [True, True]
    ask(8)
"""


@pytest.mark.long
@pytest.mark.parametrize(
    # Where a worker does not inherit what is imported, its start takes seconds.
    ("method", "workers"),
    one_short(("fork", 2), ("spawn", 1), ("forkserver", 1)),
)
def test_multiprocessing_keeps_what_every_process_has_called(method, workers, start, sandbox, kept):
    sandbox.default("tlm", delay=0.3)
    application = start(FAMILY.format(method=method, workers=workers))
    assert application.end()[0] == 0, application.stderr
    assert_nothing_is_said(application)
    assert kept() == scored(*range(9))


# A process is frozen


HANDLER = """
def handler(number):
    ask(number)
    return tt.flush(5)


for line in sys.stdin:
    say(handler(int(line)))
"""


@MODES
def test_a_handler_that_flushes_may_be_frozen_and_killed(mode, start, sandbox, kept):
    sandbox.default("tlm", delay=0.3)
    application = start(HANDLER, mode=mode)
    for number in range(3):
        application.tell(number)
        application.wait_for("True")
        application.send(signal.SIGSTOP)
        assert kept() == scored(*range(number + 1))
        application.send(signal.SIGCONT)
    application.send(signal.SIGSTOP)
    application.send(signal.SIGKILL)
    assert application.end()[0] == -signal.SIGKILL
    assert kept() == scored(0, 1, 2)


@pytest.mark.long
def test_what_is_pending_when_a_process_is_frozen_is_kept_when_it_thaws(start, sandbox, kept):
    sandbox.default("tlm", hang=True)
    application = start("ask(1)\nsay('called')\nsys.stdin.readline()")
    application.wait_for("called")
    sandbox.wait_for("tlm", 1)
    application.send(signal.SIGSTOP)
    sandbox.release()
    application.send(signal.SIGCONT)
    application.tell("end")
    assert application.end()[0] == 0, application.stderr
    assert_nothing_is_said(application)
    assert kept() == scored(1)


# The interpreter shuts down


@pytest.mark.long
def test_daemon_threads_that_still_call_at_the_end_are_no_trouble(start, kept):
    code = """
    answered = threading.Barrier(5)

    def calling(first):
        ask(first)
        answered.wait()
        while True:
            ask(1000)

    for number in range(4):
        threading.Thread(target=calling, args=(number,), daemon=True).start()
    answered.wait()
    """
    application = start(code)
    status, seconds, _ = application.end()
    assert status == 0, application.stderr
    assert seconds < BOUND
    assert_nothing_is_said(application)
    assert [call for call in kept() if call[0] < 1000] == scored(*range(4))


@pytest.mark.long
def test_threads_that_call_beyond_the_end_of_the_main_one_are_kept(start, sandbox, kept):
    sandbox.default("tlm", delay=0.3)
    code = """
    def calling(number):
        threading.main_thread().join()
        ask(number)

    ask(0)
    for number in (1, 2):
        threading.Thread(target=calling, args=(number,)).start()
    """
    application = start(code)
    assert application.end()[0] == 0, application.stderr
    assert_nothing_is_said(application)
    assert kept() == scored(0, 1, 2)


@pytest.mark.parametrize(
    "first", one_short("", "ask(0)"), ids=["the first call", "not the first call"]
)
@MODES
def test_a_call_at_exit_is_answered_and_costs_no_other(first, mode, start, kept):
    code = "atexit.register(lambda: say(ask(1).choices[0].message.role))\n"
    application = start(code + first, mode=mode)
    status, seconds, said = application.end()
    assert (status, said) == (0, ["assistant"]), application.stderr
    assert seconds < BOUND
    assert_nothing_is_said(application)
    assert [call for call in kept() if call[0] != 1] == (scored(0) if first else [])


@pytest.mark.long
def test_threads_that_call_at_exit_are_no_trouble(start, kept):
    code = """
    go_on, over = threading.Event(), threading.Event()

    def calling():
        go_on.wait()
        ask(1)
        over.set()

    threading.Thread(target=calling, daemon=True).start()
    ask(0)

    @atexit.register
    def last():
        go_on.set()
        say(over.wait(20))
    """
    application = start(code)
    status, _, said = application.end()
    assert (status, said) == (0, ["True"]), application.stderr
    assert_nothing_is_said(application)
    assert (0, "scored") in kept()
