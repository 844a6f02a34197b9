"""MLflow's evaluation with trust scores: a scorer for the new one, a metric for the older one.

Source: https://mlflow.org/docs/latest/genai/eval-monitor/scorers/custom/
"""

from __future__ import annotations

from tlm_tracing.evaluation._metric import tlm_trustworthiness
from tlm_tracing.evaluation._scorer import TLMTrustworthiness

__all__ = ["TLMTrustworthiness", "tlm_trustworthiness"]
