"""Both sides of the Sandbox, served from one thread of their own."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Coroutine
from typing import Any, TypeVar

from aiohttp import web

from tlm_tracing.testing._openai_side import openai_side
from tlm_tracing.testing._state import RecordedRequest, State
from tlm_tracing.testing._tlm_side import tlm_side

T = TypeVar("T")
_SIDES = {"openai": openai_side, "tlm": tlm_side}
_HOST = "127.0.0.1"


class Server:
    """Serves two ports until it is stopped; may be called from any thread."""

    def __init__(self) -> None:
        self._state = State()
        self._loop = asyncio.new_event_loop()
        self._held: asyncio.Event = asyncio.Event()
        self._runners: dict[str, web.AppRunner] = {}
        self._ports: dict[str, int] = {}
        self._thread = threading.Thread(target=self._serve, name="tlm-sandbox", daemon=True)
        self._thread.start()
        for side in _SIDES:
            self.start_side(side)

    def port(self, side: str) -> int:
        """The port of a side; it stays the same when the side is stopped and started."""
        return self._ports[side]

    def start_side(self, side: str) -> None:
        """Have a side listen."""
        if side not in self._runners:
            self._run(self._open(side))

    def stop_side(self, side: str) -> None:
        """Have a side refuse connections, and drop those it has."""
        if side in self._runners:
            self._run(self._shut(side))

    def load(self, rows: list[dict[str, Any]]) -> None:
        """Add canned answers."""
        self._state.load(rows)

    def script(self, side: str, behaviours: list[dict[str, Any]]) -> None:
        """Queue behaviours."""
        self._state.script(side, behaviours)

    def default(self, side: str, behaviour: dict[str, Any]) -> None:
        """Set the behaviour of requests without a script."""
        self._state.default(side, behaviour)

    def requests(self, side: str) -> list[RecordedRequest]:
        """What has arrived."""
        return self._state.requests(side)

    def wait_for(self, side: str, count: int, timeout: float) -> bool:
        """Wait for requests."""
        return self._state.wait_for(side, count, timeout)

    def connections(self, side: str) -> int:
        """How many connections were used."""
        return self._state.connections(side)

    def max_in_flight(self, side: str) -> int:
        """How many requests were open at once, at most."""
        return self._state.max_in_flight(side)

    def release(self) -> None:
        """Let go of whatever hangs."""
        self._run(self._let_go())

    def clear(self) -> None:
        """Forget everything and have both sides listen."""
        self.release()
        self._state.clear()
        for side in _SIDES:
            self.start_side(side)

    def stop(self) -> None:
        """Stop both sides and the thread."""
        self.release()
        for side in _SIDES:
            self.stop_side(side)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()

    def _serve(self) -> None:
        asyncio.set_event_loop(self._loop)
        self._loop.run_forever()
        self._loop.close()

    def _run(self, coroutine: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result()

    async def _open(self, side: str) -> None:
        application = _SIDES[side](self._state, self._hold)
        # Handlers end with their client, and a stop does not wait for what hangs.
        runner = web.AppRunner(
            application, access_log=None, handler_cancellation=True, shutdown_timeout=0.05
        )
        await runner.setup()
        site = web.TCPSite(
            runner, _HOST, self._ports.get(side, 0), backlog=1024, reuse_address=True
        )
        await site.start()
        self._ports[side] = runner.addresses[0][1]
        self._runners[side] = runner

    async def _shut(self, side: str) -> None:
        await self._runners.pop(side).cleanup()

    async def _hold(self) -> None:
        await self._held.wait()

    async def _let_go(self) -> None:
        self._held.set()
        self._held = asyncio.Event()
