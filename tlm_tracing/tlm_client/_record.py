"""The spans of TLM's own calls: one for a pair, or one for a batch and in it one for each pair."""

from __future__ import annotations

import contextlib
import copy
import functools
from collections.abc import Mapping
from typing import Any

from tlm_tracing import _live, _ready, _record
from tlm_tracing._config import Config
from tlm_tracing._visible import shape


class TLMRecord(_record._Record):
    """The open span of a pair, or of a batch.

    Attributes:
        ended: When a pair of a batch was over, in nanoseconds since 1970; None if it is not.
    """

    def __init__(self, name: str, kind: str, inputs: Any, config: Config) -> None:
        """Open it.

        Args:
            name: Its name.
            kind: Its type, as MLflow has it.
            inputs: What went in.
            config: The settings in force.
        """
        super().__init__(name, config, kind)
        self.ended: int | None = None
        self._pairs: list[TLMRecord] = []
        self.inputs(inputs)

    def inputs(self, value: Any) -> None:
        """Record what is asked."""
        self._list("request_preview", self._told(_record._INPUTS, value), "query", "prompt")

    def outputs(self, value: Any) -> None:
        """Record what was told."""
        self._list("response_preview", self._told(_record._OUTPUTS, value), "response")

    def _told(self, key: str, value: Any) -> Any:
        return self._put(functools.partial(self._span.set_attribute, key), value)

    def _list(self, preview: str, shown: Any, *names: str) -> None:
        """Have MLflow list the trace by its texts alone."""
        if self._span.parent_id is not None or not isinstance(shown, Mapping):
            return
        texts = (text for name in names if isinstance(text := shown.get(name), str))
        if (text := next(texts, None)) is not None:
            with _live.held(self._span.trace_id) as trace:
                if trace is not None and getattr(trace.info, preview) is None:
                    setattr(trace.info, preview, text[: _record._PREVIEW])

    def inside(self, name: str, kind: str, inputs: Any, began: int) -> TLMRecord:
        """Open the span of a pair in this one, which is that of a batch.

        Args:
            name: Its name.
            kind: Its type, as MLflow has it.
            inputs: What went in, as :meth:`seen` gave it.
            began: When, in nanoseconds since 1970.
        """
        pair = copy.copy(self)
        self._pairs.append(pair)
        span: Any = _record.start_inside(name, kind, self._span, began)
        pair._span = span
        if self.trace_id is not None:
            pair.span_id = span.span_id
        span.set_attribute(_record._INPUTS, inputs)
        return pair

    def seen(self, value: Any) -> Any:
        """A copy of a value as it may be recorded."""
        try:
            return self._visible(value)
        except Exception:
            return shape(value)

    def note(self, attributes: Mapping[str, Any]) -> None:
        """Set those attributes that are known."""
        known = {key: value for key, value in attributes.items() if value is not None}
        self._span.set_attributes(known)

    def went_wrong(self, detail: str) -> None:
        """Note what went wrong without an exception."""
        _record._set_error(self._span, self._shown(detail))

    def failed(self, error: BaseException) -> None:
        """Note an exception."""
        _record._mark_failed(self._span, error, self._visible)

    def close(self) -> None:
        """End the span, and in it those of the pairs that are over; of the others there is none."""
        pairs = [pair for pair in self._pairs if pair.ended is not None]
        for pair in self._pairs:
            if isinstance(pair._span, _ready.LaterSpan):
                pair._span.end()
                pair._span.end_time_ns = pair.ended
            elif pair.ended is None:
                _live.forget(pair._span)
            else:
                pair._span.end(end_time_ns=pair.ended)
        self._end(*(pair._span for pair in pairs))

    def abandon(self) -> None:
        """End what is open, so that no trace is held back for ever."""
        with contextlib.suppress(Exception):
            self._end(*(pair._span for pair in self._pairs))
