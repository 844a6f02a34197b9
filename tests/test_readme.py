"""Every snippet and every example runs, without keys."""

import dataclasses
import os
import re
from pathlib import Path

import fresh
import openai
import pytest

import tlm_tracing
from tlm_tracing._data import REASONS

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text("utf-8")
SNIPPETS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
EXAMPLES = ["quickstart", "stream", "async_app", "own_scorer", "stored", "trace_tlm"]


@pytest.fixture
def environment(sandbox, store):
    return {**os.environ, **sandbox.environment(), "MLFLOW_TRACKING_URI": store}


@pytest.mark.parametrize("snippet", SNIPPETS, ids=lambda snippet: snippet.splitlines()[3][:40])
def test_a_readme_snippet_runs(snippet, environment):
    needs_responses = "client.responses" in snippet or "TrustedChatAgent" in snippet
    if needs_responses and not hasattr(openai.OpenAI, "responses"):
        pytest.skip("this openai has no Responses API")
    done = fresh.run(snippet, env=environment)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("name", EXAMPLES)
def test_an_example_runs(name, environment):
    done = fresh.run(ROOT / "examples" / f"{name}.py", "--sandbox", env=environment)
    assert done.returncode == 0, done.stderr
    assert "score" in done.stdout or "trust" in done.stdout


def test_the_replay_compares_what_is_stored(environment, tmp_path):
    rows = tmp_path / "rows.jsonl"
    rows.write_text(
        "".join(
            f'{{"prompt": "q{n}", "response": "a{n}", "trustworthiness_score": {n / 7}}}\n'
            for n in range(7)
        )
    )
    replay = ROOT / "examples" / "replay.py"
    done = fresh.run(replay, str(rows), env=environment, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "7 traces, 0 missing, 0 crossed, 0 without their three spans" in done.stdout


def test_every_file_that_the_readme_links_to_is_there():
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        assert target.startswith("http") or (ROOT / target).exists(), target


def test_the_settings_table_is_complete():
    named = set(re.findall(r"`(\w+)`", README))
    assert {field.name for field in dataclasses.fields(tlm_tracing.Config)} <= named


def test_every_reason_is_in_the_readme():
    assert set(re.findall(r"`(\w+)`", README)) >= REASONS


def test_ci_runs_the_readmes_test_command():
    script = (ROOT / ".ci" / "run").read_text("utf-8")
    for part in ('-e ".[test]"', 'python" -m pytest'):
        assert part in script
    assert '-e ".[test]"' in README
    assert "python -m pytest" in README
