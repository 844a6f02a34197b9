"""An answer that cannot be trusted is asked for again, from a stronger model.

The second call is scored, too, and is in the trace of the first; it is not asked for a third time.

Needs OPENAI_API_KEY and CLEANLAB_TLM_API_KEY; without them, run it with --sandbox.
"""

import openai
from _sandbox import sandbox_if_asked
from openai.types.chat import ChatCompletion

import tlm_tracing as tt


def ask(client: openai.OpenAI, question: str, model: str) -> ChatCompletion:
    return client.chat.completions.create(
        model=model, messages=[{"role": "user", "content": question}]
    )


def answer_question(client: openai.OpenAI, question: str) -> ChatCompletion:
    def ask_again(completion: ChatCompletion, trust: tt.Trust) -> ChatCompletion:
        print(f"{completion.model} has a trust of {trust.score:.2f}")
        return ask(client, question, "gpt-5")

    with tt.trusted_span("answer_question", threshold=0.8, on_low=ask_again):
        return ask(client, question, "gpt-4o-mini")


with sandbox_if_asked():
    completion = answer_question(openai.OpenAI(), "How many r are in strawberry?")
    trust = tt.trust(completion)
    print(f"{completion.model} has a trust of {trust.score}")
    print(completion.choices[0].message.content)
    print(f"trace {trust.trace_id}")
