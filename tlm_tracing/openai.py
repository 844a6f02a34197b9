"""The drop-in import: ``from tlm_tracing.openai import OpenAI`` in place of ``from openai``.

The clients are OpenAI's own, with every chat call recorded and scored; ``isinstance`` with
OpenAI's classes holds.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import openai

from tlm_tracing._hook import traced_class

if TYPE_CHECKING:
    from openai import AsyncAzureOpenAI, AsyncOpenAI, AzureOpenAI, OpenAI
else:
    OpenAI = traced_class(openai.OpenAI)
    AsyncOpenAI = traced_class(openai.AsyncOpenAI)
    AzureOpenAI = traced_class(openai.AzureOpenAI)
    AsyncAzureOpenAI = traced_class(openai.AsyncAzureOpenAI)

__all__ = ["AsyncAzureOpenAI", "AsyncOpenAI", "AzureOpenAI", "OpenAI"]
