"""Presets and options of Cleanlab's TLM, by the rules of the cleanlab-tlm package."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from tlm_tracing.exceptions import ConfigurationError

if TYPE_CHECKING:
    from cleanlab_tlm import Eval

Client: TypeAlias = Literal["TLM", "TrustworthyRAG"]

DEFAULT_MODEL = "gpt-4.1-mini"
_EXPLANATION = "explanation"
# Those that explain along with the score when no option says otherwise.
_EXPLAINING: Mapping[Client, frozenset[str]] = {
    "TLM": frozenset({"medium", "high", "best"}),
    "TrustworthyRAG": frozenset({"high", "best"}),
}


def options(preset: str, given: Mapping[str, Any], wanted: bool | None) -> dict[str, Any]:
    """The options by which an answer is scored.

    Args:
        preset: The quality preset.
        given: The user's.
        wanted: Whether the user wants an explanation; None means where it comes with the score.

    Raises:
        ConfigurationError: If cleanlab-tlm refuses preset or options.
    """
    if given or preset not in _EXPLAINING["TLM"]:  # else known to be right: saves a second
        _check("TLM", preset, given)
    return _with_explanation("TLM", preset, given, wanted)


def rag_options(preset: str, given: Mapping[str, Any], wanted: bool | None) -> dict[str, Any]:
    """The same for an answer that is scored by its context, too.

    There are evals there in place of criteria of one's own, and fewer presets explain.
    """
    kept = {name: value for name, value in given.items() if name != "custom_eval_criteria"}
    log = [one for one in kept.pop("log", ()) if one != _EXPLANATION]
    bare = {**kept, "log": log} if log else kept
    return _with_explanation("TrustworthyRAG", preset, bare, wanted)


def explains(chosen: Mapping[str, Any]) -> bool:
    """Whether the explanation comes with the score, by the options."""
    return _EXPLANATION in chosen.get("log", ())


def check_evals(preset: str, evals: Sequence[Eval]) -> list[Eval]:
    """The evals, if cleanlab-tlm takes them.

    Raises:
        ConfigurationError: If it does not.
    """
    _check("TrustworthyRAG", preset, {}, evals=list(evals))
    return list(evals)


def _with_explanation(
    client: Client, preset: str, given: Mapping[str, Any], wanted: bool | None
) -> dict[str, Any]:
    log = sorted({*given.get("log", ()), _EXPLANATION})
    asked = {"model": DEFAULT_MODEL, **given, "log": log}
    if wanted is not False and _may_explain(client, preset, {**given, "log": log}):
        return asked
    return {"model": DEFAULT_MODEL, **given}


def _may_explain(client: Client, preset: str, asked: Mapping[str, Any]) -> bool:
    if asked.keys() == {"log"} and asked["log"] == [_EXPLANATION]:
        return preset in _EXPLAINING[client]
    try:
        _check(client, preset, asked)
    except ConfigurationError:
        return False
    return True


def _check(client: Client, preset: str, given: Mapping[str, Any], **more: Any) -> None:
    """Have cleanlab-tlm check preset and options, which it does when a client is made."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        # Inside a loop, because outside of one the client opens a loop and leaks it.
        loop = asyncio.new_event_loop()
        try:
            loop.run_until_complete(_construct_async(client, preset, given, more))
        finally:
            loop.close()
    else:
        _construct(client, preset, given, more)


async def _construct_async(
    client: Client, preset: str, given: Mapping[str, Any], more: Mapping[str, Any]
) -> None:
    _construct(client, preset, given, more)


def _construct(
    client: Client, preset: str, given: Mapping[str, Any], more: Mapping[str, Any]
) -> None:
    import cleanlab_tlm

    try:
        make: Any = getattr(cleanlab_tlm, client)
        make(preset, api_key="not sent", options=dict(given), verbose=False, **more)
    except Exception as error:
        raise ConfigurationError(f"cleanlab-tlm refuses these settings: {error}") from error
