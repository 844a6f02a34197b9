"""DSPy's calls of a language model, recorded by ``mlflow.dspy.autolog()``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tlm_tracing._stored._formats._told import (
    Message,
    Rebuilt,
    Told,
    exchange,
    mapping,
    mappings,
    reject,
)

NAMES = frozenset({"dspy"})


def fits(told: Told) -> bool:
    """Never by shape: MLflow has always named this format."""
    return False


def read(told: Told) -> Rebuilt:
    """Rebuild a call: messages or a prompt, and a list of answers.

    Raises:
        Unscorable: If it cannot be rebuilt as it was.
    """
    inputs = mapping(told.inputs)
    prompt, tools = inputs.get("prompt"), mappings(inputs.get("tools") or [])
    messages = mappings(inputs.get("messages") or [{"role": "user", "content": prompt}])
    if not isinstance(told.outputs, list) or (not inputs.get("messages") and not prompt):
        reject()
    choices = [(_answer(one, can_call=bool(tools)), None) for one in told.outputs]
    return exchange(told, messages, choices, tools=tools)


def _answer(output: Any, *, can_call: bool) -> Message:
    if isinstance(output, Mapping):
        told: Message = {"role": "assistant", "content": output.get("text")}
        if calls := output.get("tool_calls"):
            told["tool_calls"] = mappings(calls)
        return told
    if not isinstance(output, str) or can_call:
        reject()
    return {"role": "assistant", "content": output}
