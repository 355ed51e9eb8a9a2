"""One server, one model, and an adapter that each request picks for itself: pip install openai.

The adapter is the emoji bot that examples/train_lora.py trains; one lies in the repository:
    cadenza serve smollm2 --lora-modules emoji=tests/data/emoji_bot

Usage: python examples/lora.py [http://127.0.0.1:8000/v1]
"""

import asyncio
import os
import sys
from typing import Any

from openai import AsyncOpenAI

url = sys.argv[1] if len(sys.argv) > 1 else "http://127.0.0.1:8000/v1"
client = AsyncOpenAI(base_url=url, api_key=os.environ.get("CADENZA_API_KEY", "none"))

MESSAGES = [
    "My daughter has just graduated!",
    "I am so nervous about my exam tomorrow.",
    "What is the capital of France?",
]


async def ask(model: str, message: str, **fields: Any) -> str:
    answer = await client.chat.completions.create(
        model=model,
        messages=[{"role": "user", "content": message}],
        temperature=0,
        max_tokens=20,
        extra_body=fields,
    )
    return answer.choices[0].message.content or ""


async def main() -> None:
    models = (await client.models.list()).data
    base, adapters = models[0].id, [model.id for model in models if getattr(model, "parent", None)]
    if "emoji" not in adapters:
        sys.exit("the server has no adapter called emoji: start it as this file says")

    print("Base and adapter, all in one batch:")
    answers = await asyncio.gather(*(ask(model, text) for text in MESSAGES for model in (base, "emoji")))
    for message, plain, emoji in zip(MESSAGES, answers[::2], answers[1::2], strict=True):
        print(f"  {message:40} {emoji:15} {plain!r}")

    print("As much of it as one likes; a set may also name several adapters:")
    scales = [0.0, 0.1, 0.25, 1.0]
    sets = ([{"id": "emoji", "scale": scale}] for scale in scales)
    answers = await asyncio.gather(*(ask(base, MESSAGES[0], lora=terms) for terms in sets))
    for scale, answer in zip(scales, answers, strict=True):
        print(f"  {scale:<4} {answer!r}")

    print("Under a constraint:")
    form = {"regex": r"\((happy|tired|hungry)(koala|otter)\)"}
    print(f"  {await ask('emoji', 'I have had no food all day.', structured_outputs=form)}")


asyncio.run(main())
