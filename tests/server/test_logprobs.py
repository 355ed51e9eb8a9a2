"""Log-probabilities in the two APIs' shapes. The scripted engine's numbers are in conftest.py."""

from collections.abc import Callable
from typing import Any

import pytest

from cadenza.decoding.request import Delta, TokenLogprob
from cadenza.models.tokenizer import Tokenizer

TEXT = "Hello wörld 🎵 你好!"
Post = Callable[..., Any]


def test_chat(chat: Post, tokenizer: Tokenizer, events: Any) -> None:
    body = {"logprobs": True, "top_logprobs": 3}
    content = chat(**body).json()["choices"][0]["logprobs"]["content"]
    assert b"".join(bytes(entry["bytes"]) for entry in content).decode() == TEXT
    assert [entry["token"] for entry in content] == [
        tokenizer.token_string(token_id) for token_id in tokenizer.encode(TEXT)
    ]
    first, second = content[:2]
    assert first["logprob"] == first["top_logprobs"][0]["logprob"] == -0.25
    assert first["token"] == first["top_logprobs"][0]["token"]
    assert first["top_logprobs"][2]["logprob"] == -9999.0
    assert [top["logprob"] for top in second["top_logprobs"]] == [-0.5, -2.0, -3.5]
    assert second["logprob"] == -3.5

    streamed = []
    for chunk in events(chat(**body, stream=True)):
        streamed += (chunk["choices"][0]["logprobs"] or {"content": []})["content"]
    assert streamed == content


def test_chat_without_alternatives(chat: Post) -> None:
    for body in ({"logprobs": True}, {"logprobs": True, "top_logprobs": 0}):
        content = chat(**body).json()["choices"][0]["logprobs"]["content"]
        assert content
        assert all(entry["top_logprobs"] == [] for entry in content)
    assert chat().json()["choices"][0]["logprobs"] is None


def test_completions(complete: Post, tokenizer: Tokenizer, events: Any) -> None:
    token_ids = tokenizer.encode(TEXT)
    logprobs = complete(logprobs=1).json()["choices"][0]["logprobs"]
    assert {len(column) for column in logprobs.values()} == {len(token_ids)}
    assert set(logprobs) == {"tokens", "token_logprobs", "top_logprobs", "text_offset"}
    assert logprobs["token_logprobs"][:2] == [-0.25, -3.5]
    # The likeliest, and the chosen token where it is another one.
    name = tokenizer.token_string
    assert logprobs["top_logprobs"][:2] == [
        {name(token_ids[0]): -0.25},
        {name(1000): -0.5, name(token_ids[1]): -3.5},
    ]

    streamed: dict[str, list[Any]] = {name: [] for name in logprobs}
    for chunk in events(complete(logprobs=1, stream=True)):
        for column, values in (chunk["choices"][0]["logprobs"] or {}).items():
            streamed[column] += values
    assert streamed == logprobs


def test_zero_means_the_chosen_token_only(complete: Post) -> None:
    logprobs = complete(logprobs=0).json()["choices"][0]["logprobs"]
    assert all(len(top) == 1 for top in logprobs["top_logprobs"])
    assert [next(iter(top.values())) for top in logprobs["top_logprobs"]] == logprobs["token_logprobs"]
    assert complete().json()["choices"][0]["logprobs"] is None


def test_text_offsets_point_into_the_text(complete: Post, tokenizer: Tokenizer) -> None:
    for echo in (False, True):
        choice = complete(prompt="Grüße 🎵", logprobs=0, echo=echo).json()["choices"][0]
        tokens, offsets = choice["logprobs"]["tokens"], choice["logprobs"]["text_offset"]
        assert offsets[0] == 0
        assert offsets == sorted(offsets)
        whole = [
            (token, at) for token, at in zip(tokens, offsets, strict=True) if not token.startswith("bytes:")
        ]
        assert all(choice["text"][at : at + len(token)] == token for token, at in whole)
        assert len(whole) < len(tokens), "the emoji is written in several tokens"


def test_parts_of_characters_keep_their_own_names(complete: Post, tokenizer: Tokenizer) -> None:
    """Both decode to U+FFFD: as names of one dictionary the two would be one entry."""
    tokens = complete(logprobs=1).json()["choices"][0]["logprobs"]["tokens"]
    parts = [token for token in tokens if token.startswith("bytes:")]
    assert parts
    assert len(set(parts)) == len(parts)
    raw = bytes(int(pair, 16) for part in parts for pair in part.removeprefix("bytes:").split("\\x")[1:])
    assert raw.decode() == " 🎵你好"


def test_echo_covers_prompt_and_completion(complete: Post, tokenizer: Tokenizer, events: Any) -> None:
    prompt = tokenizer.encode("Grüße 🎵")
    body = {"prompt": [prompt, prompt[:1]], "echo": True, "logprobs": 2, "n": 2}
    choices = complete(**body).json()["choices"]
    num_new = len(tokenizer.encode(TEXT))
    for choice in choices:
        num_prompt = len(prompt) if choice["index"] < 2 else 1
        assert {len(column) for column in choice["logprobs"].values()} == {num_prompt + num_new}
        assert choice["logprobs"]["token_logprobs"][0] is None
        assert choice["logprobs"]["top_logprobs"][0] is None
        assert None not in choice["logprobs"]["token_logprobs"][1:]
        assert None not in choice["logprobs"]["top_logprobs"][1:]

    streamed: dict[int, list[Any]] = {}
    for chunk in events(complete(**body, stream=True)):
        choice = chunk["choices"][0]
        streamed.setdefault(choice["index"], []).extend((choice["logprobs"] or {"tokens": []})["tokens"])
    assert streamed == {choice["index"]: choice["logprobs"]["tokens"] for choice in choices}


def test_colliding_names_keep_the_likelier(complete: Post, engine: Any, tokenizer: Tokenizer) -> None:
    """Greedy scoring compares the chosen number with the best one: a worse twin must not hide the best."""
    token_id = tokenizer.encode("x")[0]

    def script(request: Any) -> Any:
        yield engine.prompt_done(request)
        entry = TokenLogprob(token_id, -5.0, 9, ((token_id, -0.1),))
        yield Delta(0, "x", (token_id,), (entry,), "length")

    engine.script = script
    assert complete(logprobs=1).json()["choices"][0]["logprobs"]["top_logprobs"] == [{"x": -0.1}]


@pytest.mark.parametrize("stream", [False, True])
def test_prompt_logprobs(chat: Post, complete: Post, tokenizer: Tokenizer, events: Any, stream: bool) -> None:
    prompt = tokenizer.encode("Once upon")
    response = complete(prompt=prompt, prompt_logprobs=2, stream=stream)
    answer = events(response)[0] if stream else response.json()
    first, second = answer["choices"][0]["prompt_logprobs"]
    assert first is None
    assert second == {
        "1000": {"logprob": -0.5, "rank": 1, "decoded_token": tokenizer.token_string(1000)},
        "1001": {"logprob": -2.0, "rank": 2, "decoded_token": tokenizer.token_string(1001)},
        str(prompt[1]): {"logprob": -3.5, "rank": 3, "decoded_token": tokenizer.token_string(prompt[1])},
    }
    response = chat(prompt_logprobs=0, stream=stream)
    answer = events(response)[0] if stream else response.json()
    assert answer["prompt_logprobs"][0] is None
    assert all(len(entry) == 1 for entry in answer["prompt_logprobs"][1:])
