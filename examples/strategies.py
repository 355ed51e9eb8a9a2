"""Asks a running server (`cadenza serve smollm2`) to search and to rank instead of drawing: pip install openai.

Usage: python examples/strategies.py [http://127.0.0.1:8000/v1]
"""

import os
import sys
from typing import Any

from openai import OpenAI

url = sys.argv[1] if len(sys.argv) > 1 else "http://127.0.0.1:8000/v1"
client = OpenAI(base_url=url, api_key=os.environ.get("CADENZA_API_KEY", "none"))
model = client.models.list().data[0].id
prompt = "The three primary colours are"


def ask(n: int = 1, max_tokens: int = 12, **strategy: Any) -> list[Any]:
    """What OpenAI's API has no name for goes into extra_body."""
    answer = client.completions.create(
        model=model, prompt=prompt, n=n, max_tokens=max_tokens, seed=7, extra_body=strategy
    )
    return answer.choices


print("Beam search, the two best of four, with what they were ranked by:")
for choice in ask(n=2, num_beams=4, length_penalty=1.0, early_stopping=True):
    print(f"  {choice.score:6.3f} {choice.text!r}")

print("Diverse beam search, two groups that avoid each other's tokens:")
for choice in ask(n=4, num_beams=4, num_beam_groups=2, diversity_penalty=1.0):
    print(f"  {choice.score:6.3f} {choice.text!r}")

print("Contrastive search, likely but unlike what was said:")
print(f"  {ask(penalty_alpha=0.6, top_k=4)[0].text!r}")

print("The best two of eight samples:")
for choice in ask(n=2, best_of=8):
    print(f"  {choice.score:6.2f} {choice.text!r}")

print("Beam search under a constraint, streamed: what all beams agree on comes at once, the rest at the end:")
stream = client.completions.create(
    model=model,
    prompt=prompt,
    max_tokens=24,
    stream=True,
    extra_body={
        "num_beams": 3,
        "structured_outputs": {
            "regex": "red, (green|yellow),? and blue\\. Mixed they make (orange|purple|brown)\\."
        },
    },
)
print("  ", end="")
for chunk in stream:
    print(chunk.choices[0].text, end="|", flush=True)

print("\nWhy these tokens:")
(choice,) = ask(
    max_tokens=8, num_beams=3, explain=True, structured_outputs={"choice": ["red", "green", "blue"]}
)
for token in choice.explanation:
    lost = ", ".join(f"{other['token']!r} {other['score']:.2f}" for other in token.get("lost", []))
    print(
        f"  {token['token']!r:10} {token['decision']:9} rank {token['rank']}, probability"
        f" {token['raw_probability']:.2g}, of those allowed {token['final_probability']:.2g};"
        f" the constraint removed {token['mass_removed']:.2%}" + (f"; lost: {lost}" if lost else "")
    )
