"""Each benchmark still starts, and tells what it is to tell. What it measures is not asserted."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
OURS, OUTSIDE, AUTOLOG = "ours, background", "ours, outside", "autolog"
FEW = ("--rounds", "2", "--calls", "2")

# Of the smallest size, with the ways that are told then. Without a server: its start takes longer
# than all the rest.
SMALL = {
    "overhead": (
        [*FEW, "--export", "sqlite", "--only", OURS, OUTSIDE],
        ["bare", OURS, OUTSIDE, f"{OURS}, sqlite"],
    ),
    "stream": (
        ["--rounds", "2", "--chunks", "5", "--only", OURS, AUTOLOG],
        ["bare", OURS, AUTOLOG],
    ),
    "inline": (
        [*FEW, "--llm", "0", "--tlm", "0", "--export", "sqlite"],
        ["bare", "notebook", "ours"],
    ),
    "concurrency": (
        [*FEW, "--many", "0", "--llm", "0", "--export", "sqlite", "--only", OURS],
        ["bare", OURS],
    ),
    "export": ([*FEW, "--export", "sqlite"], ["ours", "MLflow's own"]),
    "import_time": (["--rounds", "2"], ["`pass`", "`import tlm_tracing`", "`import mlflow`"]),
    "memory": (["--calls", "6", "--lot", "2", "--only", "bare", OURS], ["bare", OURS]),
}


def started(name, *arguments):
    """What a benchmark prints; its exit status tells whether its goals are met."""
    done = subprocess.run(
        [sys.executable, str(BENCHMARKS / f"{name}.py"), *arguments],
        # As a user has it: MLflow's settings are not those of these tests.
        env={key: value for key, value in os.environ.items() if not key.startswith("MLFLOW_")},
        capture_output=True,
        text=True,
    )
    assert done.returncode in (0, 1), done.stderr
    assert "Traceback" not in done.stderr
    return done.stdout


def numbers(data):
    """All numbers in JSON data."""
    if isinstance(data, dict):
        data = list(data.values())
    if isinstance(data, list):
        return [number for one in data for number in numbers(one)]
    return [data] if isinstance(data, (int, float)) and not isinstance(data, bool) else []


@pytest.mark.parametrize("name", SMALL)
def test_a_benchmark_tells_what_it_has_measured_and_where(name, tmp_path):
    """It prints a table with a row for each way, and writes that and the numbers to files."""
    arguments, ways = SMALL[name]
    note, data = tmp_path / "note.md", tmp_path / "data.json"
    printed = started(name, *arguments, "--markdown", str(note), "--out", str(data))
    for way in ways:
        assert f"\n| {way} | " in printed
    assert note.read_text() in printed
    found = json.loads(data.read_text())
    assert {"machine", "python", "mlflow", "openai", "tlm_tracing"} <= found["about"].keys()
    assert all(map(math.isfinite, numbers(found["measured"])))
    for verdict in found["verdicts"]:
        word = "met" if verdict["is_met"] else "NOT MET"
        assert f"- {word}: {verdict['goal']}: {verdict['found']}" in printed
    assert found["verdicts"]


@pytest.mark.parametrize("name", ["backfill", "faults", "soak"])
def test_a_benchmark_of_its_own_kind_starts(name):
    """Those that drive whole servers say at least how they are used."""
    assert "usage: " in started(name, "--help")


def test_every_benchmark_is_here():
    """A new one is added to these tests."""
    found = {path.stem for path in BENCHMARKS.glob("[!_]*.py")}
    assert found - {"backfill", "faults", "soak", "evaluation", "wrap_tlm"} == set(SMALL)
