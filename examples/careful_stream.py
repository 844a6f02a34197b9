"""A streamed answer that ends with its score, so that a bad one is taken back in time.

What was streamed was seen, but the end of the stream is held until the score is in.

Needs OPENAI_API_KEY and CLEANLAB_TLM_API_KEY; without them, run it with --sandbox.
"""

import openai
from _sandbox import sandbox_if_asked
from openai.types.chat import ChatCompletion

import tlm_tracing as tt


def apologize(completion: ChatCompletion, trust: tt.Trust) -> str:
    return f"Please disregard that: a trust of {trust.score:.2f} is too low."


with sandbox_if_asked():
    client = tt.wrap_openai(openai.OpenAI(), threshold=0.8, on_low=apologize, hold_last_chunk=True)
    stream = client.chat.completions.create(
        model="gpt-4o",
        messages=[{"role": "user", "content": "Why is the sky blue?"}],
        stream=True,
    )
    for chunk in stream:
        print(chunk.choices[0].delta.content or "", end="", flush=True)
    print()
    # With on_low="raise" the loop would have raised; a chunk without a score has no metadata.
    metadata = getattr(chunk, "tlm_metadata", {})
    print(metadata.get("replacement", tt.trust(stream)))
