"""Record: the only place where MLflow spans open and close."""

from __future__ import annotations

import contextlib
import contextvars
import functools
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import mlflow
from mlflow.entities import LiveSpan, Span, SpanStatus, SpanStatusCode
from mlflow.tracing.client import TracingClient
from mlflow.tracing.provider import (
    detach_span_from_context,
    get_current_otel_span,
    set_span_in_context,
)

from tlm_tracing import _live
from tlm_tracing._config import Config
from tlm_tracing._data import Trust
from tlm_tracing._visible import shape, visible

_NO_OP_TRACE_ID = "MLFLOW_NO_OP_SPAN_TRACE_ID"
# As MLflow stores and shows them.
_MESSAGE_FORMAT = "mlflow.message.format"
_TOOLS = "mlflow.chat.tools"
_USAGE = "mlflow.chat.tokenUsage"
_TRACEPARENT = re.compile("[0-9a-f]{2}-([0-9a-f]{32})-([0-9a-f]{16})-[0-9a-f]{2}")

Rest = Callable[[], bool]
"""Something left to do, elsewhere and again and again until it gives True."""


class _Record:
    """An open span, and what is recorded inside it.

    Attributes:
        trace_id: The trace that holds it; None when MLflow records nothing here.
        span_id: Its id.
    """

    def __init__(self, name: str, config: Config) -> None:
        self._visible = visible(config)
        self._span = _start(name, "CHAIN", None)
        live = self._span.trace_id != _NO_OP_TRACE_ID
        self.trace_id: str | None = self._span.trace_id if live else None
        self.span_id: str | None = self._span.span_id if live else None
        with _live.held(self._span.trace_id) as trace:
            self._experiment_id = None if trace is None else trace.info.experiment_id

    def inputs(self, value: Any) -> None:
        """Record what went in."""
        self._put(self._span.set_inputs, value)

    def outputs(self, value: Any) -> None:
        """Record what came out."""
        self._put(self._span.set_outputs, value)

    def _put(self, put: Callable[[Any], None], value: Any) -> None:
        try:
            put(self._visible(value))
        except Exception:
            put(shape(value))  # an object of the user's that cannot even be shown as text

    def activate(self) -> Any:
        """Make this MLflow's active span in the current context; gives the way back."""
        return None if self.trace_id is None else set_span_in_context(self._span)

    def deactivate(self, token: Any) -> None:
        """Undo :meth:`activate`."""
        if token is not None:
            detach_span_from_context(token)

    def _end(self, *inner: LiveSpan | None) -> Rest | None:
        """End the span; gives what remains to be done when its trace ended before it."""
        for span in (*inner, self._span):
            if span is not None and span.end_time_ns is None:
                span.end()
        # MLflow holds such a trace while a span is open, but lets go of it with the first batch
        # that it exports then, and loses the spans that have ended and are not in a batch yet.
        if self._experiment_id is None or not _live.root_has_ended(self._span):
            return None
        spans = [span.to_immutable_span() for span in (self._span, *inner) if span is not None]
        return functools.partial(_store, self._experiment_id, spans)


class CallRecord(_Record):
    """The spans of one call: its parent, the LLM request and the scoring of its answer."""

    def __init__(
        self,
        request: Mapping[str, Any],
        *,
        operation: str,
        provider: str,
        config: Config,
    ) -> None:
        """Open the call's parent span and the LLM span.

        Args:
            request: The request body as sent.
            operation: OpenAI's name of the operation, ``"chat.completions"``.
            provider: ``"openai"`` or ``"azure"``.
            config: The settings in force.
        """
        model = str(request.get("model", ""))
        super().__init__(f"{_VERB[operation]} {model}".strip(), config)
        self._llm = _start(f"openai.{operation}", "CHAT_MODEL", self._span)
        self._scoring: LiveSpan | None = None
        try:
            recorded = self._visible(request)
            for span in (self._span, self._llm):
                span.set_inputs(recorded)
                span.set_attribute(_MESSAGE_FORMAT, "openai")
            self._llm.set_attributes(_request_attributes(model, provider, recorded))
        except BaseException:
            self.abandon()
            raise

    def answered(
        self,
        answer: Any,
        *,
        request_id: str | None = None,
        first_token: float | None = None,
        outcome: str | None = None,
    ) -> None:
        """Close the LLM span with its answer.

        Args:
            answer: The completion as plain data.
            request_id: OpenAI's ``x-request-id``.
            first_token: Seconds from the request to a stream's first chunk.
            outcome: How a stream ended: ``"complete"``, ``"truncated"``, ``"abandoned"``,
                ``"cancelled"`` or ``"error"``.
        """
        self._note_answer(answer, request_id, first_token, outcome)
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
        self._note_answer(answer, None, first_token, outcome)
        _mark_failed(self._llm, error)
        self._llm.end()
        _set_error(self._span, _named(error))

    def scoring_started(self, prompt: str, response: str) -> None:
        """Open the scoring span with the texts as they are scored."""
        self._scoring = _start("tlm.trustworthiness", "EVALUATOR", self._span)
        self._scoring.set_inputs(self._visible({"prompt": prompt, "response": response}))

    def scored(self, trust: Trust, detail: str | None = None) -> None:
        """Close the scoring span.

        Args:
            trust: The settled trust.
            detail: What went wrong, when it is unscored.
        """
        span = self._scoring
        if span is None:
            return
        outputs = {
            "trust_score": trust.score,
            "explanation": trust.explanation,
            "status": trust.status,
            "reason": trust.reason,
        }
        span.set_outputs(
            self._visible({key: value for key, value in outputs.items() if value is not None})
        )
        span.set_attributes(_trust_attributes(trust))
        if trust.status == "unscored":
            _set_error(span, detail or str(trust.reason))
        span.end()

    def close(self, answer: Any, trust: Trust, action: str | None) -> Rest | None:
        """Close the call's parent span.

        Args:
            answer: What the caller got, as plain data.
            trust: The settled trust.
            action: What the threshold did.

        Returns:
            What remains to be done on another thread, if anything.
        """
        if answer is not None:
            self.outputs(answer)
        self._span.set_attributes(_trust_attributes(trust))
        if action is not None:
            self._span.set_attribute("tlm.action", action)
        return self._end(self._llm, self._scoring)

    def abandon(self) -> None:
        """End whatever is still open, so that no trace is held back for ever."""
        for span in (self._scoring, self._llm, self._span):
            if span is not None and span.end_time_ns is None:
                with contextlib.suppress(Exception):
                    span.end()

    def _note_answer(
        self,
        answer: Any,
        request_id: str | None,
        first_token: float | None,
        outcome: str | None,
    ) -> None:
        if answer is not None:
            self._llm.set_outputs(self._visible(answer))
        attributes = _answer_attributes(answer) if isinstance(answer, Mapping) else {}
        attributes["openai.request_id"] = request_id
        attributes["time_to_first_token"] = first_token
        attributes["stream.outcome"] = outcome
        self._llm.set_attributes(
            {key: value for key, value in attributes.items() if value is not None}
        )


class BlockRecord(_Record):
    """The span of a trusted function call or block."""

    def __init__(self, name: str, inputs: Any, config: Config) -> None:
        super().__init__(name, config)
        if inputs is not None:
            self.inputs(inputs)

    def close(self, error: BaseException | None) -> Rest | None:
        """End the span, as failed if there is an error.

        Returns:
            What remains to be done on another thread, if anything.
        """
        if error is not None:
            _mark_failed(self._span, error)
        return self._end()


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


@contextlib.contextmanager
def silenced() -> Iterator[None]:
    """MLflow's own tracing is off inside: a scorer's calls are not the application's."""
    with mlflow.tracing.context(enabled=False):
        yield


def flush() -> None:
    """Have MLflow write what it holds back for asynchronous export."""
    mlflow.flush_trace_async_logging()


_VERB = {"chat.completions": "chat"}


def _start(name: str, kind: str, parent: LiveSpan | None) -> LiveSpan:
    if parent is not None or not _active_span_has_ended():
        span = mlflow.start_span_no_context(name, span_type=kind, parent_span=parent)
        _live.wake_exporter()
        return span
    # The active span belongs to a block that is over, such as a task that outlived it:
    # a child of it would be lost with the trace that MLflow has already let go.
    context = contextvars.copy_context()
    context.run(set_span_in_context, mlflow.entities.NoOpSpan())  # type: ignore[no-untyped-call]
    return context.run(mlflow.start_span_no_context, name, span_type=kind)


def _store(experiment_id: str, spans: list[Span]) -> bool:
    """Write spans straight to the store; it does no harm if they are there already."""
    with contextlib.suppress(NotImplementedError):  # a store that takes whole traces only
        TracingClient().log_spans(experiment_id, spans)
    return True


def _active_span_has_ended() -> bool:
    # Not mlflow.get_current_active_span: it knows no span whose trace has been written.
    return getattr(get_current_otel_span(), "end_time", None) is not None


def _request_attributes(model: str, provider: str, recorded: Any) -> dict[str, Any]:
    attributes: dict[str, Any] = {"mlflow.llm.provider": provider}
    if model:
        attributes["mlflow.llm.model"] = model
    # From the request as it may be seen: a tool's description is content, too.
    if isinstance(recorded, Mapping) and (tools := recorded.get("tools")):
        attributes[_TOOLS] = tools
    return attributes


def _answer_attributes(answer: Mapping[str, Any]) -> dict[str, Any]:
    """By OpenTelemetry's GenAI conventions where they have a name, else OpenAI's."""
    choices = answer.get("choices") or []
    return {
        "mlflow.llm.model": answer.get("model"),
        _USAGE: _usage(answer.get("usage")),
        "gen_ai.response.id": answer.get("id"),
        "gen_ai.response.model": answer.get("model"),
        "gen_ai.response.finish_reasons": [
            choice.get("finish_reason") for choice in choices if isinstance(choice, Mapping)
        ]
        or None,
        "openai.response.system_fingerprint": answer.get("system_fingerprint"),
        "openai.response.service_tier": answer.get("service_tier"),
    }


def _usage(usage: Any) -> dict[str, int] | None:
    if not isinstance(usage, Mapping):
        return None
    details = usage.get("prompt_tokens_details")
    counts = {
        "input_tokens": usage.get("prompt_tokens"),
        "output_tokens": usage.get("completion_tokens"),
        "total_tokens": usage.get("total_tokens"),
        "cache_read_input_tokens": details.get("cached_tokens")
        if isinstance(details, Mapping)
        else None,
    }
    return {key: count for key, count in counts.items() if isinstance(count, int)}


def _trust_attributes(trust: Trust) -> dict[str, Any]:
    attributes = {
        "tlm.trustworthiness_score": trust.score,
        "tlm.status": trust.status,
        "tlm.reason": trust.reason,
        "tlm.scorer": trust.scorer,
        "tlm.seconds": trust.seconds,
    }
    return {key: value for key, value in attributes.items() if value is not None}


def _mark_failed(span: LiveSpan, error: BaseException) -> None:
    if isinstance(error, Exception):
        span.record_exception(error)
    _set_error(span, _named(error))


def _named(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"


def _set_error(span: LiveSpan, message: str) -> None:
    # MLflow documents that it takes a SpanStatus; its annotation says otherwise.
    span.set_status(SpanStatus(SpanStatusCode.ERROR, message))  # type: ignore[arg-type]
