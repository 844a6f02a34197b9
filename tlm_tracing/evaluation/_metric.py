"""The metric for ``mlflow.evaluate`` and ``mlflow.models.evaluate``."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from mlflow.entities import Feedback
from mlflow.metrics import MetricValue, make_metric
from mlflow.models import EvaluationMetric

from tlm_tracing import _config
from tlm_tracing.evaluation import _answers, _ask, _feedback


def tlm_trustworthiness(*, name: str = "tlm_trustworthiness", **settings: Any) -> EvaluationMetric:
    """A metric that tells how far each answer can be trusted.

    The column of prompts is called ``inputs``; another one is named by
    ``evaluator_config={"col_mapping": {"inputs": "prompt"}}``. All rows are scored at the same
    time, and the same answer to the same prompt once.

    Args:
        name: What it is called.
        **settings: Any of :class:`~tlm_tracing.Config`'s fields. Every row is scored, 64 at once
            unless ``max_concurrency`` is set anywhere.

    Returns:
        The metric: a score in [0, 1] and a justification for each row, and mean, min and max of
        all. A row without a score has None, and the reason as its justification.

    Raises:
        ConfigurationError: If a setting is unknown or has a value that cannot work.

    Example:
        >>> mlflow.evaluate(
        ...     data=frame,
        ...     predictions="response",
        ...     extra_metrics=[tlm_trustworthiness()],
        ...     evaluator_config={"col_mapping": {"inputs": "prompt"}},
        ... )
    """
    _config.check(settings)
    asker = _ask.Asker()

    def score(predictions: Any, inputs: Any, metrics: Any = None) -> MetricValue:
        config = _ask.settings(settings)
        rows = zip(inputs, predictions, strict=True)
        answers = [_answers.of_row(*row, None, config, rescore=False) for row in rows]
        scorer = _ask.scorer_name(config)
        told = [
            _feedback.feedback(name, one, config, scorer)
            for one in _answers.settled(answers, config, asker)
        ]
        scores: Any = [one.value for one in told]
        justifications: Any = [_justified(one) for one in told]
        return MetricValue(scores, justifications, _aggregated(scores))

    metric: EvaluationMetric = make_metric(  # type: ignore[no-untyped-call]
        eval_fn=score, greater_is_better=True, name=name
    )
    return metric


def _justified(told: Feedback) -> str | None:
    if told.error is None:
        return told.rationale
    return f"No score, {told.error.error_code}: {told.error.error_message}"


def _aggregated(scores: Iterable[float | None]) -> dict[str, float]:
    known = [score for score in scores if score is not None]
    if not known:
        return {}
    return {"mean": sum(known) / len(known), "min": min(known), "max": max(known)}
