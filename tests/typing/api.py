"""What type checkers see; checked by mypy, never run."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator

import openai
from openai.types.chat import ChatCompletion
from typing_extensions import assert_type

import tlm_tracing as tt
from tlm_tracing.openai import AsyncOpenAI, OpenAI
from tlm_tracing.scorers import HostedTLM, Scorer
from tlm_tracing.testing import FakeScorer


@tt.trusted
def plain(question: str, *, loud: bool = False) -> int:
    return 1


@tt.trusted(name="named", threshold=0.5)
async def later(question: str) -> str:
    return question


@tt.trusted
def items(count: int) -> Iterator[str]:
    yield from "abc"


@tt.trusted
async def later_items(count: int) -> AsyncIterator[str]:
    yield "a"


async def check(completion: ChatCompletion) -> None:
    assert_type(plain("?", loud=True), int)
    assert_type(await later("?"), str)
    assert_type(items(1), Iterator[str])
    assert_type(later_items(1), AsyncIterator[str])
    assert_type(tt.wrap_openai(openai.OpenAI()), openai.OpenAI)
    assert_type(tt.wrap_openai(openai.AsyncAzureOpenAI()), openai.AsyncAzureOpenAI)
    assert_type(OpenAI(), openai.OpenAI)
    assert_type(AsyncOpenAI(), openai.AsyncOpenAI)
    with tt.trusted_span() as span:
        assert_type(span.trust, tt.Trust | None)
        assert_type(span.trusts, list[tt.Trust])
    async with tt.trusted_span("name", timeout=1.0) as span:
        assert_type(span.trace_id, str | None)
    assert_type(tt.trust(completion), tt.Trust | None)
    assert_type(tt.flush(1.0), bool)
    assert_type(tt.configure(timeout=3), tt.Config)
    assert_type(await tt.Trust(0.5), tt.Trust)
    assert_type(tt.stats().unscored, dict[str, int])
    hosted: Scorer = HostedTLM("best")
    fake: Scorer = FakeScorer(0.5)
    assert hosted.name != fake.name
