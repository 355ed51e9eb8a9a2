"""Constrained answers from a live server: each way of asking, whole and streamed, on both routes; and the closing
guarantee. What comes is checked by jsonschema, re and lark, never by what produced it."""

import asyncio
import enum
import json
import re
from collections.abc import Callable
from typing import Any

import httpx
import jsonschema
import lark
import openai
import pytest
from pydantic import BaseModel

from cadenza.decoding import Engine

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string"}, "number_of_inhabitants": {"type": "integer"}},
    "required": ["name", "number_of_inhabitants"],
    "additionalProperties": False,
}
LARK = 'start: "yes" | "no" (", " WORD)+\nWORD: /[a-z]{3,8}/'
GBNF = 'root ::= "[" [0-9]+ ("," [0-9]+)* "]"'
REGEX = r"[A-Z][a-z]{2,9} [0-9]{4}"
CHOICES = ["red", "green", "blau\u00fc"]
THOUGHT_FIRST = {
    "type": "structural_tag",
    "format": {
        "type": "sequence",
        "elements": [
            {"type": "tag", "begin": "<think>", "content": {"type": "any_text"}, "end": "</think>"},
            {"type": "json_schema", "json_schema": SCHEMA},
        ],
    },
}
TAGS = {
    "type": "structural_tag",
    "structures": [{"begin": "<f>", "schema": SCHEMA, "end": "</f>"}],
    "triggers": ["<"],
}
STRICT = {"type": "json_schema", "json_schema": {"name": "city", "strict": True, "schema": SCHEMA}}


def is_instance(text: str) -> None:
    jsonschema.validate(json.loads(text), SCHEMA)


def is_object(text: str) -> None:
    assert isinstance(json.loads(text), dict)


def is_of_lark(text: str) -> None:
    lark.Lark(LARK).parse(text)


def is_of_gbnf(text: str) -> None:
    assert re.fullmatch(r"\[[0-9]+(,[0-9]+)*\]", text)


def is_of_regex(text: str) -> None:
    assert re.fullmatch(REGEX, text)


def is_choice(text: str) -> None:
    assert text in CHOICES


def is_thought_first(text: str) -> None:
    assert text.startswith("<think>")
    thought, _, answer = text.partition("</think>")
    assert "\ufffd" not in thought
    is_instance(answer)


def is_tagged(text: str) -> None:
    """Free text, in which whatever follows a trigger is a whole tag."""
    for part in text.split("<f>")[1:]:
        instance, end, free = part.partition("</f>")
        assert end
        assert "<" not in free
        is_instance(instance)


Check = Callable[[str], None]
WAYS: dict[str, tuple[dict[str, Any], Check]] = {
    "json_schema": ({"response_format": STRICT}, is_instance),
    "json_object": ({"response_format": {"type": "json_object"}}, is_object),
    "grammar in response_format": ({"response_format": {"type": "grammar", "grammar": LARK}}, is_of_lark),
    "structural_tag": ({"response_format": THOUGHT_FIRST}, is_thought_first),
    "structural_tag with triggers": ({"response_format": TAGS}, is_tagged),
    "structured_outputs.json": ({"structured_outputs": {"json": SCHEMA}}, is_instance),
    "structured_outputs.regex": ({"structured_outputs": {"regex": REGEX}}, is_of_regex),
    "structured_outputs.choice": ({"structured_outputs": {"choice": CHOICES}}, is_choice),
    "structured_outputs.grammar": ({"structured_outputs": {"grammar": GBNF}}, is_of_gbnf),
    "structured_outputs.json_object": ({"structured_outputs": {"json_object": True}}, is_object),
    "structured_outputs.structural_tag": (
        {"structured_outputs": {"structural_tag": json.dumps(THOUGHT_FIRST)}},
        is_thought_first,
    ),
    "guided_json": ({"guided_json": SCHEMA}, is_instance),
    "guided_regex": ({"guided_regex": REGEX}, is_of_regex),
    "guided_choice": ({"guided_choice": CHOICES}, is_choice),
    "guided_grammar": ({"guided_grammar": LARK}, is_of_lark),
    "llama.cpp's json_schema": ({"json_schema": SCHEMA}, is_instance),
    "llama.cpp's grammar": ({"grammar": GBNF}, is_of_gbnf),
    "SGLang's json_schema": ({"json_schema": json.dumps(SCHEMA)}, is_instance),
    "SGLang's regex": ({"regex": REGEX}, is_of_regex),
    "SGLang's ebnf": ({"ebnf": GBNF}, is_of_gbnf),
}
BUDGET = 20  # enough for the shortest of each
SAMPLED = {"temperature": 1, "seed": 11, "n": 2, "max_tokens": BUDGET}
GREEDY = {"temperature": 0, "max_tokens": BUDGET}
QUESTION = "Name a city, and say how many people live there."
Answers = dict[tuple[str, str], tuple[Any, list[str]]]


def content(choice: dict[str, Any]) -> str:
    return str(choice["text"] if "text" in choice else choice["message"]["content"])


async def streamed(client: httpx.AsyncClient, path: str, body: dict[str, Any]) -> list[str]:
    texts = [""] * body.get("n", 1)
    async with client.stream("POST", path, json={**body, "stream": True}) as response:
        async for line in response.aiter_lines():
            if line.startswith("data: {"):
                for choice in json.loads(line.removeprefix("data: "))["choices"]:
                    news = choice["text"] if "text" in choice else choice["delta"].get("content")
                    texts[choice["index"]] += news or ""
    return texts


@pytest.fixture(scope="module")
def answers(base_url: str) -> Answers:
    """Every way of asking on both routes, whole and streamed: many at once, in common batches."""

    async def ask(
        client: httpx.AsyncClient, slots: asyncio.Semaphore, path: str, way: str
    ) -> tuple[Any, list[str]]:
        prompt = {"prompt": "A city:", **SAMPLED} if path == COMPLETIONS else {**user(QUESTION), **GREEDY}
        body = {**prompt, **WAYS[way][0]}
        async with slots:
            return (await client.post(path, json=body)).json(), await streamed(client, path, body)

    async def ask_all() -> Answers:
        slots = asyncio.Semaphore(len(WAYS))
        cases = [(path, way) for path in (COMPLETIONS, CHAT) for way in WAYS]
        async with httpx.AsyncClient(base_url=base_url, timeout=120) as client:
            found = await asyncio.gather(*(ask(client, slots, path, way) for path, way in cases))
        return dict(zip(cases, found, strict=True))

    return asyncio.run(ask_all())


def user(question: str) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": question}]}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("path", [COMPLETIONS, CHAT])
def test_every_way_of_asking(answers: Answers, path: str, way: str) -> None:
    whole, streams = answers[path, way]
    assert "error" not in whole, whole
    texts = [content(choice) for choice in whole["choices"]]
    assert texts == streams, "the stream says what the whole answer says"
    assert len(texts) == (SAMPLED["n"] if path == COMPLETIONS else 1)
    for text in texts:
        WAYS[way][1](text)
    for choice in whole["choices"]:
        assert choice["finish_reason"] in ("stop", "length")
        assert choice["closed_early"] is (choice["finish_reason"] == "length")
    usage = whole["usage"]
    assert 0 <= usage["completion_tokens_details"]["forced_tokens"] <= usage["completion_tokens"]
    assert usage["completion_tokens"] <= BUDGET * len(texts)


def test_aliases_are_the_same_constraint(answers: Answers) -> None:
    names = ["json_schema", "structured_outputs.json", "guided_json", "llama.cpp's json_schema"]
    texts = [[content(choice) for choice in answers[COMPLETIONS, name][0]["choices"]] for name in names]
    assert texts == [texts[0]] * len(names)
    assert texts[0][0] != texts[0][1], "choices of one answer differ"


def complete(http: httpx.Client, **body: Any) -> Any:
    response = http.post(COMPLETIONS, json={"prompt": "A city:", **body})
    assert response.status_code == 200, response.text
    return response.json()


def test_forced_tokens_and_their_log_probabilities(http: httpx.Client, live_engine: Engine) -> None:
    """Runs without alternatives are counted; asking for log-probabilities changes neither the text nor the count."""
    body = {"json_schema": SCHEMA, "temperature": 0, "max_tokens": 24, "return_token_ids": True}
    fast, slow = complete(http, **body), complete(http, **body, logprobs=2)
    details = fast["usage"]["completion_tokens_details"]
    assert 0 < details["forced_tokens"] < fast["usage"]["completion_tokens"]
    assert slow["usage"]["completion_tokens_details"] == details
    assert slow["choices"][0]["token_ids"] == fast["choices"][0]["token_ids"]

    logprobs = slow["choices"][0]["logprobs"]["token_logprobs"]
    assert len(logprobs) == slow["usage"]["completion_tokens"]
    tokens = [*live_engine.tokenizer.encode("A city:"), *fast["choices"][0]["token_ids"]]
    scored = complete(http, prompt=tokens, echo=True, max_tokens=0, logprobs=0)["choices"][0]["logprobs"]
    assert scored["token_logprobs"][-len(logprobs) :] == pytest.approx(logprobs, abs=1e-3)


BUDGETS: dict[str, tuple[dict[str, Any], Check]] = {
    name: WAYS[name]
    for name in ("json_schema", "structural_tag", "structured_outputs.regex", "SGLang's ebnf")
}


@pytest.mark.parametrize("way", BUDGETS)
@pytest.mark.parametrize(("path", "param"), [(COMPLETIONS, "max_tokens"), (CHAT, "max_completion_tokens")])
def test_the_smallest_budget(http: httpx.Client, way: str, path: str, param: str) -> None:
    """Below the shortest answer: a 400 that says what is needed. With just that: complete and valid."""
    asked, check = BUDGETS[way]
    prompt = {"prompt": "A city:"} if path == COMPLETIONS else user(QUESTION)
    body = {**prompt, **asked, "temperature": 1, "seed": 3}

    def ask(budget: int) -> httpx.Response:
        return http.post(path, json={**body, param: budget})

    error = ask(1).json()["error"]
    assert error["param"] == param
    found = re.search(r"the shortest answer that satisfies the constraint has (\d+) tokens", error["message"])
    assert found
    least = int(found[1])
    assert least > 1
    below = ask(least - 1)
    assert (below.status_code, below.json()["error"]["param"]) == (400, param)
    for budget in (least, least + 1):
        answer = ask(budget).json()
        check(content(answer["choices"][0]))
        assert answer["usage"]["completion_tokens"] <= budget


def test_a_context_without_room(http: httpx.Client, live_engine: Engine) -> None:
    tokens = [5] * (live_engine.max_model_len - 3)
    response = http.post(COMPLETIONS, json={"prompt": tokens, "max_tokens": 3, "json_schema": SCHEMA})
    error = response.json()["error"]
    assert (response.status_code, error["param"]) == (400, "max_tokens")
    assert "the shortest answer" in error["message"]


def test_triggers_start_a_tag(http: httpx.Client, live_engine: Engine) -> None:
    """The model is pushed to write the trigger; the rest of the tag it has to write by itself."""
    (trigger,) = live_engine.tokenizer.encode("<")
    answer = complete(
        http, response_format=TAGS, logit_bias={str(trigger): 30}, temperature=1, seed=5, max_tokens=30
    )
    text = content(answer["choices"][0])
    assert "<f>{" in text
    is_tagged(text)


def test_special_tokens_stay_out_of_strings(http: httpx.Client, live_engine: Engine) -> None:
    """Neither asked for nor made as likely as can be does a special token come before the JSON is complete."""
    special = live_engine.tokenizer.special_ids
    question = 'Answer with {"text": "<|im_end|><|im_start|>"}. Write "<|im_end|>" inside of the string.'
    schema = {
        "type": "object",
        "properties": {"text": {"type": "string", "minLength": 12}},
        "required": ["text"],
    }
    for bias in ({}, {str(token): 100 for token in special}):
        for asked in ({"response_format": {"type": "json_object"}}, {"json_schema": schema}):
            body = {**user(question), **asked, "logit_bias": bias, "return_token_ids": True}
            answer = http.post(CHAT, json={**body, "temperature": 1, "seed": 2, "max_tokens": 20}).json()
            (choice,) = answer["choices"]
            is_object(content(choice))
            assert not special.intersection(choice["token_ids"][:-1])
            assert not special.intersection(choice["token_ids"]) or choice["finish_reason"] == "stop"


class Climate(enum.Enum):
    WARM = "warm"
    COLD = "cold"


class District(BaseModel):
    name: str
    inhabitants: int | None


class City(BaseModel):
    """Nested models, enumerations, optional members and lists, as clients of OpenAI's API write them."""

    name: str
    climate: Climate
    mayor: str | None
    districts: list[District]
    main_district: District


class Weather(BaseModel):
    climate: Climate
    is_capital: bool


def test_parse(client: openai.OpenAI) -> None:
    completion = client.chat.completions.parse(
        model="smollm2",
        messages=[{"role": "user", "content": "Describe Paris as JSON."}],
        response_format=City,
        temperature=1,
        seed=4,
        max_tokens=100,
    )
    parsed = completion.choices[0].message.parsed
    assert isinstance(parsed, City)
    assert isinstance(parsed.climate, Climate)
    assert isinstance(parsed.main_district, District)


def test_parse_of_an_answer_that_was_closed_early(client: openai.OpenAI) -> None:
    """The client refuses "length" by itself, whatever the text; the answer that it hands over is complete."""
    with pytest.raises(openai.LengthFinishReasonError) as error:
        client.chat.completions.parse(
            model="smollm2",
            messages=[{"role": "user", "content": "Describe Paris as JSON."}],
            response_format=City,
            temperature=1,
            seed=4,
            max_tokens=48,
        )
    City.model_validate_json(error.value.completion.choices[0].message.content or "")


def test_parse_of_a_stream(client: openai.OpenAI) -> None:
    with client.chat.completions.stream(
        model="smollm2",
        messages=[{"role": "user", "content": "Is Oslo warm or cold? Answer as JSON."}],
        response_format=Weather,
        temperature=0,
        max_tokens=60,
    ) as stream:
        final = stream.get_final_completion()
    assert isinstance(final.choices[0].message.parsed, Weather)
