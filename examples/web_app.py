"""A web application whose answers cost no wait for their scores, and that loses none when it stops.

Needs OPENAI_API_KEY and CLEANLAB_TLM_API_KEY; without them, run it with --sandbox.
Ask it: curl "http://127.0.0.1:8000/answer?question=What+is+1%2B1"
"""

import contextlib
from collections.abc import AsyncIterator

import uvicorn
from _sandbox import sandbox_if_asked
from fastapi import FastAPI
from starlette.concurrency import run_in_threadpool

import tlm_tracing as tt
from tlm_tracing.openai import AsyncOpenAI


@contextlib.asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncIterator[None]:
    async with AsyncOpenAI() as app.state.client:
        yield
    # The server ends by a signal: what is still to come is waited for here, not at exit.
    await run_in_threadpool(tt.flush, 10)


app = FastAPI(lifespan=lifespan)


@app.get("/answer")
async def answer(question: str) -> dict[str, str | None]:
    completion = await app.state.client.chat.completions.create(
        model="gpt-4o", messages=[{"role": "user", "content": question}]
    )
    trust = tt.trust(completion)
    return {
        "answer": completion.choices[0].message.content,
        "trace_id": None if trust is None else trust.trace_id,
    }


if __name__ == "__main__":
    tt.configure(mode="background")
    with sandbox_if_asked():
        uvicorn.run(app)
