"""Scores that are known already: the same answer to the same prompt is scored once.

Looked into where the answer comes in, not on the scoring loop: a known score takes no place in
the queue, and its caller waits for nothing.
"""

from __future__ import annotations

import os
import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable
from concurrent.futures import Future
from dataclasses import replace

from tlm_tracing import _scoring
from tlm_tracing._config import Config
from tlm_tracing._data import Trust
from tlm_tracing._scoring import Verdict
from tlm_tracing.exceptions import ScoringError


class _Cache:
    """The scores of one process."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._known: OrderedDict[Hashable, Verdict] = OrderedDict()
        self._asked: dict[Hashable, Future[Verdict]] = {}
        self._size = 0

    def find(
        self, key: Hashable, config: Config, send: Callable[[], Future[Verdict]]
    ) -> Future[Verdict]:
        """The verdict that is known or on its way, or that of a new request."""
        # A verdict on its way may be on the bounds as much as on the answer, such as "timeout".
        bounded = (key, *_bounds(config))
        with self._lock:
            self._size = max(self._size, config.cache_size)
            if (known := self._known.get(key)) is not None:
                self._known.move_to_end(key)
                return _again(known)
            if (asked := self._asked.get(bounded)) is None:
                shared: Future[Verdict] = Future()
                self._asked[bounded] = shared
        if asked is not None:
            return _following(asked)
        return self._ask(key, bounded, shared, send)

    def _ask(
        self,
        key: Hashable,
        bounded: Hashable,
        shared: Future[Verdict],
        send: Callable[[], Future[Verdict]],
    ) -> Future[Verdict]:
        def settle(verdict: Verdict) -> None:
            with self._lock:
                del self._asked[bounded]
                if verdict.trust.status == "scored":
                    self._known[key] = verdict
                    while len(self._known) > self._size:
                        self._known.popitem(last=False)
            shared.set_result(verdict)

        try:
            asking = send()  # not in the lock: a verdict may be handed over inside of another
        except BaseException:
            settle(Verdict(Trust.unscored("scorer_error")))
            raise
        asking.add_done_callback(lambda done: settle(done.result()))
        return asking


def find(key: Hashable, config: Config, send: Callable[[], Future[Verdict]]) -> Future[Verdict]:
    """The verdict on what has been scored before, or is being scored, or is now to be scored.

    Args:
        key: What is scored, and by whom.
        config: The settings in force. Of several cache sizes, the largest counts.
        send: Asks for the score.
    """
    return _cache.find(key, config, send)


def _bounds(config: Config) -> tuple[Hashable, ...]:
    return (
        config.mode,
        config.timeout,
        config.max_scores_per_minute,
        config.max_concurrency,
        config.queue_size,
    )


def _following(asked: Future[Verdict]) -> Future[Verdict]:
    own: Future[Verdict] = Future()
    _scoring.follow(own)
    asked.add_done_callback(lambda done: own.set_result(_repeated(done.result())))
    return own


def _again(known: Verdict) -> Future[Verdict]:
    own: Future[Verdict] = Future()
    own.set_result(_repeated(known))
    return own


def _repeated(verdict: Verdict) -> Verdict:
    """The same for one more call, which took no scorer's time."""
    error = verdict.error
    if error is not None:  # whoever raises it adds to its traceback
        cause = error.__cause__
        error = ScoringError(
            str(error), reason=error.reason, outage=error.outage, retry_after=error.retry_after
        )
        error.__cause__ = cause
    is_scored = verdict.trust.status == "scored"
    trust = replace(verdict.trust, seconds=0.0) if is_scored else verdict.trust
    return Verdict(trust, error, verdict.scorer, is_scored)


def _after_fork() -> None:
    """A forked child knows nothing, as it has none of its parent's requests."""
    global _cache
    _cache = _Cache()


_cache = _Cache()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
