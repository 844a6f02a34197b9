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
        _calls[id(obj)] = (weakref.ref(obj, functools.partial(_forget, id(obj))), call)
    trust = call.trust
    if trust is not None and trust.score is not None and hasattr(obj, "choices"):
        log = {} if trust.explanation is None else {"explanation": trust.explanation}
        # Cleanlab's own convention, so that their helpers accept the object.
        obj.tlm_metadata = {"trustworthiness_score": trust.score, "log": log}


def trust(obj: Any) -> Trust | None:
    """How far an answer can be trusted.

    Args:
        obj: A ``ChatCompletion`` as returned, a stream after its end, or a trace id.

    Returns:
        Its trust, pending in background mode until the score is in; None if nothing is known.
    """
    if isinstance(obj, str):
        return _annotate.read_trust(obj)
    found = _calls.get(id(obj))
    if found is not None and found[0]() is obj:
        return found[1].trust
    raw = getattr(obj, "_raw_stream", None)
    if raw is not None:
        return trust(raw)
    metadata = getattr(obj, "tlm_metadata", None)
    if isinstance(metadata, Mapping):
        return Trust(
            score=metadata.get("trustworthiness_score"),
            explanation=(metadata.get("log") or {}).get("explanation"),
        )
    return None


def _forget(key: int, _: weakref.ref[Any]) -> None:
    _calls.pop(key, None)
