"""The shape of answers, and that a stream and a whole answer say the same."""

from collections.abc import Callable
from typing import Any

import pytest

from cadenza.decoding.request import Delta, RequestFailed
from cadenza.models.tokenizer import Tokenizer

TEXT = "Hello wörld 🎵 你好!"
Post = Callable[..., Any]


def joined(chunks: list[Any], field: Callable[[Any], str | None]) -> dict[int, str]:
    """What a client makes of a stream: the text of each choice."""
    texts: dict[int, str] = {}
    for chunk in chunks:
        for choice in chunk["choices"]:
            texts[choice["index"]] = texts.get(choice["index"], "") + (field(choice) or "")
    return texts


@pytest.mark.parametrize(
    "text", [TEXT, "a", "👩‍👩‍👧‍👦 family", "日本語のテキスト", "tab\there\nline  two ", "\u2028 separator"]
)
def test_streamed_text_equals_whole_text(
    chat: Post, complete: Post, engine: Any, events: Any, text: str
) -> None:
    engine.say(text)
    for post, whole_text, delta_text in (
        (chat, lambda c: c["message"]["content"], lambda c: c["delta"].get("content")),
        (complete, lambda c: c["text"], lambda c: c["text"]),
    ):
        whole = post(n=2).json()
        chunks = events(post(n=2, stream=True))
        assert {c["index"]: whole_text(c) for c in whole["choices"]} == joined(chunks, delta_text)
        assert [whole_text(c) for c in whole["choices"]] == [text, text]


def test_a_chat_stream_in_order(chat: Post, events: Any) -> None:
    chunks = events(chat(stream=True))
    first, *middle, last = [chunk["choices"][0] for chunk in chunks]
    assert first["delta"] == {"role": "assistant", "content": ""}
    assert all(set(choice["delta"]) == {"content"} and choice["delta"]["content"] for choice in middle)
    assert all(choice["finish_reason"] is None for choice in (first, *middle))
    assert (last["delta"], last["finish_reason"]) == ({}, "stop")


@pytest.mark.parametrize("route", ["chat", "complete"])
def test_one_id_one_time_one_finish(request: Any, events: Any, route: str) -> None:
    chunks = events(request.getfixturevalue(route)(stream=True, n=3))
    assert (
        len({(c["id"], c["created"], c["object"], c["model"], c["system_fingerprint"]) for c in chunks}) == 1
    )
    assert "usage" not in chunks[0]
    finished = [c["choices"][0]["index"] for c in chunks if c["choices"][0]["finish_reason"]]
    assert sorted(finished) == [0, 1, 2]
    assert chunks[0]["choices"][0]["index"] == 0


def test_roles_come_once_per_choice(chat: Post, events: Any) -> None:
    chunks = events(chat(stream=True, n=2))
    roles = [c["choices"][0]["index"] for c in chunks if "role" in c["choices"][0]["delta"]]
    assert roles == [0, 1]


@pytest.mark.parametrize("route", ["chat", "complete"])
def test_usage(request: Any, engine: Any, tokenizer: Tokenizer, events: Any, route: str) -> None:
    post = request.getfixturevalue(route)
    usage = post(n=2).json()["usage"]
    num_prompt = len(engine.submitted[0].prompt_token_ids)
    num_new = 2 * len(tokenizer.encode(TEXT))
    assert usage["prompt_tokens"] == num_prompt
    assert usage["completion_tokens"] == num_new
    assert usage["total_tokens"] == num_prompt + num_new
    assert usage["prompt_tokens_details"]["cached_tokens"] == num_prompt // 2
    assert usage["completion_tokens_details"]["reasoning_tokens"] == 0

    *chunks, last = events(post(n=2, stream=True, stream_options={"include_usage": True}))
    assert last["choices"] == []
    assert last["usage"] == usage
    assert all(chunk["usage"] is None for chunk in chunks)

    running = events(post(n=2, stream=True, stream_options={"continuous_usage_stats": True}))
    counts = [chunk["usage"]["completion_tokens"] for chunk in running]
    assert counts == sorted(counts)
    assert counts[0] in (0, 1)
    assert counts[-1] == num_new


def test_several_prompts_are_ordered_prompt_by_prompt(complete: Post, engine: Any, events: Any) -> None:
    def script(request: Any) -> Any:
        yield engine.prompt_done(request)
        for index in range(request.sampling.n):
            said = f"{request.prompt_token_ids[0]}.{index}"
            yield Delta(index, said, (1,), None, "stop")

    engine.script = script
    body = {"prompt": [[7, 7, 7], [8], [9, 9]], "n": 2}
    whole = complete(**body).json()
    assert [(c["index"], c["text"]) for c in whole["choices"]] == [
        (0, "7.0"), (1, "7.1"), (2, "8.0"), (3, "8.1"), (4, "9.0"), (5, "9.1"),
    ]  # fmt: skip
    assert whole["usage"]["prompt_tokens"] == 6
    assert whole["usage"]["completion_tokens"] == 6
    streamed = joined(events(complete(**body, stream=True)), lambda c: c["text"])
    assert streamed == {c["index"]: c["text"] for c in whole["choices"]}


@pytest.mark.parametrize("prompt", ["Grüße, 世界 🎵", ["one", "two"]])
def test_echo_of_texts(complete: Post, prompt: str | list[str]) -> None:
    prompts = [prompt] if isinstance(prompt, str) else prompt
    choices = complete(prompt=prompt, echo=True).json()["choices"]
    assert [c["text"] for c in choices] == [text + TEXT for text in prompts]


def test_echo_of_token_ids(complete: Post, tokenizer: Tokenizer, events: Any) -> None:
    text = "<|im_start|>Grüße, 世界 🎵"
    token_ids = tokenizer.encode(text)
    assert complete(prompt=token_ids, echo=True).json()["choices"][0]["text"] == text + TEXT
    chunks = events(complete(prompt=token_ids, echo=True, stream=True))
    assert chunks[0]["choices"][0]["text"] == text


def test_echo_without_new_tokens(complete: Post, engine: Any) -> None:
    def script(request: Any) -> Any:
        yield engine.prompt_done(request)
        yield Delta(0, "", (), None, "length")

    engine.script = script
    choice = complete(prompt="Grüße 🎵", echo=True, max_tokens=0, logprobs=1).json()["choices"][0]
    assert choice["text"] == "Grüße 🎵"
    assert choice["finish_reason"] == "length"
    assert choice["logprobs"]["token_logprobs"][0] is None


def test_chat_echo_repeats_the_message_it_continues(chat: Post, engine: Any, tokenizer: Tokenizer) -> None:
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Once upon "}]
    answer = chat(messages=messages, continue_final_message=True, echo=True).json()
    assert answer["choices"][0]["message"]["content"] == "Once upon " + TEXT
    prompt = tokenizer.decode(engine.submitted[0].prompt_token_ids, skip_special_tokens=False)
    assert prompt.rstrip().endswith("Once upon")


def test_generation_prompt(chat: Post, engine: Any, tokenizer: Tokenizer) -> None:
    chat()
    chat(add_generation_prompt=False)
    with_it, without = [
        tokenizer.decode(r.prompt_token_ids, skip_special_tokens=False) for r in engine.submitted
    ]
    assert with_it == without + "<|im_start|>assistant\n"


def test_a_clients_own_template(chat: Post, engine: Any, tokenizer: Tokenizer) -> None:
    chat(chat_template="{{ messages[0].content }}-{{ mood }}", chat_template_kwargs={"mood": "calm"})
    assert tokenizer.decode(engine.submitted[0].prompt_token_ids) == "Hi-calm"
    for fields in (
        {"chat_template": "{{ messages[0].content"},
        {"chat_template": "{{ raise_exception('no') }}"},
        {"chat_template": "{{ ''.__class__.__mro__ }}"},
        {"chat_template_kwargs": {"messages": []}},
    ):
        response = chat(**fields)
        assert response.status_code == 400
        assert response.json()["error"]["param"] == next(iter(fields))


def test_token_ids(chat: Post, complete: Post, engine: Any, tokenizer: Tokenizer, events: Any) -> None:
    said = tokenizer.encode(TEXT)
    whole = chat(return_token_ids=True).json()
    assert whole["choices"][0]["token_ids"] == said
    assert tuple(whole["prompt_token_ids"]) == engine.submitted[0].prompt_token_ids
    first, *others = events(chat(return_token_ids=True, stream=True))
    assert first["prompt_token_ids"] == whole["prompt_token_ids"]
    streamed = [token for chunk in others for token in chunk["choices"][0].get("token_ids", [])]
    assert streamed == said
    choice = complete(return_token_ids=True, prompt=[5, 6]).json()["choices"][0]
    assert (choice["prompt_token_ids"], choice["token_ids"]) == ([5, 6], said)


def test_why_it_stopped(chat: Post, complete: Post, engine: Any) -> None:
    def script(request: Any) -> Any:
        yield engine.prompt_done(request)
        yield Delta(0, "x", (1,), None, "stop", "END")

    engine.script = script
    assert chat().json()["choices"][0]["stop_reason"] == "END"
    assert complete().json()["choices"][0]["stop_reason"] == "END"


@pytest.mark.parametrize("prompt", ["Hi", ["Hi", "there"]])
def test_an_error_before_the_end(complete: Post, engine: Any, events: Any, prompt: Any) -> None:
    def script(request: Any) -> Any:
        yield engine.prompt_done(request)
        yield Delta(0, "so far", (1,))
        yield RequestFailed("out of luck")

    engine.script = script
    response = complete(prompt=prompt)
    assert response.status_code == 500
    assert response.json()["error"]["message"] == "out of luck"

    *_, last = events(complete(prompt=prompt, stream=True))
    assert last == {
        "error": {"message": "out of luck", "type": "server_error", "param": None, "code": "request_failed"}
    }
    assert all(stream.aborted for stream in engine.streams)
