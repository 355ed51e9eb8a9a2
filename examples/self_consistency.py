"""The answer that most samples agree on, from a running server (`cadenza serve smollm2`): pip install openai.

Usage: python examples/self_consistency.py [http://127.0.0.1:8000/v1]
"""

import os
import sys
from typing import Any

from openai import OpenAI

url = sys.argv[1] if len(sys.argv) > 1 else "http://127.0.0.1:8000/v1"
client = OpenAI(base_url=url, api_key=os.environ.get("CADENZA_API_KEY", "none"))
model = client.models.list().data[0].id


def ask(question: str, **options: Any) -> Any:
    messages = [{"role": "user", "content": question}]
    return client.chat.completions.create(
        model=model, messages=messages, temperature=0.7, seed=1, **{"max_tokens": 24, **options}
    )


print("As many of 8 samples as the vote needs, each of which reasons before it answers:")
question = "Tom has 3 apples and buys 4 more. How many apples does he have?"
voting: dict[str, Any] = {"n": 8, "answer": "last_number"}
for chunk in ask(question, stream=True, extra_body={"self_consistency": voting}):
    vote = getattr(chunk, "vote", None)
    if vote and "tokens_saved" not in vote:  # news of one sample
        print(f"  sample {vote['sample']} says {vote['sample_answer']}; ahead: {vote['answer']}")
    print(chunk.choices[0].delta.content or "", end="")
print(f"\n  {vote}")

print("Reasons and the answer as JSON, counted by a field of it; likely samples weigh more:")
schema = {
    "type": "object",
    "properties": {
        "reason": {"type": "string", "maxLength": 30},
        "sentiment": {"enum": ["positive", "negative"]},
    },
    "required": ["reason", "sentiment"],
}
answer = ask(
    "Is this review positive or negative? 'The soup was cold and the waiter rude.' Answer as JSON.",
    max_tokens=60,
    extra_body={
        "self_consistency": {"n": 5, "answer": {"json_pointer": "/sentiment"}, "weight": "logprob"},
        "structured_outputs": {"json": schema},
    },
)
print(" ", answer.choices[0].message.content)
print(" ", answer.vote)
