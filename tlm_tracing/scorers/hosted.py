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
import os
import random
import time
import urllib.parse
import urllib.request
from collections.abc import Mapping
from email.utils import parsedate_to_datetime
from typing import Any

import aiohttp

from tlm_tracing import _redacted
from tlm_tracing._config import cleanlab_api_key, cleanlab_base_url, key_fault
from tlm_tracing._data import Exchange
from tlm_tracing.exceptions import ConfigurationError, ScoringError

_DEFAULT_MODEL = "gpt-4.1-mini"
_PRESETS_THAT_EXPLAIN = frozenset({"medium", "high", "best"})
_SCORE = "/v0/trustworthy_llm/get_confidence_score"
_EXPLAIN = "/v1/tlm_explanation/get_explanation"
_SCORE_FIELDS = "/v1/openai_trustworthy_llm/score"
_ATTEMPTS = 3
_FIRST_PAUSE = 0.25
# Less than all of the time, or a late answer on fields would cost the score itself.
_SHARE_FOR_FIELDS = 0.9


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
    ) -> None:
        """Check the settings; nothing is sent yet.

        Args:
            quality_preset: ``"base"``, ``"low"``, ``"medium"``, ``"high"`` or ``"best"``.
            api_key: Cleanlab's key; ``CLEANLAB_TLM_API_KEY`` by default.
            options: ``cleanlab_tlm.TLMOptions``, such as ``{"model": "gpt-4.1"}``.
            base_url: Where the API is; ``CLEANLAB_API_BASE_URL`` or Cleanlab's by default.
            explanation: Whether to ask why. By default wherever the preset and options give it
                along with the score; True also asks where it takes a second request.
            fields: Whether to ask for the score of each field of a structured answer
                (``per_field_score``), too. It takes a second request, which Cleanlab bills.

        Raises:
            ConfigurationError: If there is no key, or cleanlab-tlm refuses preset or options.
        """
        self._key = _checked_key(api_key or cleanlab_api_key())
        _redacted.learn([self._key])
        self._base = (base_url or cleanlab_base_url()).rstrip("/")
        self.preset = quality_preset
        self.name = f"cleanlab-tlm/{quality_preset}"
        given = dict(options or {})
        explains = _explains(quality_preset, given, explanation)
        if explains:
            given["log"] = sorted({*given.get("log", ()), "explanation"})
        self._explain_after = explanation is True and not explains
        self._wants_fields = fields
        self._options = {"model": _DEFAULT_MODEL, **given}
        self.model = str(self._options["model"])
        self._session: aiohttp.ClientSession | None = None
        self._proxy: str | None = None
        self._home: tuple[int, asyncio.AbstractEventLoop] | None = None

    def __repr__(self) -> str:
        return f"HostedTLM({self.preset!r}, model={self.model!r})"

    async def score(self, exchange: Exchange) -> Mapping[str, Any]:
        """Score one exchange.

        Returns:
            ``{"trustworthiness_score": float in [0, 1], "log": {"explanation": str}}``; of a
            structured answer the log has ``per_field_score``, too.

        Raises:
            ScoringError: If Cleanlab gives no score within ``exchange.timeout`` seconds.
        """
        if not self._wants_fields or not _is_structured(exchange):
            return await self._scored(exchange)
        asking = asyncio.ensure_future(self._fields(exchange))
        try:
            result = await self._scored(exchange)
            result["log"]["per_field_score"] = await asking
        finally:
            asking.cancel()
        return result

    async def aclose(self) -> None:
        """Close the connections."""
        session, self._session = self._session, None
        if session is not None:
            await session.close()

    async def _scored(self, exchange: Exchange) -> dict[str, Any]:
        until = time.monotonic() + exchange.timeout
        body = {
            "prompt": exchange.prompt,
            "response": {"response": exchange.response},
            "quality": self.preset,
            "task": "default",
            "options": {**self._options, "max_timeout": exchange.timeout},
        }
        answer = await self._post(_SCORE, body, until)
        if "confidence_score" not in answer:
            raise ScoringError("Cleanlab's answer has no confidence_score.")
        log = answer.get("log")
        log = dict(log) if isinstance(log, Mapping) else {}
        if self._explain_after:
            log["explanation"] = await self._explanation(exchange, answer, until)
        return {"trustworthiness_score": answer["confidence_score"], "log": log}

    async def _fields(self, exchange: Exchange) -> Any:
        """The score of each field; None if there is none, which must not cost the score."""
        allowed = exchange.timeout * _SHARE_FOR_FIELDS
        message = {"role": "assistant", "content": exchange.response}
        body = {
            **self._options,
            "quality_preset": self.preset,
            "log": ["per_field_score"],
            "max_timeout": allowed,
            # The texts as they may leave, in the shape that this endpoint takes.
            "messages": [{"role": "user", "content": exchange.prompt}],
            "response_format": exchange.response_format,
            "response": {
                "id": "",
                "object": "chat.completion",
                "created": 0,
                "model": self.model,
                "choices": [{"index": 0, "finish_reason": "stop", "message": message}],
            },
        }
        try:
            answer = await self._post(_SCORE_FIELDS, body, time.monotonic() + allowed)
        except ScoringError:
            return None
        log = answer.get("log")
        return log.get("per_field_score") if isinstance(log, Mapping) else None

    async def _explanation(
        self, exchange: Exchange, answer: Mapping[str, Any], until: float
    ) -> str | None:
        scored = {
            "response": exchange.response,
            "trustworthiness_score": answer["confidence_score"],
        }
        body = {"prompt": exchange.prompt, "response": scored, "options": self._options}
        try:
            found = (await self._post(_EXPLAIN, body, until)).get("explanation")
        except ScoringError:
            return None  # the score is there, and worth more than its explanation
        return None if found is None else str(found)

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

    def __init__(self, message: str, *, retry_after: float | None = None) -> None:
        super().__init__(message, reason="scorer_unavailable", outage=True, retry_after=retry_after)


def _is_structured(exchange: Exchange) -> bool:
    wanted = exchange.response_format
    if not isinstance(wanted, Mapping) or wanted.get("type") not in ("json_schema", "json_object"):
        return False
    try:
        return isinstance(json.loads(exchange.response), dict)
    except ValueError:
        return False


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
        raise _PassingError(f"Cleanlab answered {status}{said}", retry_after=_retry_after(headers))
    if status in (401, 403):
        raise _unavailable(
            f"Cleanlab refused the key ({status}{said}). Check CLEANLAB_TLM_API_KEY against "
            f"https://tlm.cleanlab.ai."
        )
    if status == 404:
        raise _unavailable(f"Cleanlab's API is not at this address (404{said}).")
    if status >= 400:
        raise ScoringError(f"Cleanlab refused the request ({status}{said}).")
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


def _explains(preset: str, options: Mapping[str, Any], wanted: bool | None) -> bool:
    """Check preset and options; gives whether the explanation can come with the score."""
    if not options and preset in _PRESETS_THAT_EXPLAIN:
        return wanted is not False  # known to be right: saves a second of imports
    _check(preset, options)
    if wanted is False:
        return False
    try:
        _check(preset, {**options, "log": sorted({*options.get("log", ()), "explanation"})})
    except ConfigurationError:
        return False
    return True


def _check(preset: str, options: Mapping[str, Any]) -> None:
    """Have cleanlab-tlm check preset and options, which it does when a client is made."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        # Inside a loop, because outside of one the client opens a loop and leaks it.
        loop = asyncio.new_event_loop()
        try:
            loop.run_until_complete(_construct_async(preset, options))
        finally:
            loop.close()
    else:
        _construct(preset, options)


async def _construct_async(preset: str, options: Mapping[str, Any]) -> None:
    _construct(preset, options)


def _construct(preset: str, options: Mapping[str, Any]) -> None:
    import cleanlab_tlm

    try:
        make: Any = cleanlab_tlm.TLM
        make(preset, api_key="not sent", options=dict(options), verbose=False)
    except Exception as error:
        raise ConfigurationError(f"cleanlab-tlm refuses these settings: {error}") from error
