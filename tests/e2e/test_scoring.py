"""Log-likelihood scoring as lm-eval's `local-completions` does it, and agreement of scoring with generation."""

from typing import Any

import httpx
import pytest

from cadenza.decoding import Engine

SENTENCES = [
    ("The capital of France is", " Paris"),
    ("The capital of France is", " purple"),
    ("Two plus two equals", " four."),
    ("Grüße, 世界", " 🎵"),
]


def score(http: httpx.Client, prompts: list[list[int]]) -> list[dict[str, Any]]:
    """lm-eval 0.4's request, field for field."""
    body = {
        "model": "smollm2",
        "prompt": prompts,
        "temperature": 0,
        "max_tokens": 1,
        "logprobs": 1,
        "seed": 1234,
        "echo": True,
    }
    response = http.post("/v1/completions", json=body)
    assert response.status_code == 200, response.text
    choices = sorted(response.json()["choices"], key=lambda choice: choice["index"])
    return [choice["logprobs"] for choice in choices]


def log_likelihood(logprobs: dict[str, Any], context_length: int) -> tuple[float, bool]:
    """lm-eval's reading of an answer: the slice, the sum, and exact equality with the best alternative."""
    chosen = logprobs["token_logprobs"][context_length:-1]
    best = [max(top.values()) for top in logprobs["top_logprobs"][context_length:-1]]
    return sum(chosen), chosen == best


def test_lm_eval(http: httpx.Client, live_engine: Engine) -> None:
    encode = live_engine.tokenizer.encode
    contexts = [encode(context) for context, _ in SENTENCES]
    prompts = [encode(context) + encode(continuation) for context, continuation in SENTENCES]
    answers = score(http, prompts)
    for prompt, logprobs in zip(prompts, answers, strict=True):
        assert {len(column) for column in logprobs.values()} == {len(prompt) + 1}
        assert [position for position, value in enumerate(logprobs["token_logprobs"]) if value is None] == [0]
        assert [position for position, value in enumerate(logprobs["top_logprobs"]) if value is None] == [0]
    results = [
        log_likelihood(logprobs, len(context)) for logprobs, context in zip(answers, contexts, strict=True)
    ]
    assert results[0][0] > results[1][0], "Paris is likelier than purple"
    assert results[1][1] is False


def test_greedy_text_scores_as_greedy(http: httpx.Client, live_engine: Engine) -> None:
    """What was generated greedily is, scored as a prompt, greedy again, with the same log-probabilities."""
    prompt = live_engine.tokenizer.encode("Once upon a time")
    body = {"prompt": prompt, "temperature": 0, "max_tokens": 8, "logprobs": 1, "return_token_ids": True}
    generated = http.post("/v1/completions", json=body).json()["choices"][0]
    (scored,) = score(http, [prompt + generated["token_ids"]])
    total, is_greedy = log_likelihood(scored, len(prompt))
    assert is_greedy
    assert total == pytest.approx(sum(generated["logprobs"]["token_logprobs"]), abs=1e-3)


def test_the_generated_token_is_there_even_if_it_ends_the_text(
    http: httpx.Client, live_engine: Engine
) -> None:
    eos = live_engine.model.eos_token_ids[0]
    body = {"prompt": [5, 6, 7], "max_tokens": 1, "logprobs": 1, "echo": True, "allowed_token_ids": [eos]}
    choice = http.post("/v1/completions", json=body).json()["choices"][0]
    assert len(choice["logprobs"]["tokens"]) == 4
    assert choice["finish_reason"] == "stop"


def test_tokenizer_routes_that_lm_eval_probes(http: httpx.Client, live_engine: Engine) -> None:
    assert http.get("/tokenizer_info").json()["eos_token"] == "<|im_end|>"
    answer = http.post("/tokenize", json={"prompt": "Hello, world", "add_special_tokens": False}).json()
    assert answer["tokens"] == live_engine.tokenizer.encode("Hello, world")
    assert http.post("/detokenize", json={"tokens": answer["tokens"]}).json() == {"prompt": "Hello, world"}


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"prompt": ""}, "prompt"),
        ({"prompt": [10**6]}, "prompt"),
        ({"logit_bias": {"9999999": 1}}, "logit_bias"),
        ({"allowed_token_ids": [9999999]}, "allowed_token_ids"),
        ({"stop_token_ids": [-1]}, "stop_token_ids"),
        ({"prompt": [5] * 8190, "max_tokens": 3}, "max_tokens"),
        ({"prompt": [5] * 8190, "max_completion_tokens": 3}, "max_completion_tokens"),
        ({"prompt": [5] * 8192}, "prompt"),
    ],
)
def test_what_only_the_engine_can_refuse(http: httpx.Client, fields: dict[str, Any], param: str) -> None:
    response = http.post("/v1/completions", json={"prompt": "x", **fields})
    assert response.status_code == 400
    assert response.json()["error"]["param"] == param


def test_too_many_messages_are_refused_by_that_name(http: httpx.Client) -> None:
    body = {"messages": [{"role": "user", "content": "word " * 9000}]}
    error = http.post("/v1/chat/completions", json=body).json()["error"]
    assert (error["param"], error["code"]) == ("messages", "context_length_exceeded")
