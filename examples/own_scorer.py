"""Any function can be the scorer: here one that distrusts long answers.

Needs OPENAI_API_KEY; without it, run it with --sandbox.
"""

from collections.abc import Mapping
from typing import Any

import openai
from _sandbox import sandbox_if_asked

import tlm_tracing as tt


def brevity(request: Mapping[str, Any], completion: openai.types.chat.ChatCompletion) -> float:
    words = (completion.choices[0].message.content or "").split()
    return 1 / (1 + len(words) / 100)


with sandbox_if_asked():
    client = tt.wrap_openai(openai.OpenAI(), scorer=brevity)
    completion = client.chat.completions.create(
        model="gpt-4o", messages=[{"role": "user", "content": "Tell me about Paris."}]
    )
    print(tt.trust(completion))
