"""What of a value may be seen on a span: all, what a mask leaves, or its shape alone."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from tlm_tracing._config import Config

_REPLACED = "[not recorded: the mask failed]"
_ENDLESS = "[not recorded: nested too deeply]"
_DEEPEST = 50
_CONTAINERS = (Mapping, list, tuple)
_SHAPE_WORDS = frozenset(
    {
        "role",
        "type",
        "model",
        "object",
        "finish_reason",
        "status",
        "reason",
        "service_tier",
    }
)


def visible(config: Config) -> Callable[[Any], Any]:
    """How a value looks on a span under these settings."""
    if not config.capture_content:
        return shape
    if (mask := config.mask) is None:
        return _storable

    def masked(value: Any) -> Any:
        try:
            # Given a copy: what it changes in place must not change what is sent or returned.
            return _storable(mask(_storable(value)))
        except Exception:
            # A broken mask must not let through what it was meant to hide.
            return _REPLACED

    return masked


def _storable(value: Any, above: tuple[Any, ...] = ()) -> Any:
    """The same, with texts that a store can encode: half a surrogate pair costs the trace."""
    if isinstance(value, str):
        return value if value.isascii() else value.encode("utf-8", "replace").decode("utf-8")
    if not isinstance(value, _CONTAINERS):
        return value
    if _is_endless(value, above):
        return _ENDLESS
    above = (*above, value)
    if isinstance(value, Mapping):
        return {_storable(str(key)): _storable(item, above) for key, item in value.items()}
    return [_storable(item, above) for item in value]


def shape(value: Any, above: tuple[Any, ...] = ()) -> Any:
    """What is left of a value when content is not recorded: structure, numbers and lengths."""
    if isinstance(value, str):
        return f"[{len(value)} characters]"
    if value is None or isinstance(value, (bool, int, float)):
        return value
    if not isinstance(value, _CONTAINERS):
        return f"[{type(value).__name__}]"
    if _is_endless(value, above):
        return _ENDLESS
    above = (*above, value)
    if isinstance(value, Mapping):
        return {
            str(key): item if key in _SHAPE_WORDS and isinstance(item, str) else shape(item, above)
            for key, item in value.items()
        }
    return [shape(item, above) for item in value]


def _is_endless(value: Any, above: tuple[Any, ...]) -> bool:
    return len(above) >= _DEEPEST or any(value is outer for outer in above)
