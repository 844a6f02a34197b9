"""Pytest fixtures for applications that use tlm_tracing; pytest finds them by itself."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from tlm_tracing.testing import FakeScorer, Sandbox


@pytest.fixture(scope="session")
def _tlm_running_sandbox() -> Iterator[Sandbox]:
    from tlm_tracing.testing import Sandbox

    with Sandbox() as sandbox:
        yield sandbox


@pytest.fixture
def tlm_sandbox(_tlm_running_sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch) -> Sandbox:
    """A fresh Sandbox that OpenAI's and Cleanlab's clients find by the environment."""
    _tlm_running_sandbox.clear()
    for name, value in _tlm_running_sandbox.environment().items():
        monkeypatch.setenv(name, value)
    return _tlm_running_sandbox


@pytest.fixture
def tlm_fake_scorer() -> FakeScorer:
    """A scorer that gives 0.9 unless told otherwise."""
    from tlm_tracing.testing import FakeScorer

    return FakeScorer()
