"""Redacted: error messages, log lines and addresses without the credentials in them.

Others write these texts: OpenAI's message on a wrong key quotes the key, and a failed connection
tells its address with the password. What is known to be a secret is taken out wherever it
stands, and so is what looks like one.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import re
import traceback
import urllib.parse
from collections.abc import Callable, Iterable

REDACTED = "[redacted]"

_SHORTEST = 8
_LONGEST = 8_000
_MARGIN = 4_000
_MOST_KNOWN = 1_000
_MOST_FRAMES = 100
_NAMES = (
    r"pass(?:word|wd|phrase)|pwd|token|secret|credentials?|signature|authorization|cookie"
    r"|(?:api|access|account|auth|private|secret|session|shared)[ _-]?key|x-amz-[\w-]+"
)
_SHAPES: tuple[tuple[str, str], ...] = (
    # What SQLAlchemy tells of a failed statement: all that was to be written.
    (r"(?s)\[(?:SQL|parameters): .*\]", REDACTED),
    # The bytes of a picture, say, in the repr of a request.
    (r"[A-Za-z0-9+/_-]{400,}={0,2}", REDACTED),
    (r"(?s)-----BEGIN [A-Z ]*PRIVATE KEY-----.*?(?:-----END [A-Z ]*PRIVATE KEY-----|\Z)", REDACTED),
    (
        r"(?i)\b([a-z][a-z0-9+.-]*://)(?:[^\s/?#@]*@|[^\s/?#:@]*:[^\s\"'<>]*@)",
        rf"\1{REDACTED}@",
    ),
    (r"(?i)([?&;][\w.%~\[\]-]+=)[^\s&;\"'<>)\]}]+", rf"\1{REDACTED}"),
    (r"\b[rsp]k[-_][\w*.-]{6,}", REDACTED),
    (r"\beyJ[\w-]{5,}\.[\w-]+(?:\.[\w-]*)*", REDACTED),
    (r"\b(?:AKIA|ASIA)[A-Z0-9]{12,}", REDACTED),
    (r"\b(?:gh[a-z]_|github_pat_|glpat-|hf_|npm_|pypi-)\w[\w-]{15,}", REDACTED),
    (r"\bx(?:ox[a-z]|app)-[\w-]{6,}", REDACTED),
    (r"\b(?:AIza|ya29\.)[\w-]{20,}", REDACTED),
    (r"(?i)\b(bearer|basic|digest)(\s+)(?:[\w.~+/=*-]{4,})", rf"\1\2{REDACTED}"),
    (
        r"(?i)\b((?:[\w-]*[_-])?(?:authorization|cookie)[\"']?\s*(?:=>|[:=])\s*)"
        r"(?:b?\"[^\"]*\"|b?'[^']*'|[^\r\n\"'}\])]+)",
        rf"\1{REDACTED}",
    ),
    (
        rf"(?i)([\w.-]*(?:{_NAMES})(?:[_-]?(?:id|key|value))?"
        r"(?:[\"']?\s*(?:=>|[:=])\s*|[\"']\s*,\s*(?=b?[\"'])))"
        r"(?:b?\"[^\"]*\"|b?'[^']*'|[^\s,;&)}\]]+)",
        rf"\1{REDACTED}",
    ),
)

# Without a lock: a text may be redacted by a finalizer, in the middle of this, or after a fork.
_known: dict[str, None] = {}
_sources: list[Callable[[], Iterable[str]]] = []


def learn(values: Iterable[object]) -> None:
    """Take these out of every text from now on; of very many the newest.

    Args:
        values: Texts, such as a client's key or a header's value; others, and what is too
            short to be secret, are passed over.
    """
    for value in values:
        if isinstance(value, str):
            for part in _parts(value):
                _known.pop(part, None)
                _known[part] = None
    with contextlib.suppress(StopIteration, RuntimeError):  # another thread was faster
        while len(_known) > _MOST_KNOWN:
            _known.pop(next(iter(_known)), None)


@functools.lru_cache(maxsize=_MOST_KNOWN)
def _parts(value: str) -> tuple[str, ...]:
    """What of a value is to be taken out of texts: all of it, and each part."""
    parts = (value.strip(), *re.split(r"[\s;,=\"]+", value))
    return tuple(part for part in parts if len(part) >= _SHORTEST)


def learn_from(source: Callable[[], Iterable[str]]) -> None:
    """Ask for further secrets whenever a text is redacted."""
    _sources.append(source)


def redact(text: str) -> str:
    """A text without the credentials in it; of a very long one, the beginning."""
    is_long = len(text) > _LONGEST
    text = text[: _LONGEST + _MARGIN]  # so that no secret is cut before it is known
    for value in sorted(_secrets(), key=len, reverse=True):
        text = text.replace(value, REDACTED)
        if "%" in text:
            text = text.replace(urllib.parse.quote(value, safe=""), REDACTED)
    for shape, instead in _shapes():
        text = shape.sub(instead, text)
    return f"{text[:_LONGEST]}…" if is_long else text


def said(error: BaseException) -> str:
    """An exception's message without the credentials in it."""
    try:
        return redact(str(error))
    except Exception:
        return "[a message that cannot be shown]"


def stack(error: BaseException) -> str:
    """Where an exception came from: no line of source, no value."""
    walked = traceback.walk_tb(error.__traceback__)
    frames = traceback.StackSummary.extract(walked, lookup_lines=False)[-_MOST_FRAMES:]
    return "\n".join(f"{frame.filename}:{frame.lineno} in {frame.name}" for frame in frames)


def address(url: str) -> str:
    """A URL without userinfo, query and fragment: either may be what opens it."""
    found = re.match(r"\s*([A-Za-z][A-Za-z0-9+.-]*:)?//(?:[^/?#\\]*@)?([^?#]*)", url)
    return re.split("[?#]", url)[0] if found is None else f"{found[1] or ''}//{found[2]}"


def host(url: str) -> str:
    """The server in a URL alone."""
    found = re.match(r"([A-Za-z][A-Za-z0-9+.-]*://)?(?:[^/\\]*@)?([^/\\]*)", address(url))
    return "" if found is None else f"{found[1] or ''}{found[2]}"


class _Filter(logging.Filter):
    """What is logged here quotes others' errors; tracebacks would quote source lines, too."""

    def filter(self, record: logging.LogRecord) -> bool:
        try:
            text = redact(record.getMessage())
            error = record.exc_info[1] if record.exc_info else None
            if error is not None:
                text = f"{text}\n{type(error).__name__}: {said(error)}\n{stack(error)}"
        except Exception:
            text = "tlm_tracing has something to say that cannot be shown."
        record.msg, record.args = text, ()
        record.exc_info = record.exc_text = record.stack_info = None
        return True


def _secrets() -> set[str]:
    secrets = set(_known.copy())
    for source in _sources:
        with contextlib.suppress(Exception):
            secrets.update(value for value in source() if len(value) >= _SHORTEST)
    return secrets


@functools.cache
def _shapes() -> tuple[tuple[re.Pattern[str], str], ...]:
    return tuple((re.compile(shape), instead) for shape, instead in _SHAPES)


logging.getLogger("tlm_tracing").addFilter(_Filter())
