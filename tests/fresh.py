"""Programs as users run them, in a fresh process, without waiting for MLflow's import each time.

The process is forked from one that has imported what others have made, and nothing of ours.
"""

from __future__ import annotations

import multiprocessing
import os
import runpy
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

_PRELOADED = ["mlflow.openai", "mlflow.store.tracking.sqlalchemy_store", "openai", "aiohttp"]

_server = multiprocessing.get_context("forkserver")
_server.set_forkserver_preload([*_PRELOADED, "openai.types.chat", "openai.resources.chat"])


class Done(NamedTuple):
    """What a program has left."""

    returncode: int | None
    stdout: str
    stderr: str


def run(
    program: str | Path,
    *arguments: str,
    env: Mapping[str, str],
    cwd: str | os.PathLike[str] = ".",
    timeout: float = 120.0,
) -> Done:
    """Run a file, or a text, as the main program."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "program.py")
        if isinstance(program, str):
            path.write_text(program, "utf-8")
        else:
            path = program
        out, err = Path(folder, "out"), Path(folder, "err")
        process = _server.Process(
            target=_run, args=(str(path), list(arguments), dict(env), os.fspath(cwd), out, err)
        )
        process.start()
        process.join(timeout)
        process.kill()
        process.join()
        return Done(process.exitcode, out.read_text("utf-8"), err.read_text("utf-8"))


def _run(
    path: str, arguments: Sequence[str], env: dict[str, str], cwd: str, out: Path, err: Path
) -> None:
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(env)
    for number, file in ((1, out), (2, err)):
        os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT, 0o600), number)
    sys.stdout = open(1, "w", encoding="utf-8", closefd=False)  # noqa: SIM115 - the process's
    sys.stderr = open(2, "w", encoding="utf-8", closefd=False)  # noqa: SIM115
    sys.argv = [path, *arguments]
    sys.path.insert(0, os.path.dirname(path))
    runpy.run_path(path, run_name="__main__")
