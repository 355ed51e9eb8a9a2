"""Tensors read one by one are transformers' own, however the checkpoint keeps them, in the memory of one of them."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
)

from cadenza.models.architecture import read_config
from cadenza.models.errors import ModelError
from cadenza.models.skeleton import open_skeleton

SMALL = dict(hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, vocab_size=320)
MIB = 2**20


def llama(**more: Any) -> LlamaForCausalLM:
    torch.manual_seed(1)
    return LlamaForCausalLM(LlamaConfig(**SMALL | {"num_key_value_heads": 2} | more)).eval()


def sharded(folder: Path) -> None:
    llama().save_pretrained(folder, max_shard_size="100KB")
    assert len(list(folder.glob("*.safetensors"))) > 2


def renamed(folder: Path) -> None:
    """As the base model is saved: no `model.` before the names; the head is the embedding."""
    llama(tie_word_embeddings=True).model.save_pretrained(folder)
    assert "embed_tokens.weight" in load_file(folder / "model.safetensors")
    change_config(folder, architectures=["LlamaForCausalLM"])


def tied(folder: Path) -> None:
    llama(tie_word_embeddings=True).save_pretrained(folder)
    assert "lm_head.weight" not in load_file(folder / "model.safetensors")


def untied(folder: Path) -> None:
    llama(tie_word_embeddings=False).save_pretrained(folder)


def halved(folder: Path) -> None:
    llama().to(torch.bfloat16).save_pretrained(folder)


def unaligned(folder: Path) -> None:
    """An odd header, after which no tensor begins at a multiple of its element's size."""
    llama().save_pretrained(folder)
    file = folder / "model.safetensors"
    raw = file.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    text = raw[8 : 8 + length].rstrip()
    text += b" " * (1 - len(text) % 2)
    file.write_bytes(len(text).to_bytes(8, "little") + text + raw[8 + length :])


def pickled(folder: Path) -> None:
    model = llama()
    model.config.save_pretrained(folder)
    torch.save(model.state_dict(), folder / "pytorch_model.bin")


def one_by_one(folder: Path) -> None:
    """A mixture in the old layout: a tensor per expert, which transformers stacks."""
    torch.manual_seed(2)
    MixtralForCausalLM(MixtralConfig(**SMALL, num_key_value_heads=2, num_local_experts=4)).save_pretrained(
        folder
    )
    names = load_file(folder / "model.safetensors").keys()
    assert "model.layers.0.block_sparse_moe.experts.3.w2.weight" in names


def transposed(folder: Path) -> None:
    torch.manual_seed(3)
    config = GPT2Config(n_embd=64, n_layer=2, n_head=4, vocab_size=320, n_positions=64)
    GPT2LMHeadModel(config).save_pretrained(folder)


def change_config(folder: Path, **changes: Any) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def skeleton(
    folder: Path, model_class: Any, dtype: torch.dtype, scratch: Path, **more: Any
) -> tuple[Any, Any]:
    return open_skeleton(
        model_class, folder, read_config(folder, trust_remote_code=False), dtype, scratch, **more
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "save",
    [sharded, renamed, tied, untied, halved, unaligned, pickled, one_by_one, transposed],
    ids=lambda it: it.__name__,
)
def test_tensors_equal_transformers_own(
    save: Callable[[Path], None], dtype: torch.dtype, tmp_path: Path
) -> None:
    save(tmp_path)
    model_class = {one_by_one: MixtralForCausalLM, transposed: GPT2LMHeadModel}.get(save, LlamaForCausalLM)
    expected: dict[str, Tensor] = model_class.from_pretrained(tmp_path, dtype=dtype).state_dict()

    scratch = tmp_path / "scratch"
    module, weights = skeleton(tmp_path, model_class, dtype, scratch, is_pickle=save is pickled)

    assert set(weights) == set(expected)
    for name, tensor in expected.items():
        assert weights[name].dtype == tensor.dtype == dtype
        assert torch.equal(weights[name], tensor), name
        assert weights.num_bytes(name) == tensor.nbytes
    tied_names = {"lm_head.weight", "model.embed_tokens.weight", "transformer.wte.weight"} & set(weights)
    is_tied = len({weights.identity(name) for name in tied_names}) < len(tied_names)
    assert is_tied == (save in (renamed, tied, transposed))
    assert set(dict(module.named_parameters(remove_duplicate=False))) <= set(weights)
    view = weights[name]
    weights.release()
    assert torch.equal(view, expected[name]), "what was handed out stays valid"
    if save not in (pickled, one_by_one):
        assert not scratch.exists() or not list(scratch.iterdir()), (
            "what the checkpoint holds is not written again"
        )


def big(folder: Path) -> int:
    """A checkpoint of many tensors in bfloat16; the bytes of all."""
    model = llama(hidden_size=512, intermediate_size=2048, num_hidden_layers=12, vocab_size=8192).to(
        torch.bfloat16
    )
    model.save_pretrained(folder)
    return sum(tensor.nbytes for tensor in model.state_dict().values())


def test_opening_and_reading_takes_the_memory_of_one_tensor(
    tmp_path: Path, peak_growth: Callable[[Callable[[], object]], int]
) -> None:
    total = big(tmp_path)
    largest = 8192 * 512 * 4
    read_config(tmp_path, trust_remote_code=False)
    skeleton(tmp_path, LlamaForCausalLM, torch.float32, tmp_path / "warm")  # imports
    opened: list[Any] = []

    growth = peak_growth(
        lambda: opened.append(skeleton(tmp_path, LlamaForCausalLM, torch.float32, tmp_path / "cold"))
    )
    assert growth < 12 * MIB < total / 5, "nothing is read before it is asked for"

    def read() -> None:
        for name in opened[0][1]:
            opened[0][1][name].sum()
            opened[0][1].release()

    assert peak_growth(read) < 3 * largest < total / 2


def test_a_checkpoint_of_another_shape_is_refused(tmp_path: Path) -> None:
    untied(tmp_path)
    change_config(tmp_path, vocab_size=321)
    with pytest.raises(
        ModelError,
        match=r"do not fit the model: (lm_head|model.embed_tokens).weight is \[320, 64\], not \[321, 64\]",
    ):
        skeleton(tmp_path, LlamaForCausalLM, torch.float32, tmp_path / "scratch")


def test_a_checkpoint_that_lacks_a_tensor_is_refused(tmp_path: Path) -> None:
    untied(tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(
        ModelError, match=r"lack 1 of the model's tensors, such as model\.layers\.1\.mlp\.up_proj"
    ):
        skeleton(tmp_path, LlamaForCausalLM, torch.float32, tmp_path / "scratch")
