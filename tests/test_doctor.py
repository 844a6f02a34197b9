"""The doctor tells what is the matter with a real world that is broken on purpose."""

import contextlib
import http.server
import json
import logging
import os
import socket
import sqlite3
import subprocess
import sys
import threading
import time
from pathlib import Path

import mlflow
import pytest

from tlm_tracing import _config, _doctor
from tlm_tracing._doctor import _check
from tlm_tracing.cli import main
from tlm_tracing.exceptions import ConfigurationError
from tlm_tracing.scorers import HostedTLM

SLIM_PYTHON = os.environ.get("SLIM_PYTHON")


@pytest.fixture
def found(capsys):
    """What the doctor finds in this process, by name."""

    def look(**options):
        checks = _doctor.run(**{"timeout": 30, "score": False, **options})
        printed = capsys.readouterr().out
        assert all(f"{check.name} " in printed for check in checks)
        assert all((check.advice or check.message) in printed for check in checks)
        assert _doctor.status(checks) == any(check.status == "problem" for check in checks)
        return {check.name: check for check in checks}

    return look


@pytest.fixture
def elsewhere(store):
    """Tests may have MLflow turn to another store."""
    yield
    mlflow.set_tracking_uri(store)


@pytest.fixture
def dead_port():
    """Nobody listens there."""
    with socket.socket() as once:
        once.bind(("127.0.0.1", 0))
        yield once.getsockname()[1]


@pytest.fixture
def silent_port():
    """Takes connections, and never answers."""
    with socket.create_server(("127.0.0.1", 0), backlog=100) as listening:
        yield listening.getsockname()[1]


@pytest.fixture
def answering():
    """A server that answers every GET in the same way; gives its address."""
    with contextlib.ExitStack() as servers:

        def serve(status, body, kind="application/json"):
            class Handler(http.server.BaseHTTPRequestHandler):
                def do_GET(self):
                    content = body.encode()
                    self.send_response(status)
                    self.send_header("Content-Type", kind)
                    self.send_header("Content-Length", str(len(content)))
                    self.end_headers()
                    self.wfile.write(content)

                do_POST = do_GET

                def log_message(self, *_):
                    pass

            server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
            threading.Thread(target=server.serve_forever, daemon=True).start()
            servers.callback(server.server_close)
            servers.callback(server.shutdown)
            return f"http://127.0.0.1:{server.server_port}"

        yield serve


def doctor(*arguments, cwd, python=sys.executable, **environment):
    """The installed command, in a process of its own."""
    bare = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("OPENAI_", "CLEANLAB_", "MLFLOW_", "TLM_TRACING_"))
    }
    return subprocess.run(
        [Path(python).with_name("tlm-tracing"), "doctor", *arguments],
        cwd=cwd,
        env={**bare, "MLFLOW_DISABLE_TELEMETRY": "true", **environment},
        capture_output=True,
        text=True,
        timeout=180,
    )


def statuses(done):
    """Status and text by check, as the command prints them."""
    lines = [line.split(None, 1) for line in done.stdout.splitlines()]
    return {
        name: (line[0], line[1])
        for line in lines
        if line and line[0] in ("ok", "problem", "skipped")
        for name in NAMES
        if line[1].startswith(name)
    }


NAMES = (
    "OPENAI_API_KEY",
    "CLEANLAB_TLM_API_KEY",
    "LLM endpoint",
    "Cleanlab",
    "MLflow store",
    "MLflow trace",
)


def test_all_is_well_and_no_trace_stays(tmp_path, sandbox):
    uri = f"sqlite:///{tmp_path / 'traces.db'}"
    done = doctor("--tracking-uri", uri, "--timeout", "60", cwd=tmp_path, **sandbox.environment())
    assert (done.returncode, done.stderr) == (0, ""), done.stdout
    assert "problem " not in done.stdout
    assert "skipped" not in done.stdout
    for package in ("python", "aiohttp", "cleanlab-tlm", "mlflow", "openai", "rich", "wrapt"):
        assert f"ok       {package} " in done.stdout
    assert "billed as one score" in done.stdout
    assert "written and read back in experiment 0, and deleted" in done.stdout
    assert [request.path for request in sandbox.requests("openai")] == ["/v1/models"]
    assert len(sandbox.requests("tlm")) == 1
    assert mlflow.MlflowClient(uri).search_traces(locations=["0"], include_spans=False) == []
    assert not (tmp_path / "mlflow.db").exists()


def test_a_program_gets_one_json_object_and_is_not_billed(tmp_path, sandbox, store):
    environment = {**sandbox.environment(), "OPENAI_API_KEY": " ", "MLFLOW_TRACKING_URI": store}
    done = doctor("--json", "--no-score", "--timeout", "60", cwd=tmp_path, **environment)
    assert (done.returncode, done.stderr) == (1, "")
    told = json.loads(done.stdout)
    assert told["ok"] is False
    by_name = {check["name"]: check for check in told["checks"]}
    assert by_name["OPENAI_API_KEY"]["status"] == "problem"
    assert by_name["OPENAI_API_KEY"]["advice"]
    assert by_name["LLM endpoint"]["status"] == by_name["Cleanlab"]["status"] == "skipped"
    assert by_name["MLflow trace"]["status"] == "ok"
    assert all(
        (check["advice"] is None) == (check["status"] != "problem") for check in told["checks"]
    )
    assert not sandbox.requests("tlm")


@pytest.mark.long
def test_the_time_is_bounded_when_everything_hangs(tmp_path, silent_port):
    silent = f"http://127.0.0.1:{silent_port}"
    started = time.monotonic()
    done = doctor(
        "--timeout",
        "2",
        cwd=tmp_path,
        OPENAI_API_KEY="sk-any",
        OPENAI_BASE_URL=silent,
        CLEANLAB_TLM_API_KEY="any",
        CLEANLAB_API_BASE_URL=silent,
        MLFLOW_TRACKING_URI=silent,
        MLFLOW_EXPERIMENT_NAME="any",
    )
    # Three checks of two seconds, a second of grace each, and imports on a busy machine.
    assert time.monotonic() - started < 60
    assert (done.returncode, done.stderr) == (1, "")
    found = statuses(done)
    for name in ("LLM endpoint", "Cleanlab", "MLflow store"):
        assert found[name][0] == "problem"
        assert "does not answer" in found[name][1]
    assert found["MLflow trace"][0] == "skipped"


def test_whatever_is_wrong_no_secret_is_told(tmp_path, dead_port, answering):
    secrets = {
        "openai": "sk-8Jw2mQx7Lr4Tz9Vb",
        "cleanlab": "z1Dt7Kq5Wn3Hs8Yd",
        "url": "a9Fp6Xg2Uc7Me4Kt",
        "uri": "p/5Zr?8Bv3#Ns6",
        "query": "q7Ud4Jh9Wl2Rx5Oe",
        "setting": "sk-3Cy8Gm5Pi1Qa6Sf",
        "unknown setting": "t2Eb7Nk4Vz9Lo6Hw",
        "token": "m6Rj1Td8Xs3Fu5Yq",
    }
    llm = answering(401, json.dumps({"error": {"message": f"Wrong: {secrets['openai']}"}}))
    done = doctor(
        "--timeout",
        "5",
        cwd=tmp_path,
        OPENAI_API_KEY=secrets["openai"],
        OPENAI_BASE_URL=llm.replace("//", f"//user:{secrets['url']}@"),
        CLEANLAB_TLM_API_KEY=secrets["cleanlab"],
        CLEANLAB_API_BASE_URL=llm,
        MLFLOW_TRACKING_URI=f"postgresql+psycopg2://user:{secrets['uri']}"
        f"@127.0.0.1:{dead_port}/db?password={secrets['query']}",
        MLFLOW_TRACKING_TOKEN=secrets["token"],
        TLM_TRACING_SCORER=secrets["setting"],
        TLM_TRACING_API_KEY=secrets["unknown setting"],
    )
    assert done.returncode == 1
    assert done.stdout.count("problem ") >= 5
    for name, secret in secrets.items():
        for start in range(len(secret) - 5):
            assert secret[start : start + 6] not in done.stdout + done.stderr, name


@pytest.mark.parametrize("seconds", ["0", "-1", "nan", "soon"])
def test_a_timeout_that_is_none_is_wrong_usage(seconds, capsys):
    with pytest.raises(SystemExit) as caught:
        main(["doctor", "--timeout", seconds])
    assert caught.value.code == 2
    assert "--timeout" in capsys.readouterr().err


KEYS = {
    None: "is not set",
    "": "is blank",
    " \n": "is blank",
    "planted-key\n": "around it",
    "  planted-key": "around it",
    "planted\nkey": "line break in it",
    '"planted-key"': "quotes",
    "'planted-key": "quotes",
    "\u201cplanted-key\u201d": "quotes",
    "planted key": "blanks or characters",
    "plantedkéy": "blanks or characters",
}


@pytest.mark.parametrize("name", ["OPENAI_API_KEY", "CLEANLAB_TLM_API_KEY"])
@pytest.mark.parametrize("key", KEYS)
def test_a_key_that_can_be_none_is_told_and_not_sent(
    key, name, found, sandbox, monkeypatch, capsys
):
    if key is None:
        monkeypatch.delenv(name)
    else:
        monkeypatch.setenv(name, key)
    checks = found(score=True)
    assert checks[name].status == "problem"
    assert KEYS[key] in checks[name].message
    assert "planted" not in str(checks)
    side = "openai" if name == "OPENAI_API_KEY" else "tlm"
    asked = {"openai": "LLM endpoint", "tlm": "Cleanlab"}[side]
    assert checks[asked].status == "skipped"
    assert not sandbox.requests(side)


@pytest.mark.parametrize("key", [key for key in KEYS if key and "planted" in key])
def test_the_scorer_takes_blanks_off_a_key_and_says_what_else_is_wrong(key):
    if KEYS[key] == "around it":
        HostedTLM(api_key=key)
        return
    with pytest.raises(ConfigurationError, match=KEYS[key]) as caught:
        HostedTLM(api_key=key)
    assert "CLEANLAB_TLM_API_KEY" in str(caught.value)
    assert "planted" not in str(caught.value)


def test_a_blank_key_is_none(monkeypatch):
    monkeypatch.setenv("CLEANLAB_TLM_API_KEY", " \n")
    assert _config.base().scorer is None


def test_a_key_of_openais_is_not_sent_to_cleanlab(found, sandbox, monkeypatch):
    monkeypatch.delenv("CLEANLAB_API_BASE_URL")
    monkeypatch.setenv("CLEANLAB_TLM_API_KEY", "sk-planted")
    checks = found(score=True)
    assert "key for OpenAI" in checks["CLEANLAB_TLM_API_KEY"].message
    assert checks["Cleanlab"].status == "skipped"


def test_who_wants_no_cleanlab_needs_no_key(found, sandbox, monkeypatch):
    monkeypatch.delenv("CLEANLAB_TLM_API_KEY")
    monkeypatch.setenv("TLM_TRACING_SCORER", "none")
    checks = found(score=True)
    assert checks["CLEANLAB_TLM_API_KEY"].status == checks["Cleanlab"].status == "skipped"


def test_azures_key_is_a_key(found, sandbox, monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY")
    monkeypatch.setenv("AZURE_OPENAI_API_KEY", "any")
    checks = found()
    assert checks["OPENAI_API_KEY"].status == checks["LLM endpoint"].status == "skipped"


NO_SCOPE = '{"error": {"message": "You have insufficient permissions for this operation."}}'
LLM = {
    "no model": (200, '{"object": "list", "data": []}', "ok", "answers"),
    "no list of models": (404, "not here", "ok", "lists no models (404)"),
    "no GET": (405, "not so", "ok", "lists no models (405)"),
    "a key for some things": (403, NO_SCOPE, "ok", "may not list models"),
    "a wrong key": (401, "{}", "problem", "refuses the key (401)"),
    "a blocked key": (403, "{}", "problem", "refuses the key (403)"),
    "a used up quota": (429, "{}", "problem", "limit is reached (429)"),
    "an outage": (503, "<html>", "problem", "answers 503"),
    "a page": (200, "<html>", "problem", "not as an API does"),
    "a list": (200, "[]", "problem", "not as an API does"),
}


@pytest.mark.parametrize("answer", LLM)
def test_what_the_llm_endpoint_answers_is_told(answer, found, sandbox, answering, monkeypatch):
    code, body, status, message = LLM[answer]
    monkeypatch.setenv("OPENAI_BASE_URL", answering(code, body))
    check = found()["LLM endpoint"]
    assert check.status == status
    assert message in check.message


@pytest.mark.parametrize(
    ("address", "reason"),
    [
        ("http://127.0.0.1:{dead_port}/v1", "refused"),
        ("http://nobody.invalid/v1", "name of its host"),
        ("localhost:8000", "no http or https URL"),
        ("https://127.0.0.1:{plain_port}/v1", "TLS"),
    ],
)
def test_why_the_llm_endpoint_does_not_answer_is_told(
    address, reason, found, sandbox, dead_port, answering, monkeypatch
):
    plain_port = answering(200, "{}").rpartition(":")[2]
    monkeypatch.setenv(
        "OPENAI_BASE_URL", address.format(dead_port=dead_port, plain_port=plain_port)
    )
    check = found()["LLM endpoint"]
    assert check.status == "problem"
    assert reason in check.message
    assert "OPENAI_BASE_URL" in check.advice


CLEANLAB = {
    "a wrong key": ({"status": 401}, "refused the key", "CLEANLAB_TLM_API_KEY"),
    "a rate limit": ({"status": 429, "retry_after": 60}, "rate limit", "Wait 60 s"),
    "another address": ({"status": 404}, "not at this address", "CLEANLAB_API_BASE_URL"),
    "an outage": ({"status": 503}, "answered 503", "unscored"),
    "a page": ({"html": True}, "no JSON object", "unscored"),
    "no score": ({"no_score": True}, "no confidence_score", "Try again"),
    "null": ({"score": None}, "without a score", "Try again"),
    "NaN": ({"score": "nan"}, "without a score", "Try again"),
}


@pytest.mark.parametrize("answer", CLEANLAB)
def test_what_cleanlab_answers_is_told(answer, found, sandbox):
    behaviour, message, advice = CLEANLAB[answer]
    sandbox.default("tlm", **behaviour)
    check = found(score=True)["Cleanlab"]
    assert check.status == "problem"
    assert message in check.message
    assert advice in check.advice


def test_a_cleanlab_that_is_down_and_one_that_hangs_are_told_apart(found, sandbox):
    sandbox.stop_side("tlm")
    assert "refused" in found(score=True)["Cleanlab"].message
    sandbox.start_side("tlm")
    sandbox.default("tlm", hang=True)
    assert "within 5 s" in found(score=True, timeout=5)["Cleanlab"].message


def test_every_setting_is_checked_and_no_value_told(found, sandbox, monkeypatch):
    for name in _config.environment_names():
        monkeypatch.setenv(name, "planted")
    checks = found()
    for name in _config.environment_names():
        assert checks[name].status == "problem"
        assert "must be" in checks[name].message
    assert checks["recording"].status == "skipped"
    assert "planted" not in str(checks)
    assert checks["MLflow trace"].status == "ok"


@pytest.mark.parametrize(
    ("name", "advice"),
    [
        ("TLM_TRACING_TRESHOLD", "Did you mean TLM_TRACING_THRESHOLD?"),
        ("TLM_TRACE_MODE", "Did you mean TLM_TRACING_MODE?"),
        ("tlm_tracing_mode", "Set TLM_TRACING_MODE."),
        ("TLM_TRACING_MASK", "configure(mask=...)"),
        ("TLM_TRACING_WHATEVER", "There are: TLM_TRACING_MODE"),
    ],
)
def test_a_variable_that_nobody_reads_is_told(name, advice, found, sandbox, monkeypatch):
    monkeypatch.setenv(name, "1")
    monkeypatch.setenv("TLM_TRACING_TIMEOUT", "5")
    checks = found()
    assert checks[name].status == "problem"
    assert advice in checks[name].advice
    assert checks["settings"].status == "ok"
    assert "TLM_TRACING_TIMEOUT" in checks["settings"].message


@pytest.mark.parametrize(
    ("name", "value", "check", "status", "message"),
    [
        ("TLM_TRACING_ENABLED", "false", "recording", "problem", "nothing is recorded"),
        ("TLM_TRACING_MODE", "off", "recording", "ok", "scoring is off"),
        ("MLFLOW_TRACE_SAMPLING_RATIO", "0.25", "sampling", "ok", "0.25"),
        ("MLFLOW_TRACE_SAMPLING_RATIO", "0", "sampling", "problem", "records nothing"),
        ("MLFLOW_TRACE_SAMPLING_RATIO", "25%", "sampling", "problem", "no number from 0 to 1"),
        ("MLFLOW_TRACE_SAMPLING_RATIO", "25", "sampling", "problem", "no number from 0 to 1"),
    ],
)
def test_a_switch_that_is_off_is_told(
    name, value, check, status, message, found, sandbox, monkeypatch
):
    monkeypatch.setenv(name, value)
    checks = found()
    assert checks[check].status == status
    assert message in checks[check].message
    assert checks["MLflow trace"].status == "ok"
    assert os.environ[name] == value


def test_opentelemetry_that_is_switched_off_is_told(found, sandbox, monkeypatch):
    monkeypatch.setenv("OTEL_SDK_DISABLED", "true")
    checks = found()
    for name in ("sampling", "MLflow trace"):
        assert checks[name].status == "problem"
        assert "records nothing" in checks[name].message


def test_mlflow_that_is_switched_off_is_told(found, sandbox):
    mlflow.tracing.disable()
    try:
        checks = found()
    finally:
        mlflow.tracing.enable()
    assert checks["MLflow trace"].status == "problem"
    assert "records nothing" in checks["MLflow trace"].message


@pytest.mark.parametrize(
    ("uri", "message"),
    [
        ("http://127.0.0.1:{dead_port}", "refused"),
        ("http://nobody.invalid", "name of its host"),
        ("nonsense://host", "can't be used"),
    ],
)
def test_why_there_is_no_store_is_told(uri, message, found, sandbox, dead_port, elsewhere):
    checks = found(tracking_uri=uri.format(dead_port=dead_port))
    assert checks["MLflow store"].status == "problem"
    assert message in checks["MLflow store"].message
    assert checks["MLflow trace"].status == "skipped"


@pytest.mark.parametrize(
    ("code", "body", "message", "advice"),
    [
        (401, "Who are you?", "refuses access (401)", "MLFLOW_TRACKING_USERNAME"),
        (403, '{"error_code": "PERMISSION_DENIED"}', "refuses access (403)", "permit"),
        (404, "<html>", "answers 404", "is that an MLflow server?"),
        (503, "<html>", "503", "MLFLOW_TRACKING_URI"),
        (200, "<html>", "can't be used", "MLFLOW_TRACKING_URI"),
    ],
)
def test_what_is_no_mlflow_or_lets_nobody_in_is_told(
    code, body, message, advice, found, sandbox, answering, elsewhere
):
    check = found(tracking_uri=answering(code, body))["MLflow store"]
    assert check.status == "problem"
    assert message in check.message
    assert advice in check.advice


def test_what_mlflow_says_is_told_without_secrets(
    found, sandbox, answering, elsewhere, monkeypatch
):
    monkeypatch.setenv("MLFLOW_TRACKING_TOKEN", "m6Rj1Td8Xs3Fu5Yq")
    said = "m6Rj1Td8Xs3Fu5Yq is no name for an experiment"
    body = json.dumps({"error_code": "INVALID_PARAMETER_VALUE", "message": said})
    message = found(tracking_uri=answering(400, body))["MLflow store"].message
    assert "is no name for an experiment" in message
    assert "m6Rj1Td8" not in message
    with _check.listening() as log:
        logging.getLogger("mlflow").warning("The first line.\n%s", said)
    assert log.last == "The first line. [redacted] is no name for an experiment"


@pytest.mark.long
def test_a_database_that_cannot_be_opened_is_told_in_time(tmp_path, sandbox):
    (tmp_path / "folder").mkdir()
    started = time.monotonic()
    done = doctor(
        "--no-score",
        "--timeout",
        "8",
        "--tracking-uri",
        f"sqlite:///{tmp_path / 'folder'}",
        cwd=tmp_path,
        **sandbox.environment(),
    )
    assert time.monotonic() - started < 90  # MLflow itself tries for 102 seconds
    assert (done.returncode, done.stderr) == (1, "")
    status, said = statuses(done)["MLflow store"]
    assert status == "problem"
    assert "unable to open database file" in said


@pytest.mark.long
def test_a_store_that_cannot_be_written_is_told_in_time(tmp_path, sandbox):
    uri = f"sqlite:///{tmp_path / 'traces.db'}"
    mlflow.MlflowClient(uri).search_experiments()
    with contextlib.closing(sqlite3.connect(tmp_path / "traces.db")) as holder:
        holder.execute("BEGIN IMMEDIATE")
        done = doctor(
            "--no-score",
            "--timeout",
            "8",
            "--tracking-uri",
            uri,
            cwd=tmp_path,
            **sandbox.environment(),
        )
    assert (done.returncode, done.stderr) == (1, "")
    found = statuses(done)
    assert found["MLflow store"][0] == "ok"
    assert found["MLflow trace"][0] == "problem"
    assert "not written" in found["MLflow trace"][1]


def metadata_of(folder, name, version, *lines):
    known = folder / f"{name}-{version}.dist-info"
    known.mkdir()
    head = f"Metadata-Version: 2.1\nName: {name.replace('_', '-')}\nVersion: {version}\n"
    (known / "METADATA").write_text(head + "".join(f"{line}\n" for line in lines))


@pytest.mark.parametrize("version", ["1.55.2", "4.0.0"])
def test_a_package_out_of_range_is_told_by_our_own_metadata(
    version, found, sandbox, tmp_path, monkeypatch
):
    metadata_of(tmp_path, "openai", version)
    monkeypatch.syspath_prepend(tmp_path)
    checks = found()
    assert f"{version} is not supported" in checks["openai"].message
    assert 'pip install "openai' in checks["openai"].advice
    assert checks["LLM endpoint"].status == checks["MLflow trace"].status == "skipped"


def test_what_is_missing_or_too_old_is_told(found, sandbox, tmp_path, monkeypatch):
    lines = ("Requires-Python: >=4", "Requires-Dist: nobody-has-this>=1", "Requires-Dist: rich>=1")
    metadata_of(tmp_path, "tlm_tracing", "0.1.0", *lines, 'Requires-Dist: x>1; extra == "test"')
    metadata_of(tmp_path, "rich", "13.0")
    monkeypatch.syspath_prepend(tmp_path)
    checks = found()
    assert "not supported" in checks["python"].message
    assert "not installed" in checks["nobody-has-this"].message
    assert checks["rich"].message == "13.0"
    assert "x" not in checks


def test_two_mlflows_of_different_versions_are_told(found, sandbox, tmp_path, monkeypatch):
    metadata_of(tmp_path, "mlflow_tracing", "3.0.0")
    monkeypatch.syspath_prepend(tmp_path)
    assert "beside mlflow-tracing 3.0.0" in found()["mlflow"].message


@pytest.mark.skipif(not SLIM_PYTHON, reason="SLIM_PYTHON names no interpreter")
@pytest.mark.parametrize("arguments", [(), ("--tracking-uri", "sqlite:///traces.db")])
def test_the_small_mlflow_is_fine_but_for_its_want_of_a_server(arguments, tmp_path, sandbox):
    done = doctor(
        "--no-score", *arguments, cwd=tmp_path, python=SLIM_PYTHON, **sandbox.environment()
    )
    assert done.returncode == 1
    assert "ok       mlflow-tracing" in done.stdout
    assert "Set MLFLOW_TRACKING_URI" in statuses(done)["MLflow store"][1]
