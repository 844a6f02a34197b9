"""What the object that a caller holds tells of its trust."""

from __future__ import annotations

import contextlib
import functools
import weakref
from collections.abc import Mapping
from typing import Any

from tlm_tracing import _annotate
from tlm_tracing._data import Trust
from tlm_tracing._scope import ScopedCall

_calls: dict[int, tuple[weakref.ref[Any], ScopedCall]] = {}
# By OpenAI's id of the answer: what a stream's helper or a raw response makes of it is another
# object. Kept for as long as the stream or the response itself.
_by_answer: weakref.WeakValueDictionary[str, ScopedCall] = weakref.WeakValueDictionary()


def plain(completion: Any) -> Any:
    """A completion as plain data; None if it is not one, such as a body that was no JSON."""
    if completion is None or isinstance(completion, (str, bytes)):
        return completion
    if isinstance(completion, Mapping):
        return completion
    dump = getattr(completion, "model_dump", None)
    if dump is None:
        return None
    answer = dump(mode="json", exclude_unset=True, warnings=False)
    answer.pop("tlm_metadata", None)
    return answer


def remember(obj: Any, call: ScopedCall) -> None:
    """Let :func:`trust` find the call's trust by the object that its caller holds."""
    if obj is None:
        return
    with contextlib.suppress(TypeError):
        # A callback that needs no global names: there are none when the process ends.
        forget = functools.partial(_calls.pop, id(obj))
        _calls[id(obj)] = (weakref.ref(obj, forget), call)
    trust = call.trust
    is_answer = hasattr(obj, "choices") or hasattr(obj, "output")
    if trust is not None and trust.score is not None and is_answer:
        # Cleanlab's own convention, so that their helpers accept the object.
        obj.tlm_metadata = {"trustworthiness_score": trust.score, "log": _log(trust)}
        if trust.evals:  # as Cleanlab's trustworthy-llm calls them
            obj.tlm_metadata["evals"] = dict(trust.evals)


def _log(trust: Trust) -> dict[str, Any]:
    log: dict[str, Any] = {}
    if trust.explanation is not None:
        log["explanation"] = trust.explanation
    if trust.fields:
        log["per_field_score"] = {
            name: {"score": field.score, "explanation": field.explanation}
            for name, field in trust.fields.items()
        }
    return log


def trust(obj: Any) -> Trust | None:
    """How far an answer can be trusted.

    Args:
        obj: A ``ChatCompletion`` or ``Response`` as returned, a stream or a raw response after
            it was read, or a trace id.

    Returns:
        Its trust, pending in background mode until the score is in; None if nothing is known.
    """
    if isinstance(obj, str):
        return _annotate.read_trust(obj)
    found = _calls.get(id(obj))
    if found is not None and found[0]() is obj:
        return found[1].trust
    inner = getattr(obj, "_raw_stream", None) or http_response(obj)
    if inner is not None and (known := trust(inner)) is not None:
        return known
    metadata = getattr(obj, "tlm_metadata", None)
    if isinstance(metadata, Mapping):
        return Trust(
            score=metadata.get("trustworthiness_score"),
            explanation=(metadata.get("log") or {}).get("explanation"),
            evals=metadata.get("evals"),
        )
    answer_id = getattr(obj, "id", None)
    call = _by_answer.get(answer_id) if isinstance(answer_id, str) else None
    return None if call is None else call.trust


def http_response(obj: Any) -> Any:
    """What a stream or a raw response is read from; what others wrap round one has it, too."""
    return getattr(obj, "response", None) or getattr(obj, "http_response", None)


def answered(answer: Any, call: ScopedCall) -> None:
    """Let :func:`trust` find the call's trust by another object with the same answer."""
    if isinstance(answer, Mapping) and isinstance(answer.get("id"), str):
        _by_answer[answer["id"]] = call
