"""For tests without keys and without a network: a loopback OpenAI and TLM, a scripted scorer.

As pytest fixtures for your own application: ``tlm_sandbox`` and ``tlm_fake_scorer``.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tlm_tracing.testing._fake import FakeScorer
    from tlm_tracing.testing._state import RecordedRequest
    from tlm_tracing.testing.sandbox import Sandbox

__all__ = ["FakeScorer", "RecordedRequest", "Sandbox"]

# Resolved on first use: pytest imports the plugin beside this in every run.
_HOMES = {"FakeScorer": "_fake", "RecordedRequest": "_state", "Sandbox": "sandbox"}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
