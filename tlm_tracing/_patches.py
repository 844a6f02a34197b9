"""Other people's functions: wrapped to look as before, and without residue after."""

from __future__ import annotations

import contextlib
import functools
import inspect
import threading
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import wrapt

FunctionT = TypeVar("FunctionT", bound=Callable[..., Any])

Wrapper = Callable[[Any, Any, Any, Any], Any]
"""What runs instead of a method: ``(wrapped, instance, args, kwargs)``."""


def like(original: Callable[..., Any]) -> Callable[[FunctionT], FunctionT]:
    """Make a function look like the one that it wraps, also to ``inspect.getfullargspec``."""

    def decorate(function: FunctionT) -> FunctionT:
        wrapper: Any = functools.wraps(original)(function)
        with contextlib.suppress(TypeError, ValueError):  # some builtins have none
            wrapper.__signature__ = inspect.signature(original)
        return wrapper  # type: ignore[no-any-return]

    return decorate


class Patches:
    """Some methods and what wraps them.

    Attributes:
        users: How many want them at present.
    """

    def __init__(self, wrappers: Mapping[tuple[Any, str], Wrapper]) -> None:
        """Nothing is wrapped yet.

        Args:
            wrappers: By class and name of the method.
        """
        self.users = 0
        self._wrappers = wrappers
        self._lock = threading.RLock()

    def install(self) -> None:
        """Wrap the methods, unless they are; each install is undone by one uninstall."""
        with self._lock:
            self.users += 1
            self._wrap()

    def renew(self) -> None:
        """Wrap them again if they are to be, but another tool has put back what it had found."""
        with self._lock:
            if self.users:
                self._wrap()

    def uninstall(self) -> None:
        """Take the wrappers off when nobody wants them any more."""
        with self._lock:
            self.users -= 1
            if self.users:
                return
            for cls, name in self._wrappers:
                method = vars(cls).get(name)
                if not self._is_ours(method):
                    continue  # under another tool's: it stays, and does nothing
                delattr(cls, name)
                if getattr(cls, name) is not method.__wrapped__:
                    setattr(cls, name, method.__wrapped__)

    def _wrap(self) -> None:
        for (cls, name), wrapper in self._wrappers.items():
            if not self._leads_to_ours(cls, name):
                wrapt.wrap_function_wrapper(cls, name, wrapper)

    def _is_ours(self, method: Any) -> bool:
        return getattr(method, "_self_wrapper", None) in self._wrappers.values()

    def _leads_to_ours(self, cls: Any, name: str) -> bool:
        """Whether ours is there, if need be under what other tools have put on top."""
        method = vars(cls).get(name)
        while method is not None:
            if self._is_ours(method):
                return True
            method = getattr(method, "__wrapped__", None)
        return False
