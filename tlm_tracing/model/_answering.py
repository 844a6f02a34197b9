"""How an agent answers."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Literal

import openai
from mlflow.entities import NoOpSpan
from mlflow.exceptions import MlflowException
from mlflow.tracing.constant import TraceMetadataKey
from mlflow.types.responses import (
    ResponsesAgentRequest,
    ResponsesAgentResponse,
    ResponsesAgentStreamEvent,
)

from tlm_tracing import _live, _span
from tlm_tracing._data import Scorer, Trust
from tlm_tracing.exceptions import ConfigurationError, ScoringError, UntrustworthyResponseError
from tlm_tracing.model import _answers, _logging, _outcome, _shape
from tlm_tracing.model._apis import APIS, arguments
from tlm_tracing.model._errors import as_mlflows
from tlm_tracing.model._tail import Tail

Data = dict[str, Any]
Request = ResponsesAgentRequest | Mapping[str, Any]

_NOT_ASKED = "MLflow is logging this model, so nothing was asked."
_NOT_SENT = {"background", "context", "custom_inputs", "stream"}


class Answering:
    """How the agent answers.

    Not in the body of a ResponsesAgent: MLflow wraps what it finds there in spans that show
    texts whatever the settings say, and that never end when a stream is left early.
    """

    _constants: Data
    _source: openai.OpenAI | Callable[[], openai.OpenAI] | None
    _api: Literal["responses", "chat"]
    _settings: Data

    def predict(self, request: Request) -> ResponsesAgentResponse:
        """Answer a request.

        Args:
            request: A conversation, and parameters for OpenAI.

        Returns:
            OpenAI's answer, or what ``on_low`` made of it. Its ``custom_outputs`` are
            ``trust_score`` in [0, 1], ``explanation``, ``status``, ``reason``, ``trace_id`` as
            in :class:`~tlm_tracing.Trust`, and ``action``: ``"flagged"``, ``"replaced"``, or
            ``"raised"`` of an answer that is withheld, with a refusal in its place; else None.
            With a context named, ``evals`` are Cleanlab's RAG scores.

        Raises:
            MlflowException: If OpenAI gave no answer; its cause is the error of openai's.
        """
        if _logging.is_under_way():
            return _shape.response(_answers.of(_NOT_ASKED), _outcome.outputs(Trust.unscored("off")))
        send, inputs = self._prepared(request)
        with _span.trusted_span("predict", **self._settings) as block:
            _introduce(block, inputs)
            block.set_inputs(inputs)
            given, error = None, None
            try:
                with as_mlflows():
                    given = send()
            except (UntrustworthyResponseError, ScoringError) as raised:
                error = raised
            answer, told = _outcome.concluded(block, given, error)
            response = _shape.response(answer, told)
            block.set_outputs(_shape.dumped(response))
        return response

    def predict_stream(self, request: Request) -> Iterator[ResponsesAgentStreamEvent]:
        """Answer a request piece by piece.

        Args:
            request: A conversation, and parameters for OpenAI.

        Yields:
            The events of the Responses API as they come. The last item's
            ``response.output_item.done`` and the event that ends the response come with the
            score: both have the ``custom_outputs`` of :meth:`predict`, and give what ``on_low``
            made of the answer. Its text was seen by then.

        Raises:
            MlflowException: If OpenAI gave no answer; its cause is the error of openai's.
        """
        if _logging.is_under_way():
            tail = Tail()
            tail.replace(_answers.of(_NOT_ASKED))
            yield from tail.events(_outcome.outputs(Trust.unscored("off")))
            return
        send, inputs = self._prepared(request)
        block = _span.TrustedSpan("predict_stream", self._settings, inputs)
        send = functools.partial(send, stream=True)
        yield from _span._generator(self._events, lambda *_: block)(block, send, inputs)

    def request_body(self, request: ResponsesAgentRequest) -> Data:
        """What OpenAI is asked; override it to make use of ``custom_inputs``.

        Args:
            request: What the agent is asked.

        Returns:
            Parameters of the Responses API, whichever API they are sent by.
        """
        return {**self._constants, **request.model_dump(exclude_none=True, exclude=_NOT_SENT)}

    def _prepared(self, given: Request) -> tuple[Callable[..., Any], Data]:
        """How OpenAI is asked, and what is recorded as the block's input."""
        request = ResponsesAgentRequest.model_validate(given)
        if request.background:
            raise MlflowException.invalid_parameter_value(
                "A response that OpenAI makes in the background cannot be fetched from here."
            )
        api = APIS[self._api]
        with as_mlflows():
            create = api.create(self._client)
        send = functools.partial(create, **arguments(api, self.request_body(request)))
        return send, {"request": _shape.dumped(request)}

    def _events(
        self, block: _span.TrustedSpan, send: Callable[[], Any], inputs: Data
    ) -> Iterator[ResponsesAgentStreamEvent]:
        _introduce(block, inputs)
        tail = Tail()
        noted: Data = {}
        error = None
        try:
            with as_mlflows(), send() as stream:
                for data in APIS[self._api].events(_noting(stream, noted)):
                    yield from tail.let_through(data)
        except (UntrustworthyResponseError, ScoringError) as raised:
            error = raised
        is_new = error is not None or "replacement" in noted
        given = noted.get("replacement") if is_new else tail.response(_outcome.heard(block))
        answer, told = _outcome.concluded(block, given, error)
        if is_new:
            tail.replace(answer)
        block.set_outputs(_shape.dumped(_shape.response(answer, told)))
        yield from tail.events(told)

    @functools.cached_property
    def _client(self) -> openai.OpenAI:
        """Made when it is needed first: where the model is served, with the keys of there."""
        source = openai.OpenAI if self._source is None else self._source
        return source if isinstance(source, openai.OpenAI) else source()

    def __getstate__(self) -> Data:
        state = {key: value for key, value in self.__dict__.items() if key != "_client"}
        scorer = self._settings.get("scorer")
        if isinstance(self._source, openai.OpenAI) or isinstance(scorer, Scorer):
            raise ConfigurationError(
                "A TrustedChatAgent with a client or a scorer in it is not pickled, as these hold "
                'keys. Log it from a file, log_model(python_model="agent.py") with '
                "mlflow.models.set_model(...) in that; or give a function that makes the client."
            )
        return state


def _introduce(block: _span.TrustedSpan, inputs: Data) -> None:
    """Have MLflow know the block as an agent's, and whose conversation it is."""
    record = block._record
    if record is None or isinstance(record._span, NoOpSpan):
        return
    record._span.set_span_type("AGENT")
    context = inputs["request"].get("context") or {}
    named = {
        TraceMetadataKey.TRACE_SESSION: context.get("conversation_id"),
        TraceMetadataKey.TRACE_USER: context.get("user_id"),
    }

    def name(trace_id: str, _: str) -> None:
        with _live.held(trace_id) as trace:
            if trace is not None:
                trace.info.trace_metadata.update({key: one for key, one in named.items() if one})

    record.when_placed(name)


def _noting(stream: Iterable[Any], noted: Data) -> Iterator[Any]:
    """A stream as it is; what the last chunk tells beside is noted."""
    for chunk in stream:
        noted.update(getattr(chunk, "tlm_metadata", None) or {})
        yield chunk
