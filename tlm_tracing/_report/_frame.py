"""Frame: rows from a DataFrame of scores, also from one merged with ``mlflow.search_traces``."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping
from datetime import datetime, timezone
from typing import TYPE_CHECKING, Any

from mlflow.entities import Assessment

from tlm_tracing._report._row import Row, to_score
from tlm_tracing._report._truth import Claim, claim, reference_claim
from tlm_tracing.exceptions import ConfigurationError

if TYPE_CHECKING:
    import pandas

_NEEDED = ("trace_id", "trust_score")


def rows(scores: pandas.DataFrame, reference: str | None = None) -> Iterator[Row]:
    """The rows of a frame.

    Args:
        scores: A frame of ``score_traces``, or one merged with ``mlflow.search_traces``.
        reference: The column with the right answers; by default ``reference``, if there is one.
            May also name an expectation, where there is a column ``assessments``.

    Raises:
        ConfigurationError: If a column is missing.
    """
    if missing := [name for name in _NEEDED if name not in scores.columns]:
        raise ConfigurationError(
            f"The frame has no column {missing[0]!r}. Give what score_traces() or "
            "least_trustworthy() returned, as it is or merged with mlflow.search_traces() on "
            "trace_id."
        )
    if reference is not None and not {reference, "assessments"} & set(scores.columns):
        raise ConfigurationError(
            f"The frame has no column {reference!r}, which reference= names. It has: "
            f"{', '.join(map(str, scores.columns))}."
        )
    said = _claims(scores, reference)
    for place, cells in enumerate(_cells(scores)):
        yield _row(cells, said(place))


def _row(cells: Mapping[str, Any], said: Claim | None) -> Row:
    get = cells.get
    score, answer = to_score(get("trust_score")), _text(get("response"))
    place = _known(get("experiment_id")) or _experiment_id(get("trace"))
    return Row(
        trace_id=_text(get("trace_id")),
        span_id=_known(get("span_id")),
        seconds=_seconds(get("timestamp")),
        prompt=_text(get("prompt")),
        response=answer,
        score=score,
        explanation=_known(get("explanation")),
        status="unscored" if score is None else "scored",
        reason=_known(get("reason")) or ("pending" if get("status") == "pending" else None),
        model=_known(get("model")),
        experiment=_known(get("experiment")) or (f"Experiment {place}" if place else None),
        experiment_id=place,
        verdict=said.verdict(answer) if said is not None else None,
    )


def _cells(scores: pandas.DataFrame) -> Iterator[Mapping[str, Any]]:
    """Each row's cells by the names of their columns."""
    names = [str(name) for name in scores.columns]
    ours = _response(names)
    names = ["response" if name == ours else name for name in names]
    columns = [scores.iloc[:, place].tolist() for place in range(len(names))]
    for values in zip(*columns, strict=True):
        yield dict(zip(names, values, strict=True))


def _response(names: list[str]) -> str:
    """Which column is ours: pandas adds a suffix where both frames have one of the name."""
    if "response" in names:
        return "response"
    following = names[names.index("prompt") + 1 :] if "prompt" in names else []
    return next((name for name in following if name.startswith("response_")), "response")


def _claims(scores: pandas.DataFrame, reference: str | None) -> Callable[[int], Claim | None]:
    """What is said of each row's answer."""
    column = reference or "reference"
    if column in scores.columns:
        values = scores[column]
        return lambda place: reference_claim(values.iloc[place])
    if "assessments" not in scores.columns:
        return lambda place: None
    assessments, lowest = scores["assessments"], _lowest(scores)

    def of_trace(place: int) -> Claim | None:
        # Said of the trace: held against its lowest score.
        said = assessments.iloc[place] if place in lowest else None
        return claim(map(_assessment, said), reference) if isinstance(said, (list, tuple)) else None

    return of_trace


def _lowest(scores: pandas.DataFrame) -> set[int]:
    """The places of the lowest score of each trace."""
    plain = scores[["trace_id", "trust_score"]].reset_index(drop=True)
    ordered = plain.dropna(subset=["trust_score"]).sort_values("trust_score", kind="stable")
    return set(ordered.drop_duplicates("trace_id").index)


def _assessment(value: Any) -> Assessment:
    return Assessment.from_dictionary(value) if isinstance(value, dict) else value


def _experiment_id(trace: Any) -> str | None:
    """From the trace as ``mlflow.search_traces`` gives it."""
    if not isinstance(trace, str):
        found = getattr(getattr(trace, "info", None), "experiment_id", None)
        return None if found is None else str(found)
    try:
        return str(
            json.loads(trace)["info"]["trace_location"]["mlflow_experiment"]["experiment_id"]
        )
    except (KeyError, TypeError, ValueError):
        return None


def _known(value: Any) -> str | None:
    """A cell's text; None for pandas' several ways to say that there is none."""
    if type(value).__name__ in ("NoneType", "NAType", "NaTType") or value != value:
        return None
    return str(value)


def _text(value: Any) -> str:
    return _known(value) or ""


def _seconds(value: Any) -> float | None:
    """Seconds since 1970 from a time, ISO text, or MLflow's milliseconds."""
    if (text := _known(value)) is None:
        return None
    try:
        if isinstance(value, str):
            value = datetime.fromisoformat(text.replace("Z", "+00:00"))
        if hasattr(value, "timestamp"):
            known = value if value.tzinfo is not None else value.replace(tzinfo=timezone.utc)
            return float(known.timestamp())
        number = float(value)
    except (TypeError, ValueError):
        return None
    return number / 1000 if math.isfinite(number) and abs(number) > 1e11 else number
