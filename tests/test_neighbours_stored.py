"""Others who record LLM calls in MLflow: each call is read as it would have been scored, live."""

import contextlib
import contextvars
import json
import os
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

# LiteLLM asks when it is imported, by us or by MLflow; without it, it fetches a file from outside.
os.environ.setdefault("LITELLM_LOCAL_MODEL_COST_MAP", "true")

import mlflow
import openai
import pytest

import tlm_tracing as tt
from tlm_tracing._messages import render
from tlm_tracing._stored._calls import calls

ASK = "What is the capital of France?"
QUESTION = [{"role": "user", "content": ASK}]
PARAMETERS = {
    "type": "object",
    "properties": {"query": {"type": "string", "description": "What to look up."}},
    "required": ["query"],
}
LOOKUP = {"name": "lookup", "description": "Finds a city.", "parameters": PARAMETERS}
TOOLS = [{"type": "function", "function": LOOKUP}]
CALLED = (
    '<tool_call>\n{\n  "name": "lookup",\n  "arguments": {\n    "query": "x"\n  }\n}\n</tool_call>'
)
PIXEL = "data:image/png;base64,iVBORw0KGgo="


@pytest.fixture(autouse=True)
def scored(scorer, sandbox, monkeypatch):
    monkeypatch.setenv("LANGSMITH_TRACING", "false")  # LangChain's own, to the outside
    tt.configure(scorer=scorer)


def package(module, name):
    return pytest.importorskip(module, reason=f"{name} is not installed")


def forget_loggers(litellm):
    """It does not take a logger for the second time."""
    litellm.logging_callback_manager._reset_all_callbacks()
    litellm.litellm_core_utils.litellm_logging._in_memory_loggers.clear()


@contextlib.contextmanager
def recorded_by(*flavors):
    if "litellm" in flavors:
        forget_loggers(package("litellm", "LiteLLM"))
    for flavor in flavors:
        getattr(mlflow, flavor).autolog()
    try:
        yield
    finally:
        for flavor in flavors:
            getattr(mlflow, flavor).autolog(disable=True)


def apart(do):
    """Some integrations leave their span active when a stream has been read."""
    contextvars.copy_context().run(do)


def texts(call):
    """Prompt and responses as they are asked for."""
    assert call.reason is None
    call.endpoint.construct(call.answer)
    asked, given = call.endpoint.as_chat(call.request, call.answer)
    rendered = [render(asked, given, choice) for choice in range(len(given["choices"]))]
    return rendered[0][0], [response for _, response in rendered]


def live_texts(trace):
    """The same as they were scored, of a trace of ours."""
    found = (span.inputs for span in trace.data.spans if span.name == "tlm.trustworthiness")
    return [(one["prompt"], one.get("choices") or [one["response"]]) for one in found]


# Those that call OpenAI: what they do, by name.


def chat_model(**options):
    langchain_openai = package("langchain_openai", "langchain-openai")
    return langchain_openai.ChatOpenAI(model="gpt-4o", **options)


def langchain_history():
    messages = package("langchain_core.messages", "langchain-core")
    calls = [{"name": "lookup", "args": {"query": "x"}, "id": "call_1"}]
    return [
        messages.SystemMessage("Be brief."),
        messages.HumanMessage(ASK),
        messages.AIMessage("", tool_calls=calls),
        messages.ToolMessage("Paris", tool_call_id="call_1"),
        messages.AIMessage("It is Paris."),
        messages.HumanMessage(
            [
                {"type": "text", "text": "And this?"},
                {"type": "image_url", "image_url": {"url": PIXEL}},
            ]
        ),
    ]


def langchain_invoke():
    chat_model().invoke(langchain_history())


def langchain_tools():
    chat_model().bind_tools(TOOLS).invoke(ASK)


def langchain_stream():
    list(chat_model().stream(ASK))


def langchain_stream_with_tools():
    list(chat_model().bind_tools(TOOLS).stream(ASK))


def langchain_structured():
    chat_model().with_structured_output(
        {"title": "City", "description": "A city.", **PARAMETERS}, method="json_schema"
    ).invoke(ASK)


def langchain_choices():
    chat_model(n=2).invoke(ASK)


def langchain_responses():
    chat_model(use_responses_api=True).invoke(ASK)


def langchain_batch():
    chat_model().batch([ASK, ASK], config={"max_concurrency": 1})


def langchain_llm():
    model = package("langchain_openai", "langchain-openai").ChatOpenAI(model="gpt-4o")
    parser = package("langchain_core.output_parsers", "langchain-core").StrOutputParser()
    prompt = package("langchain_core.prompts", "langchain-core").ChatPromptTemplate
    (prompt.from_messages([("system", "Be {how}."), ("user", ASK)]) | model | parser).invoke(
        {"how": "brief"}
    )


def llama(**options):
    return package("llama_index.llms.openai", "llama-index-llms-openai").OpenAI(
        model="gpt-4o", api_base=os.environ["OPENAI_BASE_URL"], **options
    )


def llama_messages(*messages):
    kind = package("llama_index.core.llms", "llama-index-core").ChatMessage
    return [kind(role=role, content=content) for role, content in messages]


def llama_tool():
    def lookup(query: str) -> str:
        """Find a city."""
        return query

    return package("llama_index.core.tools", "llama-index-core").FunctionTool.from_defaults(lookup)


def llamaindex_chat():
    llama().chat(llama_messages(("system", "Be brief."), ("user", ASK)))


def llamaindex_stream():
    list(llama().stream_chat(llama_messages(("user", ASK))))


def llamaindex_complete():
    llama().complete(ASK)


def llamaindex_tools():
    llama().chat_with_tools([llama_tool()], user_msg=ASK)


def llamaindex_stream_with_tools():
    list(llama().stream_chat_with_tools([llama_tool()], user_msg=ASK))


def ask_litellm(**options):
    litellm = package("litellm", "LiteLLM")
    litellm.in_memory_llm_clients_cache.flush_cache()  # clients that autolog has not seen
    return litellm.completion(model="gpt-4o", messages=QUESTION, **options)


def litellm_completion():
    ask_litellm()


def litellm_tools():
    ask_litellm(tools=TOOLS)


def litellm_stream():
    list(ask_litellm(stream=True))


CALLING = [
    ("langchain", langchain_invoke, {}),
    ("langchain", langchain_tools, {"tools": 2}),
    ("langchain", langchain_stream, {}),
    ("langchain", langchain_stream_with_tools, {"tools": 2}),
    ("langchain", langchain_structured, {"content": '{"query": "x"}'}),
    ("langchain", langchain_choices, {}),
    ("langchain", langchain_responses, {}),
    ("langchain", langchain_batch, {}),
    ("langchain", langchain_llm, {}),
    ("llama_index", llamaindex_chat, {}),
    ("llama_index", llamaindex_stream, {}),
    ("llama_index", llamaindex_complete, {}),
    ("llama_index", llamaindex_tools, {"tools": 1}),
    ("litellm", litellm_completion, {}),
    ("litellm", litellm_tools, {"tools": 1}),
    ("litellm", litellm_stream, {}),
]


# LlamaIndex's stream is not the active span while openai's client asks: MLflow makes two traces.
APART = {llamaindex_stream}
SETUPS = [
    (*one, together) for one in CALLING for together in (False, True)[: 1 if one[1] in APART else 2]
]


@pytest.mark.parametrize(
    ("flavor", "do", "behaviour", "together"),
    SETUPS,
    ids=[f"{one[1].__name__} {'together' if one[3] else 'alone'}" for one in SETUPS],
)
def test_a_call_is_read_as_it_is_scored_live(flavor, do, behaviour, together, sandbox, traces):
    """Whether the integration has recorded it, or that of openai's client inside it."""
    package("llama_index" if flavor == "llama_index" else flavor, flavor)
    sandbox.default("openai", **behaviour)
    tt.autolog()
    apart(do)
    tt.autolog(disable=True)
    live = [one for trace in traces() for one in live_texts(trace)]
    with recorded_by(flavor, *(["openai"] if together else [])):
        apart(do)
    stored = [call for trace in traces() for call in calls(trace) if call.parent is None]
    assert live
    assert without_ids([texts(call) for call in stored]) == without_ids(live)


@pytest.mark.parametrize("count", [1, 2])
def test_llamaindexs_streamed_tool_calls_are_read(count, sandbox, traces):
    """Of several whose pieces are mixed, LlamaIndex has the pieces; those are not guessed."""
    package("llama_index", "llama-index-core")
    sandbox.default("openai", tools=count, tool_args={"query": "x"})
    with recorded_by("llama_index"):
        apart(llamaindex_stream_with_tools)
    # What prepares the call is of type LLM, too, but is none, and has a trace of its own.
    (call,) = (call for trace in traces(2) for call in calls(trace))
    if count == 2:
        assert call.reason == "unsupported_content"
        return
    prompt, responses = texts(call)
    assert '"name":"lookup"' in prompt
    assert responses == [CALLED]


def without_ids(told):
    return re.sub("[0-9a-f]{32}", "*", json.dumps(told))


@pytest.mark.parametrize("do", [langchain_stream, llamaindex_stream])
def test_a_stream_that_broke_off_is_partial(do, sandbox, trace):
    """Though the integration says of every end that it was a good one."""
    flavor = "langchain" if do is langchain_stream else "llama_index"
    package(flavor, flavor)
    sandbox.default("openai", truncate=2)
    with recorded_by(flavor):
        apart(do)
    assert [call.reason for call in calls(trace())] == ["partial_stream"]


def test_a_batch_in_one_span_is_not_scored(trace):
    """An assessment could not say whose it is."""
    package("langchain", "langchain")
    with recorded_by("langchain"):
        apart(lambda: chat_model().generate([langchain_history(), langchain_history()]))
    assert {call.reason for call in calls(trace())} <= {None, "unsupported_content"}


def test_our_call_inside_an_integrations_span_is_ours(trace):
    """It is scored already."""
    package("langchain", "langchain")
    tt.autolog()
    with recorded_by("langchain"):
        langchain_invoke()
    (call,) = calls(trace())
    assert (call.parent.name, call.scoring.name) == ("chat gpt-4o", "tlm.trustworthiness")


# Those that call others: a loopback server answers as it is told.


class Canned(BaseHTTPRequestHandler):
    """Answers every request with what the server holds."""

    def do_POST(self):
        self.rfile.read(int(self.headers.get("content-length") or 0))
        body = json.dumps(self.server.answer).encode()
        self.send_response(200)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args):
        pass


@pytest.fixture
def server():
    with ThreadingHTTPServer(("127.0.0.1", 0), Canned) as server:
        server.url = f"http://127.0.0.1:{server.server_port}"
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def only(trace):
    (call,) = calls(trace)
    return call


CONVERSATION = (
    "System: Be brief.\n\nUser: Hello\n\nAssistant: <tool_call>\n"
    '{\n  "name": "lookup",\n  "arguments": {\n    "query": "x"\n  },\n  "call_id": "ID"\n}\n'
    "</tool_call>\n\n"
    'Tool: <tool_response>\n{\n  "name": "lookup",\n  "call_id": "ID",\n  "output": "Paris"\n}\n'
    "</tool_response>\n\nUser: And this?\n[image]\n\nAssistant:"
)
SIGNATURE = json.dumps({"type": "function", "function": LOOKUP}, separators=(",", ":"))


def anthropic_answer(*blocks, reason="end_turn"):
    return {
        "id": "msg_1",
        "type": "message",
        "role": "assistant",
        "model": "claude",
        "content": list(blocks),
        "stop_reason": reason,
        "stop_sequence": None,
        "usage": {"input_tokens": 1, "output_tokens": 1},
    }


def ask_anthropic(server, **options):
    client = package("anthropic", "anthropic").Anthropic(api_key="any", base_url=server.url)
    request = {"model": "claude", "max_tokens": 9, "messages": QUESTION, **options}
    with recorded_by("anthropic"):
        return client.messages.create(**request)


def anthropic_text(text):
    return {"type": "text", "text": text}


ANTHROPIC_CALL = {"type": "tool_use", "id": "ID", "name": "lookup", "input": {"query": "x"}}
ANTHROPIC_HISTORY = [
    {"role": "user", "content": "Hello"},
    {"role": "assistant", "content": [ANTHROPIC_CALL]},
    {
        "role": "user",
        "content": [
            {"type": "tool_result", "tool_use_id": "ID", "content": "Paris"},
            anthropic_text("And this?"),
            {
                "type": "image",
                "source": {"type": "base64", "media_type": "image/png", "data": "iVBORw0KGgo="},
            },
        ],
    },
]


def test_anthropics_messages_are_read(server, trace):
    """System, tool calls, their results and pictures come out as OpenAI's would."""
    server.answer = anthropic_answer(anthropic_text("It "), anthropic_text("is Paris."))
    ask_anthropic(server, system="Be brief.", messages=ANTHROPIC_HISTORY)
    call = only(trace())
    assert texts(call) == (CONVERSATION, ["It is Paris."])
    assert call.request["model"] == "claude"


def test_anthropics_tool_calls_are_read(server, trace):
    """With what was said before them, and without the thoughts."""
    thought = {"type": "thinking", "thinking": "Hm.", "signature": "x"}
    server.answer = anthropic_answer(
        thought, anthropic_text("Wait."), ANTHROPIC_CALL, reason="tool_use"
    )
    schema = {"name": "lookup", "description": "Finds a city.", "input_schema": PARAMETERS}
    ask_anthropic(server, tools=[schema])
    prompt, responses = texts(only(trace()))
    assert SIGNATURE in prompt
    assert responses == [f"Wait.\n{CALLED}"]


def test_an_answer_that_anthropic_was_led_into_is_whole(server, trace):
    """What was put into its mouth belongs to it."""
    server.answer = anthropic_answer(anthropic_text(" Paris."))
    ask_anthropic(server, messages=[*QUESTION, {"role": "assistant", "content": "It is"}])
    assert texts(only(trace())) == (ASK, ["It is Paris."])


@pytest.mark.parametrize(
    ("blocks", "stop", "reason"),
    [
        ([anthropic_text("I")], "refusal", "refusal"),
        ([anthropic_text("I")], "pause_turn", "unsupported_content"),
        (
            [{"type": "server_tool_use", "id": "s", "name": "web_search", "input": {}}],
            "end_turn",
            "unsupported_content",
        ),
    ],
)
def test_what_anthropic_says_otherwise_is_not_guessed(blocks, stop, reason, server, trace):
    """Refusals, unfinished turns, and the results of its own tools."""
    server.answer = anthropic_answer(*blocks, reason=stop)
    ask_anthropic(server)
    assert only(trace()).reason == reason


GEMINI_TOOLS = [{"function_declarations": [LOOKUP]}]
GEMINI_CALL = {"functionCall": {"id": "ID", "name": "lookup", "args": {"query": "x"}}}


def gemini(server):
    genai = package("google.genai", "google-genai")
    return genai.Client(api_key="any", http_options={"base_url": server.url})


def gemini_answer(*parts, reason="STOP"):
    content = {"role": "model", "parts": list(parts)}
    return {"candidates": [{"content": content, "finishReason": reason, "index": 0}]} | {
        "usageMetadata": {"promptTokenCount": 1, "candidatesTokenCount": 1, "totalTokenCount": 2}
    }


def test_geminis_contents_are_read(server, trace):
    """System, tool calls, their results and pictures come out as OpenAI's would."""
    server.answer = gemini_answer({"text": "Hm.", "thought": True}, {"text": "It is Paris."})
    contents = [
        {"role": "user", "parts": [{"text": "Hello"}]},
        {"role": "model", "parts": [GEMINI_CALL]},
        {
            "role": "user",
            "parts": [
                {
                    "function_response": {
                        "id": "ID",
                        "name": "lookup",
                        "response": {"result": "Paris"},
                    }
                }
            ],
        },
        {
            "role": "user",
            "parts": [
                {"text": "And this?"},
                {"inline_data": {"mime_type": "image/png", "data": b"x"}},
            ],
        },
    ]
    client = gemini(server)
    with recorded_by("gemini"):
        client.models.generate_content(
            model="gemini", contents=contents, config={"system_instruction": "Be brief."}
        )
    call = only(trace())
    result = json.dumps(json.dumps({"result": "Paris"}))
    assert texts(call) == (CONVERSATION.replace('"Paris"', result), ["It is Paris."])
    assert call.request["model"] == "gemini"


def test_geminis_tool_calls_are_read(server, trace):
    """With what was said before them."""
    server.answer = gemini_answer({"text": "Wait."}, GEMINI_CALL)
    client = gemini(server)
    with recorded_by("gemini"):
        client.models.generate_content(model="gemini", contents=ASK, config={"tools": GEMINI_TOOLS})
    prompt, responses = texts(only(trace()))
    assert '"name":"lookup"' in prompt
    assert responses == [f"Wait.\n{CALLED}"]


def test_each_turn_of_a_chat_with_gemini_is_one_call(server, traces):
    """The spans around it tell of the same call; counting tokens is none."""
    server.answer = gemini_answer({"text": "Paris."})
    client = gemini(server)
    with recorded_by("gemini"):
        chat = client.chats.create(model="gemini")
        chat.send_message("Hello")
        chat.send_message(ASK)
    found = [texts(only(trace)) for trace in traces()]
    assert found == [
        ("Hello", ["Paris."]),
        (f"User: Hello\n\nAssistant: Paris.\n\nUser: {ASK}\n\nAssistant:", ["Paris."]),
    ]


def test_what_gemini_refuses_is_told(server, trace):
    """It gives a reason in place of an answer."""
    server.answer = gemini_answer({"text": ""}, reason="SAFETY")
    client = gemini(server)
    with recorded_by("gemini"):
        client.models.generate_content(model="gemini", contents=ASK)
    assert only(trace()).reason == "refusal"


BEDROCK_CALL = {"toolUse": {"toolUseId": "ID", "name": "lookup", "input": {"query": "x"}}}


def converse(server, **options):
    boto3 = package("boto3", "boto3")
    with recorded_by("bedrock"):
        client = boto3.client(
            service_name="bedrock-runtime",
            region_name="us-east-1",
            endpoint_url=server.url,
            aws_access_key_id="any",
            aws_secret_access_key="any",
        )
        client.converse(modelId="amazon.nova", **options)


def bedrock_answer(*blocks, reason="end_turn"):
    return {
        "output": {"message": {"role": "assistant", "content": list(blocks)}},
        "stopReason": reason,
        "usage": {"inputTokens": 1, "outputTokens": 1, "totalTokens": 2},
        "metrics": {"latencyMs": 1},
    }


def test_bedrocks_conversations_are_read(server, trace):
    """System, tool calls, their results and pictures come out as OpenAI's would."""
    server.answer = bedrock_answer({"text": "It is Paris."})
    result = {"toolUseId": "ID", "content": [{"text": "Paris"}]}
    picture = {"image": {"format": "png", "source": {"bytes": b"x"}}}
    converse(
        server,
        system=[{"text": "Be brief."}],
        messages=[
            {"role": "user", "content": [{"text": "Hello"}]},
            {"role": "assistant", "content": [BEDROCK_CALL]},
            {"role": "user", "content": [{"toolResult": result}, {"text": "And this?"}, picture]},
        ],
    )
    call = only(trace())
    assert texts(call) == (CONVERSATION, ["It is Paris."])
    assert call.request["model"] == "amazon.nova"


def test_bedrocks_tool_calls_are_read(server, trace):
    """With what was said before them."""
    server.answer = bedrock_answer({"text": "Wait."}, BEDROCK_CALL, reason="tool_use")
    spec = {"name": "lookup", "description": "Finds a city.", "inputSchema": {"json": PARAMETERS}}
    converse(
        server,
        messages=[{"role": "user", "content": [{"text": ASK}]}],
        toolConfig={"tools": [{"toolSpec": spec}]},
    )
    prompt, responses = texts(only(trace()))
    assert SIGNATURE in prompt
    assert responses == [f"Wait.\n{CALLED}"]


OPENAI_LIKE = {
    "id": "c1",
    "object": "chat.completion",
    "created": 1,
    "model": "m",
    "choices": [
        {
            "index": 0,
            "finish_reason": "tool_calls",
            "message": {
                "role": "assistant",
                "content": "Wait.",
                "tool_calls": [
                    {
                        "id": "ID",
                        "type": "function",
                        "function": {"name": "lookup", "arguments": '{"query": "x"}'},
                    }
                ],
            },
        }
    ],
    "usage": {"prompt_tokens": 1, "completion_tokens": 1, "total_tokens": 2},
}


def ask_groq(server):
    client = package("groq", "groq").Groq(api_key="any", base_url=server.url)
    client.chat.completions.create(model="m", messages=QUESTION, tools=TOOLS)


def ask_mistral(server):
    client = package("mistralai.client", "mistralai").Mistral(api_key="any", server_url=server.url)
    client.chat.complete(model="m", messages=QUESTION, tools=TOOLS)


@pytest.mark.parametrize(("flavor", "do"), [("groq", ask_groq), ("mistral", ask_mistral)])
def test_those_that_speak_as_openai_does_are_read(flavor, do, server, trace):
    """Tools and tool calls included."""
    package({"mistral": "mistralai"}.get(flavor, flavor), flavor)
    server.answer = OPENAI_LIKE
    with recorded_by(flavor):
        do(server)
    prompt, responses = texts(only(trace()))
    assert SIGNATURE in prompt
    assert responses == [f"Wait.\n{CALLED}"]


def test_openais_client_stays_as_it_was(sandbox):
    """No integration leaves a patch behind for the next test."""
    openai.OpenAI().chat.completions.create(model="gpt-4o", messages=QUESTION)
    assert "traceparent" not in sandbox.requests("openai")[0].headers
