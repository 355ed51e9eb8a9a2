"""Chat messages to prompts: transformers' own rendering is the truth; mistakes and attacks are refused."""

from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from cadenza.models import ChatTemplateError, LoadConfig, LoadedModel, Tokenizer, load_model

CHATS: list[list[dict[str, Any]]] = [
    [{"role": "user", "content": "What is 2+2? 🦜"}],
    [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "漢字?"}],
    [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hello!"},
        {"role": "user", "content": "Bye"},
    ],
]
WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "The weather",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
    },
}


@pytest.fixture(scope="module")
def reference(smollm2_path: Path) -> Any:
    return AutoTokenizer.from_pretrained(str(smollm2_path))


@pytest.mark.parametrize("messages", CHATS)
@pytest.mark.parametrize("add_generation_prompt", [True, False])
def test_rendering_equals_transformers(
    smollm2: LoadedModel, reference: Any, messages: list[dict[str, Any]], add_generation_prompt: bool
) -> None:
    expected = reference.apply_chat_template(
        messages, tokenize=False, add_generation_prompt=add_generation_prompt
    )
    rendered = smollm2.tokenizer.render_chat(messages, add_generation_prompt=add_generation_prompt)
    assert rendered == expected
    assert smollm2.tokenizer.encode(rendered, add_special_tokens=False) == reference.encode(
        expected, add_special_tokens=False
    )


def test_the_final_message_can_be_continued(smollm2: LoadedModel) -> None:
    messages = [*CHATS[0], {"role": "assistant", "content": "It is "}]
    prompt = smollm2.tokenizer.render_chat(messages, add_generation_prompt=False, continue_final_message=True)
    assert prompt.endswith("<|im_start|>assistant\nIt is ")
    with pytest.raises(ChatTemplateError, match="continue_final_message"):
        smollm2.tokenizer.render_chat(messages, add_generation_prompt=True, continue_final_message=True)


def test_a_template_sees_tools_documents_and_extra_arguments(smollm2: LoadedModel) -> None:
    template = "{{ tools[0].function.name }}/{{ documents[0].text }}/{{ mood }}/{{ eos_token }}"
    prompt = smollm2.tokenizer.render_chat(
        CHATS[0],
        chat_template=template,
        tools=[WEATHER],
        documents=[{"title": "t", "text": "d"}],
        template_kwargs={"mood": "calm"},
    )
    assert prompt == "weather/d/calm/<|im_end|>"


@pytest.mark.parametrize(
    "name",
    [
        *("messages", "tools", "documents", "add_generation_prompt", "continue_final_message"),
        *("chat_template", "tokenize", "conversation", "eos_token", "raise_exception", "return_dict"),
    ],
)
def test_the_servers_own_arguments_cannot_be_overridden(smollm2: LoadedModel, name: str) -> None:
    with pytest.raises(ValueError, match=name):
        smollm2.tokenizer.render_chat(CHATS[0], template_kwargs={name: False})


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{% for %}", "Expected an expression"),
        ("{{ messages[0].content + 1 }}", "str"),
        ("{{ messages[9].content.x }}", "no element 9"),
    ],
)
def test_a_failing_template_says_why(smollm2: LoadedModel, template: str, reason: str) -> None:
    with pytest.raises(ChatTemplateError, match=reason) as failure:
        smollm2.tokenizer.render_chat(CHATS[0], chat_template=template)
    assert "\n" not in str(failure.value)


@pytest.mark.parametrize(
    "attack",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ cycler.__init__.__globals__.os.popen('id').read() }}",
        "{{ raise_exception.__globals__.os }}",
        "{% for i in range(10 ** 9) %}x{% endfor %}",
        "{{ messages.append(1) }}",
    ],
)
def test_templates_run_in_a_sandbox(smollm2: LoadedModel, attack: str) -> None:
    with pytest.raises(ChatTemplateError):
        smollm2.tokenizer.render_chat(CHATS[0], chat_template=attack)


def test_a_model_without_template_says_so(tiny_folder: Path) -> None:
    (tiny_folder / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    tokenizer = Tokenizer.from_folder(tiny_folder)
    assert tokenizer.chat_template is None
    with pytest.raises(ChatTemplateError, match="no chat template"):
        tokenizer.render_chat(CHATS[0])
    assert tokenizer.render_chat(CHATS[0], chat_template="{{ messages[0].role }}") == "user"


def test_the_users_template_wins_over_the_models(tiny_folder: Path, tmp_path: Path) -> None:
    file = tmp_path / "mine.jinja"
    file.write_text("mine: {{ messages[0].content }}")
    for choice in (str(file), file.read_text()):
        tokenizer = load_model(str(tiny_folder), LoadConfig(device="cpu", chat_template=choice)).tokenizer
        assert tokenizer.chat_template == "mine: {{ messages[0].content }}"
        assert tokenizer.render_chat([{"role": "user", "content": "Hi"}]) == "mine: Hi"
