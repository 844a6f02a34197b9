"""Lets every example run without keys: python examples/quickstart.py --sandbox."""

import contextlib
import os
import sys
from collections.abc import Iterator


@contextlib.contextmanager
def sandbox_if_asked() -> Iterator[None]:
    if "--sandbox" not in sys.argv:
        yield
        return
    from tlm_tracing.testing import Sandbox

    with Sandbox() as sandbox:
        os.environ.update(sandbox.environment())
        yield
