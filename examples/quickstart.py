"""One line makes every OpenAI call of a function a scored trace.

Needs OPENAI_API_KEY and CLEANLAB_TLM_API_KEY; without them, run it with --sandbox.
"""

import openai
from _sandbox import sandbox_if_asked

import tlm_tracing as tt


@tt.trusted
def answer_question(question: str) -> openai.types.chat.ChatCompletion:
    return openai.OpenAI().chat.completions.create(
        model="gpt-4o",
        messages=[
            {"role": "system", "content": "You are a trivia master."},
            {"role": "user", "content": question},
        ],
    )


with sandbox_if_asked():
    completion = answer_question("What is the 3rd month of the year in alphabetical order?")
    trust = tt.trust(completion)
    print(completion.choices[0].message.content)
    print(f"trust {trust.score}: {trust.explanation}")
    print(f"trace {trust.trace_id}")
