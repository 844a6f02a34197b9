"""The Sandbox: the far side of the wire, on this machine, without keys."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from types import TracebackType
from typing import Any

from tlm_tracing.testing._child import Child
from tlm_tracing.testing._server import Server
from tlm_tracing.testing._state import RecordedRequest, Side


class Sandbox:
    """A loopback HTTP server that speaks OpenAI and Cleanlab's TLM.

    Of OpenAI it has chat completions and the Responses API. Answers and scores are canned or made
    up; nothing leaves the machine. How it behaves can be scripted, and steered by the request
    itself: ``model="sandbox:status=429,retry_after=1"``.

    Behaviours of both sides: ``status`` (int), ``body`` (the JSON of a failure), ``fail_first``
    (so many equal requests fail), ``html`` (a proxy's page), ``garbage`` (no JSON),
    ``retry_after``, ``delay`` (seconds), ``hang`` (until :meth:`release`), ``disconnect``
    (OpenAI: after so many chunks or events; TLM: at once or ``"mid"``).

    Of the OpenAI side: ``content``, ``refusal``, ``reasoning``, ``tools`` (a number),
    ``tool_args``, ``empty``, ``null_content`` (a response then has no message), ``finish_reason``
    (a response with ``"length"`` or ``"content_filter"`` is incomplete), ``cached_tokens`` and
    ``reasoning_tokens`` (numbers), ``chunks`` (a number), ``chunk_delay`` (seconds), ``truncate``
    and ``stream_error`` (after so many chunks or events). Of chat only: ``function_call`` and
    ``no_choices``. Of responses only: ``builtin``, a tool that is called before the answer
    (``"web_search"``, ``"file_search"``, ``"code_interpreter"``, ``"mcp"``,
    ``"image_generation"``), or in its place (``"computer"``), and ``failed``.

    Of the TLM side: ``score`` (anything), ``field_scores`` (of a structured answer, by field),
    ``field_fault`` (a behaviour for where those are asked for alone), ``eval_scores`` (of an
    answer with a context, by eval), ``eval_fault`` (a behaviour for where such answers are scored),
    ``no_score``, ``explanation``, ``no_log``, ``empty_body``, ``partial``, ``drip`` (seconds a
    byte), ``code`` (of an error).

    Example:
        >>> with Sandbox() as sandbox:
        ...     sandbox.answer("What is 1+1?", "3", score=0.02, explanation="It is 2.")
        ...     client = openai.OpenAI(base_url=sandbox.openai_base_url, api_key="any")
    """

    def __init__(self, *, process: bool = False) -> None:
        """Nothing is started yet.

        Args:
            process: Serve from a child process, so that it takes no time from this one. It
                ends with this process, however that ends.
        """
        self._process = process
        self._server: Any = None

    def start(self) -> Sandbox:
        """Start serving; ``with Sandbox() as sandbox:`` does it, too."""
        if self._server is None:
            self._server = Child() if self._process else Server()
        return self

    def stop(self) -> None:
        """Stop serving, at once."""
        server, self._server = self._server, None
        if server is not None:
            server.stop()

    def __enter__(self) -> Sandbox:
        return self.start()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.stop()

    @property
    def openai_base_url(self) -> str:
        """For ``openai.OpenAI(base_url=...)``."""
        return f"http://127.0.0.1:{self._running.port('openai')}/v1"

    @property
    def tlm_base_url(self) -> str:
        """For ``HostedTLM(base_url=...)``."""
        return f"http://127.0.0.1:{self._running.port('tlm')}/api"

    def environment(self) -> dict[str, str]:
        """The environment variables that point OpenAI's and Cleanlab's clients here."""
        # A proxy from the environment would be asked for the loopback address, too.
        no_proxy = ",".join(filter(None, [os.environ.get("NO_PROXY"), "127.0.0.1"]))
        return {
            "NO_PROXY": no_proxy,
            "no_proxy": no_proxy,
            "OPENAI_BASE_URL": self.openai_base_url,
            "OPENAI_API_KEY": "sk-sandbox",
            "CLEANLAB_API_BASE_URL": self.tlm_base_url,
            "CLEANLAB_TLM_API_KEY": "sandbox",
        }

    def answer(
        self,
        question: str,
        text: str,
        *,
        score: float | None = None,
        explanation: str | None = None,
    ) -> None:
        """Can one answer.

        Args:
            question: The last user message that it answers.
            text: The answer.
            score: How TLM scores it, in [0, 1].
            explanation: How TLM explains the score.
        """
        self.load(
            [{"prompt": question, "response": text, "score": score, "explanation": explanation}]
        )

    def load(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Can many answers.

        Args:
            rows: Each with ``prompt`` and ``response``, and if known ``score`` (or Cleanlab's
                ``trustworthiness_score``) and ``explanation``.

        Raises:
            ValueError: If a row lacks its prompt or response.
        """
        self._running.load([dict(row) for row in rows])

    def script(self, side: Side, *behaviours: dict[str, Any]) -> None:
        """Say how the next requests to a side are answered, one behaviour each.

        Raises:
            ValueError: If a behaviour is unknown.
        """
        self._running.script(side, list(behaviours))

    def default(self, side: Side, **behaviour: Any) -> None:
        """Say how all other requests to a side are answered; without behaviour: normally.

        Raises:
            ValueError: If a behaviour is unknown.
        """
        self._running.default(side, behaviour)

    def requests(self, side: Side) -> list[RecordedRequest]:
        """What has arrived on a side, in order."""
        found: list[RecordedRequest] = self._running.requests(side)
        return found

    def wait_for(self, side: Side, count: int, timeout: float = 10.0) -> None:
        """Wait until so many requests have arrived.

        Raises:
            TimeoutError: If they have not after ``timeout`` seconds.
        """
        if not self._running.wait_for(side, count, timeout):
            raise TimeoutError(f"{len(self.requests(side))} of {count} requests came to {side}.")

    def connections(self, side: Side) -> int:
        """How many connections the requests to a side came over."""
        return int(self._running.connections(side))

    def max_in_flight(self, side: Side) -> int:
        """How many requests to a side were open at once, at most."""
        return int(self._running.max_in_flight(side))

    def stop_side(self, side: Side) -> None:
        """Have a side refuse connections, as if its service were down."""
        self._running.stop_side(side)

    def start_side(self, side: Side) -> None:
        """Have a side listen again, at the same address."""
        self._running.start_side(side)

    def release(self) -> None:
        """Let go of every request that hangs."""
        self._running.release()

    def clear(self) -> None:
        """Forget answers, scripts and requests, and have both sides listen."""
        self._running.clear()

    @property
    def _running(self) -> Any:
        if self._server is None:
            raise RuntimeError("The Sandbox is not running: use `with Sandbox() as sandbox:`.")
        return self._server
