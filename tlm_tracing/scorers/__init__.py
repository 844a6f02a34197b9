"""Scorers: who says how far an answer can be trusted. One back end a file.

Anything with a ``name``, an ``async score(exchange)`` and an ``async aclose()`` is a scorer; a
plain function ``(request, completion) -> score`` will do as well.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from tlm_tracing._config import cleanlab_api_key
from tlm_tracing._data import Scorer
from tlm_tracing.exceptions import ScoringError

if TYPE_CHECKING:
    from tlm_tracing.scorers.hosted import HostedTLM

__all__ = ["HostedTLM", "Scorer", "resolve"]


def resolve(spec: Any) -> Scorer:
    """The scorer that the ``scorer`` setting means.

    Args:
        spec: ``"hosted"``, a :class:`Scorer`, or a sync or async callable
            ``(request, completion) -> float, Trust or dict``; checked already.

    Raises:
        ScoringError: With reason ``"no_scorer"``, if it is ``"hosted"`` and there is no key.
    """
    if spec == "hosted":
        if cleanlab_api_key() is None:
            raise ScoringError(
                'scorer="hosted" needs CLEANLAB_TLM_API_KEY to be set.', reason="no_scorer"
            )
        from tlm_tracing.scorers.hosted import HostedTLM

        return HostedTLM()
    if isinstance(spec, Scorer):
        return spec
    from tlm_tracing.scorers._function import FunctionScorer

    return FunctionScorer(spec)


def load(spec: Any, *, has_context: bool = False) -> None:
    """Import what the ``scorer`` setting needs, here and now.

    A fork while another thread imports it would leave it locked for ever in the child.

    Args:
        spec: As for :func:`resolve`.
        has_context: Whether an answer is to be scored by its context.
    """
    kind = "hosted" if spec == "hosted" else "_function"
    importlib.import_module(f"{__name__}.{kind}")
    if has_context:
        from tlm_tracing.scorers.hosted import HostedTLM

        if spec == "hosted" or isinstance(spec, HostedTLM):
            importlib.import_module(f"{__name__}._rag")


def __getattr__(name: str) -> Any:
    if name == "HostedTLM":
        from tlm_tracing.scorers.hosted import HostedTLM

        return HostedTLM
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
