"""A TLM client as its own methods see it while one call of it is watched.

The methods of the client's class run with such a view in the place of ``self``. So what they do
for each pair passes here, and neither the client nor its class is touched: calls at the same
time know nothing of each other.

Source: the names inside of cleanlab-tlm 1.1.39. Without them a batch is recorded all the same,
but nobody knows how long each of its pairs took.
"""

from __future__ import annotations

import functools
import time
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import wrapt

_PACKAGE = "cleanlab_tlm"
_ONE_PAIR = frozenset(
    {
        "_get_trustworthiness_score_async",
        "_prompt_async",
        "_get_explanation_async",
        "_score_async",
        "_generate_async",
    }
)
_RATE_LIMIT = "_rate_handler"
_CALLS = frozenset({"get_trustworthiness_score", "prompt", "score", "generate"})


@dataclass
class Timing:
    """How one pair fared at TLM. Times are in nanoseconds since 1970.

    Attributes:
        number: Which pair of its round.
        is_first: Whether that is the call's first round.
        is_last: Whether it is the last, too, as far as can be told.
        begun: When it began to wait for its turn; None if it has not.
        sent: When its turn had come; None if the client does not make it wait.
        ended: When it was over; None if it is not.
        result: What came of it.
        error: What was raised in place of that.
    """

    number: int
    is_first: bool
    is_last: bool
    begun: int | None = None
    sent: int | None = None
    ended: int | None = None
    result: Any = None
    error: BaseException | None = None


class Rounds:
    """What a call of a client asks for, pair by pair, in a round for each kind of request."""

    def __init__(
        self,
        client: Any,
        *,
        when_sent: Callable[[Timing], None],
        when_ended: Callable[[Timing], None],
    ) -> None:
        """Nothing has been asked yet.

        Args:
            client: Whose call it is.
            when_sent: Told of each pair of the first round when its turn has come.
            when_ended: Told of it when it is over, unless it is a client inside of this one that
                has asked for it: then that is not the end.
        """
        self._client = id(client)
        self._when_sent = when_sent
        self._when_ended = when_ended
        self._rounds: dict[tuple[int, str], list[Timing]] = {}

    def __iter__(self) -> Iterator[list[Timing]]:
        return iter(self._rounds.values())

    def begin(self, client: Any, name: str) -> Timing:
        """A pair is asked for.

        Args:
            client: By whom; a call may have several.
            name: By which of its methods.
        """
        timings = self._rounds.setdefault((id(client), name), [])
        is_first = len(self._rounds) == 1
        timings.append(Timing(len(timings), is_first, is_first and id(client) == self._client))
        return timings[-1]

    async def ask(self, timing: Timing, ask: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """Ask TLM for a pair, and note how it goes."""
        timing.begun = time.time_ns()
        try:
            timing.result = await ask(*args, **kwargs)
        except BaseException as error:
            timing.error = error
            raise
        finally:
            timing.ended = time.time_ns()
            if timing.is_last:
                self._when_ended(timing)
        return timing.result

    def sent(self, timing: Timing) -> None:
        """A pair's turn has come."""
        if timing.sent is None:  # or it is a retry
            timing.sent = time.time_ns()
            if timing.is_first:
                self._when_sent(timing)


class Bound(wrapt.ObjectProxy):  # type: ignore[misc,type-arg,unused-ignore]
    """A client whose methods see this in its place."""

    def __getattr__(self, name: str) -> Any:
        client = self.__wrapped__
        found = getattr(client, name)
        if isinstance(found, types.MethodType) and found.__self__ is client:
            return types.MethodType(found.__func__, self)
        return found


class Watched(Bound):
    """A client while one of its methods runs; it may have clients of its own inside."""

    def __init__(self, client: Any, rounds: Rounds) -> None:
        super().__init__(client)
        self._self_rounds = rounds

    def __getattr__(self, name: str) -> Any:
        found = super().__getattr__(name)
        if name in _ONE_PAIR and isinstance(found, types.MethodType):
            return functools.partial(self._self_ask, name, found.__func__)
        return Watched(found, self._self_rounds) if is_client(found) else found

    def _self_ask(self, name: str, function: Any, *args: Any, **kwargs: Any) -> Any:
        client, rounds = self.__wrapped__, self._self_rounds
        timing = rounds.begin(client, name)
        sent = functools.partial(rounds.sent, timing)
        asking = types.MethodType(function, _One(client, sent))
        return rounds.ask(timing, asking, args, kwargs)


class _One(Bound):
    """A client while it asks for one pair."""

    def __init__(self, client: Any, sent: Callable[[], None]) -> None:
        super().__init__(client)
        self._self_sent = sent

    def __getattr__(self, name: str) -> Any:
        found = super().__getattr__(name)
        return _Turn(found, self._self_sent) if name == _RATE_LIMIT else found


class _Turn(wrapt.ObjectProxy):  # type: ignore[misc,type-arg,unused-ignore]
    """The client's limit on requests at the same time, as one pair meets it."""

    def __init__(self, limit: Any, sent: Callable[[], None]) -> None:
        super().__init__(limit)
        self._self_sent = sent

    async def __aenter__(self) -> Any:
        entered = await self.__wrapped__.__aenter__()
        self._self_sent()
        return entered

    async def __aexit__(self, *error: Any) -> Any:
        return await self.__wrapped__.__aexit__(*error)


def is_client(value: object) -> bool:
    """Whether something is a TLM client of Cleanlab's, or derived from one."""
    kind: type = value.__class__
    return _is_client_class(kind)


@functools.lru_cache(maxsize=256)
def _is_client_class(kind: type) -> bool:
    # By name, so that nothing has to be imported; a user has a client only if it is.
    return any(
        base.__module__.partition(".")[0] == _PACKAGE and _CALLS & vars(base).keys()
        for base in kind.__mro__
    )
