"""The agent as users make it."""

from __future__ import annotations

import contextlib
import importlib.util
from collections.abc import Callable, Mapping
from typing import Any, Literal

import openai
from mlflow.pyfunc import ResponsesAgent  # type: ignore[attr-defined]

from tlm_tracing import _config
from tlm_tracing.exceptions import ConfigurationError
from tlm_tracing.model import _stopping
from tlm_tracing.model._answering import Answering
from tlm_tracing.model._apis import APIS


class TrustedChatAgent(Answering, ResponsesAgent):  # type: ignore[misc]
    """Asks an OpenAI model, and gives its answer and how far that can be trusted.

    An :class:`mlflow.pyfunc.ResponsesAgent` to be logged from a file
    (``mlflow.models.set_model(TrustedChatAgent("gpt-4o"))``) and served. Keys are read when the
    first question comes; nothing is asked while MLflow logs it.

    Args:
        model: The OpenAI model.
        instructions: The system prompt.
        client: An ``OpenAI`` client, Azure's included, or a function that makes one when the
            first question comes; ``openai.OpenAI()`` by default.
        api: ``"responses"``, or ``"chat"`` for a server that has chat completions only.
        parameters: Further parameters of the Responses API for every request, such as ``tools``;
            those of a request go before.
        **settings: Any of :class:`~tlm_tracing.Config`'s fields; ``hold_last_chunk`` is true
            unless given.

    Raises:
        ConfigurationError: If a setting is unknown or its value cannot work.
    """

    def __init__(
        self,
        model: str,
        *,
        instructions: str | None = None,
        client: openai.OpenAI | Callable[[], openai.OpenAI] | None = None,
        api: Literal["responses", "chat"] = "responses",
        parameters: Mapping[str, Any] | None = None,
        **settings: Any,
    ) -> None:
        _check(model, client, api, settings)
        told = {} if instructions is None else {"instructions": instructions}
        self._constants = {**(parameters or {}), **told, "model": model}
        self._source = client
        self._api = api
        # The last events tell of the score, so they wait for it in any case.
        self._settings = {"hold_last_chunk": True, **settings}
        with contextlib.suppress(ConfigurationError):  # from the environment: told when asked
            if _config.resolve(settings).enabled:
                _stopping.prepare()


def _check(model: Any, client: Any, api: Any, settings: Mapping[str, Any]) -> None:
    _config.check(settings)
    if not isinstance(model, str) or not model:
        raise ConfigurationError(f"model must be the name of a model, not {model!r:.100}.")
    if api not in APIS:
        raise ConfigurationError(f'api must be "responses" or "chat", not {api!r:.100}.')
    if api == "responses" and importlib.util.find_spec("openai.resources.responses") is None:
        raise ConfigurationError('This openai has no Responses API: update it, or use api="chat".')
    is_client = isinstance(client, openai.OpenAI) or (
        callable(client) and not isinstance(client, openai.AsyncOpenAI)
    )
    if client is not None and not is_client:
        raise ConfigurationError(
            "client must be an openai.OpenAI client or a function that makes one, not a "
            f"{type(client).__name__}."
        )
