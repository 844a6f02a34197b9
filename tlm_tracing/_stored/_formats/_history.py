"""Conversations in ``mlflow.chat.messages``, where MLflow had them before it named formats."""

from __future__ import annotations

from tlm_tracing._stored._formats._told import Rebuilt, Told, exchange, mappings, reject

NAMES: frozenset[str] = frozenset()

_MESSAGES = "mlflow.chat.messages"


def fits(told: Told) -> bool:
    """Whether it has such a conversation."""
    return isinstance(told.attribute(_MESSAGES), list)


def read(told: Told) -> Rebuilt:
    """Rebuild a call: the last message of the conversation is the answer.

    Raises:
        Unscorable: If it is not, or one of several.
    """
    *asked, answer = mappings(told.attribute(_MESSAGES)) or reject()
    before = asked[-1].get("role") if asked else None
    if answer.get("role") != "assistant" or before == "assistant" or told.outputs is None:
        reject()
    return exchange(told, asked, [(answer, None)], tools=told.tools)
