"""What of a value may be seen on a span: all, what a mask leaves, or its shape alone.

Never seen, whatever the settings: credentials in the places that are made for them, what signs
an address, and the bytes of images, audio and files.
"""

from __future__ import annotations

import base64
import dataclasses
import functools
import hashlib
import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from tlm_tracing import _redacted
from tlm_tracing._config import Config

_REPLACED = "[not recorded: the mask failed]"
_ENDLESS = "[not recorded: nested too deeply]"
_CREDENTIAL = "[not recorded: a credential]"
_DEEPEST = 50
_LONGEST_NAME = 64
_CONTAINERS = (Mapping, list, tuple)
_NUMBERS = frozenset({int, float, bool, type(None)})
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
_WORD = re.compile(r"[a-z][a-z0-9_.]{0,39}")
_MODEL = re.compile(r"[\w.:/@-]{1,128}")
_NAME = re.compile(r"[A-Za-z_][\w.-]{0,63}")

_MCP_CREDENTIALS = frozenset({"headers", "authorization"})
_HEADERS = frozenset({"headers", "extra_headers", "default_headers", "cookies"})
_CREDENTIALS = re.compile(
    r"[a-z0-9_]*(?:api_?key|access_key|secret_key|private_key|password|passwd|passphrase"
    r"|secret|token|authorization|cookies?|credentials?)"
)
# Where OpenAI's types have bytes as base64: audio, files, pictures, archives.
_DATA = frozenset({"data", "file_data", "b64_json", "partial_image_b64", "result"})
_DATA_URL = re.compile(
    r"data:(?P<kind>[\w.+-]+/[\w.+-]+)?(?:;[\w.+=\"-]+)*;base64,(?P<data>[\w+/=%-]*)",
    re.IGNORECASE | re.ASCII,
)


class _Place(NamedTuple):
    """Where a value is: the key of the mapping that it is in, its own, and that mapping."""

    parent: str
    key: str
    around: Mapping[Any, Any]


_NOWHERE = _Place("", "", {})


def visible(config: Config) -> Callable[[Any], Any]:
    """How a value looks on a span under these settings."""
    if not config.capture_content:
        return shape
    if (mask := config.mask) is None:
        return _storable

    def masked(value: Any) -> Any:
        try:
            # Given a copy: what it changes in place must not change what is sent or returned.
            return _storable(mask(_storable(value)), opaque=_kind)
        except Exception:
            # A broken mask must not let through what it was meant to hide.
            return _REPLACED

    return masked


def without_credentials(value: Any, above: tuple[Any, ...] = ()) -> Any:
    """A copy without what opens the door to the tools in it."""
    if not isinstance(value, _CONTAINERS):
        return value
    if _is_endless(value, above):
        return _ENDLESS
    above = (*above, value)
    if isinstance(value, Mapping):
        return {key: without_credentials(item, above) for key, item in _open(value).items()}
    return [without_credentials(item, above) for item in value]


def shape(value: Any, above: tuple[Any, ...] = ()) -> Any:
    """What is left of a value when content is not recorded: structure, numbers and lengths."""
    if isinstance(value, str):
        return f"[{len(value)} characters]"
    if value is None or isinstance(value, (bool, int, float)):
        return value
    if not isinstance(value, _CONTAINERS):
        return _kind(value)
    if _is_endless(value, above):
        return _ENDLESS
    above = (*above, value)
    if isinstance(value, Mapping):
        return {
            _shape_of_key(str(key), number): item if _is_shape(key, item) else shape(item, above)
            for number, (key, item) in enumerate(_open(value).items())
        }
    return [shape(item, above) for item in value]


def _is_shape(key: Any, item: Any) -> bool:
    """Whether a text is one of the words that say what a thing is."""
    if key not in _SHAPE_WORDS or not isinstance(item, str):
        return False
    return (_MODEL if key == "model" else _WORD).fullmatch(item) is not None


def _shape_of_key(key: str, number: int) -> str:
    return key if _NAME.fullmatch(key) else f"[key {number}: {len(key)} characters]"


def _same(value: Any) -> Any:
    return value


def _kind(value: Any) -> str:
    return f"[{type(value).__name__}]"


def _storable(
    value: Any,
    above: tuple[Any, ...] = (),
    place: _Place = _NOWHERE,
    *,
    opaque: Callable[[Any], Any] = _same,
) -> Any:
    """The same as plain data that a store can take.

    Args:
        value: Anything.
        above: What it is in, the outermost first.
        place: Where in that.
        opaque: What to make of an object that cannot be looked into.
    """
    if isinstance(value, str):
        return _text(value, place)
    if isinstance(value, (bytes, bytearray)):
        return _note(None, bytes(value))
    if value is None or isinstance(value, (bool, int, float)):
        return value
    if _is_endless(value, above):
        return _ENDLESS
    above = (*above, value)
    if type(value) is dict or isinstance(value, Mapping):
        fields = _open(value)
        within = place.key
        found = {}
        for key, item in fields.items():
            name = str(key)
            if type(item) in _NUMBERS:
                seen = item
            elif type(item) is str and within not in _HEADERS and _meaning(name) is None:
                seen = _words(item)  # as most are: for what it costs, not for what it gives
            else:
                seen = _storable(item, above, _Place(within, name, fields), opaque=opaque)
            found[_encodable(name)] = seen
        return found
    if isinstance(value, (list, tuple)):
        return [_storable(item, above, place, opaque=opaque) for item in value]
    inside = _inside(value)
    return opaque(value) if inside is value else _storable(inside, above, place, opaque=opaque)


def _inside(value: Any) -> Any:
    """What MLflow would store of an object; itself if MLflow knows it as text only."""
    if isinstance(value, type):
        return value
    try:
        if dump := getattr(value, "model_dump", None):
            dumped = dump(warnings=False)
            return dumped if isinstance(dumped, _CONTAINERS) else value
        if dataclasses.is_dataclass(value):
            names = [field.name for field in dataclasses.fields(value)]
            return {name: getattr(value, name) for name in names}
    except Exception:
        return _kind(value)
    return value


def _text(text: str, place: _Place) -> str:
    if not text:
        return text
    meaning = _meaning(place.key)
    if place.parent in _HEADERS or (meaning == "credential" and not _is_word(place)):
        return _CREDENTIAL
    if meaning == "data" and _is_data(place):
        return _data(_encodable(text), _media_type(place.around))
    if meaning == "url":
        text = _encodable(text)
        return _data(text) if text[:5].lower() == "data:" else _redacted.address(text)
    return _words(text)


def _words(text: str) -> str:
    """A text that is nothing but one."""
    text = _encodable(text)
    return _DATA_URL.sub(lambda found: _data(found[0]), text) if "64," in text else text


def _encodable(text: str) -> str:
    # Half a surrogate pair costs the trace.
    return text if text.isascii() else text.encode("utf-8", "replace").decode("utf-8")


def _meaning(key: str) -> str | None:
    """What is to be expected under a key, by its name."""
    return _known_meaning(key if len(key) <= _LONGEST_NAME else key[-_LONGEST_NAME:])


@functools.lru_cache(maxsize=4096)
def _known_meaning(key: str) -> str | None:
    key = key.lower().replace("-", "_")
    if key in _DATA:
        return "data"
    if key.endswith(("url", "uri")):
        return "url"
    return "credential" if _CREDENTIALS.fullmatch(key) else None


def _is_word(place: _Place) -> bool:
    """Whether a token is one of an answer's."""
    return place.key == "token" and "logprob" in place.around


def _is_data(place: _Place) -> bool:
    if place.key == "data":
        return place.parent in ("audio", "input_audio") or place.around.get("type") == "base64"
    return place.key != "result" or place.around.get("type") == "image_generation_call"


def _media_type(around: Mapping[Any, Any]) -> str | None:
    if kind := around.get("media_type"):
        return str(kind)
    if around.get("type") == "image_generation_call":
        return f"image/{around.get('output_format') or 'png'}"
    return f"audio/{kind}" if (kind := around.get("format")) else None


def _data(text: str, kind: str | None = None) -> str:
    """What is told of bytes that came as a data URL, or as base64 alone."""
    if found := _DATA_URL.fullmatch(text.strip()):
        kind, text = found["kind"] or kind, found["data"]
    try:
        content = base64.b64decode(text.replace("-", "+").replace("_", "/") + "==")
    except ValueError:
        content = text.encode()
    return _note(kind, content)


def _note(kind: str | None, content: bytes) -> str:
    digest = hashlib.sha256(content).hexdigest()[:16]
    return f"[{kind or 'data'}, {len(content)} bytes, sha256 {digest}]"


def _open(value: Mapping[Any, Any]) -> Mapping[Any, Any]:
    """A mapping without the fields that are made for the credentials of a tool."""
    kind = value.get("type")
    is_mcp = isinstance(kind, str) and kind == "mcp"
    if not is_mcp and "domain_secrets" not in value:
        return value
    if is_mcp and isinstance(url := value.get("server_url"), str):
        # For some servers the path is the key.
        value = {**value, "server_url": _redacted.host(url)}
    hidden = _MCP_CREDENTIALS if is_mcp else ()
    return {
        key: item for key, item in value.items() if key not in hidden and key != "domain_secrets"
    }


def _is_endless(value: Any, above: tuple[Any, ...]) -> bool:
    if len(above) >= _DEEPEST:
        return True
    for outer in above:  # noqa: SIM110 - a generator costs more than all the rest
        if value is outer:
            return True
    return False
