"""What of a value may be seen on a span: all, what a mask leaves, or its shape alone."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from tlm_tracing._config import Config

_REPLACED = "[not recorded: the mask failed]"
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
        return _shape
    if (mask := config.mask) is None:
        return _storable

    def masked(value: Any) -> Any:
        try:
            return _storable(mask(value))
        except Exception:
            # A broken mask must not let through what it was meant to hide.
            return _REPLACED

    return masked


def _storable(value: Any) -> Any:
    """The same, with texts that a store can encode: half a surrogate pair costs the trace."""
    if isinstance(value, str):
        return value if value.isascii() else value.encode("utf-8", "replace").decode("utf-8")
    if isinstance(value, Mapping):
        return {key: _storable(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_storable(item) for item in value]
    return value


def _shape(value: Any) -> Any:
    """What is left of a value when content is not recorded: structure, numbers and lengths."""
    if isinstance(value, Mapping):
        return {
            key: item if key in _SHAPE_WORDS and isinstance(item, str) else _shape(item)
            for key, item in value.items()
        }
    if isinstance(value, (list, tuple)):
        return [_shape(item) for item in value]
    if value is None or isinstance(value, (bool, int, float)):
        return value
    if isinstance(value, str):
        return f"[{len(value)} characters]"
    return f"[{type(value).__name__}]"
