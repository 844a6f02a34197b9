"""Questions answered at the same time, and the answer that can be trusted least.

Needs OPENAI_API_KEY and CLEANLAB_TLM_API_KEY; without them, run it with --sandbox.
"""

import asyncio

import openai
from _sandbox import sandbox_if_asked

import tlm_tracing as tt

QUESTIONS = ["What is the capital of France?", "How many seconds are in 100 years?"]


async def ask(client: openai.AsyncOpenAI, question: str) -> str | None:
    completion = await client.chat.completions.create(
        model="gpt-4o", messages=[{"role": "user", "content": question}]
    )
    return completion.choices[0].message.content


async def main() -> None:
    async with openai.AsyncOpenAI() as client, tt.trusted_span("quiz") as span:
        for answer in await asyncio.gather(*(ask(client, question) for question in QUESTIONS)):
            print(answer)
    print(f"{len(span.trusts)} answers, the least trustworthy: {span.trust}")


with sandbox_if_asked():
    asyncio.run(main())
