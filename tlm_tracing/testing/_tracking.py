"""Real MLflow servers for tests, on SQLite or PostgreSQL, that can be killed, paused and cut off.

Runs on POSIX systems. Not for users' tests: a server takes some seconds to start.
"""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import importlib.util
import os
import pwd
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, TypeAlias, TypeVar

Backend: TypeAlias = Literal["sqlite", "postgresql"]
T = TypeVar("T")

_HOST = "127.0.0.1"
_PATIENCE = 90.0
_POLL = 0.05
_GRACE = 10.0
# Below the ports that systems give to clients: while a server is down, nobody else gets its own,
# and a client that tries it again and again does not meet itself.
_PORTS = range(20_000, 32_000)
# Waits beside a process for a line; when its input ends without one, so has the test run.
_WATCH = 'read -r _ || { kill -s KILL -- "-$1"; test -z "$2" || rm -rf -- "$2"; }'


class UnavailableError(RuntimeError):
    """What a server needs is not installed; tests of it are to be skipped."""


class _Process:
    """A program and all that it starts, in a process group of its own.

    It ends with this process, however that ends.
    """

    def __init__(
        self,
        command: Sequence[str | os.PathLike[str]],
        log: Path,
        *,
        env: Mapping[str, str] | None = None,
        litter: Path | None = None,
        **identity: Any,
    ) -> None:
        """Start it.

        Args:
            command: What to run.
            log: Where its output is kept.
            env: Its environment; None for this process's.
            litter: A folder to be removed should this process die.
            **identity: ``user``, ``group``, ... as for :class:`subprocess.Popen`.
        """
        self.log = log
        with log.open("ab") as out:
            self._child = subprocess.Popen(
                command,
                env=env,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                **identity,
            )
        watched = [str(self._child.pid), str(litter or "")]
        self._watcher = subprocess.Popen(
            ["/bin/sh", "-c", _WATCH, "watcher", *watched],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )

    def until(self, is_ready: Callable[[], bool]) -> None:
        """Wait until it is ready.

        Raises:
            RuntimeError: If it ends, or takes too long.
        """
        deadline = time.monotonic() + _PATIENCE
        while not is_ready():
            if self._child.poll() is not None or time.monotonic() > deadline:
                self.end(signal.SIGKILL)
                told = self.log.read_text("utf-8", "replace")[-2000:]
                raise RuntimeError(f"A server did not start: {told}")
            time.sleep(_POLL)

    def send(self, number: signal.Signals) -> None:
        """Send a signal to the whole group."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._child.pid, number)

    def end(self, number: signal.Signals) -> None:
        """Have all of it end, by this signal if that does it."""
        self.send(number)
        self.send(signal.SIGCONT)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._child.wait(_GRACE)
        self.send(signal.SIGKILL)
        self._child.wait()
        if self._watcher.returncode is None:
            self._watcher.communicate(b"\n")


class Postgres:
    """A PostgreSQL of its own in a temporary folder, fast: it outlives a kill, but no power cut."""

    def __init__(self) -> None:
        """Make the database; nothing is started yet.

        Raises:
            UnavailableError: If PostgreSQL is not installed.
        """
        self._programs = _postgres_programs()
        self.port = free_port()
        # The server refuses to run as root.
        self._identity: dict[str, Any] = {}
        # Not in a test's folder: other users cannot enter that.
        self._folder = Path(tempfile.mkdtemp(prefix="tlm-postgres-"))
        if os.geteuid() == 0:
            nobody = pwd.getpwnam("nobody")
            os.chown(self._folder, nobody.pw_uid, nobody.pw_gid)
            self._identity = {"user": nobody.pw_uid, "group": nobody.pw_gid, "extra_groups": []}
        self._data = self._folder / "data"
        self._process: _Process | None = None
        initdb = f"{self._programs / 'initdb'}"
        done = subprocess.run(
            [initdb, "-D", self._data, "-U", "mlflow", "-A", "trust", "-E", "UTF8", "--no-sync"],
            cwd=self._folder,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            **self._identity,
        )
        if done.returncode:
            shutil.rmtree(self._folder)
            raise RuntimeError(f"initdb failed: {done.stdout}")

    @property
    def uri(self) -> str:
        """For SQLAlchemy."""
        return f"postgresql+psycopg2://mlflow@{_HOST}:{self.port}/postgres"

    def start(self) -> None:
        """Start it, and wait until it answers."""
        if self._process is not None:
            return
        # Commits stay synchronous: what was acknowledged must outlive a kill.
        options = ("fsync=off", "full_page_writes=off")
        status = self._data / "postmaster.pid"
        status.unlink(missing_ok=True)  # one that was killed has left it
        self._process = _Process(
            [
                *(self._programs / "postgres", "-D", self._data, "-h", _HOST),
                *("-p", str(self.port), "-k", ""),
                *(part for option in options for part in ("-c", option)),
            ],
            self._folder / "log",
            litter=self._folder,
            cwd=self._folder,
            **self._identity,
        )
        self._process.until(lambda: status.exists() and "ready" in status.read_text())

    def stop(self) -> None:
        """Stop it; clients are cut off."""
        self._end(signal.SIGINT)

    def kill(self) -> None:
        """Kill it."""
        self._end(signal.SIGKILL)

    def remove(self) -> None:
        """Stop it for good."""
        self._end(signal.SIGQUIT)  # killed, it would leave its shared memory behind
        shutil.rmtree(self._folder, ignore_errors=True)

    def _end(self, number: signal.Signals) -> None:
        if self._process is not None:
            self._process.end(number)
            self._process = None


class TrackingServer:
    """A real ``mlflow server`` with one worker in a child process, on a free loopback port.

    It ends with this process, however that ends. While it is down, its port and its store stay.

    Attributes:
        port: Where it listens.
        folder: Its artifacts, its log, and with SQLite its database ``mlflow.db``.
        database: The PostgreSQL behind it, with methods of its own; None with SQLite.

    Example:
        >>> with TrackingServer("postgresql", folder=folder) as server:
        ...     mlflow.set_tracking_uri(server.uri)
        ...     server.kill()
        ...     server.restart()
    """

    def __init__(self, backend: Backend = "sqlite", *, folder: str | os.PathLike[str]) -> None:
        """Nothing is started yet.

        Raises:
            UnavailableError: If PostgreSQL is asked for and not installed.
        """
        self.folder = Path(folder)
        self.port = free_port()
        self.database = Postgres() if backend == "postgresql" else None
        self._process: _Process | None = None

    def __enter__(self) -> TrackingServer:
        try:
            self.start()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    @property
    def uri(self) -> str:
        """For ``mlflow.set_tracking_uri``."""
        return f"http://{_HOST}:{self.port}"

    @property
    def store_uri(self) -> str:
        """The database, to read it while the server is down."""
        if self.database is not None:
            return self.database.uri
        return f"sqlite:///{self.folder / 'mlflow.db'}"

    def start(self) -> None:
        """Start it, and wait until it answers."""
        if self._process is not None:
            return
        if self.database is not None:
            self.database.start()
        # Settings of the application under test are none of the server's.
        env = {
            name: value for name, value in os.environ.items() if not name.startswith("MLFLOW_")
        } | {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "MLFLOW_DISABLE_TELEMETRY": "true"}
        self._process = _Process(
            [
                *(sys.executable, "-m", "mlflow", "server", "--workers", "1"),
                *("--host", _HOST, "--port", str(self.port)),
                *("--backend-store-uri", self.store_uri),
                *("--default-artifact-root", str(self.folder / "artifacts")),
            ],
            self.folder / "server.log",
            env=env,
        )
        self._process.until(self._is_healthy)

    def stop(self) -> None:
        """Stop it, as an operator does."""
        self._end(signal.SIGTERM)

    def kill(self) -> None:
        """Kill it at once, with all that it has started."""
        self._end(signal.SIGKILL)

    def restart(self) -> None:
        """Start it again at the same address, on the same store; a running one is stopped."""
        self.stop()
        self.start()

    def pause(self) -> None:
        """Freeze it: connections are accepted by the system, and nobody answers."""
        if self._process is not None:
            self._process.send(signal.SIGSTOP)

    def resume(self) -> None:
        """Let it go on."""
        if self._process is not None:
            self._process.send(signal.SIGCONT)

    def close(self) -> None:
        """End it for good; its folder stays."""
        self.kill()
        if self.database is not None:
            self.database.remove()

    def _end(self, number: signal.Signals) -> None:
        if self._process is not None:
            self._process.end(number)
            self._process = None

    def _is_healthy(self) -> bool:
        connection = http.client.HTTPConnection(_HOST, self.port, timeout=_GRACE)
        try:
            connection.request("GET", "/health")
            return connection.getresponse().status == 200
        except (OSError, http.client.HTTPException):
            return False
        finally:
            connection.close()


class Wire:
    """A network in front of a server on this machine, that can be slow, broken or a black hole.

    Example:
        >>> with Wire(server.port) as wire:
        ...     mlflow.set_tracking_uri(wire.uri)
        ...     wire.swallow()
        ...     wire.mend()
    """

    def __init__(self, port: int) -> None:
        """Nothing is open yet.

        Args:
            port: Where the server listens.
        """
        self.port = free_port()
        self._target = port
        self._trouble: str | None = None
        self._delay = 0.0
        self._status = 503
        self._headers = b""
        self._loop = asyncio.new_event_loop()
        self._changed = asyncio.Event()
        self._open: set[asyncio.StreamWriter] = set()
        self._busy: set[asyncio.Task[None]] = set()
        self._thread = threading.Thread(target=self._serve, name="tlm-wire", daemon=True)

    def __enter__(self) -> Wire:
        self._thread.start()
        self._do(self._listen())
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._do(self._close())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    @property
    def uri(self) -> str:
        """For ``mlflow.set_tracking_uri``."""
        return f"http://{_HOST}:{self.port}"

    def mend(self) -> None:
        """Let everything pass; what was swallowed arrives."""
        self._do(self._change(None))

    def slow(self, seconds: float) -> None:
        """Let everything pass, each piece in each direction so much later."""
        self._do(self._change(None, delay=seconds))

    def swallow(self) -> None:
        """Accept connections and bytes, and let nothing pass."""
        self._do(self._change("swallow"))

    def reset(self) -> None:
        """Break the connections there are, and each new one when it sends its request."""
        self._do(self._change("reset"))

    def answer(self, status: int = 503, *, retry_after: float | None = None) -> None:
        """Answer in the server's place, as a gateway does."""
        head = b"" if retry_after is None else f"Retry-After: {retry_after:g}\r\n".encode()
        self._do(self._change("answer", status=status, headers=head))

    def _serve(self) -> None:
        asyncio.set_event_loop(self._loop)
        self._loop.run_forever()

    def _do(self, coroutine: Any) -> None:
        asyncio.run_coroutine_threadsafe(coroutine, self._loop).result()

    async def _listen(self) -> None:
        self._server = await asyncio.start_server(self._connected, _HOST, self.port, backlog=1024)

    async def _close(self) -> None:
        self._server.close()
        self._drop_all()
        for task in self._busy:
            task.cancel()
        await asyncio.gather(*self._busy, return_exceptions=True)

    async def _change(
        self, trouble: str | None, delay: float = 0.0, status: int = 503, headers: bytes = b""
    ) -> None:
        self._trouble, self._delay = trouble, delay
        self._status, self._headers = status, headers
        if trouble in ("reset", "answer"):
            self._drop_all()
        self._changed.set()
        self._changed = asyncio.Event()

    def _drop_all(self) -> None:
        for writer in self._open:
            writer.transport.abort()

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._busy.add(task)
        self._open.add(writer)
        try:
            await self._handle(reader, writer)
        except (OSError, EOFError, asyncio.IncompleteReadError):
            pass  # either side may leave
        finally:
            self._busy.discard(task)
            self._open.discard(writer)
            writer.transport.abort()

    async def _handle(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        first = await reader.read(1 << 16)
        await self._passable()
        if self._trouble == "answer":
            await self._refuse(first, reader, writer)
        elif self._trouble is None and first:
            far_reader, far_writer = await asyncio.open_connection(_HOST, self._target)
            self._open.add(far_writer)
            try:
                await self._carry(first, far_writer)
                pumps = (self._pump(reader, far_writer), self._pump(far_reader, writer))
                await asyncio.gather(*pumps)
            finally:
                self._open.discard(far_writer)
                far_writer.transport.abort()

    async def _pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while piece := await reader.read(1 << 16):
            await self._carry(piece, writer)
        if writer.can_write_eof():
            writer.write_eof()

    async def _carry(self, piece: bytes, writer: asyncio.StreamWriter) -> None:
        await self._passable()
        await asyncio.sleep(self._delay)
        writer.write(piece)
        await writer.drain()

    async def _passable(self) -> None:
        while self._trouble == "swallow":
            await self._changed.wait()

    async def _refuse(
        self, first: bytes, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        head, _, body = first.partition(b"\r\n\r\n")
        length = next(
            (
                int(line.split(b":")[1])
                for line in head.split(b"\r\n")
                if line.lower().startswith(b"content-length:")
            ),
            0,
        )
        await reader.readexactly(max(0, length - len(body)))
        head = b"HTTP/1.1 %d In trouble\r\nConnection: close\r\nContent-Length: 0\r\n%s\r\n"
        writer.write(head % (self._status, self._headers))
        await writer.drain()
        writer.write_eof()
        await reader.read()


def free_port() -> int:
    """A port of this machine where nobody listens.

    Raises:
        OSError: If there is none.
    """
    for port in random.sample(_PORTS, 100):
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((_HOST, port))
            return port
    raise OSError("There is no free port.")


def _postgres_programs() -> Path:
    """Where PostgreSQL is installed."""
    if importlib.util.find_spec("psycopg2") is None:
        raise UnavailableError("There is no psycopg2, MLflow's driver for PostgreSQL.")
    found = shutil.which("initdb")
    # Debian keeps them off the path, one folder a version.
    folders = sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True)
    candidates = [Path(found).resolve().parent] if found else []
    for folder in [*candidates, *folders]:
        if all((folder / name).exists() for name in ("initdb", "postgres")):
            return folder
    raise UnavailableError("There are no initdb and postgres of PostgreSQL.")
