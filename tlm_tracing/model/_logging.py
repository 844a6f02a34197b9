"""Whether MLflow is logging a model, and tries it out for that."""

from __future__ import annotations

import sys
from types import FrameType

from mlflow.environment_variables import _MLFLOW_IN_CAPTURE_MODULE_PROCESS

_LOGGING = frozenset({"log_model", "save_model"})


def is_under_way() -> bool:
    """Whether this call is one of MLflow's own while it logs or saves a model.

    There it asks the model an example of its own, in the process that logs and in one that finds
    out what the model imports.
    """
    if _MLFLOW_IN_CAPTURE_MODULE_PROCESS.get():  # type: ignore[no-untyped-call]
        return True
    frame: FrameType | None = sys._getframe()
    while frame is not None:
        if frame.f_code.co_name in _LOGGING and frame.f_globals.get("__name__") == "mlflow.pyfunc":
            return True
        frame = frame.f_back
    return False
