"""The formats in which LLM calls are recorded, each read into a request and answer of OpenAI's.

A format has a module with ``NAMES``, as ``mlflow.message.format`` has them, ``fits``, which tells
it by its shape, and ``read``. What cannot be read as it was is never guessed.
"""

from __future__ import annotations

from types import ModuleType

from mlflow.entities import Span

from tlm_tracing._stored._formats import (
    _anthropic,
    _bedrock,
    _dspy,
    _gemini,
    _history,
    _langchain,
    _llamaindex,
    _openai,
    _parts,
    _vercel,
)
from tlm_tracing._stored._formats._told import Rebuilt, Told, reject

__all__ = ["Rebuilt", "rebuild"]

_FORMAT = "mlflow.message.format"
# The less a shape could be another's, the earlier it is looked for.
_FORMATS: tuple[ModuleType, ...] = (
    _parts,
    _anthropic,
    _gemini,
    _bedrock,
    _llamaindex,
    _langchain,
    _vercel,
    _dspy,
    _openai,
    _history,
)
_BY_NAME = {name: module for module in _FORMATS for name in module.NAMES}


def rebuild(span: Span) -> Rebuilt | None:
    """The request and answer that an LLM span tells of.

    Args:
        span: A span of type CHAT_MODEL or LLM that has ended.

    Returns:
        None if it is no call of an LLM, though it is of that type.

    Raises:
        Unscorable: If they cannot be rebuilt as they were; says why.
    """
    told = Told(span)
    if name := told.attribute(_FORMAT):
        module = _BY_NAME.get(name)
    else:
        module = next((one for one in _FORMATS if one.fits(told)), None)
    if module is None:
        reject()  # of a format that is unknown, its shape does not tell what it leaves out
    rebuilt: Rebuilt | None = module.read(told)
    return rebuilt
