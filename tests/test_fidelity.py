"""OpenAI's SDK behaves the same bare and instrumented, and a function the same when decorated."""

import asyncio
import contextlib
import copy
import functools
import gc
import inspect
import operator
import pickle
import re
import sys
import traceback
import types
import typing
import warnings
import weakref
from pathlib import Path

import openai
import pydantic
import pytest
from openai._legacy_response import LegacyAPIResponse
from openai._response import BaseAPIResponse
from openai.types.chat import ChatCompletion, ChatCompletionChunk, ChatCompletionMessage

import tlm_tracing as tt

# The HTTP library: httpx or, from openai 3 on, httpx2.
httpx = sys.modules[openai.DefaultHttpxClient.__base__.__module__.partition(".")[0]]

OURS = str(Path(tt.__file__).parent)
METADATA = {"trustworthiness_score": 0.9, "log": {}}  # the documented addition to an answer
QUESTION = [{"role": "user", "content": "What is the capital of France?"}]
ASK = {"model": "gpt-4o", "messages": QUESTION}
RESPOND = {"model": "gpt-4o", "input": "What is the capital of France?"}
TOOLS = [{"type": "function", "function": {"name": "clock", "parameters": {"type": "object"}}}]
FLAT_TOOLS = [{"type": "function", "name": "clock", "parameters": {}, "strict": False}]


class City(pydantic.BaseModel):
    """What a structured answer is parsed into."""

    name: str


# What is compared: values as plain data with their types, without what is made anew each time.

ANEW = re.compile(
    r"(?<=[a-z][-_])[0-9a-f]{32}|(?<=\bat )0x[0-9a-f]+|(?<=cancel scope )[0-9a-f]+"
    r"|(?<=created['\"=])[ :\d.]+|(?<=(?:created|mpleted)_at['\"=])[ :\d.]+"
)
FIELDS = {
    (LegacyAPIResponse, BaseAPIResponse): "status_code method url headers http_version elapsed "
    "is_closed retries_taken request_id http_request http_response",
    (openai.Stream, openai.AsyncStream): "response",
    httpx.Response: "status_code headers is_closed is_stream_consumed elapsed encoding extensions "
    "num_bytes_downloaded request",
    httpx.Request: "method url headers extensions",
}


def described(value):
    if isinstance(value, (str, bytes)):
        text = value.decode() if isinstance(value, bytes) else value
        return [type(value), ANEW.sub("*", text)]
    if value is None or isinstance(value, (int, float, type)):
        return [type(value), value]
    if isinstance(value, pydantic.BaseModel):
        fields = {**vars(value), **(value.model_extra or {})}
        if isinstance(value, ChatCompletion) or fields.get("object") == "response":
            assert fields.pop("tlm_metadata", METADATA) == METADATA
        told = sorted(value.model_fields_set - {"tlm_metadata"})
        return [type(value), told, described(fields), getattr(value, "_request_id", None) is None]
    if isinstance(value, BaseException):
        links = (value.__cause__, value.__context__, value.__suppress_context__)
        parts = (str(value), value.args, getattr(value, "__notes__", None), vars(value), *links)
        return [type(value), *map(described, parts)]
    if isinstance(value, (dict, httpx.Headers)):
        return [type(value), {name: _field(name, part) for name, part in value.items()}]
    if isinstance(value, (list, tuple)):
        return [type(value), *map(described, value)]
    for kind, names in FIELDS.items():
        if isinstance(value, kind):
            return [type(value), {name: outcome(_attribute, value, name) for name in names.split()}]
    return type(value)


def _field(name, value):
    is_new = name in ("created", "created_at", "completed_at", "date")
    return type(value) if is_new else described(value)


def _attribute(value, name):
    found = getattr(value, name)
    return str(found) if name == "url" else sorted(found) if name == "extensions" else found


def outcome(function, *args):
    """What a function gives, unless it cannot."""
    try:
        return described(function(*args))
    except Exception:
        return "fails"


COPIES = {
    "pickle": lambda value: pickle.loads(pickle.dumps(value)),
    "copy": copy.copy,
    "deepcopy": copy.deepcopy,
    "dump": lambda value: value.model_dump(warnings=False, exclude={"tlm_metadata"}),
    "json": lambda value: value.model_dump_json(warnings=False, exclude={"tlm_metadata"}),
    "text": lambda value: repr(value).replace(f", tlm_metadata={METADATA}", ""),
}


def copies(value):
    """What can be made of a value, or of the first in a list."""
    if isinstance(value, list):
        return [copies(one) for one in value[:3]]
    return {name: outcome(make, value) for name, make in COPIES.items()}


def frames(error):
    """The way that an exception came, without us."""
    return [
        (frame.filename, frame.name)
        for frame in traceback.extract_tb(error.__traceback__)
        if not frame.filename.startswith(OURS) and "/wrapt/" not in frame.filename
    ]


def raised(error):
    return {"error": described(error), "frames": frames(error), "copies": copies(error)}


@contextlib.contextmanager
def overheard():
    """What is said beside: warnings, and exceptions that nobody could catch."""
    heard = []
    gc.disable()
    gc.freeze()  # to collect only what is left behind here
    hook, sys.unraisablehook = sys.unraisablehook, lambda it: heard.append(described(it.exc_value))
    try:
        with warnings.catch_warnings(record=True) as warned:
            warnings.simplefilter("always")
            yield heard
            gc.collect()
    finally:
        sys.unraisablehook = hook
        gc.unfreeze()
        gc.enable()
    for one in warned:
        heard += [(one.category, described(str(one.message)), one.filename, one.lineno)]


def hear_the_loop(heard):
    """And what an event loop can tell nobody, once: of what, depends on the order of a set."""

    def hear(_, told):
        message = told["message"].partition(" <")[0]
        heard.extend([message] if message not in heard else [])

    asyncio.get_running_loop().set_exception_handler(hear)


def unlike(ours, theirs, *place):
    """Where two descriptions differ, and how."""
    if type(ours) is type(theirs) and isinstance(ours, (list, tuple)):
        ours, theirs = dict(enumerate(ours)), dict(enumerate(theirs))
    if isinstance(ours, dict) and isinstance(theirs, dict):
        names = [*theirs, *(name for name in ours if name not in theirs)]
        differs = [] if names == list(ours) else [(*place, list(ours), list(theirs))]
        parts = (unlike(ours.get(name), theirs.get(name), *place, name) for name in names)
        return differs + [one for part in parts for one in part]
    return [] if ours == theirs else [(*place, ours, theirs)]


def nowhere(differences):
    """Fail with the places where something differs."""
    assert not differences, "\n".join(map(repr, differences))


# One way to write a call for both kinds of client; with a sync one it never waits.


async def done(value):
    return await value if inspect.isawaitable(value) else value


async def gathered(items):
    return [item async for item in items] if hasattr(items, "__aiter__") else list(items)


async def begun(items):
    """The first of it, by a loop that is left."""
    if hasattr(items, "__aiter__"):
        async for item in items:
            return item
    for item in items:
        return item
    return None


@contextlib.asynccontextmanager
async def inside(manager):
    if hasattr(manager, "__aenter__"):
        async with manager as value:
            yield value
    else:
        with manager as value:
            yield value


async def read(value):
    """A call's result, read to its end."""
    value = await done(value)
    if isinstance(value, LegacyAPIResponse):
        return [value, await read(value.parse()), value.parse() is value.parse()]
    if hasattr(value, "__anext__") or hasattr(value, "__next__"):
        items = await gathered(value)
        if items and isinstance(items[0], (str, bytes)):
            items = type(items[0])().join(items)  # it comes in pieces as the network has it
        return [value, items]
    return value


def create(client, *, how=None, **options):
    return _by(client.chat.completions, how).create(**{**ASK, **options})


def parse(client, *, how=None, **options):
    return _by(helpers(client), how).parse(**{**ASK, "response_format": City, **options})


def respond(client, *, how=None, **options):
    return _by(client.responses, how).create(**{**RESPOND, **options})


def _by(resource, how):
    return getattr(resource, how) if how else resource


def helpers(client):
    """Where ``parse`` and ``stream`` are: in ``beta`` until they came of age."""
    completions = client.chat.completions
    return completions if hasattr(completions, "parse") else client.beta.chat.completions


def post(client, **options):
    return client.post("/chat/completions", **{"cast_to": ChatCompletion, "body": ASK, **options})


def post_stream(client):
    kind = openai.AsyncStream if isinstance(client, openai.AsyncOpenAI) else openai.Stream
    body = {**ASK, "stream": True}
    return post(client, body=body, stream=True, stream_cls=kind[ChatCompletionChunk])


async def helper(client, *, of=None, to_the_end=True, **options):
    """By ``stream()``, which is a block with events."""
    manager = client.responses if of == "responses" else helpers(client)
    asked = RESPOND if of == "responses" else ASK
    async with inside(manager.stream(**{**asked, **options})) as stream:
        if not to_the_end:
            return [stream, await begun(stream)]
        events = await gathered(stream)
        final = getattr(stream, "get_final_completion", None) or stream.get_final_response
        return [stream, events, await done(final())]


async def lazily(reader, ask, client, **options):
    async with inside(ask(client, how="with_streaming_response", **options)) as response:
        return [response, await read(READERS[reader](response))]


async def left(leave, client):
    """A stream that is not read to its end, and a call after it."""
    first = await leave(await done(create(client, stream=True)))
    return [first, await done(create(client))]


async def by_nothing(stream):
    if hasattr(stream, "__aiter__"):  # what the loop says of it is a matter of chance
        asyncio.get_running_loop().set_exception_handler(lambda *_: None)
    return await begun(stream)


async def by_block(stream):
    async with inside(stream):
        return await begun(stream)


async def by_close(stream):
    return [await begun(stream), await done(stream.close())]


async def for_a_while(stream):
    return [await begun(stream), stream, await gathered(stream)]


async def from_a_generator(client, **options):
    messages = (message for message in QUESTION)
    return [await read(create(client, messages=messages, **options)), list(messages)]


async def with_the_message_itself(client):
    first = await done(create(client, model="sandbox:tools=1", tools=TOOLS))
    result = {"role": "tool", "tool_call_id": "call_0", "content": "sunny"}
    return await read(create(client, messages=[*QUESTION, first.choices[0].message, result]))


async def with_the_output_itself(client):
    first = await done(respond(client))
    following = await done(respond(client, previous_response_id=first.id))
    return [following, await done(respond(client, input=[*QUESTION, *first.output]))]


async def pages(client):
    page = await done(client.models.list())
    return [page, await gathered(page)]


def optioned(options, ask, client, **given):
    return ask(client.with_options(**options), **given)


def steered(*behaviours):
    return {behaviour: {"model": f"sandbox:{behaviour}"} for behaviour in behaviours}


OPTIONS = {
    "plain": {},
    "sampling": {"temperature": 0.2, "top_p": 1, "seed": 7, "stop": ["x"], "logit_bias": {"1": 2}},
    "tools": {"model": "sandbox:tools=2", "tools": TOOLS, "parallel_tool_calls": True},
    "n": {"n": 3},
    "logprobs": {"logprobs": True, "top_logprobs": 2},
    "json": {"response_format": {"type": "json_object"}},
    "extra": {
        "extra_headers": {"X-Mine": "1", "User-Agent": "me", "traceparent": "mine"},
        "extra_query": {"a": ["b", "c"]},
        "extra_body": {"custom": {"deep": None}, "temperature": 1},
        "temperature": 0,
    },
    "metadata": {"metadata": {"a": "b"}, "store": True},
    "not given": {"user": openai.NOT_GIVEN, "stop": None},
    "timeout": {"timeout": openai.Timeout(5.0, connect=2.0)},
    "pydantic": {"messages": [*QUESTION, ChatCompletionMessage(role="assistant", content="é☃")]},
    "tuple": {"messages": tuple(QUESTION)},
    **steered("refusal=No", "reasoning=well", "function_call", "null_content", "no_choices"),
    **steered("finish_reason=length"),
}
HANGS = {"model": "sandbox:hang", "timeout": 0.15}
FAULTS = {
    **steered("status=400", "status=401", "status=404", "status=409", "status=429", "status=500"),
    **steered("html", "html,status=502", "garbage", "disconnect=0", "disconnect=2"),
    "time-out": HANGS,
    "no JSON": {"metadata": {"a": object()}},
    "no text": {"metadata": {"a": "\ud83d"}},
    "bad header": {"extra_headers": {"X-Mine": "☃"}},
    "unknown option": {"tresholds": 1},
    "a class": {"response_format": City},
}
STREAM_FAULTS = {
    **steered("status=400", "html", "garbage"),
    **steered("disconnect=0", "disconnect=2", "stream_error=2", "truncate=2"),
    "time-out": HANGS,
    "time-out of a chunk": {"model": "sandbox:chunk_delay=30", "timeout": 0.15},
    "bad stream options": {"stream_options": 3},
}
PARSE_FAULTS = {
    **steered("finish_reason=length", "finish_reason=content_filter", "content={}", "status=400"),
    "a number": {"response_format": int},
}
RESPONSES = {
    "plain": {},
    "instructions": {"instructions": "Be brief.", "temperature": 0, "metadata": {"a": "b"}},
    "tools": {"model": "sandbox:tools=2", "tools": FLAT_TOOLS},
    "builtin": {"model": "sandbox:builtin=web_search", "tools": [{"type": "web_search_preview"}]},
    "extra": {"extra_headers": {"X-Mine": "1"}, "extra_query": {"a": "b"}, "user": None},
    **steered("reasoning=well", "refusal=No", "finish_reason=length", "failed"),
}
READERS = {
    **{name: operator.methodcaller(name) for name in ("json", "parse", "read", "text")},
    "lines": lambda response: response.iter_lines(),
    "bytes": lambda response: response.iter_bytes(),
    "pieces": lambda response: response.iter_text(3),
    "begin": lambda response: begun(response.iter_lines()),
    "leave": lambda response: None,
}
of = functools.partial
stream, respond_stream = of(create, stream=True), of(respond, stream=True)
raw = {"how": "with_raw_response"}
retrying = of(optioned, {"max_retries": 2})
unheard = of(optioned, {"base_url": "http://127.0.0.1:1/v1"})


def each(label, ask, table, names=None):
    """A call for each row of a table, or for some."""
    return {f"{label} {name}": of(ask, **table[name]) for name in names or table}


CALLS = {
    **each("chat", create, OPTIONS),
    **each("chat fails:", create, FAULTS),
    "chat without model": lambda client: client.chat.completions.create(messages=QUESTION),
    "chat of a generator": from_a_generator,
    "chat of a generator, streamed": of(from_a_generator, stream=True),
    "chat with the message itself": with_the_message_itself,
    "chat with_options": of(optioned, {"timeout": 3, "default_query": {"a": "b"}}, create),
    "chat copy": lambda client: create(client.copy(default_headers={"X-Mine": "1"}).copy()),
    "stream": stream,
    "stream with usage": of(stream, stream_options={"include_usage": True}),
    "stream with extra": of(stream, **OPTIONS["extra"]),
    **each("stream fails:", stream, STREAM_FAULTS),
    "stream left by a block": of(left, by_block),
    "stream left by close": of(left, by_close),
    "stream left": of(left, by_nothing),
    "stream left for a while": of(left, for_a_while),
    "raw": of(create, **raw),
    "raw stream": of(stream, **raw),
    "raw client": lambda client: create(client.with_raw_response),
    "raw fails": of(create, **raw, model="sandbox:status=400"),
    **{f"lazy {name}": of(lazily, name, create) for name in READERS},
    **{
        f"lazy stream {name}": of(lazily, name, stream)
        for name in ("parse", "lines", "bytes", "begin", "leave")
    },
    "lazy fails": of(lazily, "parse", create, model="sandbox:status=400"),
    "lazy cut off": of(lazily, "parse", create, model="sandbox:disconnect=2"),
    "parse": parse,
    "parse tools": of(parse, model="sandbox:tools=1", tools=[openai.pydantic_function_tool(City)]),
    "parse without format": of(parse, response_format=openai.NOT_GIVEN),
    **each("parse fails:", parse, PARSE_FAULTS),
    "parse raw": of(parse, **raw),
    "parse raw, cut off": of(parse, **raw, model="sandbox:finish_reason=length"),
    "helper": helper,
    "helper with format": of(helper, response_format=City),
    "helper left": of(helper, to_the_end=False),
    **each("helper with format fails:", of(helper, response_format=City), PARSE_FAULTS),
    **each("helper fails:", helper, STREAM_FAULTS, ["garbage", "disconnect=2", "stream_error=2"]),
    "beta parse": lambda client: client.beta.chat.completions.parse(**ASK, response_format=City),
    "beta create": lambda client: client.beta.chat.completions.create(**ASK),
    "beta helper": lambda client: helper(client.beta),
    "post": post,
    "post stream": post_stream,
    "post for a response": of(post, cast_to=httpx.Response),
    "post for a text": of(post, cast_to=str),
    "post for anything": of(post, cast_to=object),
    "unheard": of(unheard, create),
    "unheard stream": of(unheard, stream),
    "retried": of(retrying, create, model="sandbox:fail_first=2,retry_after=0.01"),
    "retried stream": of(retrying, stream, model="sandbox:fail_first=1,retry_after=0.01"),
    "retried in vain": of(retrying, create, model="sandbox:status=503,retry_after=0.01"),
    **each("response", respond, RESPONSES),
    **each("response fails:", respond, FAULTS, ["status=400", "html", "disconnect=2", "time-out"]),
    "response without input": lambda client: client.responses.create(model="gpt-4o"),
    "response of another": with_the_output_itself,
    "response raw": of(respond, **raw),
    "response lazy": of(lazily, "parse", respond),
    "response parse": lambda client: client.responses.parse(**RESPOND, text_format=City),
    "response helper": of(helper, of="responses"),
    "response helper with format": of(helper, of="responses", text_format=City),
    "response helper left": of(helper, of="responses", to_the_end=False),
    "response helper fails": of(helper, of="responses", model="sandbox:stream_error=2"),
    **each("response stream", respond_stream, RESPONSES, ["plain", "tools", "builtin", "failed"]),
    **each("response stream fails:", respond_stream, STREAM_FAULTS, ["status=400", "truncate=2"]),
    "response stream raw": of(respond_stream, **raw),
    "response stream lazy": of(lazily, "lines", respond_stream),
    "response stream lazy, left": of(lazily, "begin", respond_stream),
    "embeddings": lambda client: client.embeddings.create(model="m", input=["x", "y"]),
    "models": pages,
    "model": lambda client: client.models.retrieve("gpt-4o"),
    "completions": lambda client: client.completions.create(model="gpt-4o", prompt="?"),
    "azure": create,
    "azure stream": stream,
    "azure fails": of(create, model="sandbox:status=401"),
    "azure response": respond,
}
OBSERVED = re.compile("/(chat/completions|responses)([?]|$)")


# Each call bare, and by each way in.


def bare(client, scorer):
    return contextlib.nullcontext()


def wrapped(client, scorer):
    tt.wrap_openai(client, scorer=scorer)
    return contextlib.nullcontext()


def logged(client, scorer):
    tt.autolog(scorer=scorer)
    return contextlib.nullcontext()


def in_block(client, scorer):
    return tt.trusted_span(scorer=scorer)


WAYS = [wrapped, logged, in_block]
KINDS = pytest.mark.parametrize("kind", ["OpenAI", "AsyncOpenAI"])


def make(kind, *, azure=False):
    http = openai.DefaultHttpxClient if kind == "OpenAI" else openai.DefaultAsyncHttpxClient
    # To load the certificates would take longer than a call.
    options = {"max_retries": 0, "timeout": 10, "http_client": http(verify=False)}
    if azure:
        kind = kind.replace("Open", "AzureOpen")
        endpoint = str(openai.OpenAI().base_url.join("/"))
        options |= {"azure_endpoint": endpoint, "api_key": "key", "api_version": "2024-10-21"}
    return getattr(openai, kind)(**options)


def drive(coroutine):
    """Run what never waits."""
    try:
        coroutine.send(None)
    except StopIteration as end:
        return end.value
    raise AssertionError("A sync client made its caller wait.")


def observed(call, client, way, sandbox, scorer=None):
    """All that a caller and a server can tell of a call."""
    sandbox.clear()
    is_async = isinstance(client, openai.AsyncOpenAI)

    async def main():
        if is_async:
            hear_the_loop(heard)
        async with inside(client) as entered:
            try:
                with way(entered, scorer):
                    result = await read(call(entered))
                return {"result": described(result), "copies": copies(result)}
            except Exception as error:
                return raised(error)
            finally:
                tt.autolog(disable=True)

    with overheard() as heard:
        seen = asyncio.run(main()) if is_async else drive(main())
    sent = [
        (one.method, one.path, one.raw_headers, described(one.body))
        for one in sandbox.requests("openai")
    ]
    return {**seen, "heard": heard, "sent": sent, "connections": sandbox.connections("openai")}


def recorded():
    """How many calls are recorded so far."""
    assert tt.flush(10)
    stats = tt.stats()
    return stats.scored + sum(stats.unscored.values())


def differences(call, client, ways, sandbox, scorer):
    theirs = observed(call, client(), bare, sandbox)
    if theirs.get("error", [None])[0] is AttributeError:
        pytest.skip(f"this openai: {theirs['error'][1][1]}")
    is_ours = any(OBSERVED.search(path) for _, path, _, _ in theirs["sent"])
    found = []
    for way in ways:
        before = recorded()
        found += unlike(observed(call, client(), way, sandbox, scorer), theirs, way.__name__)
        assert recorded() > before or not is_ours
    return found


@KINDS
@pytest.mark.parametrize("name", CALLS)
def test_a_call_is_what_it_is_without_us(name, kind, sandbox, scorer):
    client = of(make, kind, azure=name.startswith("azure"))
    nowhere(differences(CALLS[name], client, WAYS, sandbox, scorer))


@pytest.mark.parametrize("call", [create, stream])
def test_a_call_of_the_module_is_what_it_is_without_us(call, sandbox, scorer, monkeypatch):
    monkeypatch.setattr(openai, "api_key", "sk-sandbox")
    monkeypatch.setattr(openai, "base_url", f"{sandbox.openai_base_url}/")
    client = of(contextlib.nullcontext, openai)
    nowhere(differences(call, client, [logged, in_block], sandbox, scorer))


INSPECTED = {
    "signature": lambda function: str(inspect.signature(function)),
    "arguments": inspect.getfullargspec,
    "coroutine": inspect.iscoroutinefunction,
    "generator": inspect.isgeneratorfunction,
    "async generator": inspect.isasyncgenfunction,
    "function": inspect.isfunction,
    "method": inspect.ismethod,
    "source": inspect.getsource,
    "names": lambda function: (function.__name__, function.__qualname__, function.__module__),
    "doc": inspect.getdoc,
}


def inspected(function):
    told = {name: outcome(look, function) for name, look in INSPECTED.items()}
    return {**told, "hints": typing.get_type_hints(function)}


@KINDS
@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
def test_a_client_is_what_it_was(way, kind, sandbox, scorer):
    base = getattr(openai, kind)

    def seen(way):
        client = base()
        with way(client, scorer):
            methods = [client.request, client.post, client.copy, client.with_options]
            methods += [client.chat.completions.create, helpers(client).parse]
            told = [inspected(method) for method in methods]
            twins = [type(one) is type(client) for one in (client.copy(), copy.copy(client))]
            assert isinstance(client, base)
            assert way is wrapped or type(client) is base
        return told, twins, str(type(client)), inspect.getdoc(client), described(repr(client))

    theirs = seen(bare)
    nowhere(unlike(seen(way), theirs))


# Functions, bare and decorated.


def assistant(mark):
    """A class with every kind of method, marked in every place where a mark may stand."""

    class Assistant:
        @mark
        def method(self, word: str = "x", *, loud: bool = False) -> tuple:
            """A method."""
            return word, loud

        @mark
        async def later(self, word: str, *rest: int) -> tuple:
            """A coroutine."""
            await asyncio.sleep(0)
            return word, rest

        @mark
        def each(self, word: str, /, **more: int) -> typing.Iterator[str]:
            """A generator."""
            yield from word

        @mark
        async def each_later(self, word: "str") -> "typing.AsyncIterator[str]":
            """An async generator."""
            for letter in word:
                yield letter

        @mark
        @classmethod
        def of_class(cls, word: str) -> str:
            return word

        @classmethod
        @mark
        async def of_class_later(cls, word: str) -> str:
            return word

        @mark
        @classmethod
        async def each_of_class_later(cls, word: str) -> typing.AsyncIterator[str]:
            yield word

        @staticmethod
        @mark
        def each_static(word: str) -> typing.Iterator[str]:
            yield word

        @mark
        @staticmethod
        async def static_later(word: str) -> str:
            return word

    return Assistant


Bare, Trusted = assistant(lambda function: function), assistant(tt.trusted)
Bare.__qualname__, Trusted.__qualname__ = "Bare", "Trusted"  # where pickle finds them


@pytest.mark.parametrize("name", [name for name in vars(Bare) if not name.startswith("_")])
def test_a_decorated_method_is_what_it_was(name, traces):
    async def seen(cls):
        told = {}
        for place in (cls(), cls):
            method = getattr(place, name)
            told[type(place) is type] = inspected(method), {**copies(method), "text": None}
        return told, described(await read(getattr(cls(), name)("word")))

    nowhere(unlike(asyncio.run(seen(Trusted)), asyncio.run(seen(Bare))))
    traces(1)


def plain(log):
    """Takes and gives."""
    try:
        log.append((yield 1))
        log.append((yield 2))
        return "end"
    finally:
        log.append("finally")


def catching(log):
    """Goes on whatever is thrown at it, and ends when it is closed."""
    for number in range(4):
        try:
            log.append((yield number))
        except BaseException as error:  # noqa: PERF203 - this is what is tested
            log.append(described(error))
            if isinstance(error, GeneratorExit):
                return "closed"
    return "end"


def stubborn(log):
    """Does not want to be closed, and breaks then."""
    try:
        yield 1
    except GeneratorExit as error:
        log.append("ignored")
        yield 2
        raise LookupError("mine") from error


def nested(log):
    """Turns what is thrown at it into its own."""
    try:
        yield from plain(log)
    except BaseException as error:
        raise LookupError("mine") from error


@types.coroutine
def pause(value):
    return (yield value)


async def plain_later(log):
    try:
        log.append(await pause(1))
        log.append(await pause(2))
        return "end"
    finally:
        log.append("finally")


async def catching_later(log):
    try:
        await pause(1)
    except BaseException as error:
        log.append(described(error))


async def each_plain(log):
    try:
        log.append((yield 1))
        await asyncio.sleep(0)
        log.append((yield 2))
    finally:
        await asyncio.sleep(0)
        log.append("finally")


async def each_catching(log):
    for number in range(4):
        try:
            log.append((yield number))
        except BaseException as error:  # noqa: PERF203 - this is what is tested
            log.append(described(error))
            if isinstance(error, GeneratorExit):
                return


async def each_stubborn(log):
    try:
        yield 1
    except GeneratorExit as error:
        log.append("ignored")
        yield 2
        raise LookupError("mine") from error


FUNCTIONS = [plain, catching, stubborn, nested, plain_later, catching_later]
EACH = [each_plain, each_catching, each_stubborn]
NEXT, CLOSE = ("send", None), ("close",)
STEPS = {
    "to the end": [NEXT, NEXT, NEXT, NEXT, NEXT],
    "sent": [NEXT, ("send", "a"), ("send", "b"), NEXT],
    "sent too early": [("send", "a")],
    "closed": [NEXT, CLOSE, NEXT, CLOSE],
    "closed at once": [CLOSE, NEXT],
    "thrown into": [NEXT, ("throw", KeyError), NEXT, CLOSE],
    "thrown into twice": [NEXT, ("throw", KeyError), ("throw", ValueError)],
    "thrown into at once": [("throw", KeyError), NEXT],
    "exit thrown into": [NEXT, ("throw", GeneratorExit), NEXT],
    "stop thrown into": [NEXT, ("throw", StopIteration), NEXT],
    "cancelled": [NEXT, ("throw", asyncio.CancelledError), NEXT],
    "interrupted": [NEXT, ("throw", KeyboardInterrupt)],
    "dropped": [NEXT],
    "dropped at once": [],
}


async def stepped(function, steps, *, by_task=False):
    """What a generator or a coroutine gives and does at each step."""
    log = []
    running = function(log)
    seen = [(type(running), running.__name__, running.__qualname__)]
    for name, *given in steps:
        step = getattr(running, name, None) or getattr(running, f"a{name}")
        given = [one("mine") if isinstance(one, type) else one for one in given]
        try:
            value = done(step(*given))
            seen.append(described(await (asyncio.create_task(value) if by_task else value)))
        except BaseException as error:
            seen.append(raised(error))
            if not log:  # what has not begun has no frame but the outermost
                seen[-1].pop("frames")
        log.append(f"after {name}")
    running = step = None
    log.append("dropped")
    return seen, log


@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize("function", FUNCTIONS, ids=lambda function: function.__name__)
def test_a_decorated_function_does_what_it_did_at_each_step(function, steps, traces):
    if inspect.iscoroutinefunction(function) and steps == "exit thrown into":
        pytest.skip("Python itself closes what a coroutine awaits; asyncio never does this.")

    def seen(function):
        with overheard() as heard:
            told = drive(stepped(function, STEPS[steps]))
        return told, heard

    nowhere(unlike(seen(tt.trusted(function)), seen(function)))
    traces(STEPS[steps][:1] == [NEXT])


@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize("function", EACH, ids=lambda function: function.__name__)
def test_a_decorated_async_generator_does_what_it_did_at_each_step(function, steps, traces):
    async def main(function, by_task, heard):
        hear_the_loop(heard)
        told = await stepped(function, STEPS[steps], by_task=by_task)
        for _ in range(9):  # the loop closes what was dropped
            await asyncio.sleep(0)
        return told

    def seen(function, by_task):
        with overheard() as heard:
            told = asyncio.run(main(function, by_task, heard))
        return told, heard

    # These two a task does not hand to who waits for it.
    tasks = [False] if steps in ("exit thrown into", "interrupted") else [False, True]
    for by_task in tasks:
        nowhere(unlike(seen(tt.trusted(function), by_task), seen(function, by_task), by_task))
    traces(len(tasks) * (STEPS[steps][:1] == [NEXT]))


async def endless(log, reached):
    try:
        yield 1
        reached.set()
        await asyncio.Event().wait()
    except asyncio.CancelledError as error:
        log.append(described(error))
        raise
    finally:
        await asyncio.sleep(0)
        log.append("finally")


async def cancelled(generator, reached, then=None):
    task = asyncio.create_task(done(generator.__anext__()))
    await reached.wait()
    try:
        return then and await then(generator)
    finally:
        task.cancel()
        await asyncio.wait([task])


async def timed_out(generator, reached):
    return await asyncio.wait_for(generator.__anext__(), 0.01)


LEAVES = {
    "cancelled": cancelled,
    "read by two": of(cancelled, then=lambda generator: generator.__anext__()),
    "closed while it runs": of(cancelled, then=lambda generator: generator.aclose()),
    "timed out": timed_out,
}


@pytest.mark.parametrize("leave", LEAVES.values(), ids=LEAVES)
def test_a_decorated_async_generator_is_left_as_it_was(leave, traces):
    async def main(function, log, heard):
        hear_the_loop(heard)
        reached = asyncio.Event()
        generator = function(log, reached)
        log.append(await generator.__anext__())
        try:
            log.append(await leave(generator, reached))
        except BaseException as error:
            log.append(raised(error))

    def seen(function):
        log = []
        with overheard() as heard:
            asyncio.run(main(function, log, heard))
        return log, heard

    nowhere(unlike(seen(tt.trusted(endless)), seen(endless)))
    traces(1)


def test_decorated_async_generators_are_closed_by_the_loop_as_they_were(traces):
    async def main(function, log, heard):
        hear_the_loop(heard)
        generators = [function(log) for _ in range(8)]  # they are closed in any order
        for generator in generators:
            await generator.__anext__()
        return generators

    def seen(function):
        log = []
        with overheard() as heard:
            generators = asyncio.run(main(function, log, heard))
        return log, heard, [generator.ag_frame for generator in generators]

    nowhere(unlike(seen(tt.trusted(each_plain)), seen(each_plain)))
    traces(8)


class Thrown(Exception):
    """An exception whose end can be observed."""


@pytest.mark.parametrize("function", [plain, plain_later], ids=lambda function: function.__name__)
def test_an_exception_is_gone_as_soon_as_it_is_handled(function, asynchronous_export):
    running = tt.trusted(function)([])
    running.send(None)
    with overheard():
        error = Thrown()
        alive = weakref.ref(error)
        with contextlib.suppress(Thrown):
            running.throw(error)
        del error
        assert alive() is None
