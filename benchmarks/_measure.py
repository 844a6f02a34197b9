"""What the benchmarks share: variants that take turns, medians with their spread, the note.

A variant is a way of making calls. Many change the whole process, so each has a process of its own,
which lives as long as the benchmark. They take turns in short rounds, in a new order each time, so
that whatever else the machine does hits all of them alike, and are compared round by round.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import random
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, TypeAlias

# Before MLflow is imported, here or in a child: no call to the outside.
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ.setdefault("MLFLOW_MODEL_CATALOG_URI", "")

from tlm_tracing.testing import Sandbox

Job: TypeAlias = Mapping[str, Any]
Found: TypeAlias = dict[str, Any]
"""What one variant measured in one round, by name."""
Rounds: TypeAlias = Mapping[str, Sequence[Found]]
"""That of all variants, by variant."""

OURS = ("tlm_tracing", "mlflow", "openai", "cleanlab-tlm", "opentelemetry-sdk")


# Numbers.


@dataclass(frozen=True)
class Spread:
    """The middle of several measurements, and how far they are apart.

    Attributes:
        median: The median.
        low: The first quartile.
        high: The third quartile.
    """

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Iterable[float]) -> Spread:
        """Of at least one measurement."""
        found = list(values)
        if len(found) == 1:
            return cls(*(found * 3))
        low, median, high = statistics.quantiles(found, n=4, method="inclusive")
        return cls(median, low, high)

    def __str__(self) -> str:
        digits = 2 if abs(self.median) < 100 else 0
        return f"{self.median:.{digits}f} [{self.low:.{digits}f}, {self.high:.{digits}f}]"


def percentile(values: Iterable[float], share: float) -> float:
    """The smallest value that is not below so large a share of all; 0 if there is none."""
    found = sorted(values)
    return found[max(0, math.ceil(share * len(found)) - 1)] if found else 0.0


def spread(rounds: Rounds, variant: str, name: str, *, beyond: str | None = None) -> Spread:
    """A number of a variant over all rounds.

    Args:
        rounds: What was measured.
        variant: Whose.
        name: Which number.
        beyond: Another variant, whose number in the same round is taken off.
    """
    found = [one[name] for one in rounds[variant]]
    if beyond is not None:
        found = [one - less[name] for one, less in zip(found, rounds[beyond], strict=True)]
    return Spread.of(found)


def ratio(rounds: Rounds, variant: str, name: str, *, to: str) -> Spread:
    """How many times another variant's number a variant's is, round by round."""
    pairs = zip(rounds[variant], rounds[to], strict=True)
    return Spread.of([one[name] / other[name] for one, other in pairs])


def cpu_seconds(pid: int | None) -> float:
    """CPU that a process and all that it has started have used, those that have ended included."""
    if pid is None:
        return 0.0
    ticks: dict[int, int] = {}
    children: dict[int, list[int]] = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            # The name before it may have spaces and parentheses.
            fields = path.read_text().rpartition(") ")[2].split()
        except OSError:
            continue  # it has just ended
        one = int(path.parent.name)
        ticks[one] = sum(map(int, fields[11:15]))
        children.setdefault(int(fields[1]), []).append(one)
    waiting, total = [pid], 0
    while waiting:
        one = waiting.pop()
        total += ticks.get(one, 0)
        waiting += children.get(one, ())
    return total / os.sysconf("SC_CLK_TCK")


def resident_megabytes() -> float:
    """The memory that this process has now."""
    found = re.search(r"VmRSS:\s+(\d+)", Path("/proc/self/status").read_text())
    return int(found[1]) / 1024 if found else 0.0


# Processes.

_DATABASE = "mlflow.db"
_MAKE = "import mlflow, sys; mlflow.MlflowClient(sys.argv[1]).search_experiments()"


class Child:
    """A variant's process: does what it is told, one line of JSON there and back each."""

    def __init__(self, script: str, job: Job, environment: Mapping[str, str], log: Path) -> None:
        self._log = log
        with log.open("w") as file:
            self._process = subprocess.Popen(
                [sys.executable, script, "--serve", json.dumps(job)],
                env={**os.environ, **environment},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=file,
                text=True,
            )

    @property
    def pid(self) -> int:
        """The process's id."""
        return self._process.pid

    def do(self, **order: Any) -> Found:
        """Have it work; gives what it measured.

        Raises:
            RuntimeError: If it has failed; says what it said last.
        """
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        line = ""
        try:
            self._process.stdin.write(json.dumps(order) + "\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        except OSError:
            pass  # it has ended, and has said why
        if not line:
            raise RuntimeError(f"A variant failed:\n{self._log.read_text()[-3000:]}")
        return dict(json.loads(line))

    def end(self) -> None:
        """End it at once: what it had to do is done."""
        if self._process.returncode is None:
            self._process.kill()
            self._process.communicate()


def serve(work: Callable[..., Found]) -> None:
    """Be a variant's process: do each order that comes in, until there are no more.

    Args:
        work: Takes an order's arguments, gives what it measured.
    """
    # Whatever others print must not come between the replies.
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for line in sys.stdin:
        print(json.dumps(work(**json.loads(line))), file=replies, flush=True)


class Stage:
    """Where the variants work: the Sandbox, a store for each, and their processes.

    Attributes:
        sandbox: The far side of the wire, in a process of its own.
        server: The MLflow server; None until a variant exports to it.
    """

    def __init__(self, script: str, options: argparse.Namespace) -> None:
        self.server: Any = None
        self._script = script
        self._options = options
        self._stack = ExitStack()
        self._folder = Path(self._stack.enter_context(tempfile.TemporaryDirectory()))
        self.sandbox = self._stack.enter_context(Sandbox(process=True))

    def __enter__(self) -> Stage:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def child(self, name: str, job: Job, *, export: str = "off") -> Child:
        """Start a variant's process.

        Args:
            name: The variant's; also that of its experiment.
            job: What it is told.
            export: Where its traces go: ``"off"``, ``"sqlite"``, a database of its own, or
                ``"server"``.
        """
        folder = self._folder_of(name)
        folder.mkdir()
        if export == "server":
            uri = self._started_server().uri
        else:
            uri = self._database_of(name)
            shutil.copy(self._empty_database(), folder / _DATABASE)
        environment = {**self.sandbox.environment(), "MLFLOW_TRACKING_URI": uri}
        job = {"experiment": name, "export": export, **job}
        child = Child(self._script, job, environment, folder / "log")
        self._stack.callback(child.end)
        return child

    def whole_traces(self, name: str, spans: int, *, export: str, is_scored: bool) -> int:
        """How many traces of a variant are whole in its store.

        Args:
            name: The variant's.
            spans: How many each has to have.
            export: As in :meth:`child`.
            is_scored: Whether each has to have the tags of a score and an assessment, too.
        """
        import sqlalchemy as sa

        queries = [_WHOLE, *([_TAGGED, _ASSESSED] if is_scored else [])]
        uri = self.server.store_uri if export == "server" else self._database_of(name)
        engine = sa.create_engine(uri)
        with engine.connect() as connection:
            counts = [
                connection.execute(sa.text(query), {"name": name, "spans": spans}).scalar_one()
                for query in queries
            ]
        engine.dispose()
        return int(min(counts))

    def gauge(self) -> dict[str, float]:
        """CPU that has been used on the far sides so far, in seconds."""
        server, database = (None, None) if self.server is None else self.server.pids()
        return {"server": cpu_seconds(server), "database": cpu_seconds(database)}

    def _folder_of(self, name: str) -> Path:
        return self._folder / re.sub(r"\W+", "-", name)

    def _database_of(self, name: str) -> str:
        return f"sqlite:///{self._folder_of(name) / _DATABASE}"

    def _empty_database(self) -> Path:
        """A database as MLflow makes it, which takes it seconds."""
        path = self._folder / "empty.db"
        if not path.exists():
            make = [sys.executable, "-c", _MAKE, f"sqlite:///{path}"]
            subprocess.run(make, check=True, stderr=subprocess.DEVNULL)
        return path

    def _started_server(self) -> Any:
        if self.server is None:
            from _stores import Server

            self.server = Server(self._options.backend, folder=self._folder)
            self.server.workers = self._options.workers
            self._stack.enter_context(self.server)
        return self.server


_DONE = """
    select request_id from trace_info where status != 'IN_PROGRESS' and experiment_id =
    (select experiment_id from experiments where name = :name)
"""
_WHOLE = f"""
    select count(*) from (
        select trace_id from spans where trace_id in ({_DONE})
        group by trace_id having count(*) = :spans
    ) as whole
"""
_TAGGED = f"""
    select count(*) from (
        select request_id from trace_tags where request_id in ({_DONE})
        and key in ('trust_score', 'explanation') group by request_id having count(*) = 2
    ) as tagged
"""
_ASSESSED = f"""
    select count(distinct trace_id) from assessments
    where name = 'trustworthiness' and trace_id in ({_DONE})
"""


def take_turns(
    children: Mapping[str, Child],
    rounds: int,
    *,
    gauge: Callable[[], Mapping[str, float]] = dict,
    **order: Any,
) -> dict[str, list[Found]]:
    """Have each work once a round, in a new order each time.

    Args:
        children: The variants.
        rounds: How often each has its turn.
        gauge: Read before and after each turn; what it has grown by is told, too.
        **order: What each is told to do.

    Returns:
        What each measured, round by round.
    """
    found: dict[str, list[Found]] = {name: [] for name in children}
    lots = random.Random(0)
    for number in range(rounds):
        for name in lots.sample(list(children), len(children)):
            before = gauge()
            one = children[name].do(**order)
            grown = {what: value - before[what] for what, value in gauge().items()}
            found[name].append(one | grown)
        if sys.stderr.isatty():
            print(f"\rround {number + 1} of {rounds}", end="", file=sys.stderr, flush=True)
    return found


# The note.


@dataclass(frozen=True)
class Verdict:
    """Whether a goal is met.

    Attributes:
        goal: What was to be.
        is_met: Whether it is.
        found: The numbers.
    """

    goal: str
    is_met: bool
    found: str

    def __str__(self) -> str:
        return f"{'met' if self.is_met else 'NOT MET'}: {self.goal}: {self.found}"


def at_most(goal: str, value: Spread, most: float, unit: str = "times") -> Verdict:
    """Judge a number that is to be small, by its median."""
    return Verdict(f"{goal}, at most {most:g} {unit}", value.median <= most, f"{value} {unit}")


def at_least(goal: str, value: Spread, least: float, unit: str = "times") -> Verdict:
    """Judge a number that is to be large, by its median."""
    return Verdict(f"{goal}, at least {least:g} {unit}", value.median >= least, f"{value} {unit}")


@dataclass
class Table:
    """A table of the note.

    Attributes:
        title: What it tells.
        head: The names of its columns; all but the first are numbers.
        rows: Its rows.
    """

    title: str
    head: Sequence[str]
    rows: list[Sequence[object]] = field(default_factory=list)

    def __str__(self) -> str:
        lines = [self.head, ["---", *["--:"] * (len(self.head) - 1)], *self.rows]
        table = [f"| {' | '.join(map(str, line))} |" for line in lines]
        return "\n".join([f"**{self.title}**", "", *table])


def about(packages: Iterable[str] = (), **more: Any) -> dict[str, Any]:
    """Where this is measured, with what.

    Args:
        packages: Distributions whose versions matter, beside ours; those that are not installed
            are left out.
        **more: What else matters.
    """
    model = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    memory = re.search(r"MemTotal:\s+(\d+)", Path("/proc/meminfo").read_text())
    return {
        "machine": f"{os.cpu_count()} x {model[1] if model else platform.machine()}",
        "memory": f"{int(memory[1]) / 2**20:.0f} GB" if memory else "unknown",
        "system": platform.platform(),
        "load before": f"{os.getloadavg()[0]:.1f}",
        "python": platform.python_version(),
        **{name: found for name in (*OURS, *packages) if (found := _version(name))},
        **more,
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def parser(
    doc: str | None,
    *,
    rounds: int | None = None,
    calls: int | None = None,
    ways: bool = True,
) -> argparse.ArgumentParser:
    """The options that most benchmarks have.

    Args:
        doc: The benchmark's description; its first line is shown.
        rounds: How often each variant takes its turn, by default.
        calls: How many calls it makes then, by default.
        ways: Whether some of the ways can be chosen.
    """
    found = argparse.ArgumentParser(description=(doc or "").partition("\n")[0])
    if rounds is not None:
        found.add_argument("--rounds", type=int, default=rounds)
    if calls is not None:
        found.add_argument("--calls", type=int, default=calls, help="of each variant in a round")
    if ways:
        found.add_argument("--only", nargs="+", metavar="WAY", help="of these ways, and bare")
    found.add_argument("--out", type=Path, metavar="FILE.json")
    found.add_argument("--markdown", type=Path, metavar="FILE.md")
    found.add_argument("--serve", type=json.loads, help=argparse.SUPPRESS)
    return found


def add_server_options(found: argparse.ArgumentParser) -> None:
    """The options of the MLflow server."""
    backends = ["sqlite", "postgresql"]
    found.add_argument("--backend", choices=backends, default="postgresql", help="of the server")
    found.add_argument("--workers", type=int, help="of the MLflow server; its own by default")


def tell(
    options: argparse.Namespace,
    where: Mapping[str, Any],
    tables: Sequence[Table],
    verdicts: Sequence[Verdict],
    measured: Any,
) -> int:
    """Print the note, and write it where it is wanted.

    Args:
        options: Say where.
        where: What :func:`about` gave.
        tables: The tables.
        verdicts: The goals.
        measured: All that was measured, for the JSON file.

    Returns:
        The exit status: 1 if a goal is missed.
    """
    parts = [
        "\n".join(f"- {name}: {value}" for name, value in where.items()),
        *map(str, tables),
        "\n".join(f"- {verdict}" for verdict in verdicts),
    ]
    note = "\n\n".join(filter(None, parts)) + "\n"
    print(note)
    if options.markdown:
        options.markdown.write_text(note)
    if options.out:
        judged = [asdict(verdict) for verdict in verdicts]
        result = {"about": where, "measured": measured, "verdicts": judged}
        options.out.write_text(json.dumps(result, indent=1) + "\n")
    return 0 if all(verdict.is_met for verdict in verdicts) else 1
