"""Cleanlab's hosted Trustworthy Language Model.

It speaks the REST endpoint that Cleanlab documents, over one kept-alive session, and leaves the
rules about presets and options to the cleanlab-tlm package. That package's own requests can't
be kept within bounds by its public names: it repeats a 429 in a hot loop, a refused connection
for 903 seconds, and opens a new TLS connection for every score.

Source: https://help.cleanlab.ai/tlm/ and the notebook "TLM API directly" in
https://github.com/cleanlab/cleanlab-tools.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import random
import time
import urllib.parse
import urllib.request
from collections.abc import Mapping, Sequence
from email.utils import parsedate_to_datetime
from typing import TYPE_CHECKING, Any

import aiohttp

from tlm_tracing import _redacted
from tlm_tracing._config import cleanlab_api_key, cleanlab_base_url, key_fault
from tlm_tracing._data import Exchange
from tlm_tracing.exceptions import ConfigurationError, ScoringError
from tlm_tracing.scorers import _fields, _presets

if TYPE_CHECKING:
    from cleanlab_tlm import Eval

_logger = logging.getLogger("tlm_tracing")

_SCORE = "/v0/trustworthy_llm/get_confidence_score"
_EXPLAIN = "/v1/tlm_explanation/get_explanation"
_SCORE_FIELDS = "/v1/openai_trustworthy_llm/score"
_SCORE_RAG = "/v1/rag_trustworthy_llm/score"
_ATTEMPTS = 3
_FIRST_PAUSE = 0.25
# Less than all of the time, or a late answer on fields would cost the score itself.
_SHARE_FOR_FIELDS = 0.9
# The status of a server that is there, and stumbled over what it was asked.
_FAILED_AT_IT = 500


class HostedTLM:
    """Scores by Cleanlab's hosted TLM.

    Attributes:
        name: ``"cleanlab-tlm/<preset>"``.
        preset: The quality preset.
        model: The LLM that TLM itself uses.
        reads_texts_only: That a score depends on the texts and the format alone, and may be
            kept by these.
    """

    reads_texts_only = True

    def __init__(
        self,
        quality_preset: str = "medium",
        *,
        api_key: str | None = None,
        options: Mapping[str, Any] | None = None,
        base_url: str | None = None,
        explanation: bool | None = None,
        fields: bool = True,
        evals: Sequence[Eval] | None = None,
    ) -> None:
        """Check the settings; nothing is sent yet.

        Args:
            quality_preset: ``"base"``, ``"low"``, ``"medium"``, ``"high"`` or ``"best"``.
            api_key: Cleanlab's key; ``CLEANLAB_TLM_API_KEY`` by default.
            options: ``cleanlab_tlm.TLMOptions``, such as ``{"model": "gpt-4.1"}``.
            base_url: Where the API is; ``CLEANLAB_API_BASE_URL`` or Cleanlab's by default.
            explanation: Whether to ask why. By default wherever the preset and options give it
                along with the score, which for answers with a context are ``"high"`` and
                ``"best"``; True also asks where it takes a second request.
            fields: Whether to ask for the score of each field of a structured answer
                (``per_field_score``), too. It takes a second request, which Cleanlab bills.
            evals: What is asked about an answer whose context is named, as for
                ``cleanlab_tlm.TrustworthyRAG``; ``cleanlab_tlm.get_default_evals()`` by default.

        Raises:
            ConfigurationError: If there is no key, or cleanlab-tlm refuses preset, options or
                evals.
        """
        self._key = _checked_key(api_key or cleanlab_api_key())
        _redacted.learn([self._key])
        self._base = (base_url or cleanlab_base_url()).rstrip("/")
        self.preset = quality_preset
        self.name = f"cleanlab-tlm/{quality_preset}"
        given = dict(options or {})
        self._options = _presets.options(quality_preset, given, explanation)
        self._rag_options = _presets.rag_options(quality_preset, given, explanation)
        self._evals = None if evals is None else _presets.check_evals(quality_preset, evals)
        self._wants_explanation = explanation is True
        self._wants_fields = fields
        self.model = str(self._options["model"])
        self._session: aiohttp.ClientSession | None = None
        self._proxy: str | None = None
        self._home: tuple[int, asyncio.AbstractEventLoop] | None = None
        self._has_warned = False

    def __repr__(self) -> str:
        return f"HostedTLM({self.preset!r}, model={self.model!r})"

    async def score(self, exchange: Exchange) -> Mapping[str, Any]:
        """Score one exchange.

        Returns:
            ``{"trustworthiness_score": float in [0, 1], "log": {"explanation": str}}``; of a
            structured answer the log has ``per_field_score``, too, and of one with a context
            there are ``evals``, as far as Cleanlab gives them.

        Raises:
            ScoringError: If Cleanlab gives no score within ``exchange.timeout`` seconds.
        """
        score = self._scored if exchange.context is None else self._scored_by_context
        if not self._wants_fields or not _fields.is_structured(exchange):
            return await score(exchange, exchange.timeout)
        asking = asyncio.ensure_future(self._scored_fields(exchange))
        try:
            result = await score(exchange, exchange.timeout)
            result["log"]["per_field_score"] = await asking
        finally:
            asking.cancel()
        return result

    async def aclose(self) -> None:
        """Close the connections."""
        session, self._session = self._session, None
        if session is not None:
            await session.close()

    async def _scored(self, exchange: Exchange, allowed: float) -> dict[str, Any]:
        until = time.monotonic() + allowed
        body = {
            "prompt": exchange.prompt,
            "response": {"response": exchange.response},
            "quality": self.preset,
            "task": "default",
            "options": {**self._options, "max_timeout": allowed},
        }
        answer = await self._post(_SCORE, body, until)
        if "confidence_score" not in answer:
            raise ScoringError("Cleanlab's answer has no confidence_score.")
        log = answer.get("log")
        result = {
            "trustworthiness_score": answer["confidence_score"],
            "log": dict(log) if isinstance(log, Mapping) else {},
        }
        return await self._explained(result, exchange, self._options, until)

    async def _scored_by_context(self, exchange: Exchange, allowed: float) -> dict[str, Any]:
        """Trust and evals by one request; what fails of it must not cost the trust."""
        from tlm_tracing.scorers import _rag

        until = time.monotonic() + allowed
        evals = _rag.chosen(self._evals, exchange.response)
        options = {**self._rag_options, "max_timeout": allowed}
        body = _rag.body(exchange, evals, self.preset, options, self._key)
        try:
            answer = await self._post(_SCORE_RAG, body, until)
        except (_RefusedError, _PassingError) as error:
            if isinstance(error, _PassingError) and error.status != _FAILED_AT_IT:
                raise
            self._warn_of_no_evals(error.status)
            answer = {}
        trust = _rag.trustworthiness(answer)
        if trust is None:
            trust = await self._scored(exchange, max(0.001, until - time.monotonic()))
        else:
            trust = await self._explained(trust, exchange, self._rag_options, until)
        return {**trust, "evals": _rag.scores(answer, evals)}

    def _warn_of_no_evals(self, status: int | None) -> None:
        """Say it the first time only, by the status alone: an answer may quote the texts."""
        if not self._has_warned:
            self._has_warned = True
            _logger.warning(
                "Cleanlab answered %s when it was to score by the context. Such answers are scored "
                "without it.",
                status,
            )

    async def _scored_fields(self, exchange: Exchange) -> Any:
        """The score of each field; None if there is none, which must not cost the score."""
        allowed = exchange.timeout * _SHARE_FOR_FIELDS
        body = _fields.body(exchange, self.preset, self._options, allowed)
        try:
            return _fields.scores(await self._post(_SCORE_FIELDS, body, time.monotonic() + allowed))
        except ScoringError:
            return None

    async def _explained(
        self,
        result: dict[str, Any],
        exchange: Exchange,
        options: Mapping[str, Any],
        until: float,
    ) -> dict[str, Any]:
        """The same with the explanation, if it is wanted and has not come with the score."""
        if not self._wants_explanation or _presets.explains(options):
            return result
        scored = {
            "response": exchange.response,
            "trustworthiness_score": result["trustworthiness_score"],
        }
        body = {"prompt": exchange.prompt, "response": scored, "options": options}
        try:
            found = (await self._post(_EXPLAIN, body, until)).get("explanation")
        except ScoringError:
            found = None  # the score is there, and worth more than its explanation
        result["log"]["explanation"] = None if found is None else str(found)
        return result

    async def _post(self, path: str, body: Mapping[str, Any], until: float) -> Mapping[str, Any]:
        """Post with a few attempts; the pauses keep to what Cleanlab asks for."""
        for attempt in range(1, _ATTEMPTS + 1):
            try:
                return await self._attempt(path, body, until)
            except _PassingError as error:
                pause = error.retry_after
                if pause is None:
                    pause = _FIRST_PAUSE * 2 ** (attempt - 1) * random.uniform(0.5, 1.5)
                if attempt == _ATTEMPTS or time.monotonic() + pause >= until:
                    raise
            await asyncio.sleep(pause)
        raise AssertionError("unreachable: the last attempt returns or raises")

    async def _attempt(self, path: str, body: Mapping[str, Any], until: float) -> Mapping[str, Any]:
        timeout = aiohttp.ClientTimeout(total=max(0.001, until - time.monotonic()))
        try:
            async with self._connected().post(
                self._base + path,
                json=body,
                headers=self._headers(),
                timeout=timeout,
                proxy=self._proxy,
            ) as response:
                content = await response.read()
        except asyncio.TimeoutError:
            raise ScoringError(
                "Cleanlab did not answer in time.", reason="timeout", outage=True
            ) from None
        except aiohttp.ClientConnectorCertificateError as error:
            raise _unavailable(f"Cleanlab's certificate is not trusted: {error}") from error
        except (aiohttp.ClientError, OSError) as error:
            raise _PassingError(f"Cleanlab is not to be reached: {_named(error)}") from error
        return _read(response.status, response.headers, content)

    def _headers(self) -> dict[str, str]:
        return {
            "Authorization": f"bearer {self._key}",
            "Client-Type": "python-api",
            "X-Tlm-Origin": "standalone",
        }

    def _connected(self) -> aiohttp.ClientSession:
        """The session of this process and loop: neither survives a fork or a new loop."""
        home = (os.getpid(), asyncio.get_running_loop())
        if self._session is None or self._session.closed or self._home != home:
            self._abandon_inherited()
            # The number in flight is capped by max_concurrency, not here.
            connector = aiohttp.TCPConnector(limit=0)
            self._session = aiohttp.ClientSession(connector=connector)
            self._proxy = _proxy(self._base)
            self._home = home
        return self._session

    def _abandon_inherited(self) -> None:
        """Let go of the session of a parent process, and close none of its connections.

        To close them would take them from the parent's event loop, too, which would then wait for
        an answer on them for ever.
        """
        session = self._session
        if session is None or self._home is None or self._home[0] == os.getpid():
            return
        connector: Any = session.connector
        session.detach()
        with contextlib.suppress(AttributeError):
            connector._conns.clear()


def _proxy(url: str) -> str | None:
    """The environment's proxy for an address.

    Not aiohttp's ``trust_env``: it reads ``.netrc`` for each request, in a thread, and then
    refuses a request that has a key of its own.
    """
    address = urllib.parse.urlsplit(url)
    if address.hostname is None or urllib.request.proxy_bypass(address.hostname):
        return None
    return urllib.request.getproxies().get(address.scheme)


class _PassingError(ScoringError):
    """A failure that may be over soon; the back end as a whole is affected."""

    def __init__(
        self, message: str, *, retry_after: float | None = None, status: int | None = None
    ) -> None:
        super().__init__(message, reason="scorer_unavailable", outage=True, retry_after=retry_after)
        self.status = status


class _RefusedError(ScoringError):
    """Cleanlab does not take this request; another kind may go well."""

    def __init__(self, message: str, *, status: int, **more: Any) -> None:
        super().__init__(message, **more)
        self.status = status


def _unavailable(message: str) -> ScoringError:
    return ScoringError(message, reason="scorer_unavailable", outage=True)


def _named(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__


def _read(status: int, headers: Mapping[str, str], content: bytes) -> Mapping[str, Any]:
    """Cleanlab's answer, or the error that it amounts to."""
    try:
        answer = json.loads(content)
    except ValueError:
        answer = None
    said = _complaint(answer)
    if status == 429:
        raise _PassingError(
            f"Cleanlab's rate limit is reached{said}", retry_after=_retry_after(headers)
        )
    if status >= 500:
        raise _PassingError(
            f"Cleanlab answered {status}{said}", retry_after=_retry_after(headers), status=status
        )
    if status in (401, 403):
        raise _unavailable(
            f"Cleanlab refused the key ({status}{said}). Check CLEANLAB_TLM_API_KEY against "
            f"https://tlm.cleanlab.ai."
        )
    if status == 404:
        raise _RefusedError(
            f"Cleanlab's API is not at this address (404{said}).",
            status=status,
            reason="scorer_unavailable",
            outage=True,
        )
    if status >= 400:
        raise _RefusedError(f"Cleanlab refused the request ({status}{said}).", status=status)
    if not isinstance(answer, Mapping):
        raise _PassingError("Cleanlab's answer is no JSON object.")
    return answer


def _complaint(answer: Any) -> str:
    if not isinstance(answer, Mapping):
        return ""
    said = answer.get("error") or answer.get("description") or answer.get("code")
    return f": {said!s:.300}" if said else ""


def _retry_after(headers: Mapping[str, str]) -> float | None:
    """Seconds by RFC 9110, section 10.2.3: a number, or a date."""
    value = headers.get("Retry-After")
    if value is None:
        return None
    try:
        return max(0.0, float(value))
    except ValueError:
        pass
    try:
        return max(0.0, parsedate_to_datetime(value).timestamp() - time.time())
    except ValueError:
        return None


def _checked_key(key: str | None) -> str:
    key = (key or "").strip()
    if not key:
        raise ConfigurationError(
            "HostedTLM needs a key: set CLEANLAB_TLM_API_KEY, or give api_key=. "
            "Keys are to be had at https://tlm.cleanlab.ai."
        )
    if (fault := key_fault(key)) is not None:
        raise ConfigurationError(
            f"The Cleanlab key {fault}: copy it again to CLEANLAB_TLM_API_KEY, or to api_key=."
        )
    return key
