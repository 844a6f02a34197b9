"""A server in a child process, called as if it were in this one."""

from __future__ import annotations

import base64
import itertools
import json
import os
import subprocess
import sys
import threading
from concurrent.futures import Future
from pathlib import Path
from typing import Any

from tlm_tracing.testing._state import RecordedRequest

_PACKAGES = Path(__file__).parents[2]
_SECONDS_TO_END = 10.0


class Child:
    """A :class:`~tlm_tracing.testing._server.Server` elsewhere: each call is a line there and back.

    It ends when its standard input does, that is with this process, however that ends.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._numbers = itertools.count()
        self._waiting: dict[int, Future[Any]] = {}
        self._ended = False
        # The child must find this package even where it is not installed.
        path = os.pathsep.join(filter(None, [str(_PACKAGES), os.environ.get("PYTHONPATH")]))
        self._child = subprocess.Popen(
            [sys.executable, "-m", "tlm_tracing.testing"],
            env={**os.environ, "PYTHONPATH": path},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            encoding="utf-8",
        )
        self._reader = threading.Thread(target=self._read, name="tlm-sandbox-child", daemon=True)
        self._reader.start()

    def __getattr__(self, name: str) -> Any:
        def call(*args: Any) -> Any:
            return self._call(name, args)

        return call

    def requests(self, side: str) -> list[RecordedRequest]:
        """What has arrived."""
        return [_recorded(found) for found in self._call("requests", (side,))]

    def stop(self) -> None:
        """End the process."""
        with self._child:
            assert self._child.stdin is not None
            self._child.stdin.close()
            self._child.wait(_SECONDS_TO_END)
            self._reader.join()

    def _call(self, name: str, args: tuple[Any, ...]) -> Any:
        assert self._child.stdin is not None
        reply: Future[Any] = Future()
        with self._lock:
            if self._ended:
                raise RuntimeError("The Sandbox's process has ended.")
            number = next(self._numbers)
            self._waiting[number] = reply
            self._child.stdin.write(json.dumps([number, name, args]) + "\n")
            self._child.stdin.flush()
        return reply.result()

    def _read(self) -> None:
        assert self._child.stdout is not None
        for line in self._child.stdout:
            number, reply = json.loads(line)
            with self._lock:
                waiting = self._waiting.pop(number)
            if "error" in reply:
                waiting.set_exception(ValueError(reply["error"]))
            else:
                waiting.set_result(reply["value"])
        with self._lock:
            self._ended = True
            left = [*self._waiting.values()]
        for waiting in left:
            waiting.set_exception(RuntimeError("The Sandbox's process has ended."))


def _recorded(found: dict[str, Any]) -> RecordedRequest:
    body = base64.b64decode(found.pop("body"))
    raw_headers = tuple((name, value) for name, value in found.pop("raw_headers"))
    return RecordedRequest(**found, raw_headers=raw_headers, body=body)
