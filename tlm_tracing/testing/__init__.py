"""For tests without keys and without a network: a loopback OpenAI and TLM, a scripted scorer.

As pytest fixtures for your own application: ``tlm_sandbox`` and ``tlm_fake_scorer``.
"""

from __future__ import annotations

from tlm_tracing.testing._fake import FakeScorer
from tlm_tracing.testing._state import RecordedRequest
from tlm_tracing.testing.sandbox import Sandbox

__all__ = ["FakeScorer", "RecordedRequest", "Sandbox"]
