"""Others who watch the same calls: they and we see each call once, whoever came first.

Logfire and Langfuse change the whole process. They get one of their own, in which these very
tests run with ``NEIGHBOUR`` set to their name.
"""

import asyncio
import contextlib
import importlib.util
import os
import subprocess
import sys
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor

import openai
import pytest
from openai.resources.chat.completions import AsyncCompletions, Completions
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

import tlm_tracing as tt

HERE = os.environ.get("NEIGHBOUR")
if HERE:
    sys.modules["litellm"] = None  # MLflow looks there for prices, and it takes seconds to import

BASES = [openai.OpenAI, openai.AsyncOpenAI]
ANSWER = "It is Paris."
ASK = {"model": "gpt-4o", "messages": [{"role": "user", "content": "Where is the Louvre?"}]}
FAILING = {**ASK, "model": "sandbox:status=400"}
RESPOND = {"model": "gpt-4o", "input": "Where is the Louvre?"}
MADE_UP = {"id", "item_id", "created", "created_at", "completed_at"}
OURS = {"tlm_metadata"}
NOWHERE = "http://127.0.0.1:9"


class Watcher:
    """Somebody else who watches OpenAI calls, here one who makes OpenTelemetry's spans.

    Attributes:
        module: What is imported.
        for_good: Whether it cannot be taken off.
        puts_back: Whether it then puts back the ``request`` method that it had found.
    """

    module = ""
    for_good = False
    puts_back = False

    def __init__(self):
        self.exporter = InMemorySpanExporter()
        self.processor = SimpleSpanProcessor(self.exporter)
        self.provider = TracerProvider()
        self.provider.add_span_processor(self.processor)

    @contextlib.contextmanager
    def on(self, client):
        """Watch the process, or only this client."""
        instrumentor = importlib.import_module(self.module).OpenAIInstrumentor()
        instrumentor.instrument(tracer_provider=self.provider)
        try:
            yield
        finally:
            instrumentor.uninstrument()

    def records(self):
        """What was noted since the last time: names, and whether the answer is there."""
        spans = self.exporter.get_finished_spans()
        self.exporter.clear()
        return [(span.name, ANSWER in str(dict(span.attributes))) for span in spans]


class OpenInference(Watcher):
    module = "openinference.instrumentation.openai"
    puts_back = True


class OpenTelemetry(Watcher):
    module = "opentelemetry.instrumentation.genai.openai"


class LangSmith(Watcher):
    module = "langsmith"

    def __init__(self):
        import langsmith

        runs = self.runs = []

        class Noting(langsmith.Client):
            def create_run(self, *args, **kwargs):
                """A run is noted when it has ended."""

            def update_run(self, run_id, **run):
                runs.append(run)

        self.client = Noting(NOWHERE, api_key="any", auto_batch_tracing=False)

    @contextlib.contextmanager
    def on(self, client):
        import langsmith.wrappers

        if "create" not in vars(client.chat.completions):
            langsmith.wrappers.wrap_openai(client)
        with langsmith.tracing_context(enabled=True, client=self.client):
            yield

    def records(self):
        runs, self.runs[:] = list(self.runs), []
        return [(run["name"], ANSWER in str(run["outputs"])) for run in runs]


class Logfire(Watcher):
    module = "logfire"
    puts_back = True

    def __init__(self):
        import logfire

        super().__init__()
        logfire.configure(
            send_to_logfire=False,
            console=False,
            metrics=False,
            inspect_arguments=False,
            additional_span_processors=[self.processor],
        )

    @contextlib.contextmanager
    def on(self, client):
        import logfire

        with logfire.instrument_openai():
            yield

    def records(self):
        # What had come of an async stream that is left: noted no sooner than it is collected.
        return [one for one in super().records() if one[1] or "streaming" not in one[0]]


class Langfuse(Watcher):
    module = "langfuse"
    for_good = True
    noted = InMemorySpanExporter()

    def __init__(self):
        self.exporter = self.noted  # a process has one Langfuse
        self.exporter.clear()

    @contextlib.contextmanager
    def on(self, client):
        import langfuse

        langfuse.Langfuse(
            public_key="any",
            secret_key="any",
            base_url=NOWHERE,
            span_exporter=self.exporter,
        )
        importlib.import_module("langfuse.openai")
        yield

    def records(self):
        import langfuse

        langfuse.get_client().flush()
        return super().records()


WATCHERS = {
    "openinference": OpenInference,
    "opentelemetry": OpenTelemetry,
    "langsmith": LangSmith,
    "logfire": Logfire,
    "langfuse": Langfuse,
}
ALONE = ["logfire", "langfuse"]


@pytest.fixture(scope="module", autouse=HERE is None)
def processes():
    """Those who need a process of their own, beside this one from the first test on."""
    started = {
        neighbour: subprocess.Popen(
            [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__],
            env={**os.environ, "NEIGHBOUR": neighbour},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for neighbour in ALONE
        if importlib.util.find_spec(neighbour) is not None
    }
    yield started
    for process in started.values():
        process.kill()


# Whose classes have something left on them when it is over.
TOUCHED = [
    openai.OpenAI,
    openai.AsyncOpenAI,
    openai.Stream,
    openai.AsyncStream,
    Completions,
    AsyncCompletions,
    ThreadPoolExecutor,
    ProcessPoolExecutor,
    *(type(base(api_key="any").responses) for base in BASES if hasattr(base, "responses")),
]


@pytest.fixture(params=[HERE] if HERE else [name for name in WATCHERS if name not in ALONE])
def watcher(request, scorer, sandbox, monkeypatch):
    watcher = WATCHERS[request.param]
    pytest.importorskip(watcher.module, reason=f"{watcher.module} is not installed")
    monkeypatch.setenv("OTEL_INSTRUMENTATION_GENAI_CAPTURE_MESSAGE_CONTENT", "SPAN_ONLY")
    tt.configure(scorer=scorer)
    sandbox.default("openai", content=ANSWER)
    before = [dict(vars(cls)) for cls in TOUCHED]
    yield watcher()
    sys.modules.pop("langfuse.openai", None)
    for cls, members in zip(TOUCHED, before, strict=True):
        for name, value in list(vars(cls).items()):
            if name not in members:
                delattr(cls, name)
            elif value is not members[name]:
                setattr(cls, name, members[name])


@contextlib.contextmanager
def wrapping(client):
    tt.wrap_openai(client)
    yield


@contextlib.contextmanager
def autologging(client):
    tt.autolog(stream_usage=True)
    try:
        yield
    finally:
        tt.autolog(disable=True)


@contextlib.contextmanager
def inside_a_block(client):
    with tt.trusted_span():
        yield


def calls(client):
    """A call of each kind; gives whatever their caller meets."""
    create = client.chat.completions.create
    yield create(**ASK)
    yield from create(**ASK, stream=True)
    with create(**ASK, stream=True) as stream:
        yield next(stream)
    yield client.chat.completions.with_raw_response.create(**ASK).parse()
    with pytest.raises(openai.BadRequestError) as caught:
        create(**FAILING)
    yield caught.value
    yield client.responses.create(**RESPOND)
    yield from client.responses.create(**RESPOND, stream=True)


async def async_calls(client):
    create = client.chat.completions.create
    yield await create(**ASK)
    async for chunk in await create(**ASK, stream=True):
        yield chunk
    async with await create(**ASK, stream=True) as stream:
        yield await anext(stream)
    yield (await client.chat.completions.with_raw_response.create(**ASK)).parse()
    with pytest.raises(openai.BadRequestError) as caught:
        await create(**FAILING)
    yield caught.value
    yield await client.responses.create(**RESPOND)
    async for event in await client.responses.create(**RESPOND, stream=True):
        yield event


def outcome(client):
    """Whatever the caller of those calls meets, as plain data."""

    async def main():
        async with client:
            return [plain(one) async for one in async_calls(client)]

    if isinstance(client, openai.AsyncOpenAI):
        return asyncio.run(main())
    return [plain(one) for one in calls(client)]


def plain(met):
    """Without what the server makes up anew for each answer, and what we add to it."""
    if isinstance(met, Exception):
        return type(met), str(met)
    if isinstance(met, dict):
        return {key: plain(value) for key, value in met.items() if key not in MADE_UP | OURS}
    if isinstance(met, list):
        return [plain(value) for value in met]
    return plain(met.model_dump()) if hasattr(met, "model_dump") else met


def both(first, ours, theirs, client):
    """Ours and theirs, on for the time of a block."""
    on = contextlib.ExitStack()
    for side in [ours, theirs] if first == "ours" else [theirs, ours]:
        on.enter_context(side(client))
    return on


FIRST = pytest.mark.parametrize("first", ["ours", "theirs"])


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("way_in", [wrapping, autologging, inside_a_block])
@FIRST
def test_both_see_every_call_once_and_its_caller_notices_nothing(
    watcher, first, way_in, base, traces, scorer
):
    bare = outcome(base())
    client = base()
    with both(first, way_in, watcher.on, client):
        assert outcome(client) == bare
    together = watcher.records()
    client = base()
    with watcher.on(client):
        outcome(client)
    assert together == watcher.records()
    assert sum(answered for _, answered in together) == 5
    found = traces(1 if way_in is inside_a_block else 7)
    spans = [span.name for trace in found for span in trace.data.spans]
    assert (spans.count("openai.chat.completions"), spans.count("openai.responses")) == (5, 2)
    assert len(scorer.exchanges) == 5
    assert [one.value for trace in found for one in trace.info.assessments] == [0.9] * 5


@FIRST
def test_the_trust_is_known_of_a_stream_that_they_have_wrapped(watcher, first):
    client = openai.OpenAI()
    with both(first, autologging, watcher.on, client):
        stream = client.chat.completions.create(**ASK, stream=True)
        list(stream)
        assert tt.trust(stream).score == 0.9
    assert watcher.records()


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize(
    "order",
    [
        "+ours +theirs -ours -theirs",
        "+ours +theirs -theirs -ours",
        "+theirs +ours -ours -theirs",
        "+theirs +ours -theirs -ours",
    ],
)
def test_each_can_be_taken_off_and_the_other_goes_on(watcher, order, base, scorer):
    client = base()

    async def ask():
        asked = client.chat.completions.create(**ASK)
        return await asked if base is openai.AsyncOpenAI else asked

    async def main():
        switches = {"ours": autologging, "theirs": watcher.on}
        on = {}
        for step in order.split() * 2:
            name = step[1:]
            if step[0] == "+":
                on[name] = contextlib.ExitStack()
                on[name].enter_context(switches[name](client))
            elif name == "ours" or not watcher.for_good:
                on.pop(name).close()
                if watcher.puts_back and "ours" in on:
                    tt.autolog()  # they put back the method as it was before ours came
            await ask()
            assert len(scorer.exchanges) == ("ours" in on), step
            assert len(watcher.records()) == ("theirs" in on), step
            scorer.exchanges.clear()

    asyncio.run(main())


@pytest.mark.skipif(HERE is not None, reason="this is that process")
@pytest.mark.parametrize("neighbour", ALONE)
def test_in_a_process_of_its_own(neighbour, processes):
    if neighbour not in processes:
        pytest.skip(f"{neighbour} is not installed")
    printed, _ = processes[neighbour].communicate()
    assert processes[neighbour].returncode == 0, printed
