"""The Sandbox's child process: calls come as lines of JSON, until the standard input ends."""

from __future__ import annotations

import base64
import dataclasses
import json
import signal
import sys
import threading
from typing import Any

from tlm_tracing.testing._server import Server
from tlm_tracing.testing._state import RecordedRequest


def main() -> None:
    """Serve until the standard input ends.

    A line in is ``[number, name, arguments]``, a line out ``[number, {"value": ...}]`` or
    ``[number, {"error": "..."}]``, in the order in which the calls are done.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent
    server = Server()
    out = threading.Lock()
    for line in sys.stdin:
        # Each in its own thread: one may wait for requests while another lets them go.
        threading.Thread(target=_serve, args=(server, out, *json.loads(line)), daemon=True).start()
    server.stop()


def _serve(server: Server, out: threading.Lock, number: int, name: str, args: list[Any]) -> None:
    try:
        reply = {"value": getattr(server, name)(*args)}
    except ValueError as error:
        reply = {"error": str(error)}
    line = json.dumps([number, reply], default=_plain)
    with out:
        print(line, flush=True)


def _plain(value: Any) -> Any:
    if isinstance(value, RecordedRequest):
        body = base64.b64encode(value.body).decode()
        return {**dataclasses.asdict(value), "body": body}
    raise TypeError(f"{type(value).__name__} can't be sent.")


if __name__ == "__main__":
    main()
