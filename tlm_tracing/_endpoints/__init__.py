"""OpenAI's endpoints: what differs between them, and only that.

Each is a module that knows the shape of its requests, answers and streams. The rest of the
package goes by :class:`Endpoint` alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Protocol

from tlm_tracing._endpoints import chat, responses
from tlm_tracing._visible import without_credentials

Data = dict[str, Any]


class Endpoint(Protocol):
    """One endpoint of OpenAI's API.

    Attributes:
        NAME: What OpenAI calls the operation, such as ``"chat.completions"``.
        VERB: What one call of it is called on its span, such as ``"chat"``.
    """

    NAME: str
    VERB: str

    def parameters(self) -> frozenset[str]:
        """The parameters that the installed openai knows for a request."""

    def assemble(self, chunks: Iterable[Any]) -> Data:
        """The answer as plain data that a stream's chunks or events add up to."""

    def construct(self, answer: Mapping[str, Any]) -> Any:
        """An answer as the object that OpenAI's client gives for it."""

    def is_whole(self, answer: Mapping[str, Any]) -> bool:
        """Whether a streamed answer was finished: a body can end early but cleanly."""

    def kept(self, chunk: Any) -> Any:
        """A chunk as it is kept, whatever its reader makes of it later."""

    def is_token(self, chunk: Any) -> bool:
        """Whether a chunk brings something of the answer itself."""

    def failure(self, answer: Mapping[str, Any]) -> str | None:
        """What went wrong, when the answer says that itself."""

    def tools(self, request: Mapping[str, Any]) -> list[Any]:
        """The tools of a request in the form that MLflow shows."""

    def attributes(self, answer: Mapping[str, Any]) -> Data:
        """What an answer tells beside its text; values may be None."""

    def response_format(self, request: Mapping[str, Any]) -> Any:
        """The output format asked for, as chat completions put it; None for free text."""

    def remember(self, request: Mapping[str, Any], answer: Mapping[str, Any]) -> None:
        """Keep what later requests may leave out, because OpenAI knows it."""

    def as_chat(
        self, request: Mapping[str, Any], answer: Mapping[str, Any]
    ) -> tuple[Mapping[str, Any], Mapping[str, Any]]:
        """The exchange as one of chat completions, for scoring.

        Raises:
            Unscorable: If there is nothing in it to score.
        """


# Input items of the Responses API tell of tools that were found, too.
_WITH_TOOLS = frozenset({"tools", "input"})
_PATHS: Mapping[str, Endpoint] = {"/chat/completions": chat, "/responses": responses}


def at(path: str) -> Endpoint | None:
    """The endpoint that a request's path leads to; None if it is none of ours."""
    return _PATHS.get(path)


def known(endpoint: Endpoint, body: Mapping[str, Any]) -> Data:
    """A request as it is recorded and scored: by an allow-list.

    Args:
        endpoint: Where it goes.
        body: The request body. What came by ``extra_body`` is for a server of the caller's own
            choice and may be anything.

    Returns:
        The parameters that OpenAI documents, without the credentials for tools in them.
    """
    parameters = endpoint.parameters()
    return {
        key: without_credentials(value) if key in _WITH_TOOLS else value
        for key, value in body.items()
        if key in parameters
    }
