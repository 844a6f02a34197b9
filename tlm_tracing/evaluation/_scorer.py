"""The scorer for ``mlflow.genai.evaluate``."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from mlflow.entities import Feedback, Trace
from mlflow.genai.scorers import Scorer
from pydantic import PrivateAttr

from tlm_tracing import _annotate, _config, _exporter
from tlm_tracing._config import Config
from tlm_tracing.evaluation import _answers, _ask, _feedback, _rows
from tlm_tracing.evaluation._answers import Answer
from tlm_tracing.exceptions import ConfigurationError

_PASSING = "trustworthy"
_AGGREGATIONS = ("mean", "min", "max", "p90")
_SETTINGS = (
    "scorer",
    "timeout",
    "threshold",
    "max_scores_per_minute",
    "cache_size",
    "max_concurrency",
    "mask",
    "mask_scorer",
)


class TLMTrustworthiness(Scorer):
    """How far each answer of an evaluation can be trusted: a scorer for ``mlflow.genai.evaluate``.

    The LLM calls of a row's trace are scored, each with the whole request that the LLM got; of
    several, the score is the lowest. A score that a trace tells already is taken as it is. A row
    without a trace, or without a call in it, is scored by its inputs and outputs.

    What is not given here is as :func:`~tlm_tracing.configure` or the environment say, but that
    every row is scored, 64 at once, and the same answer to the same prompt once. Waits for a
    budget, and for about a minute for a scorer that is away.

    Attributes:
        name: What the score is called: ``"trustworthiness"``, as for live calls, or
            ``"trustworthy"`` for a pass or fail.
        scorer: As in :class:`~tlm_tracing.Config`, as are the next seven.
        timeout: Seconds that one score may take.
        threshold: Scores below it are low: the evaluation tells their share,
            ``share_below_threshold``, and ``EvaluationResult.passed`` goes by it.
        max_scores_per_minute: Budget; kept by waiting.
        cache_size: How many scores are kept; 10,000 unless it is set anywhere.
        max_concurrency: Scores in flight at once; 64 unless it is set anywhere.
        mask: Applied to explanations and to what errors say.
        mask_scorer: Applied to each text that leaves for the scorer.
        pass_fail: Whether to tell ``"yes"`` or ``"no"`` by the threshold in place of the score.
        rescore: Whether what this scorer has scored already is scored again.
        prompt: Which of the inputs is the prompt: its name, or a function on the inputs that
            gives a text or messages. Given, or ``response``, the row is scored and not the calls
            of its trace.
        response: The same of the outputs.
        aggregations: What is told of all rows: mean, min, max and 90th percentile, and the share
            below the threshold if there is one.

    Example:
        >>> mlflow.genai.evaluate(data, scorers=[TLMTrustworthiness(threshold=0.7)])
    """

    name: str = _annotate.ASSESSMENT
    scorer: Any = None
    timeout: int | float | None = None
    threshold: float | None = None
    max_scores_per_minute: float | None = None
    cache_size: int | None = None
    max_concurrency: int | None = None
    mask: Any = None
    mask_scorer: Any = None
    pass_fail: bool = False
    rescore: bool = False
    prompt: Any = None
    response: Any = None

    _asker: _ask.Asker = PrivateAttr(default_factory=_ask.Asker)

    def __init__(self, **settings: Any) -> None:
        """Check the settings; nothing is sent yet.

        Raises:
            ConfigurationError: If one is unknown or has a value that cannot work.
        """
        unknown = sorted(set(settings) - set(type(self).model_fields))
        if unknown:
            known = ", ".join(sorted(type(self).model_fields))
            raise ConfigurationError(f"Unknown: {', '.join(unknown)}. There are: {known}.")
        given = {name: settings[name] for name in _SETTINGS if name in settings}
        _config.check(given)
        threshold = _ask.settings(given).threshold
        if settings.get("pass_fail"):
            if threshold is None:
                raise ConfigurationError("pass_fail needs a threshold.")
            settings.setdefault("name", _PASSING)
            settings.setdefault("aggregations", ["mean"])
        settings.setdefault("aggregations", [*_AGGREGATIONS, *_shares(threshold)])
        super().__init__(**settings)

    @property
    def pass_if(self) -> Callable[[Any], bool] | None:
        """Whether a score passes, for ``EvaluationResult.passed``."""
        threshold = self._resolved().threshold
        if threshold is None or self.pass_fail:
            return None
        return lambda score: bool(score >= threshold)

    def run(
        self,
        *,
        inputs: Any = None,
        outputs: Any = None,
        expectations: Any = None,
        trace: Trace | None = None,
        session: Any = None,
    ) -> Feedback:
        """What MLflow calls in an evaluation; its own clock is not needed."""
        _exporter.adopt()  # the evaluation's traces, too, are written many at a time then
        told = self(inputs=inputs, outputs=outputs, expectations=expectations, trace=trace)
        return _feedback.replacing(told, trace)

    def __call__(  # type: ignore[override]  # of no session
        self,
        *,
        inputs: Any = None,
        outputs: Any = None,
        expectations: Mapping[str, Any] | None = None,
        trace: Trace | None = None,
    ) -> Feedback:
        """Score a row.

        Args:
            inputs: What went into the application.
            outputs: What came out of it.
            expectations: Not looked at.
            trace: Its trace, with spans.

        Returns:
            A score in [0, 1] with its explanation, or an error whose code says why there is none.
        """
        config = self._resolved()
        answer = _answers.least(self._settled(inputs, outputs, trace, config))
        told = _feedback.feedback(self.name, answer, config, _ask.scorer_name(config))
        if self.pass_fail:
            return _feedback.passing(told, config.threshold or 0.0)
        return told

    def _resolved(self) -> Config:
        given = self.model_fields_set
        return _ask.settings({name: getattr(self, name) for name in _SETTINGS if name in given})

    def prefetch(self, data: Any) -> Any:
        """Ask for the scores of all rows at once, before an evaluation that is to find them.

        MLflow hands a scorer one row after the other, as many at once as it has workers.

        Args:
            data: What the evaluation gets: a frame, rows or traces. Rows without an answer yet
                are left to it.

        Returns:
            The same: ``mlflow.genai.evaluate(scorer.prefetch(data), scorers=[scorer])``.
        """
        config = self._resolved()
        for row in _rows.told(data):
            for one in self._found(*row, config):
                if one.asked is not None:
                    one.asked.send()
        return data

    def _settled(
        self, inputs: Any, outputs: Any, trace: Trace | None, config: Config
    ) -> list[Answer]:
        found = self._found(inputs, outputs, trace, config)
        return _answers.settled(found, config, self._asker)

    def _found(
        self, inputs: Any, outputs: Any, trace: Trace | None, config: Config
    ) -> list[Answer]:
        found: list[Answer] = []
        if trace is not None and self.prompt is None and self.response is None:
            found = _answers.of_trace(trace, config, rescore=self.rescore)
        if not found:
            given, said = _picked(self.prompt, inputs), _picked(self.response, outputs)
            found = [_answers.of_row(given, said, trace, config, rescore=self.rescore)]
        return found


def _picked(part: Any, value: Any) -> Any:
    if part is None:
        return value
    if callable(part):
        return part(value)
    return value.get(part) if isinstance(value, Mapping) else value


def _shares(threshold: float | None) -> list[Callable[[list[float]], float]]:
    if threshold is None:
        return []

    def share_below_threshold(scores: list[float]) -> float:
        return sum(score < threshold for score in scores) / len(scores)

    return [share_below_threshold]
