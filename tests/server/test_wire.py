"""What a body may say: each field is honoured, neutral, or refused by name."""

import json
from typing import Any

import pytest

from cadenza.decoding.request import RequestError
from cadenza.decoding.strategies.spec import BestOf
from cadenza.server.protocol.chat import ChatRequest
from cadenza.server.protocol.completion import CompletionRequest
from cadenza.server.protocol.wire import parse

MESSAGES = [{"role": "user", "content": "Hi"}]


def chat(**fields: Any) -> ChatRequest:
    return parse(ChatRequest, json.dumps({"messages": MESSAGES, **fields}).encode())


def completion(**fields: Any) -> CompletionRequest:
    return parse(CompletionRequest, json.dumps({"prompt": "x", **fields}).encode())


@pytest.mark.parametrize(
    "raw",
    [b"", b"{", b"[1]", b'"x"', b"\xff{}", b'{"prompt": NaN}', b"[" * 100_000, b'{"prompt": "\\ud800"}'],
)
def test_what_is_not_a_json_object_is_refused(raw: bytes) -> None:
    with pytest.raises(RequestError) as caught:
        parse(CompletionRequest, raw)
    assert caught.value.code == "invalid_json"


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"temperature": "hot"}, "temperature"),
        ({"temperature": True}, "temperature"),
        ({"max_tokens": 1.5}, "max_tokens"),
        ({"max_tokens": "5"}, "max_tokens"),
        ({"n": 0}, "n"),
        ({"n": 129}, "n"),
        ({"stop": [1]}, "stop[0]"),
        ({"stop": 1}, "stop"),
        ({"stream": 1}, "stream"),
        ({"logit_bias": {"5": "x"}}, "logit_bias.5"),
        ({"logit_bias": []}, "logit_bias"),
        ({"seed": "abc"}, "seed"),
        ({"logprobs": 1}, "logprobs"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"no_such_field": 1}, "no_such_field"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"stream": True, "stream_options": {"nonsense": True}}, "stream_options.nonsense"),
        (
            {"stream": True, "stream_options": {"include_obfuscation": True}},
            "stream_options.include_obfuscation",
        ),
        ({"max_tokens": 3, "max_completion_tokens": 4}, "max_completion_tokens"),
        ({"truncate_prompt_tokens": 0}, "truncate_prompt_tokens"),
        ({"truncate_prompt_tokens": -2}, "truncate_prompt_tokens"),
        ({"echo": True}, "echo"),
        ({"continue_final_message": True}, "continue_final_message"),
        ({"messages": []}, "messages"),
        ({"messages": "Hi"}, "messages"),
        ({"messages": [{"role": "robot", "content": "x"}]}, "messages[0].role"),
        ({"messages": [{"content": "x"}]}, "messages[0].role"),
        ({"messages": [{"role": "user"}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": None}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": 5}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": []}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": "x", "mood": "bad"}]}, "messages[0].mood"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
            "messages[0].content",
        ),
    ],
)
def test_mistakes_name_their_field(fields: dict[str, Any], param: str) -> None:
    with pytest.raises(RequestError) as caught:
        chat(**fields)
    assert caught.value.param == param


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"lora": "x"}, "lora must be a list."),
        ({"lora": {"id": "x", "scale": 1}}, "lora must be a list."),
        ({"lora": ["x"]}, "lora[0] must be a JSON object."),
        ({"logit_bias": [1]}, "logit_bias must be a JSON object."),
    ],
)
def test_values_of_the_wrong_kind_are_told_in_terms_of_json(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError) as caught:
        chat(**fields)
    assert str(caught.value) == message


def test_required_fields() -> None:
    for kind, param in ((ChatRequest, "messages"), (CompletionRequest, "prompt")):
        with pytest.raises(RequestError) as caught:
            parse(kind, b"{}")
        assert caught.value.param == param


@pytest.mark.parametrize(
    "prompt", [[], [[]], ["a", 1], [[1], "a"], [1, [2]], [1.5], 7, {}, [True], [[1, "a"]], [[1], []]]
)
def test_prompts_of_no_known_kind_are_refused(prompt: Any) -> None:
    with pytest.raises(RequestError) as caught:
        completion(prompt=prompt)
    assert caught.value.param == "prompt"


@pytest.mark.parametrize(
    ("prompt", "prompts"),
    [("a", ["a"]), (["a", "b"], ["a", "b"]), ([1, 2], [[1, 2]]), ([[1], [2, 3]], [[1], [2, 3]])],
)
def test_prompts_of_all_four_kinds(prompt: Any, prompts: Any) -> None:
    assert completion(prompt=prompt).prompt == prompts


REFUSED = {
    "tools": [{"type": "function", "function": {"name": "f"}}],
    "tool_choice": "required",
    "functions": [{"name": "f"}],
    "audio": {"voice": "x", "format": "wav"},
    "modalities": ["text", "audio"],
    "store": True,
    "service_tier": "priority",
    "reasoning_effort": "high",
    "verbosity": "low",
    "prediction": {"type": "content", "content": "x"},
    "web_search_options": {},
    "documents": [{"text": "x"}],
    "suffix": "end",
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_done_yet_is_refused_by_name(name: str) -> None:
    with pytest.raises(RequestError, match=f"^{name} is not supported yet") as caught:
        completion(**{name: REFUSED[name]})
    assert caught.value.param == name
    assert caught.value.code == "unsupported_parameter"


NEUTRAL = {
    "user": "me",
    "metadata": {"a": "b"},
    "store": False,
    "service_tier": "auto",
    "parallel_tool_calls": True,
    "tools": [],
    "tool_choice": "none",
    "response_format": {"type": "text"},
    "grammar": "",
    "guided_decoding_backend": "xgrammar",
    "use_beam_search": False,
    "modalities": ["text"],
    "suffix": "",
    "lora": [],
}


@pytest.mark.parametrize("name", NEUTRAL)
def test_values_that_ask_for_nothing_are_accepted(name: str) -> None:
    assert completion(**{name: NEUTRAL[name]}) == completion()


def test_a_boolean_is_no_number() -> None:
    """JSON's false is not 0, though Python says that they are equal."""
    for fields in ({"mirostat": False}, {"store": 0}, {"num_beams": True}):
        with pytest.raises(RequestError):
            completion(**fields)


@pytest.mark.parametrize("name", sorted(set(ChatRequest.model_fields) - {"messages"}) + sorted(REFUSED))
def test_null_means_absent(name: str) -> None:
    assert chat(**{name: None}) == chat()


def test_null_means_absent_inside_too() -> None:
    message = {"role": "user", "content": "Hi", "name": None, "tool_calls": None, "annotations": []}
    options = {"include_usage": True, "continuous_usage_stats": None}
    body = chat(messages=[message], stream=True, stream_options=options)
    assert body.messages == chat().messages
    assert body.stream_options is not None
    assert not body.stream_options.continuous_usage_stats


def test_text_parts_are_joined() -> None:
    parts = [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]
    assert chat(messages=[{"role": "user", "content": parts}]).messages[0].content == "one\ntwo"


def test_messages_for_the_template() -> None:
    call = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}}
    body = chat(
        messages=[
            {"role": "developer", "content": "Be brief."},
            {"role": "assistant", "content": None, "tool_calls": [call]},
            {"role": "tool", "tool_call_id": "c1", "content": "42"},
        ]
    )
    developer, assistant, tool = [m.for_template(developer_as_system=True) for m in body.messages]
    assert developer == {"role": "system", "content": "Be brief."}
    assert assistant["content"] == ""
    assert assistant["tool_calls"][0]["function"] == {"name": "f", "arguments": {"a": 1}}
    assert tool == {"role": "tool", "tool_call_id": "c1", "content": "42"}
    assert body.messages[0].for_template(developer_as_system=False)["role"] == "developer"


def test_arguments_that_are_no_object_are_refused() -> None:
    call = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": "{"}}
    with pytest.raises(RequestError) as caught:
        chat(messages=[{"role": "assistant", "tool_calls": [call]}])
    assert caught.value.param == "messages[0].tool_calls[0].function.arguments"


def test_best_of_is_for_completions() -> None:
    assert completion(n=2, best_of=3).strategy == BestOf(best_of=3)
    assert completion(n=2, best_of=2).strategy is None
    assert chat(best_of=1) == chat()
    with pytest.raises(RequestError) as caught:
        chat(best_of=2)
    assert caught.value.param == "best_of"
