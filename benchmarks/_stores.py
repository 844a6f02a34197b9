"""A real MLflow server with tens of thousands of traces, made in a minute, and what became of them.

One call is made and traced by ``mlflow.openai.autolog()``; its rows in the database are the
template of all others, each with its own ids, times and texts. So they are what MLflow writes,
whatever its version.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import random
import re
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlflow
import openai
import sqlalchemy as sa

from tlm_tracing.testing import Sandbox
from tlm_tracing.testing._tracking import TrackingServer, _Process

SYSTEM = "You are a trivia master."
SCORING_SPAN = "tlm.trustworthiness"
ASSESSMENT = "trustworthiness"
WEEK_MS = 7 * 86_400_000
# In these texts a quotation mark tells how often they were written as JSON within JSON.
QUESTION, ANSWER = 'Which is the "question" that is asked here?', 'It is the "answer" to it.'
CHUNK = 1000
OWN_ROWS = 2000


@dataclass(frozen=True)
class Row:
    """A question, its answer, and how TLM scores it.

    Attributes:
        prompt: What the user asked.
        response: What the LLM answered.
        score: In [0, 1].
        explanation: Why.
    """

    prompt: str
    response: str
    score: float
    explanation: str


def rows(data: Path | None) -> list[Row]:
    """What traces are made of.

    Args:
        data: A file with a JSON object a line: ``prompt``, ``response`` and
            ``trustworthiness_score``. None makes up texts of usual lengths.
    """
    made_up = random.Random(0)
    if data is None:
        return [
            Row(_text(made_up, 60, 130), _text(made_up, 150, 450), made_up.random(), why)
            for why in (_text(made_up, 150, 400) for _ in range(OWN_ROWS))
        ]
    read = [json.loads(line) for line in data.read_text("utf-8").splitlines() if line.strip()]
    return [
        Row(
            *(one["prompt"], one["response"], float(one["trustworthiness_score"])),
            one.get("explanation") or _text(made_up, 150, 400),
        )
        for one in read
    ]


def _text(made_up: random.Random, least: int, most: int) -> str:
    words: list[str] = []
    while sum(map(len, words)) + len(words) < least:
        words.append("".join(made_up.choices("etaoinshrdlu", k=made_up.randint(2, 9))))
    return " ".join(words).capitalize()[:most] + "."


@dataclass(frozen=True)
class Stored:
    """A trace of an experiment.

    Attributes:
        trace_id: Its id.
        span_id: Its only span's id, until it is scored.
        row: What it is made of.
    """

    trace_id: str
    span_id: str
    row: Row


def stored(experiment: str, count: int, made_of: Sequence[Row]) -> Iterator[Stored]:
    """The traces of an experiment, oldest first; the same in every process.

    Args:
        experiment: Its name.
        count: How many it has.
        made_of: What they are made of, again and again.
    """
    for number in range(count):
        digest = hashlib.sha256(f"{experiment}/{number}".encode()).hexdigest()
        yield Stored(f"tr-{digest[:32]}", digest[32:48], made_of[number % len(made_of)])


class Server(TrackingServer):
    """An MLflow server with as many workers as MLflow has by default, or as many as are asked for.

    The runner of jobs is off: its processes look for work all the time.
    """

    workers: int | None = None

    def start(self) -> None:
        """Start it, and wait until it answers."""
        if self.database is not None:
            self.database.start()
        env = {
            name: value for name, value in os.environ.items() if not name.startswith("MLFLOW_")
        } | {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "MLFLOW_DISABLE_TELEMETRY": "true"}
        workers = () if self.workers is None else ("--workers", str(self.workers))
        self._process = _Process(
            [
                *(sys.executable, "-m", "mlflow", "server", *workers),
                *("--host", "127.0.0.1", "--port", str(self.port)),
                *("--backend-store-uri", self.store_uri),
                *("--default-artifact-root", str(self.folder / "artifacts")),
            ],
            self.folder / "server.log",
            env=env,
        )
        self._process.until(self._is_healthy)

    def pids(self) -> tuple[int, int | None]:
        """The first process of the server, and of PostgreSQL if that is behind it."""
        assert self._process is not None
        database = None if self.database is None else self.database._process
        return self._process._child.pid, None if database is None else database._child.pid


class Store:
    """The database behind a server."""

    def __init__(self, server: TrackingServer) -> None:
        self._uri = server.uri
        self._engine = sa.create_engine(server.store_uri)
        self._tables = sa.MetaData()
        self._tables.reflect(self._engine)

    @property
    def version(self) -> str:
        """Which database it is."""
        with self._engine.connect() as connection:
            numbers = connection.dialect.server_version_info or ()
        return f"{self._engine.dialect.name} {'.'.join(map(str, numbers))}"

    def template(self, sandbox: Sandbox) -> Template:
        """Have a call traced, and give what there is of it in the database."""
        sandbox.answer(QUESTION, ANSWER, score=0.5)
        mlflow.set_experiment("template")
        mlflow.openai.autolog()
        with openai.OpenAI() as client:
            client.chat.completions.create(
                model="gpt-4o",
                messages=[
                    {"role": "system", "content": SYSTEM},
                    {"role": "user", "content": QUESTION},
                ],
            )
        mlflow.flush_trace_async_logging()
        mlflow.openai.autolog(disable=True)
        trace_id = mlflow.get_last_active_trace_id()
        with self._engine.connect() as connection:
            found = [
                (table, dict(row._mapping))
                for table in self._tables.sorted_tables
                if (key := _trace_id_of(table)) is not None
                for row in connection.execute(sa.select(table).where(key == trace_id))
            ]
        return Template(found)

    def fill(self, template: Template, experiment: str, count: int, made_of: Sequence[Row]) -> str:
        """Make the traces of an experiment.

        Args:
            template: What they are to be like.
            experiment: Its name; it must not exist.
            count: How many.
            made_of: What they are made of, again and again.

        Returns:
            The experiment's id.
        """
        experiment_id = mlflow.MlflowClient(self._uri).create_experiment(experiment)
        start_ms = int(time.time() * 1000) - WEEK_MS
        traces = list(stored(experiment, count, made_of))
        for first in range(0, count, CHUNK):
            lots: dict[sa.Table, list[dict[str, Any]]] = defaultdict(list)
            for number, one in enumerate(traces[first : first + CHUNK], first):
                began_ms = start_ms + number * WEEK_MS // count
                for table, values in template.copy(one, int(experiment_id), began_ms):
                    lots[table].append(values)
            with self._engine.begin() as connection:
                for table, lot in lots.items():
                    connection.execute(sa.insert(table), lot)
        return experiment_id

    def settle(self) -> None:
        """Have PostgreSQL do now what it would do in the midst of a measurement."""
        if self._engine.dialect.name == "postgresql":
            with self._engine.connect().execution_options(isolation_level="AUTOCOMMIT") as one:
                one.execute(sa.text("VACUUM ANALYZE"))
                one.execute(sa.text("CHECKPOINT"))

    def faults(
        self, experiment_id: str, expected: Sequence[Stored], *, spans: bool, assessments: bool
    ) -> list[str]:
        """What is not as it should be after all traces of an experiment were scored.

        Args:
            experiment_id: Where.
            expected: All its traces.
            spans: Whether each is to have a scoring span, and its status.
            assessments: Whether each is to have an assessment.
        """
        wrong: Counter[str] = Counter()
        tags, scoring, assessed = self._found(int(experiment_id))
        for one in expected:
            told, row = tags[one.trace_id], one.row
            checks: dict[str, tuple[Any, Any]] = {
                "explanation": (told.get("explanation"), row.explanation),
                "scoring spans": (scoring[one.trace_id], int(spans)),
                "assessments": (
                    assessed[one.trace_id],
                    [(True, row.score)] if assessments else [],
                ),
            }
            if spans:
                checks["trust_score"] = (told.get("trust_score"), f"{row.score:.4f}")
                checks["trust_status"] = (told.get("trust_status"), "scored")
            else:
                checks["trust_score"] = (float(told.get("trust_score", "nan")), row.score)
            wrong.update(name for name, (found, wanted) in checks.items() if found != wanted)
        return [f"{count} traces with a wrong {name}" for name, count in wrong.items()]

    def faults_as_read(
        self, expected: Sequence[Stored], *, assessments: bool, sample: int = 200
    ) -> list[str]:
        """The same of some traces, as MLflow's client reads them."""
        wrong: Counter[str] = Counter()
        client = mlflow.MlflowClient(self._uri)
        for one in random.Random(0).sample(expected, min(sample, len(expected))):
            trace = client.get_trace(one.trace_id)
            root = next(span for span in trace.data.spans if span.parent_id is None)
            valid = [
                (item.name, item.feedback.value) for item in trace.info.assessments if item.valid
            ]
            scored = [span for span in trace.data.spans if span.name == SCORING_SPAN]
            checks: dict[str, tuple[Any, Any]] = {
                "question": (root.inputs["messages"][-1]["content"], one.row.prompt),
                "answer": (root.outputs["choices"][0]["message"]["content"], one.row.response),
                "trust_score": (trace.info.tags.get("trust_score"), f"{one.row.score:.4f}"),
                "trust_status": (trace.info.tags.get("trust_status"), "scored"),
                "state": (str(trace.info.state), "OK"),
                "assessments": (valid, [(ASSESSMENT, one.row.score)] if assessments else []),
                "parent": ([span.parent_id for span in scored], [root.span_id]),
            }
            wrong.update(name for name, (found, wanted) in checks.items() if found != wanted)
        return [f"MLflow reads {count} with a wrong {name}" for name, count in wrong.items()]

    def _found(
        self, experiment_id: int
    ) -> tuple[dict[str, dict[str, str]], Counter[str], dict[str, list[tuple[bool, float]]]]:
        """Tags, numbers of scoring spans, and assessments, by trace id."""
        info, tag, span, assessment = (
            self._tables.tables[name]
            for name in ("trace_info", "trace_tags", "spans", "assessments")
        )
        here = info.c.experiment_id == experiment_id
        tags: dict[str, dict[str, str]] = defaultdict(dict)
        assessed: dict[str, list[tuple[bool, float]]] = defaultdict(list)
        with self._engine.connect() as connection:
            for trace_id, key, value in connection.execute(
                sa.select(tag.c.request_id, tag.c.key, tag.c.value).join(info).where(here)
            ):
                tags[trace_id][key] = value
            for trace_id, valid, value in connection.execute(
                sa.select(assessment.c.trace_id, assessment.c.valid, assessment.c.value)
                .join(info)
                .where(here, assessment.c.name == ASSESSMENT)
            ):
                assessed[trace_id].append((bool(valid), json.loads(value)))
            scoring = Counter(
                connection.scalars(
                    sa.select(span.c.trace_id).where(
                        span.c.experiment_id == experiment_id, span.c.name == SCORING_SPAN
                    )
                )
            )
        return tags, scoring, assessed


class Template:
    """The rows of one trace, from which those of others are made."""

    def __init__(self, found: Sequence[tuple[sa.Table, Mapping[str, Any]]]) -> None:
        """Read it.

        Args:
            found: Its rows, with the table of each.
        """
        self._info = next(row for table, row in found if table.name == "trace_info")
        self._span = next(row for table, row in found if table.name == "spans")
        marks = self._told(
            Stored(self._info["request_id"], self._span["span_id"], Row(QUESTION, ANSWER, 0, "")),
            self._info["experiment_id"],
            self._info["timestamp_ms"],
        )
        texts = sorted((mark for mark in marks if isinstance(mark, str)), key=len, reverse=True)
        between = re.compile("(" + "|".join(map(re.escape, texts)) + ")")
        self._rows = [
            (
                table,
                {
                    column.name: between.split(value) if isinstance(value, str) else value
                    for column in table.columns
                    if column.computed is None and (value := row[column.name]) is not None
                },
            )
            for table, row in found
        ]

    def copy(
        self, trace: Stored, experiment_id: int, began_ms: int
    ) -> Iterator[tuple[sa.Table, dict[str, Any]]]:
        """The rows of another trace.

        Args:
            trace: Which.
            experiment_id: Where it is to be.
            began_ms: When it is to have begun, in milliseconds since 1970.

        Yields:
            A table, and the values of a row in it.
        """
        told = self._told(trace, experiment_id, began_ms)
        for table, row in self._rows:
            values = {
                name: "".join([told.get(piece, piece) for piece in value])
                if isinstance(value, list)
                else told.get(value, value)
                for name, value in row.items()
            }
            if "experiment_id" in values:
                values["experiment_id"] = experiment_id
            yield table, {name: _cut(table.c[name], value) for name, value in values.items()}

    def _told(self, trace: Stored, experiment_id: int, began_ms: int) -> dict[Any, Any]:
        """What of this trace becomes what of another: ids, times, texts."""
        later = (began_ms - self._info["timestamp_ms"]) * 1_000_000
        told: dict[Any, Any] = {
            self._info["timestamp_ms"]: began_ms,
            f"/{self._info['experiment_id']}/traces/": f"/{experiment_id}/traces/",
        }
        for edge in ("start_time_unix_nano", "end_time_unix_nano"):
            nanoseconds = self._span[edge]
            told |= {nanoseconds: nanoseconds + later, str(nanoseconds): str(nanoseconds + later)}
        for own, new in (
            (self._info["request_id"].removeprefix("tr-"), trace.trace_id.removeprefix("tr-")),
            (self._span["span_id"], trace.span_id),
        ):
            told |= {own: new, _base64(own): _base64(new)}
        for own, new in ((QUESTION, trace.row.prompt), (ANSWER, trace.row.response)):
            for _ in range(3):
                told[own] = new
                own, new = json.dumps(own)[1:-1], json.dumps(new)[1:-1]
        return told


def _trace_id_of(table: sa.Table) -> sa.Column[Any] | None:
    names = ("trace_id",) if table.name in ("spans", "assessments") else ("request_id", "trace_id")
    return next((table.c[name] for name in names if name in table.c), None)


def _cut(column: sa.Column[Any], value: Any) -> Any:
    """A text no longer than its column, as MLflow cuts previews."""
    return value[: getattr(column.type, "length", None)] if isinstance(value, str) else value


def _base64(digits: str) -> str:
    return base64.b64encode(bytes.fromhex(digits)).decode()
