"""The Sandbox's child process: calls come as lines of JSON, until the standard input ends."""

from __future__ import annotations

import base64
import dataclasses
import json
import sys
from typing import Any

from tlm_tracing.testing._server import Server
from tlm_tracing.testing._state import RecordedRequest


def _plain(value: Any) -> Any:
    if isinstance(value, RecordedRequest):
        body = base64.b64encode(value.body).decode()
        return {**dataclasses.asdict(value), "body": body}
    raise TypeError(f"{type(value).__name__} can't be sent.")


def main() -> None:
    """Serve until the standard input ends."""
    server = Server()
    for line in sys.stdin:
        name, args = json.loads(line)
        try:
            reply = {"value": getattr(server, name)(*args)}
        except ValueError as error:
            reply = {"error": str(error)}
        print(json.dumps(reply, default=_plain), flush=True)
    server.stop()


if __name__ == "__main__":
    main()
