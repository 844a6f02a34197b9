"""An answer that cannot be trusted is not shown: the user gets a fixed one instead.

Needs OPENAI_API_KEY and CLEANLAB_TLM_API_KEY; without them, run it with --sandbox.
"""

import openai
from _sandbox import sandbox_if_asked
from openai.types.chat import ChatCompletion

import tlm_tracing as tt


def not_sure(completion: ChatCompletion, trust: tt.Trust) -> ChatCompletion:
    print(f"trust {trust.score:.2f} is too low for: {completion.choices[0].message.content}")
    answer = completion.model_copy(deep=True)
    answer.choices[0].message.content = "I am not sure. Please ask our support."
    return answer


@tt.trusted(threshold=0.8, on_low=not_sure)
def answer_question(question: str) -> str | None:
    completion = openai.OpenAI().chat.completions.create(
        model="gpt-4o", messages=[{"role": "user", "content": question}]
    )
    return completion.choices[0].message.content


with sandbox_if_asked():
    print(answer_question("How many r are in strawberry?"))
