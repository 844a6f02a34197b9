"""What the Sandbox knows: canned answers, how it is to behave, what it was asked."""

from __future__ import annotations

import hashlib
import json
import threading
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

Side: TypeAlias = Literal["openai", "tlm"]
Behaviour: TypeAlias = dict[str, Any]

_BOTH = {
    "status",
    "html",
    "retry_after",
    "fail_first",
    "delay",
    "hang",
    "disconnect",
    "garbage",
    "body",
}
BEHAVIOURS: Mapping[str, frozenset[str]] = {
    "openai": frozenset(
        _BOTH
        | {"content", "refusal", "reasoning", "tools", "tool_args", "function_call", "empty"}
        | {"null_content", "no_choices", "finish_reason"}
        | {"cached_tokens", "reasoning_tokens", "builtin", "failed"}
        | {"chunks", "chunk_delay", "truncate", "stream_error"}
    ),
    "tlm": frozenset(
        _BOTH
        | {"score", "no_score", "explanation", "no_log", "field_scores", "field_fault"}
        | {"eval_scores", "eval_fault"}
        | {"empty_body", "partial", "drip", "code"}
    ),
}
_STEERED = "sandbox:"


@dataclass(frozen=True)
class RecordedRequest:
    """A request as it arrived.

    Attributes:
        side: ``"openai"`` or ``"tlm"``.
        method: ``"POST"``, ...
        path: Path with the query.
        headers: Values by header name in lower case.
        raw_headers: Names and values as they came, in order.
        body: The bytes of the body.
    """

    side: str
    method: str
    path: str
    headers: Mapping[str, str]
    raw_headers: tuple[tuple[str, str], ...]
    body: bytes

    @property
    def json(self) -> Any:
        """The body as data."""
        return json.loads(self.body)


@dataclass(frozen=True)
class Row:
    """A canned answer and how it is scored."""

    text: str
    score: float | None
    explanation: str | None


class State:
    """Shared by both sides; safe to use from any thread."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._era = 0
        self.clear()

    def clear(self) -> None:
        """Forget everything."""
        with self._changed:
            self._era += 1
            self._rows: dict[str, Row] = {}
            self._scores: dict[tuple[str, str], Row] = {}
            self._scripts: dict[str, deque[Behaviour]] = {side: deque() for side in BEHAVIOURS}
            self._defaults: dict[str, Behaviour] = {side: {} for side in BEHAVIOURS}
            self._requests: list[RecordedRequest] = []
            self._attempts: Counter[tuple[str, bytes]] = Counter()
            self._peers: dict[str, set[Any]] = {side: set() for side in BEHAVIOURS}
            self._in_flight: Counter[str] = Counter()
            self._max_in_flight: Counter[str] = Counter()

    def load(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Add canned answers; see :meth:`Sandbox.load`."""
        read = [_read(row) for row in rows]
        with self._changed:
            for question, canned in read:
                self._rows[question] = canned
                self._scores[question, canned.text.strip()] = canned

    def script(self, side: str, behaviours: Iterable[Behaviour]) -> None:
        """Queue behaviours, one for each of the next requests."""
        checked = [_checked(side, behaviour) for behaviour in behaviours]
        with self._changed:
            self._scripts[side].extend(checked)

    def default(self, side: str, behaviour: Behaviour) -> None:
        """Set how requests without a script are answered."""
        checked = _checked(side, behaviour)
        with self._changed:
            self._defaults[side] = checked

    def behaviour(self, side: str, path: str, body: bytes, model: str) -> Behaviour:
        """How the request at hand is to be answered."""
        with self._changed:
            if self._scripts[side]:
                chosen = self._scripts[side].popleft()
            else:
                chosen = {**self._defaults[side], **_steering(side, model)}
            fails = chosen.pop("fail_first", 0)
            if fails:
                self._attempts[path, body] += 1
                if self._attempts[path, body] <= fails:
                    return {"status": 500, **chosen}
                chosen.pop("status", None)
            return chosen

    def canned(self, question: str) -> Row | None:
        """The canned answer to a question."""
        return self._rows.get(question.strip())

    def score(self, prompt: str, response: str) -> Row:
        """The score of a pair: its own if it is canned, else one made of a hash."""
        asked = (self._scores.get((one.strip(), response.strip())) for one in questions_of(prompt))
        found = next(filter(None, asked), None)
        if found is None or found.score is None:
            digest = hashlib.sha256(f"{prompt}\x1f{response}".encode("utf-8", "replace")).digest()
            score = int.from_bytes(digest[:4], "big") / 2**32
            return Row(response, score, "Made up by the Sandbox: there is no canned score.")
        if found.explanation is None:
            return Row(response, found.score, "Canned by the Sandbox.")
        return found

    def arrived(self, request: RecordedRequest, peer: Any) -> int:
        """Note a request; gives the era that :meth:`left` wants to know."""
        with self._changed:
            side = request.side
            self._requests.append(request)
            self._peers[side].add(peer)
            self._in_flight[side] += 1
            self._max_in_flight[side] = max(self._max_in_flight[side], self._in_flight[side])
            self._changed.notify_all()
            return self._era

    def left(self, side: str, era: int) -> None:
        """Note that a request is over; one from before a :meth:`clear` counts no more."""
        with self._changed:
            self._in_flight[side] -= era == self._era

    def requests(self, side: str) -> list[RecordedRequest]:
        """What has arrived, in order."""
        with self._changed:
            return [request for request in self._requests if request.side == side]

    def wait_for(self, side: str, count: int, timeout: float) -> bool:
        """Wait until so many requests have arrived."""
        with self._changed:
            return self._changed.wait_for(
                lambda: sum(request.side == side for request in self._requests) >= count, timeout
            )

    def connections(self, side: str) -> int:
        """How many connections were used."""
        return len(self._peers[side])

    def max_in_flight(self, side: str) -> int:
        """How many requests were open at once, at most."""
        return self._max_in_flight[side]


def questions_of(prompt: str) -> Iterator[str]:
    """What the user may have asked last in a prompt as TLM gets it, the likeliest first."""
    yield prompt
    turns = prompt.removesuffix("Assistant:")
    last = f"\n\n{turns}".rpartition("\n\nUser: ")[2]
    yield last
    # Tool calls and their results may have followed.
    yield last.partition("\n\nAssistant: ")[0]


def _read(row: Mapping[str, Any]) -> tuple[str, Row]:
    try:
        question, text = row["prompt"].strip(), row["response"]
    except KeyError as error:
        raise ValueError(f"A row needs prompt and response; {error} is missing.") from None
    score = row.get("score", row.get("trustworthiness_score"))
    return question, Row(text, score, row.get("explanation"))


def _checked(side: str, behaviour: Behaviour) -> Behaviour:
    if side not in BEHAVIOURS:
        raise ValueError(f"There is no side {side!r}; the sides are 'openai' and 'tlm'.")
    unknown = sorted(set(behaviour) - BEHAVIOURS[side])
    if unknown:
        known = ", ".join(sorted(BEHAVIOURS[side]))
        raise ValueError(f"Unknown behaviour {', '.join(unknown)}; known are: {known}.")
    return dict(behaviour)


def _steering(side: str, model: str) -> Behaviour:
    """``model="sandbox:status=500,delay=0.1"`` steers the request that names it."""
    if not model.startswith(_STEERED):
        return {}
    pairs = (pair.partition("=") for pair in model.removeprefix(_STEERED).split(",") if pair)
    return _checked(side, {name: _value(text) for name, _, text in pairs})


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text or True
