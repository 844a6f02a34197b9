"""OpenAI's errors as MLflow's servers tell them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import openai
from mlflow.exceptions import MlflowException, get_error_code

from tlm_tracing import _redacted

# What a caller can do something about, by OpenAI's status; the others are the operator's.
_CALLERS = {400: 400, 413: 400, 422: 400, 429: 429}


@contextlib.contextmanager
def as_mlflows() -> Iterator[None]:
    """OpenAI's errors as those for which MLflow's servers have a status of HTTP."""
    try:
        yield
    except openai.OpenAIError as error:
        message = f"{type(error).__name__}: {_redacted.said(error)}"
        code = get_error_code(_status(error))  # type: ignore[no-untyped-call]
        raise MlflowException(message, code) from error


def _status(error: openai.OpenAIError) -> int:
    if isinstance(error, openai.APITimeoutError):
        return 504
    if not isinstance(error, openai.APIError):
        return 500  # there is no key, for example
    status = getattr(error, "status_code", 503)
    return 503 if status >= 500 else _CALLERS.get(status, 500)
