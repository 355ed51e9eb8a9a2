"""Answers of a given form, from a running server (`cadenza serve smollm2`): pip install openai.

Usage: python examples/constraints.py [http://127.0.0.1:8000/v1]
"""

import os
import sys
from typing import Any, Literal

from openai import OpenAI
from pydantic import BaseModel

url = sys.argv[1] if len(sys.argv) > 1 else "http://127.0.0.1:8000/v1"
client = OpenAI(base_url=url, api_key=os.environ.get("CADENZA_API_KEY", "none"))
model = client.models.list().data[0].id


def ask(question: str, **options: Any) -> str:
    """Whatever max_tokens is, the answer is complete: its end is planned from the start."""
    answer = client.chat.completions.create(
        model=model,
        messages=[{"role": "user", "content": question}],
        temperature=0,
        **{"max_tokens": 60, **options},
    )
    return answer.choices[0].message.content or ""


print("One of several texts:")
outputs: dict[str, Any] = {"choice": ["positive", "negative", "neutral"]}
question = "Is this review positive, negative or neutral? 'The soup was cold and the waiter rude.'"
print(" ", ask(question, extra_body={"structured_outputs": outputs}))

print("A regular expression:")
outputs = {"regex": r"[0-9]{4}-[0-9]{2}-[0-9]{2}"}
question = "On which date did people first walk on the moon? Answer as YYYY-MM-DD."
print(" ", ask(question, extra_body={"structured_outputs": outputs}))


class Dish(BaseModel):
    name: str
    course: Literal["starter", "main", "dessert"]
    ingredients: list[str]


print("A pydantic model:")
parsed = client.chat.completions.parse(
    model=model,
    messages=[{"role": "user", "content": "Describe a dish with tomatoes as JSON."}],
    response_format=Dish,
    temperature=0,
    max_tokens=100,
)
print(" ", repr(parsed.choices[0].message.parsed))

print("A grammar, here in Lark's syntax; with `::=` it is read as EBNF:")
grammar = r"""
start: line+
line: WORD ": " TAG "\n"
WORD: /[A-Z][a-z]+/
TAG: "PERSON" | "PLACE" | "COMPANY"
"""
question = "Tag the names in: 'Anna left Oslo for Berlin.' One per line, such as Tom: PERSON"
answer = ask(question, extra_body={"structured_outputs": {"grammar": grammar}})
print(*(f"  {line}" for line in answer.splitlines()), sep="\n")

print("Free text, in which only what follows <weather> has a form:")
tag = {
    "type": "structural_tag",
    "structures": [
        {
            "begin": "<weather>",
            "schema": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
            "end": "</weather>",
        }
    ],
    "triggers": ["<weather>"],
}
question = 'To look up the weather you write <weather>{"city": "Rome"}</weather>. How is it in Paris?'
print(" ", ask(question, extra_body={"response_format": tag}))
