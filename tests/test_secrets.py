"""No secret leaves: secrets are planted wherever an application has them, and looked for.

In every byte of the store, in what is logged, and in what the scorer is sent.
"""

import base64
import dataclasses
import json
import logging
import os
import socket
import subprocess
import sys
import urllib.parse
import uuid

import openai
import pydantic
import pytest

import tlm_tracing as tt
from tlm_tracing import _redacted
from tlm_tracing.openai import OpenAI
from tlm_tracing.testing import FakeScorer

RESPONSES_API = pytest.mark.skipif(
    not hasattr(openai.OpenAI, "responses"), reason="this openai has no Responses API"
)
QUESTION = [{"role": "user", "content": "What is the capital of France?"}]

ENVIRONMENT = {
    "OPENAI_API_KEY": "sk-proj-{}",
    "OPENAI_ORG_ID": "org-{}",
    "CLEANLAB_TLM_API_KEY": "{}",
    "DATABASE_PASSWORD": "{}",
    "VENDOR_API_TOKEN": "{}",
    "DATABASE_URL": "postgresql://me:{}@db.example/app",
    "HTTPS_PROXY": "http://me:{}@127.0.0.1:PORT",
    "MLFLOW_TRACKING_PASSWORD": "{}",
}
# What is set for these tests themselves.
OURS = ("MLFLOW_EXPERIMENT", "MLFLOW_TRACKING", "HTTP", "http", "NO_PROXY", "no_proxy")
PLANTED = [
    *ENVIRONMENT,
    *("extra header", "extra authorization", "extra cookie", "default header", "default cookie"),
    *("project", "extra query", "default query", "address password", "address query"),
    *("extra body", "unknown key", "unknown nested key", "echoed key"),
    *("tool header", "tool authorization", "tool path", "tool query", "domain secret"),
    *("user text", "answer", "explanation", "tool argument", "tool result", "schema"),
    *("image", "image address", "image address query", "audio", "file", "bytes"),
    *("argument", "named argument", "header argument", "result", "object"),
    *("error text", "error url", "scorer error", "scorer url", "mask error", "broken mask"),
    *("local", "source line", "unrecorded text", "unrecorded key", "unrecorded explanation"),
    *("unrecorded error", "unrecorded argument", "jwt"),
]
CONTROLS = ["control in the text", "control in the log"]

APPLICATION = r'''
import asyncio, base64, dataclasses, inspect, json, logging, os, re, sys
import mlflow, openai, tlm_tracing as tt
from tlm_tracing.openai import AsyncOpenAI, OpenAI
from tlm_tracing.scorers import HostedTLM
from tlm_tracing.testing import Sandbox

planted = json.load(sys.stdin)
secret = planted["secrets"]
logging.basicConfig(level=logging.WARNING)
logging.getLogger("tlm_tracing").setLevel(logging.DEBUG)


def private(name):
    """A text that the masks know."""
    return f"<<{secret[name]}>>"


def mask(value):
    if isinstance(value, str):
        return re.sub("<<.*?>>", "[private]", value)
    if isinstance(value, dict):
        return {mask(key): mask(item) for key, item in value.items()}
    return [mask(item) for item in value] if isinstance(value, list) else value


def broken_mask(value):
    raise ValueError(f"cannot mask {value} of {secret['mask error']}")


def broken_scorer(request, completion):
    at = f"https://me:{secret['scorer error']}@scorer.example/?sig={secret['scorer url']}"
    raise RuntimeError(f"no answer from {at}")


def failing_scorer(request, completion):
    raise RuntimeError(f"cannot score {request['messages']}")


def explained(request, completion):
    return {"trustworthiness_score": 0.1, "log": {"explanation": secret["unrecorded explanation"]}}


@dataclasses.dataclass
class Context:
    user: str
    api_key: str


def connect(dsn):
    local = secret["local"]
    raise OSError(
        f"{dsn}: password={secret['error text']} at redis://:{secret['error url']}@cache:6379/0?a=1"
        f" with {os.environ['DATABASE_PASSWORD']} and {os.environ['VENDOR_API_TOKEN']}"
        f" of {os.environ['DATABASE_URL']}, token {secret['jwt']}"
    )


@tt.trusted
def handle(question, api_key, headers, context, blob):
    return {"said": private("result"), "blob": blob}


@tt.trusted
def fail():
    connect("dsn" or "SOURCE LINE")


@tt.trusted(capture_content=False)
def unrecorded(status, mapping):
    raise ValueError(secret["unrecorded error"])


def data(name):
    return base64.b64encode(secret[name].encode() * 20).decode()


MESSAGES = [
    {"role": "system", "content": secret["control in the text"]},
    {"role": "assistant", "content": None, "tool_calls": [{
        "id": "1", "type": "function",
        "function": {"name": "f", "arguments": json.dumps({"x": private("tool argument")})},
    }]},
    {"role": "tool", "tool_call_id": "1", "content": private("tool result")},
    {"role": "user", "content": [
        {"type": "text", "text": "Who is " + private("user text") + "?"},
        {"type": "image_url", "image_url": {"url": "data:image/png;base64," + data("image")}},
        {"type": "image_url", "image_url": {
            "url": f"https://me:{secret['image address']}@cdn.example/x.png"
                   f"?sig={secret['image address query']}"}},
        {"type": "input_audio", "input_audio": {"data": data("audio"), "format": "wav"}},
        {"type": "file", "file": {
            "filename": "x.pdf", "file_data": "data:application/pdf;base64," + data("file")}},
    ]},
]
INPUT = [
    {"role": "user", "content": [
        {"type": "input_text", "text": "Who is " + private("user text") + "?"},
        {"type": "input_image", "image_url": "data:image/png;base64," + data("image")},
        {"type": "input_file",
         "file_url": f"https://x.example/?sig={secret['image address query']}"},
        {"type": "input_file", "filename": "x", "file_data": data("file")},
    ]},
    {"type": "function_call", "call_id": "1", "name": "f", "arguments": private("tool argument")},
    {"type": "function_call_output", "call_id": "1", "output": private("tool result")},
]
TOOLS = [
    {
        "type": "mcp", "server_label": "mine",
        "server_url": f"https://me:{secret['tool query']}@mcp.example/{secret['tool path']}/mcp"
                      f"?key={secret['tool query']}",
        "headers": {"X-Key": secret["tool header"]}, "authorization": secret["tool authorization"],
        "require_approval": "never",
    },
    {"type": "code_interpreter", "container": {"type": "auto", "network_policy": {
        "type": "allowlist", "allowed_domains": ["x.example"],
        "domain_secrets": [{"domain": "x.example", "name": "k", "value": secret["domain secret"]}],
    }}},
]
SCHEMA = {"type": "json_schema", "json_schema": {"name": "city", "schema": {
    "type": "object", "properties": {"name": {"type": "string", "description": private("schema")}},
}}}
CARRIED = {
    "extra_headers": {
        "X-Mine": secret["extra header"],
        "Authorization": f"Bearer {secret['extra authorization']}",
        "Cookie": f"sid={secret['extra cookie']}",
    },
    "extra_query": {"key": secret["extra query"]},
    "extra_body": {
        "more": {"data_sources": [{"authentication": {"key": secret["extra body"]}}]}
    },
}


async def given(result):
    return await result if inspect.isawaitable(result) else result


async def read(result):
    result = await given(result)
    if hasattr(result, "__aiter__"):
        return [chunk async for chunk in result]
    return list(result)


async def failing(call):
    try:
        await read(call())
    except Exception as error:
        return error
    raise AssertionError("it did not fail")


def echo(status, sandbox):
    """OpenAI's own complaint, with all that it was sent."""
    told = " ".join([
        f"Incorrect API key provided: {os.environ['OPENAI_API_KEY']}.",
        f"You sent {CARRIED['extra_headers']}, {secret['extra query']}, {secret['default header']},"
        f" {secret['default cookie']}, {secret['default query']}"
        f" and sk-proj-{secret['echoed key']}",
    ])
    error = {"message": told, "type": "invalid_request_error", "param": "model", "code": "key"}
    sandbox.script("openai", {"status": status, "body": {"error": error}})


async def use(client, sandbox):
    create = client.chat.completions.create
    for stream in (False, True):
        await read(create(model="gpt-4o", messages=MESSAGES, stream=stream, **CARRIED))
        for status in (400, 401):
            echo(status, sandbox)
            await failing(lambda: create(
                model="gpt-4o", messages=MESSAGES, stream=stream, **CARRIED))
    await given(create(model="sandbox:tools=1", messages=MESSAGES, response_format=SCHEMA))
    body = {
        "model": "gpt-4o", "messages": MESSAGES, "api_key": secret["unknown key"],
        "vendor": {"deep": [secret["unknown nested key"]]},
    }
    kind = openai.types.chat.ChatCompletion
    await given(client.post("/chat/completions", body=body, cast_to=kind))
    if hasattr(client, "responses"):
        for stream in (False, True):
            await read(client.responses.create(
                model="gpt-4o", input=INPUT, tools=TOOLS, stream=stream, **CARRIED))
        echo(401, sandbox)
        await failing(lambda: client.responses.create(model="gpt-4o", input=INPUT, **CARRIED))
    lost = client.with_options(base_url=f"{sandbox.openai_base_url}?sig={secret['address query']}")
    await failing(lambda: lost.chat.completions.create(model="gpt-4o", messages=MESSAGES))
    for scorer in (broken_scorer, failing_scorer, HostedTLM("low"),
                   HostedTLM("base", base_url="https://tlm.invalid/api")):
        if getattr(scorer, "preset", None) == "low":
            key = os.environ["CLEANLAB_TLM_API_KEY"]
            sandbox.script("tlm", {"status": 401, "body": {"error": f"Invalid API key: {key}"}})
        with tt.trusted_span("scored", scorer=scorer) as span:
            await given(create(model="gpt-4o", messages=MESSAGES))
        assert span.trusts[0].wait(30).status == "unscored"
    with tt.trusted_span("masked", mask=broken_mask):
        await given(create(model="gpt-4o", messages=[
            *MESSAGES, {"role": "user", "content": private("broken mask")}]))
    text = f"My number is {secret['unrecorded text']}."
    with tt.trusted_span("unrecorded", capture_content=False, scorer=explained):
        await given(create(
            model="gpt-4o", messages=[{"role": "user", "content": text}],
            metadata={secret["unrecorded key"] + " ": "1"}, user=secret["unrecorded text"]))


def application():
    blob = secret["bytes"].encode()
    handle(private("argument"), secret["named argument"], {"X-Key": secret["header argument"]},
           Context(private("object"), secret["named argument"]), blob)
    for failing in (fail, lambda: unrecorded(secret["unrecorded argument"], {
            "a@example.com " + secret["unrecorded argument"]: 1})):
        try:
            failing()
        except (OSError, ValueError):
            pass


def drive(coroutine):
    try:
        coroutine.send(None)
    except StopIteration:
        return
    raise AssertionError("a sync client made us wait")


async def use_async(options, sandbox):
    async with AsyncOpenAI(**options) as client:
        await use(client, sandbox)


with Sandbox() as sandbox:
    for name, value in sandbox.environment().items():
        if "KEY" not in name:
            os.environ[name] = value
    proxy = os.environ["HTTPS_PROXY"]
    port = sandbox.openai_base_url.removesuffix("/v1").rpartition(":")[2]
    os.environ["HTTPS_PROXY"] = proxy.replace("PORT", port)
    base = sandbox.openai_base_url.replace("://", f"://me:{secret['address password']}@")
    options = {
        "base_url": base, "max_retries": 0, "project": secret["project"],
        "default_headers": {
            "X-Team": secret["default header"], "Cookie": f"a={secret['default cookie']}"},
        "default_query": {"q": secret["default query"]},
    }
    sandbox.default("openai", content=f"It is {private('answer')}, {secret['control in the text']}")
    sandbox.default("tlm", explanation=f"Because of {private('explanation')}.")
    tt.configure(mask=mask, mask_scorer=mask, mode=planted["mode"])
    application()
    drive(use(OpenAI(**options), sandbox))
    asyncio.run(use_async(options, sandbox))
    logging.getLogger("tlm_tracing").warning("%s", secret["control in the log"])
    assert tt.flush(60)
    received = [
        [one.path, [*map(list, one.raw_headers)], base64.b64encode(one.body).decode()]
        for one in sandbox.requests("tlm")
    ]
    with open(planted["received"], "w") as file:
        json.dump(received, file)
'''


def plant():
    """A secret for each place; none can be there by chance."""
    secrets = {name: f"S{uuid.uuid4().hex}" for name in (*PLANTED, *CONTROLS)}
    header = base64.urlsafe_b64encode(b'{"alg":"HS256","typ":"JWT"}').decode().rstrip("=")
    secrets["jwt"] = f"{header}.{secrets['jwt']}.{uuid.uuid4().hex}"
    return secrets


def forms(secret):
    """A secret as it may be written."""
    yield secret.encode()
    yield base64.b64encode(secret.encode()).rstrip(b"=")[:-1]
    yield urllib.parse.quote(secret, safe="").encode()


def found(secrets, haystack):
    """The names of the secrets in some bytes."""
    return {
        name for name, secret in secrets.items() if any(form in haystack for form in forms(secret))
    }


def bytes_below(folder):
    return b"\n".join(path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file())


def run(tmp_path, secrets, mode, **more):
    """Run the application; gives what was stored, what was logged and what the scorer got."""
    for name in ("home", "code"):
        (tmp_path / name).mkdir()
    code = tmp_path / "code" / "application.py"
    code.write_text(APPLICATION.replace("SOURCE LINE", secrets["source line"]), "utf-8")
    planted = {"secrets": secrets, "mode": mode, "received": str(tmp_path / "received")}
    done = subprocess.run(
        [sys.executable, str(code)],
        input=json.dumps(planted),
        env={
            **{name: os.environ[name] for name in os.environ if not name.startswith(OURS)},
            **{name: text.format(secrets[name]) for name, text in ENVIRONMENT.items()},
            "MLFLOW_TRACKING_URI": f"sqlite:///{tmp_path}/home/mlflow.db",
            "MLFLOW_ENABLE_ASYNC_TRACE_LOGGING": "true",
            **more,
        },
        cwd=tmp_path / "home",
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    sent = b""
    for path, headers, body in json.loads((tmp_path / "received").read_text("utf-8")):
        own = ["Authorization", f"bearer {secrets['CLEANLAB_TLM_API_KEY']}"]
        kept = [pair for pair in headers if pair != own]
        sent += b"\n".join([path.encode(), json.dumps(kept).encode(), base64.b64decode(body)])
    return {
        "store": bytes_below(tmp_path / "home"),
        "log": (done.stdout + done.stderr).encode(),
        "scorer": sent,
    }


@pytest.mark.parametrize("mode", ["background", pytest.param("inline", marks=pytest.mark.long)])
def test_none_of_all_secrets_is_in_the_store_the_log_or_the_scorers_requests(mode, tmp_path):
    secrets = plant()
    places = run(tmp_path, secrets, mode)
    controls = {name: secrets.pop(name) for name in CONTROLS}
    assert len(secrets) >= 30
    assert {place: found(secrets, what) for place, what in places.items()} == {
        "store": set(),
        "log": set(),
        "scorer": set(),
    }
    # The hunt finds what is to be found.
    assert {place: found(controls, what) for place, what in places.items()} == {
        "store": {"control in the text"},
        "log": set(CONTROLS),  # a scorer's error quotes the text
        "scorer": {"control in the text"},
    }


OUTAGE = """
import logging, os
import tlm_tracing as tt
from tlm_tracing.openai import OpenAI
from tlm_tracing.testing import FakeScorer, Sandbox

logging.basicConfig(level=logging.INFO)
logging.getLogger("tlm_tracing").setLevel(logging.DEBUG)
with Sandbox() as sandbox:
    os.environ.update(sandbox.environment())
    tt.configure(scorer=FakeScorer())
    question = [{"role": "user", "content": "?"}]
    assert tt.trust(OpenAI().chat.completions.create(model="gpt-4o", messages=question)).score
    tt.flush(3)
"""


@pytest.mark.long
def test_mlflows_password_is_not_told_when_its_server_is_away(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    secrets = {name: f"S{uuid.uuid4().hex}" for name in ("address", "environment")}
    done = subprocess.run(
        [sys.executable, "-c", OUTAGE],
        env={
            **{name: os.environ[name] for name in os.environ if not name.startswith(OURS)},
            "MLFLOW_TRACKING_URI": f"http://me:{secrets['address']}@127.0.0.1:{port}",
            "MLFLOW_TRACKING_PASSWORD": secrets["environment"],
            "MLFLOW_ENABLE_ASYNC_TRACE_LOGGING": "true",
        },
        cwd=tmp_path,
        capture_output=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert b"tlm_tracing" in done.stderr
    assert found(secrets, done.stdout + done.stderr) == set()


@pytest.fixture(autouse=True)
def configured(sandbox, scorer):
    sandbox.answer(QUESTION[0]["content"], "Paris.")
    tt.configure(scorer=scorer)


def ask(content=None, client=None, **options):
    messages = QUESTION if content is None else [{"role": "user", "content": content}]
    client = client or OpenAI(max_retries=0)
    return client.chat.completions.create(**{"model": "gpt-4o", "messages": messages, **options})


def stored(trace):
    return json.dumps(trace.to_dict())


def event_of(span):
    (event,) = (event for event in span.events if event.name == "exception")
    return event.attributes


# What is recorded of a request.


def test_only_parameters_that_openai_knows_are_recorded_and_given_to_scorers(
    scorer, sandbox, trace
):
    body = {"model": "gpt-4o", "messages": QUESTION, "seed": 1, "user": "me", "api_key": "SECRET"}
    client = OpenAI()
    client.post("/chat/completions", body=body, cast_to=openai.types.chat.ChatCompletion)
    assert sandbox.requests("openai")[0].json == body
    known = {key: value for key, value in body.items() if key != "api_key"}
    assert trace().data.spans[1].inputs == known
    assert scorer.exchanges[0].request == known


@RESPONSES_API
def test_a_tool_is_recorded_without_what_opens_it(scorer, sandbox, trace):
    tool = {
        "type": "mcp",
        "server_label": "mine",
        "server_url": "https://me:SECRET@mcp.example:8080/s/SECRET/mcp?key=SECRET",
        "headers": {"X-Key": "SECRET"},
        "authorization": "SECRET",
    }
    OpenAI().responses.create(
        model="gpt-4o", input="?", tools=[tool], safety_identifier="me", prompt_cache_key="k"
    )
    assert sandbox.requests("openai")[0].json["tools"] == [tool]
    found = trace()
    seen = {"type": "mcp", "server_label": "mine", "server_url": "https://mcp.example:8080"}
    for request in (found.data.spans[1].inputs, scorer.exchanges[0].request):
        assert request["tools"] == [seen]
        assert (request["safety_identifier"], request["prompt_cache_key"]) == ("me", "k")
    assert "SECRET" not in stored(found)


def test_an_address_is_recorded_without_what_signs_it(sandbox, trace):
    url = "https://me:SECRET@cdn.example/a/b.png?X-Amz-Signature=SECRET&x=1#SECRET"
    parts = [{"type": "text", "text": "?"}, {"type": "image_url", "image_url": {"url": url}}]
    ask(parts)
    assert sandbox.requests("openai")[0].json["messages"][0]["content"] == parts
    found = trace()
    image = found.data.spans[1].inputs["messages"][0]["content"][1]["image_url"]
    assert image == {"url": "https://cdn.example/a/b.png"}
    assert "SECRET" not in stored(found)


def test_an_address_within_a_message_is_part_of_the_message(trace):
    ask("Look at https://example.com/?q=1.")
    assert "https://example.com/?q=1." in stored(trace())


@pytest.mark.parametrize(
    "part",
    [
        {"type": "image_url", "image_url": {"url": "data:image/png;base64,DATA"}},
        {"type": "input_audio", "input_audio": {"data": "DATA", "format": "wav"}},
        {
            "type": "file",
            "file": {"filename": "x", "file_data": "data:application/pdf;base64,DATA"},
        },
        {"type": "text", "text": "See ![this](data:image/png;base64,DATA) and go on."},
    ],
    ids=lambda part: part["type"],
)
def test_of_media_a_note_is_recorded_and_no_bytes_are_stored(part, trace):
    content = b"\x89PNG of 25 bytes, no more"
    encoded = base64.b64encode(content).decode()
    given = json.loads(json.dumps(part).replace("DATA", encoded))
    ask([{"type": "text", "text": "?"}, given])
    found = trace()
    text = json.dumps(found.data.spans[1].inputs["messages"])
    assert "25 bytes, sha256 eebf9d7908f6b4a5" in text
    assert encoded not in stored(found)
    assert "mlflow-attachment" not in stored(found)
    assert ("and go on." in text) == (part["type"] == "text")


def test_of_audio_in_an_answer_the_transcript_is_recorded(sandbox, trace):
    spoken = base64.b64encode(b"the sound").decode()

    @tt.trusted
    def answer():
        audio = {"id": "a", "data": spoken, "expires_at": 1, "transcript": "Paris."}
        message = {"role": "assistant", "content": None, "audio": audio}
        return openai.types.chat.ChatCompletion.construct(
            choices=[{"index": 0, "message": message, "finish_reason": "stop"}]
        )

    answer()
    found = trace()
    audio = found.data.spans[0].outputs["choices"][0]["message"]["audio"]
    assert audio["transcript"] == "Paris."
    assert audio["data"].startswith("[data, 9 bytes, sha256 ")
    assert spoken not in stored(found)


def test_arguments_that_are_credentials_by_their_name_are_not_recorded(trace):
    @dataclasses.dataclass
    class Settings:
        region: str
        client_secret: str

    class Login(pydantic.BaseModel):
        user: str
        password: str

    @tt.trusted
    def answer(question, api_key, headers, settings, login, logprob):
        return question

    settings, login = Settings("eu", "SECRET"), Login(user="me", password="SECRET")
    answer("?", "SECRET", {"X-Any": "SECRET"}, settings, login, {"token": "a", "logprob": -1.0})
    found = trace()
    inputs = found.data.spans[0].inputs
    assert inputs["settings"]["region"] == "eu"
    assert inputs["login"]["user"] == "me"
    assert inputs["logprob"]["token"] == "a"
    assert "SECRET" not in stored(found)


# Nothing but shape.


def test_without_content_no_text_is_recorded_anywhere(sandbox, scorer, trace, caplog):
    why = {"trustworthiness_score": 0.2, "log": {"explanation": "SECRET"}}
    tt.configure(capture_content=False, scorer=FakeScorer(why))

    @tt.trusted
    def answer(question, status, people):
        return ask(question).choices[0].message.content

    sandbox.answer("SECRET?", "SECRET!")
    answer("SECRET?", "a SECRET status", {"SECRET@example.com": 1})
    found = trace()
    assert "SECRET" not in stored(found)
    assert "explanation" not in found.info.tags
    assert found.info.tags["trust_score"] == "0.2000"
    (assessment,) = found.info.assessments
    assert (assessment.value, assessment.rationale) == (0.2, None)
    assert found.data.spans[2].inputs["messages"] == [{"role": "user", "content": "[7 characters]"}]


def test_without_content_the_explanation_is_on_the_object_still(trace):
    why = {"trustworthiness_score": 0.2, "log": {"explanation": "because"}}
    tt.configure(capture_content=False, scorer=FakeScorer(why))
    completion = ask()
    assert tt.trust(completion).explanation == "because"
    assert "explanation" not in trace().info.tags


def test_without_content_an_error_tells_its_kind_alone(sandbox, trace):
    tt.configure(capture_content=False)
    error = {"message": "SECRET", "type": "invalid", "param": "messages[0].role", "code": "c"}
    sandbox.script("openai", {"status": 400, "body": {"error": error}})
    with pytest.raises(openai.BadRequestError):
        ask()
    found = trace()
    llm = found.data.spans[1]
    assert llm.status.description.startswith("BadRequestError: [")
    assert llm.attributes["openai.error.param"] == "messages[0].role"
    assert "SECRET" not in stored(found)


def test_without_content_a_scorers_words_are_neither_recorded_nor_logged(trace, caplog):
    def judge(request, completion):
        raise ValueError(f"no score for {request['messages']}")

    tt.configure(capture_content=False, scorer=judge)
    assert tt.trust(ask()).reason == "scorer_error"
    assert "judge gave no score: [" in caplog.text
    assert "France" not in caplog.text + stored(trace())


# Masks.


def masked(value):
    return json.loads(json.dumps(value).replace("SECRET", "[masked]"))


def broken(value):
    raise ValueError(f"SECRET {value}")


@pytest.mark.parametrize(("mask", "left"), [(masked, "[masked]"), (broken, "the mask failed")])
def test_a_mask_is_applied_to_explanations(mask, left, trace):
    why = {"trustworthiness_score": 0.2, "log": {"explanation": "SECRET"}}
    tt.configure(mask=mask, scorer=FakeScorer(why))
    ask()
    found = trace()
    assert left in found.info.tags["explanation"]
    assert left in found.info.assessments[0].rationale
    assert "SECRET" not in stored(found)


@pytest.mark.parametrize(("mask", "left"), [(masked, "[masked]"), (broken, "the mask failed")])
def test_a_mask_is_applied_to_the_messages_of_exceptions(mask, left, trace, caplog):
    def judge(request, completion):
        raise ValueError("SECRET")

    @tt.trusted(mask=mask)
    def fail():
        ask(
            "SECRET",
            tools=[{"type": "function", "function": {"name": "f", "description": "SECRET"}}],
        )
        raise KeyError("SECRET")

    tt.configure(scorer=judge)
    with pytest.raises(KeyError):
        fail()
    found = trace()
    assert left in found.data.spans[0].status.description
    assert left in event_of(found.data.spans[0])["exception.message"]
    assert left in found.data.spans[-1].status.description
    assert "SECRET" not in stored(found) + caplog.text


def test_a_mask_that_cannot_look_into_an_object_keeps_it_back(trace):
    class Opaque:
        def __str__(self):
            return "SECRET"

    @tt.trusted(mask=lambda value: value)
    def answer(thing):
        return thing

    answer(Opaque())
    found = trace()
    assert found.data.spans[0].inputs == {"thing": "[Opaque]"}
    assert "SECRET" not in stored(found)


# Exceptions.


def test_an_exception_is_recorded_with_where_it_came_from_and_nothing_of_the_source(trace):
    @tt.trusted
    def fail():
        local = "SECRET 1"
        raise RuntimeError(f"no {len(local)}")  # SECRET 2

    with pytest.raises(RuntimeError):
        fail()
    found = trace()
    event = event_of(found.data.spans[0])
    assert event["exception.type"] == "RuntimeError"
    assert event["exception.message"] == "no 8"
    assert "test_secrets.py:" in event["exception.stacktrace"]
    assert event["exception.stacktrace"].endswith("in fail")
    assert "SECRET" not in stored(found)


def test_an_error_of_openais_tells_its_status_code_type_and_parameter(sandbox, trace):
    error = {"message": "No.", "type": "invalid_request_error", "param": "model", "code": "x"}
    sandbox.script("openai", {"status": 404, "body": {"error": error}})
    with pytest.raises(openai.NotFoundError) as caught:
        ask()
    attributes = trace().data.spans[1].attributes
    assert attributes["http.response.status_code"] == 404
    assert attributes["openai.error.type"] == "invalid_request_error"
    assert attributes["openai.error.param"] == "model"
    assert attributes["openai.error.code"] == "x"
    assert attributes["openai.request_id"] == caught.value.request_id


def test_what_a_client_carries_is_taken_out_of_what_openai_says(sandbox, trace):
    carried = ["key-of-no-known-shape", "header-of-mine", "cookie-of-mine", "query-of-mine"]
    key, header, cookie, query = carried
    client = OpenAI(
        api_key=key,
        default_headers={"X-Team": header, "Cookie": f"sid={cookie}"},
        default_query={"q": query},
        max_retries=0,
    )
    error = {"message": f"Wrong: {' '.join(carried)}.", "code": key}
    sandbox.script("openai", {"status": 401, "body": {"error": error}})
    with pytest.raises(openai.AuthenticationError) as caught:
        ask(client=client)
    assert key in str(caught.value)
    found = trace()
    assert not [one for one in carried if one in stored(found)]
    assert found.data.spans[1].status.description.startswith("AuthenticationError: ")


@pytest.mark.parametrize(
    "text",
    [
        "key sk-proj-SECRET-x, wrong",
        "keys sk-SECR****SECRET",
        "Authorization: Bearer SECRET",
        "{'Authorization': 'Basic SECRET=='}",
        "[(b'authorization', b'Custom SECRET')]",
        "AKIASECRETSECRET1234",
        "ghp_SECRETSECRETSECRET12",
        "github_pat_SECRETSECRETSECRET",
        "xoxb-SECRET-SECRET",
        "AIzaSECRETSECRETSECRETSECRET",
        "eyJhbGciOi.eyJSECRET.SECRET",
        "-----BEGIN RSA PRIVATE KEY-----\nSECRET\n-----END RSA PRIVATE KEY-----",
        "-----BEGIN PRIVATE KEY-----\nSECRET",
        "postgresql+psycopg2://me:SECRET@db/app failed",
        "postgresql://me:SE/SECRET@db/app failed",
        "https://SECRET@example.com/",
        "url: /blob?sv=1&sig=SECRET (refused)",
        "https://x.example/?a=SECRET&b=SECRET",
        "password=SECRET",
        'PASSWORD: "a SECRET of mine"',
        "db_passwd='SECRET'",
        "api_key=SECRET, model=gpt",
        "AccountKey=SECRET;EndpointSuffix=x",
        "aws_secret_access_key = SECRET",
        '{"client_secret": "SECRET", "a": 1}',
        "Cookie: a=1; sid=SECRET",
        "Set-Cookie: sid=SECRET; Path=/",
        "token: SECRET",
        "(sqlite3.OperationalError) locked [SQL: INSERT] [parameters: ('SECRET', 1)] (Background)",
    ],
)
def test_what_looks_like_a_credential_is_taken_out_of_messages_and_logs(text, trace, caplog):
    @tt.trusted
    def fail():
        raise RuntimeError(f"before {text}")

    with pytest.raises(RuntimeError):
        fail()
    found = trace()
    assert found.data.spans[0].status.description.startswith("RuntimeError: before ")
    assert "SECRET" not in stored(found)
    logging.getLogger("tlm_tracing").warning("after all: %s", text)
    assert "after all: " in caplog.text
    assert "SECRET" not in caplog.text


@pytest.mark.parametrize(
    "text",
    [
        "This model's maximum context length is 8192 tokens. However, you requested 9000 tokens.",
        "Invalid value for 'max_tokens': must be 1 or more",
        "Connection error.",
        "https://example.com/a/b:80 said 404 at /v1/chat/completions",
        "task-oriented risk-averse",
    ],
)
def test_what_is_no_credential_stays_in_messages(text):
    assert _redacted.redact(text) == text


def test_a_secret_at_the_end_of_what_is_told_of_a_long_message_is_taken_out(trace):
    text = _redacted.redact("x y " * 1_999 + "sk-SECRET" * 100 + " z" * 10_000)
    assert len(text) < 9_000
    assert "SECRET" not in text


def test_secrets_of_the_environment_are_taken_out_by_their_value(monkeypatch, trace):
    for name, value in {
        "VENDOR_TOKEN": "value-number-1",
        "Some_Password": "value number 2",
        "QUEUE_URL": "amqp://me:value%2Fnumber-3@queue",
    }.items():
        monkeypatch.setenv(name, value)

    @tt.trusted
    def fail():
        raise RuntimeError("value-number-1, value number 2 and value/number-3 were refused")

    with pytest.raises(RuntimeError):
        fail()
    description = trace().data.spans[0].status.description
    assert description == "RuntimeError: [redacted], [redacted] and [redacted] were refused"


def test_a_traceback_in_the_log_has_no_source_lines(caplog):
    try:
        raise RuntimeError("password=SECRET")  # SECRET
    except RuntimeError:
        logging.getLogger("tlm_tracing").warning("It failed.", exc_info=True)
    assert "It failed." in caplog.text
    assert "RuntimeError: password=[redacted]" in caplog.text
    assert "test_secrets.py:" in caplog.text
    assert "SECRET" not in caplog.text


@RESPONSES_API
def test_the_failure_that_a_response_tells_of_is_redacted(sandbox, trace):
    tt.configure(capture_content=False)
    OpenAI().responses.create(model="sandbox:failed=true", input="?")
    found = trace()
    assert found.data.spans[1].status.status_code.value == "ERROR"
    assert found.data.spans[1].status.description.startswith("[")
