"""Calls: the application's LLM calls in a stored trace, each with its request and its answer."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from mlflow.entities import Span, SpanStatusCode, Trace

from tlm_tracing._endpoints import Endpoint, chat, responses
from tlm_tracing._messages import Unscorable
from tlm_tracing._record import CONTENT
from tlm_tracing._stored import _formats

_LLM = frozenset({"CHAT_MODEL", "LLM"})
_EVALUATOR = "EVALUATOR"
_SCORING = "tlm.trustworthiness"
_OURS: Mapping[str, Endpoint] = {
    f"openai.{chat.NAME}": chat,
    f"openai.{responses.NAME}": responses,
}
_FORMAT = "mlflow.message.format"
_OUTCOME = "stream.outcome"
_SCORER_OF_TRACE = "mlflow.trace.sourceScorer"
# Events that tell of a piece of an answer, by how their names begin.
_PIECES = ("mlflow.chunk.item.", "new_token", "streaming_chunk")


class StoredCall(NamedTuple):
    """An LLM call in a stored trace.

    Attributes:
        span_id: The span that an assessment of it belongs to: the parent of a call of ours, of
            others' the LLM span itself.
        llm: The span of the LLM request.
        parent: The call's parent span, if it is one of ours.
        scoring: The scoring span that it has already, the newest if there are several.
        endpoint: Where it went; others than OpenAI's are told as chat completions.
        request: The request body as that endpoint has it; empty if it cannot be rebuilt.
        answer: The answer as plain data of that endpoint; empty likewise.
        reason: Why it cannot be scored, a word of :data:`~tlm_tracing._data.REASONS`; None if
            it can.
    """

    span_id: str
    llm: Span
    parent: Span | None
    scoring: Span | None
    endpoint: Endpoint
    request: Mapping[str, Any]
    answer: Mapping[str, Any]
    reason: str | None


def calls(trace: Trace) -> list[StoredCall]:
    """The application's LLM calls, in the order in which they began.

    Of LLM spans inside each other, such as LangChain's around that of OpenAI's client, only the
    innermost is a call. What an evaluator asked an LLM is not the application's.

    Args:
        trace: A trace with its spans, from us, from ``mlflow.openai.autolog()``, or another
            integration.
    """
    if _SCORER_OF_TRACE in trace.info.tags:
        return []
    tree = _Tree(trace.data.spans)
    found: list[StoredCall] = []
    wrappers: set[str] = set()
    for span, above in tree.innermost_first():
        if span.span_id in wrappers:
            continue
        if (call := _call(tree, span)) is not None:
            found.append(call)
            wrappers.update(one.span_id for one in above)
    return sorted(found, key=lambda call: call.llm.start_time_ns)


class _Tree:
    """A trace's spans, with what is above and below each of them."""

    def __init__(self, spans: Iterable[Span]) -> None:
        self._spans = {span.span_id: span for span in spans}
        self._scoring: dict[str | None, Span] = {}
        for span in self._spans.values():
            if span.name == _SCORING and span.span_type == _EVALUATOR:
                before = self._scoring.get(span.parent_id)
                if before is None or before.start_time_ns <= span.start_time_ns:
                    self._scoring[span.parent_id] = span

    def innermost_first(self) -> list[tuple[Span, list[Span]]]:
        """The application's LLM spans, each with the spans above it."""
        found = []
        for span in self._spans.values():
            if span.span_type in _LLM:
                above = self._above(span)
                if not any(one.span_type == _EVALUATOR for one in above):
                    found.append((span, above))
        return sorted(found, key=lambda one: -len(one[1]))

    def parent(self, span: Span) -> Span | None:
        """The span right above."""
        return self._spans.get(span.parent_id or "")

    def scoring(self, span: Span) -> Span | None:
        """The scoring span right below."""
        return self._scoring.get(span.span_id)

    def _above(self, span: Span) -> list[Span]:
        above: list[Span] = []
        one = self.parent(span)
        while one is not None and len(above) < len(self._spans):  # ids can go round in circles
            above.append(one)
            one = self.parent(one)
        return above


def _call(tree: _Tree, llm: Span) -> StoredCall | None:
    """The call of an LLM span; None if it is none."""
    endpoint = _OURS.get(llm.name)
    parent = tree.parent(llm) if endpoint is not None else None
    # No span of others' is a chain that has a message format.
    if parent is None or parent.span_type != "CHAIN" or not parent.get_attribute(_FORMAT):
        endpoint = parent = None
    owner = parent or llm
    request: Mapping[str, Any] = {}
    answer: Mapping[str, Any] = {}
    reason = None
    try:
        rebuilt = _own(llm, endpoint) if endpoint is not None else _foreign(llm)
        if rebuilt is None:
            return None
        endpoint, request, answer = rebuilt
    except Unscorable as nothing:
        reason = nothing.reason
    except Exception:  # a shape that nobody has thought of
        reason = "unsupported_content"
    scoring = tree.scoring(owner)
    return StoredCall(
        owner.span_id, llm, parent, scoring, endpoint or chat, request, answer, reason
    )


def _own(llm: Span, endpoint: Endpoint) -> _formats.Rebuilt:
    """A call of ours, as it was recorded."""
    if llm.end_time_ns is None or llm.get_attribute(_OUTCOME) not in (None, "complete"):
        raise Unscorable("partial_stream")
    if _is_failed(llm):
        raise Unscorable("call_failed")
    request, answer = llm.inputs, llm.outputs
    if llm.get_attribute(CONTENT) or not isinstance(request, Mapping):
        raise Unscorable("unsupported_content")
    if not isinstance(answer, Mapping):
        raise Unscorable("unsupported_content")
    return _formats.Rebuilt(endpoint, request, answer)


def _foreign(llm: Span) -> _formats.Rebuilt | None:
    """A call that others have recorded."""
    if llm.end_time_ns is None:
        raise Unscorable("partial_stream")
    if _is_failed(llm) and not llm.outputs:
        begun = any(event.name.startswith(_PIECES) for event in llm.events)
        raise Unscorable("partial_stream" if begun else "call_failed")
    return _formats.rebuild(llm)


def _is_failed(span: Span) -> bool:
    return span.status.status_code == SpanStatusCode.ERROR
