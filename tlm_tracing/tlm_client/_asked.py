"""What a call of a TLM client asks: the pairs, each with its own part of the arguments."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeGuard

# A list of these is a batch. With a query, the prompt is made of it.
_SUBJECTS = ("query", "prompt")
_NOT_ASKED = frozenset({"form_prompt"})


class Asked:
    """The arguments of a call.

    Attributes:
        count: How many pairs a batch has; None if it is none.
        pairs: What is asked of each pair, by the names of the arguments.
    """

    def __init__(self, function: Callable[..., Any], args: Any, kwargs: Mapping[str, Any]) -> None:
        """Read them.

        Args:
            function: The method's function.
            args: Its arguments, without ``self``.
            kwargs: Those that are given by name.
        """
        declared, more = _by_name(function, args, kwargs)
        subjects = (declared[name] for name in _SUBJECTS if name in declared)
        subject = next(subjects, None)
        self.count = len(subject) if _is_list(subject) else None
        given = {
            name: value
            for name, value in {**declared, **more}.items()
            if value is not None and name not in _NOT_ASKED
        }
        self.pairs = (
            [given] if self.count is None else [self._part(given, n) for n in range(self.count)]
        )

    def _part(self, given: Mapping[str, Any], number: int) -> dict[str, Any]:
        """What is asked of one pair of a batch."""
        return {
            name: value[number] if self._has_parts(name, value) else value
            for name, value in given.items()
        }

    def _has_parts(self, name: str, value: Any) -> bool:
        if not _is_list(value) or len(value) != self.count:
            return False
        # The same outputs may be allowed for all pairs, as a list of texts.
        return name != "constrain_outputs" or not all(isinstance(one, str) for one in value)


def _by_name(
    function: Callable[..., Any], args: Any, kwargs: Mapping[str, Any]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The arguments that a method names, and those that it takes by any name."""
    signature = _signature(function)
    try:
        bound = dict(signature.bind(None, *args, **kwargs).arguments)
    except TypeError:  # which the method itself is about to raise
        return {}, dict(kwargs)
    more: dict[str, Any] = {}
    for number, parameter in enumerate(signature.parameters.values()):
        if number == 0:
            bound.pop(parameter.name, None)  # self
        elif parameter.kind is inspect.Parameter.VAR_KEYWORD:
            more = bound.pop(parameter.name, {})
    return bound, more


@functools.lru_cache(maxsize=256)
def _signature(function: Callable[..., Any]) -> inspect.Signature:
    return inspect.signature(function)


def _is_list(value: Any) -> TypeGuard[Sequence[Any]]:
    return isinstance(value, Sequence) and not isinstance(value, (str, bytes))
