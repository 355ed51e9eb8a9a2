"""The official client against a live server: what most users will do first."""

import asyncio

import openai
import pytest
from openai.types.chat import ChatCompletionMessageParam
from pydantic import BaseModel

MESSAGES: list[ChatCompletionMessageParam] = [{"role": "user", "content": "What is the capital of France?"}]


def test_models(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["smollm2", "emoji"]
    assert client.models.retrieve("smollm2").owned_by == "cadenza"


def test_chat(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(model="smollm2", messages=MESSAGES, temperature=0, max_tokens=20)
    assert "Paris" in (answer.choices[0].message.content or "")
    assert answer.choices[0].message.role == "assistant"
    assert answer.choices[0].finish_reason in ("stop", "length")
    assert answer.usage is not None
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens
    assert answer.object == "chat.completion"
    assert (answer.system_fingerprint or "").startswith("fp_")


def test_the_same_again_is_cached(client: openai.OpenAI) -> None:
    messages: list[ChatCompletionMessageParam] = [{"role": "user", "content": "A long story. " * 20}]

    def cached_tokens() -> int:
        answer = client.chat.completions.create(model="smollm2", messages=messages, max_tokens=1)
        assert answer.usage is not None
        assert answer.usage.prompt_tokens_details is not None
        return answer.usage.prompt_tokens_details.cached_tokens or 0

    first, second = cached_tokens(), cached_tokens()
    assert second > first


def test_streaming_equals_whole(client: openai.OpenAI) -> None:
    whole = client.chat.completions.create(
        model="smollm2", messages=MESSAGES, temperature=1.0, seed=7, n=2, max_tokens=8
    )
    stream = client.chat.completions.create(
        model="smollm2",
        messages=MESSAGES,
        temperature=1.0,
        seed=7,
        n=2,
        max_tokens=8,
        stream=True,
        stream_options={"include_usage": True},
    )
    texts = ["", ""]
    reasons: list[str | None] = [None, None]
    usage = None
    for chunk in stream:
        usage = chunk.usage
        for choice in chunk.choices:
            texts[choice.index] += choice.delta.content or ""
            reasons[choice.index] = choice.finish_reason or reasons[choice.index]
    assert texts == [choice.message.content for choice in whole.choices]
    assert reasons == [choice.finish_reason for choice in whole.choices]
    assert texts[0] != texts[1]
    assert usage is not None
    assert whole.usage is not None
    assert usage.completion_tokens == whole.usage.completion_tokens


def test_the_clients_own_accumulation(client: openai.OpenAI) -> None:
    """The helper adds up deltas by itself, and is strict about roles, indices and finish reasons."""
    whole = client.chat.completions.create(
        model="smollm2", messages=MESSAGES, temperature=0, max_tokens=12, logprobs=True, top_logprobs=2
    )
    with client.chat.completions.stream(
        model="smollm2", messages=MESSAGES, temperature=0, max_tokens=12, logprobs=True, top_logprobs=2
    ) as stream:
        final = stream.get_final_completion()
    assert final.choices[0].message.content == whole.choices[0].message.content
    assert final.choices[0].message.role == "assistant"
    assert final.choices[0].logprobs is not None
    assert whole.choices[0].logprobs is not None
    assert final.choices[0].logprobs.content == whole.choices[0].logprobs.content


def test_logprobs(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(
        model="smollm2", messages=MESSAGES, temperature=0, max_tokens=8, logprobs=True, top_logprobs=3
    )
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.content is not None
    raw = b"".join(bytes(entry.bytes or []) for entry in logprobs.content)
    assert raw.decode().removesuffix("<|im_end|>") == answer.choices[0].message.content
    for entry in logprobs.content:
        assert len(entry.top_logprobs) == 3
        assert (entry.token, entry.logprob) == (entry.top_logprobs[0].token, entry.top_logprobs[0].logprob)
        assert sorted((top.logprob for top in entry.top_logprobs), reverse=True) == [
            top.logprob for top in entry.top_logprobs
        ]


def test_completions(client: openai.OpenAI) -> None:
    answer = client.completions.create(
        model="smollm2", prompt=["The sky is", "Water is"], temperature=0, max_tokens=4, logprobs=1, echo=True
    )
    assert [choice.index for choice in answer.choices] == [0, 1]
    assert answer.choices[0].text.startswith("The sky is")
    assert answer.choices[1].text.startswith("Water is")
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.token_logprobs is not None
    assert logprobs.token_logprobs[0] is None
    streamed = ["", ""]
    for chunk in client.completions.create(
        model="smollm2",
        prompt=["The sky is", "Water is"],
        temperature=0,
        max_tokens=4,
        echo=True,
        stream=True,
    ):
        for choice in chunk.choices:
            streamed[choice.index] += choice.text
    assert streamed == [choice.text for choice in answer.choices]


def test_async(base_url: str) -> None:
    async def ask(client: openai.AsyncOpenAI, question: str) -> str:
        text = ""
        stream = await client.chat.completions.create(
            model="smollm2",
            messages=[{"role": "user", "content": question}],
            temperature=0,
            max_tokens=5,
            stream=True,
        )
        async for chunk in stream:
            text += chunk.choices[0].delta.content or ""
        return text

    async def ask_all(questions: list[str], together: bool) -> list[str]:
        async with openai.AsyncOpenAI(base_url=f"{base_url}/v1", api_key="none") as client:
            if together:
                return list(await asyncio.gather(*(ask(client, question) for question in questions)))
            return [await ask(client, question) for question in questions]

    questions = [f"What is {n} plus {n}?" for n in range(3)]
    assert asyncio.run(ask_all(questions, together=True)) == asyncio.run(ask_all(questions, together=False))


class Capital(BaseModel):
    city: str


def test_errors_become_the_clients_exceptions(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as missing:
        client.chat.completions.create(model="gpt-9", messages=MESSAGES)
    assert missing.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError) as hot:
        client.chat.completions.create(model="smollm2", messages=MESSAGES, temperature=-1)
    assert hot.value.param == "temperature"
    with pytest.raises(openai.BadRequestError) as parse:
        client.chat.completions.parse(
            model="smollm2", messages=MESSAGES, response_format=Capital, max_tokens=1
        )
    assert parse.value.param == "max_tokens"
    with pytest.raises(openai.BadRequestError) as tools:
        client.chat.completions.create(
            model="smollm2", messages=MESSAGES, tools=[{"type": "function", "function": {"name": "f"}}]
        )
    assert tools.value.param == "tools"
    with pytest.raises(openai.BadRequestError) as long:
        client.completions.create(model="smollm2", prompt=[5] * 8193)
    assert long.value.code == "context_length_exceeded"


def test_extra_fields(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(
        model="smollm2",
        messages=MESSAGES,
        max_tokens=4,
        extra_body={"top_k": 1, "repetition_penalty": 1.1, "return_token_ids": True},
    )
    greedy = client.chat.completions.create(
        model="smollm2",
        messages=MESSAGES,
        max_tokens=4,
        temperature=0,
        extra_body={"repetition_penalty": 1.1},
    )
    assert answer.choices[0].message.content == greedy.choices[0].message.content
    assert len(answer.choices[0].model_dump()["token_ids"]) == 4
