"""Truth: whether an answer is right, as far as people have told MLflow or a frame.

An answer is right if a reference is found in it, both normalised as SQuAD's evaluation does,
but that a dash parts words, and the point in a number stays.

Source: https://rajpurkar.github.io/SQuAD-explorer/ (``evaluate-v2.0.py``)
"""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from mlflow.entities import Assessment

from tlm_tracing._annotate import ASSESSMENT

_REFERENCES = ("expected_response", "expected_answer", "reference", "ground_truth")
_VERDICTS = ("correct", "is_correct", "correctness", "right", "accurate")
_PASS_FAIL = {"yes": True, "no": False}
_ARTICLES = re.compile(r"\b(?:a|an|the)\b")
_NOT_CAPTURED = re.compile(r"\[\d+ characters\]")


@dataclass(frozen=True)
class Verdict:
    """Whether an answer is right.

    Attributes:
        is_right: Whether it is.
        how: How that is known: ``"human"``, ``"boolean"`` or ``"text"``.
        reference: The right answer, if there is one in words.
    """

    is_right: bool
    how: str
    reference: str | None = None


@dataclass(frozen=True)
class Claim:
    """What somebody said of an answer.

    Attributes:
        is_right: That it is right, or wrong; None if they gave the right answer in place of that.
        how: ``"human"``, ``"boolean"`` or ``"text"``.
        references: The right answer, or several that are right.
    """

    is_right: bool | None
    how: str
    references: tuple[str, ...] = ()

    def verdict(self, answer: str) -> Verdict | None:
        """What follows for an answer; None if it can't be told."""
        reference = " / ".join(self.references) or None
        if self.is_right is not None:
            return Verdict(self.is_right, self.how, reference)
        found = [contains(answer, one) for one in self.references]
        known = [one for one in found if one is not None]
        return Verdict(any(known), self.how, reference) if known else None


def claim(assessments: Iterable[Assessment], name: str | None = None) -> Claim | None:
    """What a trace's assessments say of its answer.

    A person's boolean feedback comes first, then a boolean expectation, then one in words. Of
    several, those with a usual name (``correct``, ``expected_response``, ...) are meant; without
    such a name, the only one.

    Args:
        assessments: All of the trace's.
        name: The name of the one that is meant.
    """
    valid = [
        one
        for one in assessments
        if one.valid is not False and one.name == (name or one.name) and one.name != ASSESSMENT
    ]
    people = {
        one.name: is_right
        for one in valid
        if one.feedback is not None
        and one.source.source_type == "HUMAN"
        and (is_right := _passed(one.feedback.value)) is not None
    }
    if (said := _one_of(people, _VERDICTS)) is not None:
        return Claim(said, "human")
    expected = {one.name: one.expectation.value for one in valid if one.expectation is not None}
    flags = {key: value for key, value in expected.items() if isinstance(value, bool)}
    if (said := _one_of(flags, (*_VERDICTS, *_REFERENCES))) is not None:
        return Claim(said, "boolean")
    texts = {
        key: value
        for key, value in expected.items()
        if isinstance(value, str) or key in (*_REFERENCES, name)
    }
    return reference_claim(_one_of(texts, _REFERENCES))


def reference_claim(value: Any) -> Claim | None:
    """What a reference says: true or false, the right answer, or several of them."""
    if isinstance(value, bool) or type(value).__name__ in ("bool_", "bool"):
        return Claim(bool(value), "boolean")
    texts = tuple(text for one in _several(value) if (text := _text(one)) is not None)
    return Claim(None, "text", texts) if texts else None


def contains(answer: str, reference: str) -> bool | None:
    """Whether a reference is found in an answer as whole words; None if it can't be told."""
    if _NOT_CAPTURED.fullmatch(answer.strip()) or not (wanted := normalise(reference)):
        return None
    found = normalise(answer)
    if any(unicodedata.category(character) == "Lo" for character in wanted):
        return wanted in found  # scripts that do not part words by spaces
    return f" {wanted} " in f" {found} "


def normalise(text: str) -> str:
    """Lower case, without punctuation, articles and superfluous white space."""
    text = unicodedata.normalize("NFKC", text).casefold()
    text = re.sub(r"(?<=\d),(?=\d{3}\b)", "", text)
    text = re.sub(r"(?<=\d)\.(?=\d)", "\0", text)  # 3.5 is not 35
    kept = (_kept(character) for character in text)
    return " ".join(_ARTICLES.sub(" ", "".join(kept)).replace("\0", ".").split())


def _kept(character: str) -> str:
    kind = unicodedata.category(character)
    if kind == "Pd":
        return " "
    return "" if kind[0] in "PS" else character


def _passed(value: Any) -> bool | None:
    if isinstance(value, bool):
        return value
    return _PASS_FAIL.get(value.lower()) if isinstance(value, str) else None


def _one_of(values: dict[str, Any], names: Sequence[str]) -> Any:
    for name in names:
        if name in values:
            return values[name]
    return next(iter(values.values())) if len(values) == 1 else None


def _several(value: Any) -> Iterable[Any]:
    return value if isinstance(value, (list, tuple)) else (value,)


def _text(value: Any) -> str | None:
    if value is None or (isinstance(value, float) and value != value):
        return None
    if isinstance(value, str):
        return value if value.strip() else None
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    return json.dumps(value, ensure_ascii=False, default=str)
