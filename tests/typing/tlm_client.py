"""What type checkers see of ``wrap_tlm``; checked by mypy, never run."""

from __future__ import annotations

from cleanlab_tlm import TLM, TrustworthyRAG
from cleanlab_tlm.tlm import TLMResponse
from typing_extensions import assert_type

from tlm_tracing.tlm_client import wrap_tlm


async def check() -> None:
    tlm = wrap_tlm(TLM("best"))
    assert_type(tlm, TLM)
    assert_type(await tlm.prompt_async("?"), TLMResponse | list[TLMResponse])
    assert_type(wrap_tlm(TrustworthyRAG()), TrustworthyRAG)
