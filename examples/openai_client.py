"""Asks a running server (`cadenza serve smollm2`) with the official client: pip install openai.

Usage: python examples/openai_client.py [http://127.0.0.1:8000/v1]
"""

import os
import sys

from openai import OpenAI

url = sys.argv[1] if len(sys.argv) > 1 else "http://127.0.0.1:8000/v1"
client = OpenAI(base_url=url, api_key=os.environ.get("CADENZA_API_KEY", "none"))
model = client.models.list().data[0].id
question = "Name three things that are blue."

answer = client.chat.completions.create(
    model=model, messages=[{"role": "user", "content": question}], temperature=0, max_tokens=30
)
print(answer.choices[0].message.content)

print("\nThe same, as it is written:")
stream = client.chat.completions.create(
    model=model, messages=[{"role": "user", "content": question}], temperature=0, max_tokens=30, stream=True
)
for chunk in stream:
    print(chunk.choices[0].delta.content or "", end="", flush=True)

print("\n\nHow sure it was, token by token:")
answer = client.chat.completions.create(
    model=model,
    messages=[{"role": "user", "content": "What is the capital of France?"}],
    temperature=0,
    max_tokens=8,
    logprobs=True,
    top_logprobs=3,
)
logprobs = answer.choices[0].logprobs
for token in logprobs.content if logprobs and logprobs.content else []:
    others = ", ".join(f"{top.token!r} {top.logprob:.2f}" for top in token.top_logprobs)
    print(f"  {token.token!r:12} {token.logprob:6.2f}   of {others}")

print("\nA parameter that only this server knows goes into extra_body:")
completion = client.completions.create(
    model=model, prompt="Once upon a time", max_tokens=20, seed=7, extra_body={"min_p": 0.1, "top_k": 40}
)
print(completion.choices[0].text)
