"""What both sides of the Sandbox share: recording, and the faults of any server."""

from __future__ import annotations

import asyncio
import json
import uuid
from collections.abc import Awaitable, Callable, Mapping
from typing import Any, Protocol, TypeAlias

from aiohttp import web

from tlm_tracing.testing._state import Behaviour, RecordedRequest, State

Handler: TypeAlias = Callable[[web.Request], Awaitable[web.StreamResponse]]
_LARGEST_BODY = 1 << 28


class Hold(Protocol):
    """Where requests hang until they are let go."""

    async def __call__(self) -> None:
        """Wait."""


def application(side: str, state: State, routes: Mapping[str, Handler]) -> web.Application:
    """A side's application.

    Args:
        side: ``"openai"`` or ``"tlm"``.
        state: Where requests are recorded.
        routes: Handlers by ``"METHOD /path"``.
    """

    @web.middleware
    async def record(request: web.Request, handler: Handler) -> web.StreamResponse:
        headers = {name.lower(): value for name, value in request.headers.items()}
        body = await request.read()
        recorded = RecordedRequest(
            side, request.method, request.path_qs, headers, tuple(request.headers.items()), body
        )
        peer = None if request.transport is None else request.transport.get_extra_info("peername")
        era = state.arrived(recorded, peer)
        try:
            return await handler(request)
        except ConnectionResetError:
            return drop(request)  # the client left early, as it may
        finally:
            state.left(side, era)

    app = web.Application(middlewares=[record], client_max_size=_LARGEST_BODY)
    for route, handler in routes.items():
        method, path = route.split(" ")
        app.router.add_route(method, path, handler)
    return app


async def fault(behaviour: Behaviour, hold: Hold, error: Mapping[str, Any]) -> web.Response | None:
    """The answer of a server in trouble; None if it is in none.

    Args:
        behaviour: How to answer the request at hand.
        hold: Where to hang.
        error: The JSON body of an error, in the side's own shape, unless one was scripted.
    """
    await asyncio.sleep(behaviour.get("delay", 0))
    if behaviour.get("hang"):
        await hold()
    headers = {"x-request-id": f"req_{uuid.uuid4().hex}"}
    if "retry_after" in behaviour:
        headers["Retry-After"] = str(behaviour["retry_after"])
    status = behaviour.get("status", 200)
    if behaviour.get("html"):
        page = "<html><body>A proxy's page</body></html>"
        return web.Response(status=status, text=page, content_type="text/html", headers=headers)
    if behaviour.get("garbage"):
        return web.Response(status=status, text="this is { not JSON", headers=headers)
    if status != 200:
        told = behaviour.get("body", error)
        return web.json_response(told, status=status, headers=headers)
    return None


def drop(request: web.Request) -> web.Response:
    """Close the connection without another byte."""
    if request.transport is not None:
        request.transport.abort()
    return web.Response()


async def body_of(request: web.Request) -> Any:
    """The request's JSON; None if it is none."""
    try:
        return json.loads(await request.read())
    except ValueError:
        return None
