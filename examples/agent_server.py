"""The same by MLflow's agent server, which streams, too, and which OpenAI's client can talk to.

Needs OPENAI_API_KEY and CLEANLAB_TLM_API_KEY; without them, run it with --sandbox. Also needs
httpx, which MLflow does not install: pip install httpx
Ask it: curl http://127.0.0.1:8000/responses -H "Content-Type: application/json" \
    -d '{"input": [{"role": "user", "content": "What is 1+1?"}], "stream": true}'
"""

from collections.abc import AsyncIterator

import uvicorn
from _sandbox import sandbox_if_asked
from mlflow.genai.agent_server import AgentServer, invoke, stream
from mlflow.types.responses import (
    ResponsesAgentRequest,
    ResponsesAgentResponse,
    ResponsesAgentStreamEvent,
)
from starlette.concurrency import iterate_in_threadpool, run_in_threadpool

from tlm_tracing.model import TrustedChatAgent

agent = TrustedChatAgent("gpt-4o", threshold=0.8)


# In threads: the server calls a plain function on its event loop, where all others would wait.
@invoke()
async def answer(request: ResponsesAgentRequest) -> ResponsesAgentResponse:
    return await run_in_threadpool(agent.predict, request)


@stream()
async def answer_streamed(
    request: ResponsesAgentRequest,
) -> AsyncIterator[ResponsesAgentStreamEvent]:
    async for event in iterate_in_threadpool(agent.predict_stream(request)):
        yield event


app = AgentServer("ResponsesAgent").app

if __name__ == "__main__":
    with sandbox_if_asked():
        uvicorn.run(app, port=8000)
