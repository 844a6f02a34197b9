"""Page: the report as one HTML file that needs no network, and lets nothing in it use one."""

from __future__ import annotations

import base64
import hashlib
import os
from datetime import datetime, timezone
from importlib import resources
from typing import TYPE_CHECKING, Any
from urllib.parse import quote, urlencode

import jinja2

from tlm_tracing import _redacted
from tlm_tracing._report import _said
from tlm_tracing._report._table import level

if TYPE_CHECKING:
    from tlm_tracing._report._find import Found
    from tlm_tracing._report._row import Row

_LONGEST = 20_000


def write(path: str | os.PathLike[str], found: Found, threshold: float | None) -> None:
    """Write the page.

    Args:
        path: Where to.
        found: The answers.
        threshold: The threshold to mark; the suggested one by default, if there is one.

    Raises:
        OSError: If the file can't be written.
    """
    page = render(found, threshold)
    with open(path, "w", encoding="utf-8", errors="replace") as file:
        file.write(page)


def render(found: Found, threshold: float | None) -> str:
    """The page as text, arguments as for :func:`write`."""
    script = _file("page.js")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    said: dict[str, Any] = {"empty": found.empty}
    if len(found.answers.scores):
        said = _said.overview(found.answers, threshold)
        said["worst"] = [_article(row, found.uri) for row in found.worst]
    # Escapes all that is not marked as safe: what is shown was written by others.
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    return environment.from_string(_file("page.html")).render(
        style=_file("page.css"),
        script=script,
        digest=digest,
        subtitle=_said.subtitle(found.answers),
        footer=f"Made by tlm_tracing, {datetime.now(timezone.utc):%Y-%m-%d %H:%M} UTC.",
        **said,
    )


def link(uri: str | None, experiment_id: str | None, trace_id: str) -> str | None:
    """Where MLflow shows a trace; None if the tracking URI is no server's.

    Credentials in the URI are left out.
    """
    if not uri or not uri.lower().startswith(("http://", "https://")) or not experiment_id:
        return None
    server = _redacted.address(uri).rstrip("/")
    chosen = urlencode({"selectedEvaluationId": trace_id})
    return f"{server}/#/experiments/{quote(experiment_id, safe='')}/traces?{chosen}"


def _article(row: Row, uri: str | None) -> dict[str, Any]:
    """What the page shows of one answer."""
    verdict = row.verdict
    texts = (
        ("Prompt", row.prompt),
        ("Answer", row.response),
        ("Right answer", verdict.reference if verdict is not None else None),
        ("Explanation", row.explanation),
    )
    facts = (_said.moment(row.seconds), row.model, row.experiment)
    return {
        "score": f"{row.score:.4f}",
        "level": level(row.score or 0.0),
        "facts": [fact for fact in facts if fact],
        "verdict": None if verdict is None else "right" if verdict.is_right else "wrong",
        "link": link(uri, row.experiment_id, row.trace_id),
        "texts": [(label, _cut(text)) for label, text in texts if text],
        "trace_id": row.trace_id,
    }


def _cut(text: str) -> str:
    if len(text) <= _LONGEST:
        return text
    return f"{text[:_LONGEST]}…\n[{len(text) - _LONGEST:,} more characters are in MLflow]"


def _file(name: str) -> str:
    return resources.files(__package__).joinpath(name).read_text("utf-8")
