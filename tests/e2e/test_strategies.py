"""Strategies and explanations with the official client against a live server, streamed and not."""

import math
from typing import Any

import httpx
import openai
import pytest
from openai.types.chat import ChatCompletionMessageParam

from cadenza.decoding import BeamSearch, Engine

MESSAGES: list[ChatCompletionMessageParam] = [{"role": "user", "content": "Name a colour and a fruit."}]
PROMPT = "The three primary colours are"
REGEX = "(red|green|blue), because [a-z]{2,8}( [a-z]{2,8}){0,3}\\."
SCHEMA = {"type": "object", "properties": {"fruit": {"type": "string"}}, "required": ["fruit"]}

STRATEGIES: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0},
    "sampled": {"temperature": 0.9, "seed": 11, "n": 2},
    "beams": {"num_beams": 4, "n": 2, "length_penalty": 0.5, "early_stopping": "never"},
    "vLLM's beams": {"use_beam_search": True, "n": 3},
    "groups": {"num_beams": 4, "n": 4, "num_beam_groups": 2, "diversity_penalty": 0.7},
    "contrastive": {"penalty_alpha": 0.6, "top_k": 4},
}
CONSTRAINTS: dict[str, dict[str, Any]] = {
    "free": {},
    "regex": {"structured_outputs": {"regex": REGEX}},
    "schema": {"structured_outputs": {"json": SCHEMA}},
}


def choices_of(answer: Any) -> list[dict[str, Any]]:
    """What an answer says, less the wrapping that differs between streamed and whole ones."""
    members = ("index", "text", "explanation", "token_ids", "finish_reason", "score", "stop_reason")
    found = []
    for choice in answer.model_dump()["choices"]:
        text = choice["message"]["content"] if "message" in choice else choice["text"]
        found.append({name: {**choice, "text": text}.get(name) for name in members})
    return found


def joined(stream: Any) -> list[dict[str, Any]]:
    """What a client puts together from a stream."""
    choices: dict[int, dict[str, Any]] = {}
    for chunk in stream:
        for news in chunk.model_dump()["choices"]:
            choice = choices.setdefault(
                news["index"], {"index": news["index"], "text": "", "explanation": [], "token_ids": []}
            )
            assert choice.get("finish_reason") is None, "news after the end"
            choice["text"] += (news["delta"].get("content") if "delta" in news else news["text"]) or ""
            choice["explanation"] += news.get("explanation") or []
            choice["token_ids"] += news.get("token_ids") or []
            for name in ("finish_reason", "score", "stop_reason"):
                choice[name] = news.get(name)
    return [choices[index] for index in sorted(choices)]


CELLS = [
    (strategy, constraint, route)
    for strategy in STRATEGIES
    for constraint, route in (("free", "chat"), ("regex", "completions"), ("schema", "chat"))
    if constraint == "free" or strategy in ("greedy", "sampled", "beams", "contrastive")
]


@pytest.mark.parametrize(("strategy", "constraint", "route"), CELLS)
def test_streamed_equals_whole(client: openai.OpenAI, strategy: str, constraint: str, route: str) -> None:
    """Texts, tokens, scores and explanations; one explanation per token."""
    extra = {**STRATEGIES[strategy], **CONSTRAINTS[constraint], "explain": True, "return_token_ids": True}
    body: dict[str, Any] = {"model": "smollm2", "max_tokens": 10, "extra_body": extra}
    body |= {"messages": MESSAGES} if route == "chat" else {"prompt": PROMPT}
    create: Any = client.chat.completions.create if route == "chat" else client.completions.create
    whole = choices_of(create(**body))
    assert joined(create(**body, stream=True)) == whole
    assert len(whole) == extra.get("n", 1)
    decision = {"greedy": "greedy", "sampled": "sampled"}.get(strategy, "searched")
    for choice in whole:
        assert [entry["token_id"] for entry in choice["explanation"]] == choice["token_ids"]
        assert {entry["decision"] for entry in choice["explanation"]} <= {decision, "forced", "closing"}
        assert choice["finish_reason"] in ("stop", "length")
    scores = [choice["score"] for choice in whole]
    is_ranked = strategy in ("beams", "vLLM's beams", "groups")
    assert scores == (sorted(scores, reverse=True) if is_ranked else [None] * len(whole))
    has_losers = any("lost" in entry for entry in whole[0]["explanation"])
    assert has_losers == (decision == "searched")


def test_a_beams_score_is_its_log_probability(client: openai.OpenAI) -> None:
    answer = client.completions.create(
        model="smollm2",
        prompt=PROMPT,
        max_tokens=8,
        logprobs=0,
        n=3,
        extra_body={"num_beams": 3, "length_penalty": 0.0, "explain": True},
    )
    assert len(answer.choices) == 3
    for choice in answer.choices:
        assert choice.logprobs is not None
        total = sum(logprob or 0.0 for logprob in choice.logprobs.token_logprobs or [])
        explained = sum(math.log(entry["raw_probability"]) for entry in choice.explanation)  # type: ignore[attr-defined]
        assert choice.score == pytest.approx(total, abs=1e-4)  # type: ignore[attr-defined]
        assert explained == pytest.approx(total, abs=1e-4)


def test_explanations_add_up(client: openai.OpenAI) -> None:
    """Greedily and without other limits, what is left after the mask is shared out anew."""
    answer = client.completions.create(
        model="smollm2",
        prompt=PROMPT,
        max_tokens=24,
        temperature=0,
        extra_body={**CONSTRAINTS["regex"], "explain": True},
    )
    entries = answer.choices[0].explanation  # type: ignore[attr-defined]
    assert {entry["decision"] for entry in entries} >= {"greedy", "forced"}
    for entry in entries:
        left = 1.0 - entry["mass_removed"]
        assert entry["raw_probability"] == pytest.approx(
            entry["final_probability"] * left, rel=1e-4, abs=1e-9
        )
        assert entry["entropy"] > 0.0
        assert entry["rank"] >= 1


def test_what_a_script_sees_is_what_a_client_sees(client: openai.OpenAI, live_engine: Engine) -> None:
    ids = live_engine.tokenizer.encode(PROMPT)
    own = live_engine.generate(ids, strategy=BeamSearch(num_beams=3), n=2, max_tokens=8, explain=True)
    told = client.completions.create(
        model="smollm2", prompt=PROMPT, n=2, max_tokens=8, extra_body={"num_beams": 3, "explain": True}
    )
    for mine, theirs in zip(own.choices, told.choices, strict=True):
        assert (mine.text, mine.score, mine.finish_reason) == (
            theirs.text,
            theirs.score,  # type: ignore[attr-defined]
            theirs.finish_reason,
        )
        wire = theirs.explanation  # type: ignore[attr-defined]
        assert [entry.final_probability for entry in mine.explanations] == [
            entry["final_probability"] for entry in wire
        ]
        assert [entry.lost for entry in mine.explanations] == [
            tuple((each["token_id"], each["score"]) for each in entry.get("lost", [])) for entry in wire
        ]


def test_fewer_choices_than_asked_for(client: openai.OpenAI) -> None:
    """Of two characters, each a single token, there are no four texts."""
    extra = {"num_beams": 4, "structured_outputs": {"choice": ["a", "b"]}}
    body: dict[str, Any] = {"model": "smollm2", "messages": MESSAGES, "n": 4, "extra_body": extra}
    whole = choices_of(client.chat.completions.create(**body))
    assert sorted(choice["text"] for choice in whole) == ["a", "b"]
    streamed = joined(client.chat.completions.create(**body, stream=True))
    assert [(choice["index"], choice["text"]) for choice in streamed] == [
        (choice["index"], choice["text"]) for choice in whole
    ]


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"num_beams": 4, "top_p": 0.5}, "top_p"),
        ({"num_beams": 4, "temperature": 0.7}, "temperature"),
        ({"num_beams": 4, "top_k": 10}, "top_k"),
        ({"num_beams": 4, "mirostat": 2}, "mirostat"),
        ({"penalty_alpha": 0.6, "top_k": 4, "min_p": 0.1}, "min_p"),
        ({"use_beam_search": True, "n": 128}, "n"),
        ({"num_beams": 500}, "num_beams"),
        ({"num_beams": 2, "n": 3}, "n"),
        ({"penalty_alpha": 0.6, "top_k": 5000}, "top_k"),
        ({"best_of": 2, "n": 3}, "best_of"),
        ({"best_of": 2, "num_beams": 2}, "best_of"),
    ],
)
def test_refusals_name_the_field(http: httpx.Client, fields: dict[str, Any], param: str) -> None:
    answer = http.post("/v1/completions", json={"prompt": PROMPT, "max_tokens": 4, **fields})
    assert answer.status_code == 400, answer.text
    assert answer.json()["error"]["param"] == param
