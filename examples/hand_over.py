"""An answer that cannot be trusted goes to a person, who finds the proof in its trace.

Needs OPENAI_API_KEY and CLEANLAB_TLM_API_KEY; without them, run it with --sandbox.
"""

import dataclasses
import queue

import openai
from _sandbox import sandbox_if_asked
from openai.types.chat import ChatCompletion

import tlm_tracing as tt


@dataclasses.dataclass
class Ticket:
    draft: str | None
    trust: tt.Trust


desk: queue.Queue[Ticket] = queue.Queue()


def hand_over(completion: ChatCompletion, trust: tt.Trust) -> Ticket:
    ticket = Ticket(completion.choices[0].message.content, trust)
    desk.put(ticket)
    return ticket


def reply(client: openai.OpenAI, question: str) -> str | None:
    answer = client.chat.completions.create(
        model="gpt-4o", messages=[{"role": "user", "content": question}]
    )
    # What a fallback gives is what the call gives, whatever it is.
    if isinstance(answer, Ticket):
        return "A colleague will answer you soon."
    return answer.choices[0].message.content


with sandbox_if_asked():
    client = tt.wrap_openai(openai.OpenAI(), threshold=0.8, on_low=hand_over)
    print(reply(client, "How many r are in strawberry?"))
    while not desk.empty():
        ticket = desk.get()
        print(f"To be answered by a person: {ticket.draft}")
        print(f"trust {ticket.trust.score:.2f}, {ticket.trust.explanation}")
        print(f"trace {ticket.trust.trace_id}")
