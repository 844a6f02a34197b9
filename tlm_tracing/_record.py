"""Record: the only place where MLflow spans open and close."""

from __future__ import annotations

import contextlib
import contextvars
import functools
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, TypeAlias

import mlflow
from mlflow.entities import LiveSpan, NoOpSpan, Span, SpanEvent, SpanStatus, SpanStatusCode
from mlflow.tracing.client import TracingClient
from mlflow.tracing.provider import (
    detach_span_from_context,
    get_current_otel_span,
    set_span_in_context,
)

from tlm_tracing import _exporter, _live, _outbox, _ready, _redacted, _tracking
from tlm_tracing._config import Config
from tlm_tracing._data import Trust
from tlm_tracing._endpoints import Endpoint
from tlm_tracing._light import LightSpan
from tlm_tracing._visible import shape, visible

_NO_OP_TRACE_ID = "MLFLOW_NO_OP_SPAN_TRACE_ID"
# As MLflow stores and shows them.
_MESSAGE_FORMAT = "mlflow.message.format"
_TOOLS = "mlflow.chat.tools"
_INPUTS = "mlflow.spanInputs"
_OUTPUTS = "mlflow.spanOutputs"
_USAGE = "mlflow.chat.tokenUsage"
_NO_TOKENS = ("input_tokens", "output_tokens", "total_tokens")
_PREVIEW = 1000
_WORD = re.compile(r"[\w.\[\]-]{1,100}")
_TRACEPARENT = re.compile("[0-9a-f]{2}-([0-9a-f]{32})-([0-9a-f]{16})-[0-9a-f]{2}")

CONTENT = "tlm.content"
"""What is recorded of a call in place of its texts: ``"shape"`` or ``"masked"``; else absent."""

EVALS = "tlm.evals."
"""How the attributes begin that tell what a scorer says beside the trust."""

QUERY, CONTEXT = "tlm.query", "tlm.context"
"""Of a call that was not scored when it was made: what it is to be scored by."""

AnySpan: TypeAlias = LiveSpan | NoOpSpan | LightSpan | _ready.LaterSpan


class _Record:
    """An open span, and what is recorded inside it.

    Attributes:
        trace_id: The trace that holds it; None when MLflow records nothing here.
        span_id: Its id.
    """

    def __init__(
        self, name: str, config: Config, kind: str = "CHAIN", *, becomes_active: bool = False
    ) -> None:
        _outbox.called()
        self._visible = visible(config)
        self._captures = config.capture_content
        self._span = _start(name, kind, becomes_active)
        live = self._span.trace_id != _NO_OP_TRACE_ID
        self.trace_id: str | None = self._span.trace_id if live else None
        self.span_id: str | None = self._span.span_id if live else None
        with _live.held(self._span.trace_id) as trace:
            self._experiment_id = None if trace is None else trace.info.experiment_id

    def inputs(self, value: Any) -> None:
        """Record what went in."""
        self._preview(self._put(self._span.set_inputs, value))

    def outputs(self, value: Any) -> None:
        """Record what came out."""
        self._put(self._span.set_outputs, value)

    def _put(self, put: Callable[[Any], None], value: Any) -> Any:
        try:
            shown = self._visible(value)
            put(shown)
        except Exception:
            shown = shape(value)  # an object of the user's that cannot even be shown as text
            put(shown)
        return shown

    def _preview(self, shown: Any) -> None:
        """Have MLflow list a request to the Responses API by its text, as it does others."""
        text = shown.get("input") if isinstance(shown, Mapping) else None
        if self._span.parent_id is None and isinstance(text, str):
            with _live.held(self._span.trace_id) as trace:
                if trace is not None and trace.info.request_preview is None:
                    trace.info.request_preview = text[:_PREVIEW]

    def activate(self) -> Any:
        """Make this the active span in the current context; gives the way back."""
        if isinstance(self._span, _ready.LaterSpan):
            return (_ready.activate(self._span),)
        if self.trace_id is None or isinstance(self._span, LightSpan):
            return None
        return set_span_in_context(self._span)

    def deactivate(self, token: Any) -> None:
        """Undo :meth:`activate`."""
        if isinstance(self._span, _ready.LaterSpan):
            if token is not None and _ready.current() is self._span:
                _ready.activate(*token)
        elif token is not None:
            _detach(token)

    def when_placed(self, place: _ready.Place) -> None:
        """Have something done that needs the ids of trace and span, which are known by then."""
        if isinstance(self._span, _ready.LaterSpan):
            self._span.when_placed(place)
        elif self.trace_id is not None and self.span_id is not None:
            place(self.trace_id, self.span_id)

    def shown(self, trust: Trust) -> Trust:
        """A trust as it may be seen on its trace."""
        if trust.explanation is None:
            return trust
        # Of a text whose words are not recorded, nothing is left to tell.
        explanation = str(self._visible(trust.explanation)) if self._captures else None
        return replace(trust, explanation=explanation)

    def _shown(self, message: str) -> str:
        return str(self._visible(_redacted.redact(message)))

    def _end(self, *inner: AnySpan | None) -> None:
        spans = [span for span in (*inner, self._span) if span is not None]
        for span in spans:
            if span.end_time_ns is None:
                span.end()
        if self._experiment_id is None or self._span.parent_id is None:
            return
        if _live.may_be_lost(self._span, whole=_exporter.is_adopted()):
            whole = [span.to_immutable_span() for span in spans]
            _outbox.post(functools.partial(_store, self._experiment_id, whole))


class CallRecord(_Record):
    """The spans of one call: its parent, the LLM request and the scoring of its answer."""

    def __init__(
        self,
        request: Mapping[str, Any],
        *,
        endpoint: Endpoint,
        provider: str,
        config: Config,
    ) -> None:
        """Open the call's parent span and the LLM span.

        Args:
            request: The request body as sent.
            endpoint: Where it goes.
            provider: ``"openai"`` or ``"azure"``.
            config: The settings in force.
        """
        model = str(request.get("model") or "")
        # A fallback's own calls are inside of this one.
        may_retry = callable(config.on_low)
        super().__init__(f"{endpoint.VERB} {model}".strip(), config, becomes_active=may_retry)
        self._endpoint = endpoint
        self._llm = start_inside(f"openai.{endpoint.NAME}", "CHAT_MODEL", self._span)
        self._scoring: AnySpan | None = None
        self._answer: Any = None
        self._shown_answer: Any = None
        self._is_let_go = False
        try:
            recorded = self._visible(request)
            # Not set_inputs: it looks for pictures to be stored apart, which are not recorded.
            self._llm.set_attribute(_INPUTS, recorded)
            self._have_too(_INPUTS, recorded)
            for span in (self._span, self._llm):
                span.set_attribute(_MESSAGE_FORMAT, "openai")
            self._preview(recorded)
            if config.threshold is not None:
                self._span.set_attribute("tlm.threshold", config.threshold)
            # Tools from the request as it may be seen: their descriptions are content, too.
            tools = endpoint.tools(recorded) if isinstance(recorded, Mapping) else None
            self._note(
                {
                    "mlflow.llm.provider": provider,
                    "mlflow.llm.model": model,
                    _TOOLS: tools,
                    CONTENT: _content(config),
                }
            )
        except BaseException:
            self.abandon()
            raise

    def _have_too(self, key: str, value: Any) -> None:
        """Tell the call's parent span what its LLM span tells already."""
        if not _live.copy(key, self._llm, self._span):
            self._span.set_attribute(key, value)

    def outputs(self, value: Any) -> None:
        """Record what the caller gets."""
        if value is not None and value is self._answer:
            self._have_too(_OUTPUTS, self._shown_answer)
        else:
            super().outputs(value)

    def retried(self, number: int) -> None:
        """Note that the request is sent again, for the first, second, ... time."""
        self._note({"http.request.resend_count": number})
        event: Any = SpanEvent
        self._llm.add_event(event("retry", attributes={"http.request.resend_count": number}))

    def identified(self, request_id: str | None) -> None:
        """Note OpenAI's ``x-request-id``."""
        self._note({"openai.request_id": request_id})

    def answered(
        self, answer: Any, *, first_token: float | None = None, outcome: str | None = None
    ) -> None:
        """Close the LLM span with its answer.

        Args:
            answer: The answer as plain data.
            first_token: Seconds from the request to the first piece of a streamed answer.
            outcome: How a stream ended: ``"complete"``, ``"truncated"``, ``"abandoned"``,
                ``"cancelled"`` or ``"error"``.
        """
        self._note_answer(answer, first_token, outcome)
        if isinstance(answer, Mapping) and (failure := self._endpoint.failure(answer)) is not None:
            for span in (self._llm, self._span):
                _set_error(span, self._shown(failure))
        self._llm.end()

    def failed(
        self,
        error: BaseException,
        answer: Any = None,
        *,
        first_token: float | None = None,
        outcome: str | None = None,
    ) -> None:
        """Close the LLM span as failed, with as much of the answer as had come."""
        self._note_answer(answer, first_token, outcome)
        _mark_failed(self._llm, error, self._visible)
        self._llm.end()
        _set_error(self._span, _named(error, self._visible))

    def scoring_started(
        self,
        prompt: str,
        responses: list[str],
        *,
        is_partial: bool,
        query: str | None = None,
        context: str | None = None,
    ) -> None:
        """Open the scoring span with the texts as they are scored.

        Args:
            prompt: The prompt.
            responses: The answer; with several choices, each of them.
            is_partial: Whether the prompt lacks turns that only OpenAI knows.
            query: What the context was retrieved for.
            context: What was retrieved, if that is named.
        """
        self._scoring = start_inside("tlm.trustworthiness", "EVALUATOR", self._span)
        shown = self._visible(texts(prompt, responses, query, context))
        self._scoring.set_attribute(_INPUTS, shown)
        if is_partial:
            self._scoring.set_attribute("tlm.prompt_is_partial", True)

    def left_unscored(self, query: str | None, context: str) -> None:
        """Note what was retrieved for an answer that nobody scores now, for a later score."""
        told = {QUERY: query, CONTEXT: context}
        shown = {name: self._visible(text) for name, text in told.items() if text is not None}
        self._span.set_attributes(shown)

    def scored(self, trust: Trust, detail: str | None = None, *, is_cached: bool = False) -> None:
        """Close the scoring span.

        Args:
            trust: The settled trust.
            detail: What went wrong, when it is unscored.
            is_cached: Whether nobody was asked, as the score was known.
        """
        span = self._scoring
        if span is None:
            return
        span.set_attribute(_OUTPUTS, self._visible(told(trust)))
        span.set_attributes(trust_attributes(trust))
        if is_cached:
            span.set_attribute("tlm.cached", True)
        if trust.status == "unscored":
            _set_error(span, self._shown(detail) if detail else str(trust.reason))
        span.end()

    def let_go(self, answer: Any) -> None:
        """Close the call before its score is known: enough traces are held for theirs.

        The score follows in the store.
        """
        if isinstance(self._scoring, (LiveSpan, LightSpan)):
            self._is_let_go = True
            _live.forget(self._scoring)
            # Of no tokens, or the store would take the scoring's time for the trace's.
            self._scoring.set_attribute(_USAGE, dict.fromkeys(_NO_TOKENS, 0))
            self.outputs(answer)
            self._end(self._llm)

    def close(self, answer: Any, trust: Trust, action: str | None) -> None:
        """Close the call's parent span.

        Args:
            answer: What the caller got, as plain data.
            trust: The settled trust.
            action: What the threshold did.
        """
        attributes = trust_attributes(trust)
        if action is not None:
            attributes["tlm.action"] = action
        if self._is_let_go:
            self._close_late(answer, attributes)
            return
        if answer is not None:
            self.outputs(answer)
        self._span.set_attributes(attributes)
        self._end(self._llm, self._scoring)

    def _close_late(self, answer: Any, attributes: dict[str, Any]) -> None:
        if self._experiment_id is None or self._scoring is None:
            return
        shown = {} if answer is None else {_OUTPUTS: self._visible(answer)}
        told = self._span.to_immutable_span().to_dict()
        told["attributes"] |= {
            key: json.dumps(value, default=str) for key, value in {**attributes, **shown}.items()
        }
        late = [Span.from_dict(told), self._scoring.to_immutable_span()]
        with _exporter.kept(self._span.trace_id) as trace:
            if trace is not None:
                trace.add(late)
                return
        _outbox.post(functools.partial(_store_late, self._experiment_id, late))

    def abandon(self) -> None:
        """End whatever is still open, so that no trace is held back for ever."""
        for span in (self._scoring, self._llm, self._span):
            if span is not None and span.end_time_ns is None:
                with contextlib.suppress(Exception):
                    span.end()

    def _note_answer(self, answer: Any, first_token: float | None, outcome: str | None) -> None:
        if answer is not None:
            self._answer, self._shown_answer = answer, self._visible(answer)
            self._llm.set_attribute(_OUTPUTS, self._shown_answer)
        if isinstance(answer, Mapping):
            self._note(
                {
                    "mlflow.llm.model": answer.get("model"),
                    "gen_ai.response.id": answer.get("id"),
                    "gen_ai.response.model": answer.get("model"),
                    "openai.response.service_tier": answer.get("service_tier"),
                    **self._endpoint.attributes(answer),
                }
            )
        self._note({"time_to_first_token": first_token, "stream.outcome": outcome})

    def _note(self, attributes: Mapping[str, Any]) -> None:
        """Set those attributes of the LLM span that are known."""
        known = {key: value for key, value in attributes.items() if value not in (None, "", [])}
        self._llm.set_attributes(known)


class BlockRecord(_Record):
    """The span of a trusted function call or block."""

    def __init__(self, name: str, inputs: Any, config: Config) -> None:
        super().__init__(name, config, becomes_active=True)
        if inputs is not None:
            self.inputs(inputs)

    def close(self, error: BaseException | None) -> None:
        """End the span, as failed if there is an error."""
        if error is not None:
            _mark_failed(self._span, error, self._visible)
        self._end()


def displace(traceparent: str) -> bool:
    """Discard the span that ``mlflow.openai.autolog()`` has opened for a call of ours.

    It opens one before the request comes this way, and names it to the provider in a header.

    Args:
        traceparent: The header's value, by W3C's Trace Context.

    Returns:
        Whether there was such a span; otherwise the header is the caller's own.
    """
    found = _TRACEPARENT.fullmatch(traceparent)
    return found is not None and _live.discard(int(found[1], 16), found[2])


def active() -> Any:
    """The active span in this context; None if there is none."""
    return _ready.current() or mlflow.get_current_active_span()


@contextlib.contextmanager
def activated(span: Any) -> Iterator[None]:
    """A span that was active elsewhere is the active one inside."""
    if isinstance(span, _ready.LaterSpan):
        before = _ready.activate(span)
        try:
            yield
        finally:
            _ready.activate(before)
        return
    token = None if span is None else set_span_in_context(span)
    try:
        yield
    finally:
        if token is not None:
            _detach(token)


@contextlib.contextmanager
def silenced() -> Iterator[None]:
    """MLflow's own tracing is off inside: a scorer's calls are not the application's."""
    with mlflow.tracing.context(enabled=False):
        yield


def flush() -> None:
    """Have MLflow write what it holds back for asynchronous export."""
    mlflow.flush_trace_async_logging()


def _detach(token: Any) -> None:
    # In another context there is nothing to undo; older MLflows raise.
    with contextlib.suppress(ValueError):
        detach_span_from_context(token)


def start_inside(
    name: str, kind: str, parent: AnySpan, start_time_ns: int | None = None
) -> AnySpan:
    """Start a span in another; nothing will be inside of it.

    Args:
        name: Its name.
        kind: Its type, as MLflow has it.
        parent: What it is inside of.
        start_time_ns: When it began, since 1970; now by default.
    """
    if isinstance(parent, _ready.LaterSpan):
        return _ready.LaterSpan(name, kind, parent, start_time_ns)
    if isinstance(parent, LightSpan) or (isinstance(parent, LiveSpan) and _exporter.alone()):
        return _live.start_light(name, kind, parent, start_time_ns)
    return _ready.start(name, kind, parent, start_time_ns)


def _start(name: str, kind: str, becomes_active: bool) -> AnySpan:
    if (parent := _ready.current()) is not None:
        return _ready.LaterSpan(name, kind, parent)
    if not _ready.wait():
        return _ready.LaterSpan(name, kind, None)
    # Not mlflow.get_current_active_span: it knows no span whose trace has been written.
    active = get_current_otel_span()
    if getattr(active, "end_time", None) is None:
        light = None if becomes_active else _ready.start_light(name, kind, active)
        return light or _ready.start(name, kind, None)
    # The active span belongs to a block that is over, such as a task that outlived it:
    # a child of it would be lost with the trace that MLflow has already let go.
    context = contextvars.copy_context()
    context.run(set_span_in_context, mlflow.entities.NoOpSpan())  # type: ignore[no-untyped-call]
    return context.run(_ready.start, name, kind, None)


def _store(experiment_id: str, spans: list[Span]) -> bool:
    """Write spans straight to the store; it does no harm if they are there already."""
    client = TracingClient()
    with _tracking.at_store(client):
        _tracking.log_spans(client, experiment_id, spans)
    return True


def _store_late(experiment_id: str, spans: list[Span]) -> bool:
    """The same for a trace that MLflow writes by itself, but after it has."""
    client = TracingClient()
    with _tracking.at_store(client):
        trace_id = spans[0].trace_id
        if _exporter.is_being_written(trace_id) or _tracking.stored(client, trace_id) is None:
            return False
        _tracking.log_spans(client, experiment_id, spans)
    return True


def texts(
    prompt: str, responses: Sequence[str], query: str | None = None, context: str | None = None
) -> dict[str, Any]:
    """The texts as they are scored, as a scoring span's input tells them."""
    inputs: dict[str, Any] = {"prompt": prompt, "response": responses[0]}
    if len(responses) > 1:
        inputs["choices"] = list(responses)
    if context is not None:
        inputs |= {"query": query, "context": context}
    return inputs


def told(trust: Trust) -> dict[str, Any]:
    """A trust as a scoring span's output tells it."""
    outputs = {
        "trust_score": trust.score,
        "explanation": trust.explanation,
        "status": trust.status,
        "reason": trust.reason,
        "choices": [told(choice) for choice in trust.choices] or None,
        "fields": {name: told(one) for name, one in trust.fields.items()} if trust.fields else None,
        "evals": dict(trust.evals) if trust.evals else None,
    }
    return {key: value for key, value in outputs.items() if value is not None}


def trust_attributes(trust: Trust) -> dict[str, Any]:
    """A trust as the attributes of a call's spans tell it."""
    attributes = {
        "tlm.trustworthiness_score": trust.score,
        "tlm.status": trust.status,
        "tlm.reason": trust.reason,
        "tlm.scorer": trust.scorer,
        "tlm.seconds": trust.seconds,
        "tlm.untrustworthy_fields": trust.untrustworthy_fields() if trust.fields else None,
        **{f"{EVALS}{name}": score for name, score in (trust.evals or {}).items()},
    }
    return {key: value for key, value in attributes.items() if value is not None}


def _mark_failed(span: AnySpan, error: BaseException, see: Callable[[Any], Any]) -> None:
    """Tell of an exception; MLflow's own way would store source lines, and what they quote."""
    if isinstance(error, Exception):
        told = {
            "exception.type": type(error).__name__,
            "exception.message": str(see(_redacted.said(error))),
            "exception.stacktrace": _redacted.stack(error),
        }
        event: Any = SpanEvent
        span.add_event(event("exception", attributes=told))
        span.set_attributes(_told_by_openai(error))
    _set_error(span, _named(error, see))


def _content(config: Config) -> str | None:
    if not config.capture_content:
        return "shape"
    return None if config.mask is None else "masked"


def _told_by_openai(error: Exception) -> dict[str, Any]:
    """What an error of openai's says beside its message."""
    if type(error).__module__.partition(".")[0] != "openai":
        return {}
    words = {
        f"openai.error.{name}": _redacted.redact(word)
        for name in ("code", "type", "param")
        if isinstance(word := getattr(error, name, None), str) and _WORD.fullmatch(word)
    }
    status = getattr(error, "status_code", None)
    return {**words, **({"http.response.status_code": status} if status else {})}


def _named(error: BaseException, see: Callable[[Any], Any]) -> str:
    return f"{type(error).__name__}: {see(_redacted.said(error))}"


def _set_error(span: AnySpan, message: str) -> None:
    # MLflow documents that it takes a SpanStatus; its annotation says otherwise.
    span.set_status(SpanStatus(SpanStatusCode.ERROR, message))  # type: ignore[arg-type]
