"""The ways of watching calls to OpenAI that are compared: none, ours, and those of others.

All of them record the whole request and the whole answer. With export off, what they have recorded
is dropped in the moment in which it would be exported, from the thread that would do that.
"""

from __future__ import annotations

import gc
import importlib
import importlib.util
import os
import sys
import threading
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

Drain: TypeAlias = Callable[[], object]
"""Waits until all that was recorded is exported, or dropped."""

NOWHERE = "http://127.0.0.1:9"
FROZEN = "ours, recorded, gc.freeze()"
LAST: list[Any] = []
"""The last span or run that was dropped."""


@dataclass(frozen=True)
class Way:
    """A way of watching.

    Attributes:
        name: For tables.
        on: Has a client, or the whole process, be watched.
        module: What has to be installed; None if it is with us.
        package: The distribution.
        exports: Whether it can export to MLflow.
    """

    name: str
    on: Callable[[Any], Drain]
    module: str | None = None
    package: str | None = None
    exports: bool = False

    @property
    def is_installed(self) -> bool:
        """Whether it can be used here."""
        if self.module is None:
            return True
        try:
            return importlib.util.find_spec(self.module) is not None
        except ModuleNotFoundError:  # of a parent
            return False


# Nobody, and ours.


def bare(client: Any) -> Drain:
    """Nobody watches."""
    return lambda: None


def bare_beside_mlflow(client: Any) -> Drain:
    """Nobody watches, but MLflow is imported: what its mere presence costs."""
    import mlflow.openai

    return lambda: mlflow.get_tracking_uri()


def outside(client: Any) -> Drain:
    """Instrumented, but these calls are outside of the trusted block: another thread is inside."""
    import tlm_tracing as tt

    is_inside = threading.Event()

    def stay_inside() -> None:
        with tt.trusted_span("elsewhere", mode="off"):
            is_inside.set()
            threading.Event().wait()

    threading.Thread(target=stay_inside, daemon=True).start()
    is_inside.wait()
    return lambda: None


def ours(mode: str) -> Callable[[Any], Drain]:
    """Ours, in one of the modes."""

    def on(client: Any) -> Drain:
        import tlm_tracing as tt

        tt.wrap_openai(client, mode=mode)
        return _flush

    return on


def ours_frozen(client: Any) -> Drain:
    """Ours, where the application has the collector pass over all that was imported."""
    drain = ours("off")(client)
    gc.collect()
    gc.freeze()
    return drain


def _flush() -> None:
    import tlm_tracing as tt

    if not tt.flush(600):
        raise TimeoutError("tt.flush() was not done in time.")


# Others.


def autolog(client: Any) -> Drain:
    """MLflow's own."""
    import mlflow

    mlflow.openai.autolog()
    return mlflow.flush_trace_async_logging


def openinference(client: Any) -> Drain:
    """OpenInference, with a batch processor as in production."""
    from openinference.instrumentation.openai import OpenAIInstrumentor

    provider = _provider()
    OpenAIInstrumentor().instrument(tracer_provider=provider)
    return provider.force_flush


def opentelemetry(client: Any) -> Drain:
    """OpenTelemetry's own, told to record contents."""
    os.environ["OTEL_INSTRUMENTATION_GENAI_CAPTURE_MESSAGE_CONTENT"] = "SPAN_ONLY"
    from opentelemetry.instrumentation.genai.openai import OpenAIInstrumentor

    provider = _provider()
    OpenAIInstrumentor().instrument(tracer_provider=provider)
    return provider.force_flush


def langfuse(client: Any) -> Drain:
    """Langfuse, with its own processor."""
    import langfuse

    made = langfuse.Langfuse(
        public_key="any", secret_key="any", base_url=NOWHERE, span_exporter=_dropping()
    )
    importlib.import_module("langfuse.openai")
    return made.flush


def langsmith(client: Any) -> Drain:
    """LangSmith. Its runs are dropped before they are queued, which favours it."""
    os.environ["LANGSMITH_TRACING"] = "true"
    import langsmith
    import langsmith.wrappers

    class Dropping(langsmith.Client):
        def create_run(self, *args: Any, **kwargs: Any) -> None:
            """Nothing."""

        def update_run(self, run_id: Any, **run: Any) -> None:
            """Nothing but a look at it."""
            LAST[:] = [run]

    langsmith.wrappers.wrap_openai(
        client, tracing_extra={"client": Dropping(NOWHERE, api_key="any")}
    )
    return lambda: None


def logfire(client: Any) -> Drain:
    """Logfire, with a batch processor as in production."""
    import logfire
    from opentelemetry.sdk.trace.export import BatchSpanProcessor

    logfire.configure(
        send_to_logfire=False,
        console=False,
        metrics=False,
        inspect_arguments=False,
        additional_span_processors=[BatchSpanProcessor(_dropping())],
    )
    logfire.instrument_openai(client)
    return logfire.force_flush


WAYS = {
    way.name: way
    for way in (
        Way("bare", bare),
        Way("bare, MLflow imported", bare_beside_mlflow),
        Way("ours, outside", outside),
        Way("ours, recorded", ours("off"), exports=True),
        Way(FROZEN, ours_frozen, exports=True),
        Way("ours, inline", ours("inline"), exports=True),
        Way("ours, background", ours("background"), exports=True),
        Way("autolog", autolog, exports=True),
        Way(
            "openinference",
            openinference,
            "openinference.instrumentation.openai",
            "openinference-instrumentation-openai",
        ),
        Way(
            "opentelemetry",
            opentelemetry,
            "opentelemetry.instrumentation.genai.openai",
            "opentelemetry-instrumentation-genai-openai",
        ),
        Way("langfuse", langfuse, "langfuse", "langfuse"),
        Way("langsmith", langsmith, "langsmith", "langsmith"),
        Way("logfire", logfire, "logfire", "logfire"),
    )
}
RIVALS = [name for name, way in WAYS.items() if way.package] + ["autolog"]
PACKAGES = [way.package for way in WAYS.values() if way.package]


def chosen(names: Iterable[str], only: Sequence[str] | None = None) -> list[Way]:
    """Those ways that can be used here; says which can't.

    Args:
        names: Which are of interest.
        only: Which were asked for; None for all of them.

    Raises:
        SystemExit: If one was asked for that there is not.
    """
    known = list(names)
    if unknown := sorted(set(only or ()) - set(known)):
        raise SystemExit(f"There is no way {', '.join(unknown)}; there are: {'; '.join(known)}.")
    found = [WAYS[name] for name in known if only is None or name in only]
    for way in found:
        if not way.is_installed:
            print(f"skipped: {way.name}, as {way.package} is not installed")
    return [way for way in found if way.is_installed]


def watch(name: str, client: Any, *, export: str, experiment: str) -> Drain:
    """Have a client be watched.

    Args:
        name: The way.
        client: Which.
        export: ``"off"``, or where MLflow's traces go; its tracking URI is in the environment.
        experiment: The one of MLflow's that they belong to.
    """
    way = WAYS[name]
    if way.exports or name == "ours, outside":
        if name.startswith("ours"):
            importlib.import_module("tlm_tracing._exporter")
        if export == "off":
            _drop_traces()
        import mlflow

        mlflow.set_experiment(experiment)
    return way.on(client)


def _drop_traces() -> None:
    """Have MLflow make traces as ever, and drop them when they would be exported."""
    from mlflow.tracing.export import mlflow_v3
    from mlflow.tracing.trace_manager import InMemoryTraceManager

    manager: Any = InMemoryTraceManager.get_instance()

    def drop(self: Any, spans: Sequence[Any]) -> None:
        with manager._lock:
            for span in spans:
                if span.parent is None:
                    number = span.context.trace_id
                    trace_id = manager._otel_id_to_mlflow_trace_id.pop(number, None)
                    manager._traces.pop(trace_id, None)

    # The classes stay, as ours recognises MLflow's by its class, and makes its own of it.
    ours = sys.modules.get("tlm_tracing._exporter")
    for exporter in (mlflow_v3.MlflowV3SpanExporter, getattr(ours, "_Exporter", None)):
        if exporter is not None:
            exporter.export = drop  # type: ignore[method-assign]


def _provider() -> Any:
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor

    provider = TracerProvider()
    provider.add_span_processor(BatchSpanProcessor(_dropping()))
    return provider


def _dropping() -> Any:
    from opentelemetry.sdk.trace.export import SpanExporter, SpanExportResult

    class Dropping(SpanExporter):
        def export(self, spans: Sequence[Any]) -> SpanExportResult:
            LAST[:] = spans[-1:]
            return SpanExportResult.SUCCESS

    return Dropping()
