"""The methods of TLM clients that are traced, and what each is for."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple


class Kind(NamedTuple):
    """What a method is for.

    Attributes:
        span: The name of a pair's span.
        span_type: Its type, as MLflow has it.
        is_scored: Whether the pair gets a score.
    """

    span: str
    span_type: str
    is_scored: bool = True


_SCORE = Kind("tlm.trustworthiness", "EVALUATOR")
PROMPT = Kind("tlm.prompt", "LLM")
"""TLM answers itself, and scores its answer."""
_EXPLAIN = Kind("tlm.explanation", "EVALUATOR", is_scored=False)

METHODS: Mapping[str, Kind] = {
    "get_trustworthiness_score": _SCORE,
    "score": _SCORE,
    "prompt": PROMPT,
    "generate": PROMPT,
    "get_explanation": _EXPLAIN,
}
"""The methods that are traced, each with its async twin."""
