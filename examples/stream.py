"""A streamed answer: the chunks come as ever, the score is there after the last one.

Needs OPENAI_API_KEY and CLEANLAB_TLM_API_KEY; without them, run it with --sandbox.
"""

from _sandbox import sandbox_if_asked

import tlm_tracing as tt
from tlm_tracing.openai import OpenAI

with sandbox_if_asked():
    stream = OpenAI().chat.completions.create(
        model="gpt-4o",
        messages=[{"role": "user", "content": "Why is the sky blue?"}],
        stream=True,
    )
    for chunk in stream:
        print(chunk.choices[0].delta.content or "", end="", flush=True)
    print()
    print(tt.trust(stream))
