"""An answer by retrieved documents, and whether it was the documents or the model that failed.

Needs OPENAI_API_KEY and CLEANLAB_TLM_API_KEY; without them, run it with --sandbox.
"""

import openai
from _sandbox import sandbox_if_asked

import tlm_tracing as tt

DOCUMENTS = [
    "Returns: goods may be returned within 30 days of delivery, unused and in their packaging.",
    "Refunds: the price is paid back within 5 days of the return, shipping is not.",
    "Opening hours: Monday to Friday, 9 to 17.",
]


def retrieve(question: str) -> list[str]:
    """Stands for your vector store."""
    words = set(question.lower().split())
    return [one for one in DOCUMENTS if words & set(one.lower().split())]


def answer(question: str) -> tuple[str | None, tt.Trust | None]:
    with tt.trusted_span("answer") as span:
        documents = retrieve(question)
        span.set_context(documents, query=question)
        completion = openai.OpenAI().chat.completions.create(
            model="gpt-4o",
            messages=[
                {
                    "role": "system",
                    "content": "Answer by these documents:\n" + "\n".join(documents),
                },
                {"role": "user", "content": question},
            ],
        )
    return completion.choices[0].message.content, span.trust


with sandbox_if_asked():
    text, trust = answer("How long may goods be returned?")
    print(text)
    if trust is not None:
        print(f"trust {trust.score:.2f}, trace {trust.trace_id}")
        for name, score in (trust.evals or {}).items():
            print(f"{name} {score:.2f}")
