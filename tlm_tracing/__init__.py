"""How far an LLM's answer can be trusted, at the moment it answers, and the proof in MLflow."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tlm_tracing._config import Config, configure
    from tlm_tracing._data import Trust
    from tlm_tracing._hook import autolog, wrap_openai
    from tlm_tracing._pipeline import flush
    from tlm_tracing._propagation import propagate, suppress
    from tlm_tracing._report import least_trustworthy, report
    from tlm_tracing._returned import trust
    from tlm_tracing._scoring import Stats, stats
    from tlm_tracing._span import TrustedSpan, set_context, trusted, trusted_span
    from tlm_tracing._stored import (
        Progress,
        ScoredCall,
        aiter_scores,
        ascore_traces,
        iter_scores,
        score_traces,
    )
    from tlm_tracing.exceptions import (
        ConfigurationError,
        ScoringError,
        TLMTracingError,
        UntrustworthyResponseError,
    )
    from tlm_tracing.tlm_client import wrap_tlm

__all__ = [
    "Config",
    "ConfigurationError",
    "Progress",
    "ScoredCall",
    "ScoringError",
    "Stats",
    "TLMTracingError",
    "Trust",
    "TrustedSpan",
    "UntrustworthyResponseError",
    "aiter_scores",
    "ascore_traces",
    "autolog",
    "configure",
    "flush",
    "iter_scores",
    "least_trustworthy",
    "propagate",
    "report",
    "score_traces",
    "set_context",
    "stats",
    "suppress",
    "trust",
    "trusted",
    "trusted_span",
    "wrap_openai",
    "wrap_tlm",
]

# Where each name lives. Resolved on first use: importing the package imports nothing else.
_HOMES = {
    "Config": "_config",
    "configure": "_config",
    "Trust": "_data",
    "autolog": "_hook",
    "wrap_openai": "_hook",
    "flush": "_pipeline",
    "propagate": "_propagation",
    "trust": "_returned",
    "suppress": "_propagation",
    "Stats": "_scoring",
    "stats": "_scoring",
    "TrustedSpan": "_span",
    "set_context": "_span",
    "trusted": "_span",
    "trusted_span": "_span",
    "least_trustworthy": "_report",
    "report": "_report",
    "Progress": "_stored",
    "ScoredCall": "_stored",
    "aiter_scores": "_stored",
    "ascore_traces": "_stored",
    "iter_scores": "_stored",
    "score_traces": "_stored",
    "wrap_tlm": "tlm_client",
    "ConfigurationError": "exceptions",
    "ScoringError": "exceptions",
    "TLMTracingError": "exceptions",
    "UntrustworthyResponseError": "exceptions",
}


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version

        return version("tlm_tracing")
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
