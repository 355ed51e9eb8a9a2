"""Adapters that add tokens, bring a tokenizer or a chat template, or save embeddings beside what they adapt."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from cadenza.models.errors import ModelError
from cadenza.models.tokenizer import Tokenizer

BOTH = {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "lm_head"]}
IDS = torch.tensor([[3, 48, 7, 49, 11, 5]])
Maker = Callable[..., Any]


def grow(rows: int) -> Callable[[Any], None]:
    def prepare(model: Any) -> None:
        torch.manual_seed(5)
        model.resize_token_embeddings(rows, mean_resizing=False)

    return prepare


@torch.no_grad()
@pytest.mark.parametrize("name", ["llama", "tied"])
@pytest.mark.parametrize(
    "arguments",
    [
        BOTH,
        {"target_modules": ["embed_tokens", "lm_head", "v_proj"]},
        {"target_modules": ["embed_tokens", "lm_head"], "use_dora": True},
        {"target_modules": ["v_proj"], "modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
        {"target_modules": ["v_proj"], "trainable_token_indices": [3, 49, 48]},
        {"target_modules": ["v_proj"]},
    ],
    ids=["saved", "adapted", "dora", "saved_tied", "rows", "resized"],
)
def test_added_tokens_equal_peft(
    name: str, arguments: Any, tiny: Maker, make_adapter: Maker, read: Maker, apply: Maker, tmp_path: Path
) -> None:
    module = tiny(name)
    folder, model = make_adapter(module, tmp_path, arguments, prepare=grow(50), save_embedding_layers=True)
    adapter = read(folder, module)
    assert adapter.num_tokens == 50
    actual = apply(module, adapter)(input_ids=IDS).logits
    assert actual.shape[-1] == 50
    torch.testing.assert_close(actual, model(input_ids=IDS).logits, atol=1e-9, rtol=1e-9)


@torch.no_grad()
def test_new_rows_alone_are_enough_where_the_layers_are_tied(
    tiny: Maker, make_adapter: Maker, read: Maker, apply: Maker, tmp_path: Path
) -> None:
    module = tiny("tied")
    arguments = {"target_modules": ["v_proj"], "trainable_token_indices": [49, 3, 48]}
    folder, model = make_adapter(module, tmp_path, arguments, prepare=grow(50))
    adapter = read(folder, module)
    assert adapter.num_tokens == 50
    assert adapter.changes["lm_head"].weight is adapter.changes["model.embed_tokens"].weight
    actual = apply(module, adapter)(input_ids=IDS).logits
    torch.testing.assert_close(actual, model(input_ids=IDS).logits, atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("indices", [[49, 3], [48, 50]])
def test_new_tokens_without_rows_are_refused(
    indices: list[int], tiny: Maker, make_adapter: Maker, read: Maker, tmp_path: Path
) -> None:
    arguments = {"target_modules": ["v_proj"], "trainable_token_indices": indices}
    folder, _ = make_adapter(tiny("tied"), tmp_path, arguments, prepare=grow(51))
    with pytest.raises(ModelError, match=r"48 rows and the adapter none for each token up to"):
        read(folder, tiny("tied"))


@pytest.mark.parametrize("layer", ["embed_tokens", "lm_head"])
def test_tokens_added_to_one_layer_only_are_refused(
    layer: str, tiny: Maker, make_adapter: Maker, read: Maker, tmp_path: Path
) -> None:
    folder, _ = make_adapter(
        tiny("llama"), tmp_path, {"target_modules": ["v_proj"], "modules_to_save": [layer]}, prepare=grow(50)
    )
    with pytest.raises(
        ModelError, match=r"adds tokens, 50 in all, and has 48 rows for them in (lm_head|model)"
    ):
        read(folder, tiny("llama"))


def test_a_padded_embedding_ends_where_the_tokenizer_does(
    tiny: Maker, make_adapter: Maker, read: Maker, make_tokenizer: Maker, tmp_path: Path
) -> None:
    folder, _ = make_adapter(tiny("llama"), tmp_path, BOTH, prepare=grow(64))
    make_tokenizer(added=("<a>", "<b>", "<c>")).save_pretrained(folder)
    adapter = read(folder, tiny("llama"))
    assert adapter.num_tokens == adapter.tokenizer.vocab_size == 51
    assert adapter.tokenizer.encode("<c>") == [50]
    assert adapter.changes["lm_head"].weight.shape == (51, 16)
    assert adapter.changes["model.embed_tokens"].weight.shape == (51, 16)


def test_padding_alone_adds_no_tokens(
    tiny: Maker, make_adapter: Maker, read: Maker, make_tokenizer: Maker, tmp_path: Path
) -> None:
    folder, _ = make_adapter(tiny("llama"), tmp_path, BOTH, prepare=grow(64))
    make_tokenizer().save_pretrained(folder)
    adapter = read(folder, tiny("llama"))
    assert adapter.num_tokens is None
    assert adapter.tokenizer is None
    assert adapter.changes["lm_head"].weight.shape == (48, 16)


def test_tokens_without_rows_cannot_be_used(
    tiny: Maker, make_adapter: Maker, read: Maker, make_tokenizer: Maker, tmp_path: Path
) -> None:
    """A token that was added to the tokenizer and never to the model: requests that write it are refused by its id."""
    folder, _ = make_adapter(tiny("llama"), tmp_path, "lora")
    make_tokenizer(added=("[PAD]",)).save_pretrained(folder)
    adapter = read(folder, tiny("llama"))
    assert adapter.num_tokens is None
    assert adapter.tokenizer.vocab_size == 49


@torch.no_grad()
def test_untouched_embeddings_saved_beside_change_nothing(
    tiny: Maker, make_adapter: Maker, read: Maker, tmp_path: Path
) -> None:
    folder, _ = make_adapter(
        tiny("tied"), tmp_path, {"target_modules": ["q_proj"]}, save_embedding_layers=True
    )
    adapter = read(folder, tiny("tied"))
    assert all(name.endswith("q_proj") for name in adapter.changes)


def test_an_equal_tokenizer_is_the_models(
    tiny: Maker, make_adapter: Maker, read: Maker, make_tokenizer: Maker, tmp_path: Path, monkeypatch: Any
) -> None:
    """Also one that was saved with a truncation and another padding token, as training does; none of them is loaded."""
    monkeypatch.setattr(Tokenizer, "from_folder", None)
    folder, _ = make_adapter(tiny("llama"), tmp_path, "lora")
    plain = read(folder, tiny("llama"))
    fast = make_tokenizer()
    for change in (lambda: None, lambda: fast.backend_tokenizer.enable_truncation(9), lambda: pad(fast)):
        change()
        fast.save_pretrained(folder)
        again = read(folder, tiny("llama"))
        assert again.tokenizer is None
        assert again.num_tokens is None
        assert again.digest == plain.digest


def test_rows_are_tokens_if_no_tokenizer_says_otherwise(
    tiny: Maker, make_adapter: Maker, read: Maker, make_tokenizer: Maker, tmp_path: Path
) -> None:
    """The same weights with the model's own tokenizer beside them are another content: their last rows are padding."""
    size = tiny("llama").config.vocab_size
    kind = {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "lm_head"]}
    folder, _ = make_adapter(
        tiny("llama"), tmp_path, kind, prepare=lambda model: model.resize_token_embeddings(size + 2)
    )
    grown = read(folder, tiny("llama"))
    make_tokenizer().save_pretrained(folder)
    padded = read(folder, tiny("llama"))
    assert (grown.num_tokens, padded.num_tokens) == (size + 2, None)
    assert grown.digest != padded.digest


def pad(fast: Any) -> None:
    fast.pad_token = fast.eos_token


@pytest.mark.parametrize("added", [(), ("<new>",)])
def test_another_chat_template_is_the_adapters(
    added: tuple[str, ...],
    tiny: Maker,
    make_adapter: Maker,
    read: Maker,
    make_tokenizer: Maker,
    tiny_tokenizer: Tokenizer,
    tmp_path: Path,
) -> None:
    folder, _ = make_adapter(tiny("llama"), tmp_path, "lora")
    plain = read(folder, tiny("llama"))
    make_tokenizer(added, "bot: {{ messages[0].content }}").save_pretrained(folder)
    adapter = read(folder, tiny("llama"))
    message = [{"role": "user", "content": "x"}]
    assert adapter.tokenizer.render_chat(message) == "bot: x"
    assert tiny_tokenizer.render_chat(message) == "x"
    assert adapter.digest != plain.digest


def test_the_servers_template_stays(
    tiny: Maker, make_adapter: Maker, make_tokenizer: Maker, tiny_tokenizer: Tokenizer, tmp_path: Path
) -> None:
    from cadenza.models.adapters.tokenizer import read_tokenizer

    own = tiny_tokenizer.with_chat_template("server")
    make_tokenizer((), "adapter").save_pretrained(tmp_path)
    assert read_tokenizer(tmp_path, own) is None
    make_tokenizer(("<new>",), "adapter").save_pretrained(tmp_path)
    found = read_tokenizer(tmp_path, own)
    assert found is not None
    assert found.chat_template == "server"


def test_special_tokens_of_its_own_make_it_another(
    make_tokenizer: Maker, tiny_tokenizer: Tokenizer, tmp_path: Path
) -> None:
    from cadenza.models.adapters.tokenizer import read_tokenizer

    fast = make_tokenizer((), "{{ eos_token }}")
    fast.eos_token = chr(0x4E05)
    fast.save_pretrained(tmp_path)
    found = read_tokenizer(tmp_path, tiny_tokenizer)
    assert found is not None
    assert found.render_chat([{"role": "user", "content": "x"}]) == chr(0x4E05)
    assert tiny_tokenizer.eos_token_id == 1


def test_equal_tokenizers_are_one(make_tokenizer: Maker, tiny_tokenizer: Tokenizer, tmp_path: Path) -> None:
    """Adapters that bring the same can be added up in one request."""
    from cadenza.models.adapters.tokenizer import read_tokenizer

    for name, word in (("first", "<new>"), ("second", "<new>"), ("third", "<other>")):
        make_tokenizer((word,)).save_pretrained(tmp_path / name)
    first, second, third = (
        read_tokenizer(tmp_path / name, tiny_tokenizer) for name in ("first", "second", "third")
    )
    assert first is second
    assert first is not third
    another = tiny_tokenizer.with_chat_template("x")
    assert read_tokenizer(tmp_path / "first", another) is not first


def test_a_token_of_another_meaning_is_refused(
    make_tokenizer: Maker, tiny_tokenizer: Tokenizer, tmp_path: Path
) -> None:
    from cadenza.models.adapters.tokenizer import read_tokenizer

    make_tokenizer().save_pretrained(tmp_path)
    file = tmp_path / "tokenizer.json"
    content = json.loads(file.read_text())
    vocabulary = content["model"]["vocab"]
    vocabulary["x"] = vocabulary.pop(chr(0x4E00 + 9))
    file.write_text(json.dumps(content))
    with pytest.raises(ModelError, match=r"tokenizer has 'x' for token 9, the model's has '\u4e09'"):
        read_tokenizer(tmp_path, tiny_tokenizer)
    content["model"]["vocab"].pop("x")
    file.write_text(json.dumps(content))
    with pytest.raises(ModelError, match=r"tokenizer has None for token 9"):
        read_tokenizer(tmp_path, tiny_tokenizer)
