"""The demo, as a newcomer runs it: five traces with the five right tags, each time."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import mlflow
import pytest

from tlm_tracing import _demo
from tlm_tracing.cli import main

WANTED = {row["prompt"]: f"{row['score']:.4f}" for row in _demo.CANNED}


def demo(cwd, *arguments, **environment):
    bare = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("OPENAI_", "CLEANLAB_", "MLFLOW_"))
    }
    return subprocess.run(
        [Path(sys.executable).with_name("tlm-tracing"), "demo", *arguments],
        cwd=cwd,
        env={**bare, **environment, "COLUMNS": "200"},
        capture_output=True,
        text=True,
        timeout=120,
    )


def stored(uri):
    client = mlflow.MlflowClient(uri)
    experiment = client.get_experiment_by_name(_demo.EXPERIMENT)
    return client.search_traces(locations=[experiment.experiment_id])


def test_the_demo_leaves_five_tagged_traces_and_a_second_run_too(tmp_path):
    for runs in (1, 2):
        done = demo(tmp_path)
        assert done.returncode == 0, done.stderr
        assert done.stderr == ""
        found = stored(f"sqlite:///{tmp_path / 'mlflow.db'}")
        assert len(found) == 5 * runs
        for trace in found:
            question = trace.data.spans[0].inputs["question"]
            assert trace.info.tags["trust_score"] == WANTED[question]
            assert trace.info.tags["explanation"]
            assert len(trace.data.spans) == 4
        said = done.stdout
        assert [said.index(score) for score in sorted(WANTED.values())] == sorted(
            said.index(score) for score in WANTED.values()
        )
        assert "canned" in said
        (command,) = re.findall(r"^  (\S+) ui --backend-store-uri \"sqlite:", said, re.MULTILINE)
        assert shutil.which(command)
        assert "http://127.0.0.1:5000" in said


def test_live_without_keys_names_them(tmp_path):
    done = demo(tmp_path, "--live")
    assert done.returncode == 2
    assert "OPENAI_API_KEY and CLEANLAB_TLM_API_KEY" in done.stderr
    assert not list(tmp_path.iterdir())


def test_live_asks_the_services_that_the_environment_names(tmp_path, sandbox):
    sandbox.load(_demo.CANNED)
    done = demo(tmp_path, "--live", MLFLOW_MODEL_CATALOG_URI="", **sandbox.environment())
    assert done.returncode == 0, done.stderr
    assert len(sandbox.requests("openai")) == len(sandbox.requests("tlm")) == 5
    assert "canned" not in done.stdout


def test_live_without_an_answer_says_so(tmp_path, sandbox):
    sandbox.default("openai", status=401)
    done = demo(tmp_path, "--live", MLFLOW_MODEL_CATALOG_URI="", **sandbox.environment())
    assert done.returncode == 1
    assert "OpenAI did not answer" in done.stderr
    assert "Traceback" not in done.stderr


def test_without_a_command_the_help_is_shown(capsys):
    assert main([]) == 2
    said = capsys.readouterr().out
    assert "demo" in said
    assert "doctor" in said


def test_an_unknown_command_is_refused(capsys):
    with pytest.raises(SystemExit):
        main(["dance"])
    assert "demo" in capsys.readouterr().err
