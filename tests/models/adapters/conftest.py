"""Tiny random models of several architectures, their weights as the reader asks for them, and what an adapter means:
plain torch that puts W' in place of every W."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

from cadenza.models.adapters.adapter import Adapter, EmbeddingChange, LinearChange, LowRank, ModuleChange
from cadenza.models.adapters.layout import Layout, layout_of
from cadenza.models.adapters.read import read_adapter
from cadenza.models.tokenizer import Tokenizer

VOCABULARY = 48
COMMON = {
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "pad_token_id": None,
    "eos_token_id": 1,
    "bos_token_id": 0,
}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {}),
    "tied": ("Llama", {"tie_word_embeddings": True}),
    "qwen2": ("Qwen2", {}),
    "gpt2": ("GPT2", {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 64}),
    "gemma2": ("Gemma2", {}),
    "gemma3": ("Gemma3", {}),
    "mixtral": ("Mixtral", {"num_local_experts": 3}),
    "qwen3_moe": ("Qwen3Moe", {"num_experts": 3, "num_experts_per_tok": 2, "moe_intermediate_size": 12}),
    "gpt_oss": (
        "GptOss",
        {"num_local_experts": 3, "num_experts_per_tok": 2, "layer_types": ["full_attention"] * 2},
    ),
}


class ModuleWeights:
    """`BaseWeights` of a module that nothing has packed. In the module's own dtype, for tests in float64."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module

    def linear(self, name: str) -> Tensor:
        layer = self.module.get_submodule(name)
        weight = layer.weight.detach()
        return weight if isinstance(layer, nn.Linear) else weight.T

    def bias(self, name: str) -> Tensor | None:
        bias = self.module.get_submodule(name).bias
        return None if bias is None else bias.detach()

    def embedding(self, name: str, start: int, stop: int) -> Tensor:
        table = self.module.get_submodule(name).weight.detach()
        assert 0 <= start <= stop <= table.shape[0]
        return table[start:stop]


@torch.no_grad()
def applied(module: Any, adapter: Adapter) -> Any:
    """A copy whose weights are W': the definition of what an adapter computes."""
    changed = copy.deepcopy(module)
    weights = {
        name: _changed(changed.get_submodule(name), change) for name, change in adapter.changes.items()
    }
    for name, parameters in weights.items():
        for parameter, value in parameters.items():
            setattr(changed.get_submodule(name), parameter, nn.Parameter(value, requires_grad=False))
    return changed


def _changed(layer: Any, change: LinearChange | EmbeddingChange | ModuleChange) -> dict[str, Tensor]:
    if isinstance(change, ModuleChange):
        found = {name: value.to(layer.get_parameter(name).dtype) for name, value in change.values.items()}
        for name, pair in change.low_rank.items():
            weight = found.get(name, layer.get_parameter(name).detach())
            found[name] = weight + _product(pair, weight)
        return found
    is_conv = not isinstance(layer, nn.Linear | nn.Embedding)
    weight = layer.weight.detach().clone()
    weight = (
        weight.T if is_conv or isinstance(change, EmbeddingChange) else weight
    )  # [out, in] or [dim, tokens]
    dtype = weight.dtype
    if change.weight is not None:
        weight = change.weight.to(dtype).T if isinstance(change, EmbeddingChange) else change.weight.to(dtype)
    if change.gain is not None:
        weight = weight * (1 + change.gain.to(dtype))[:, None]
    if change.low_rank is not None:
        weight = weight + _product(change.low_rank, weight)
    weight = weight.T if is_conv or isinstance(change, EmbeddingChange) else weight
    weight = weight.clone()
    if change.rows is not None:
        weight[change.rows[0]] = change.rows[1].to(dtype)
    found = {"weight": weight}
    if isinstance(change, LinearChange) and change.bias is not None:
        found["bias"] = change.bias.to(dtype)
    return found


def _product(pair: LowRank, like: Tensor) -> Tensor:
    product = pair.b.to(like.dtype) @ pair.a.to(like.dtype)
    assert product.shape == like.shape
    return product


def _tiny(name: str, dtype: torch.dtype) -> Any:
    family, extra = MODELS[name]
    kind = f"{family}TextConfig" if family == "Gemma3" else f"{family}Config"
    common = {"vocab_size": VOCABULARY, "bos_token_id": 0, "eos_token_id": 1} if family == "GPT2" else COMMON
    config = getattr(transformers, kind)(**(common | extra))
    config._attn_implementation = "eager"
    torch.manual_seed(11)
    config._experts_implementation = "eager"
    kind = "GPT2LMHeadModel" if family == "GPT2" else f"{family}ForCausalLM"
    model = getattr(transformers, kind)(config).eval().requires_grad_(False)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    return model.to(dtype)


@pytest.fixture(scope="session")
def tiny() -> Callable[..., Any]:
    """tiny(name, dtype): a model that nobody may change."""
    made: dict[Any, Any] = {}

    def get(name: str, dtype: torch.dtype = torch.float64) -> Any:
        if (name, dtype) not in made:
            made[name, dtype] = _tiny(name, dtype)
        return made[name, dtype]

    return get


@pytest.fixture(scope="session")
def tiny_tokenizer() -> Tokenizer:
    """One token for each of 48 letters; a chat template."""
    return Tokenizer(fast_tokenizer())


def fast_tokenizer(added: tuple[str, ...] = (), template: str = "{{ messages[0].content }}") -> Any:
    from tokenizers import Tokenizer as Backend
    from tokenizers import decoders, models
    from transformers import PreTrainedTokenizerFast

    letters = {chr(0x4E00 + place): place for place in range(VOCABULARY)}
    backend = Backend(models.BPE(letters, []))
    backend.decoder = decoders.Fuse()
    fast = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token=chr(0x4E00), eos_token=chr(0x4E01))
    fast.add_tokens(list(added))
    fast.chat_template = template
    return fast


@pytest.fixture(scope="session")
def make_tokenizer() -> Callable[..., Any]:
    return fast_tokenizer


@pytest.fixture
def read(tiny_tokenizer: Tokenizer) -> Callable[..., Adapter]:
    """read(folder, module): for that model."""

    def call(
        folder: Path,
        module: Any,
        *,
        max_rank: int = 64,
        fingerprint: str = "model",
        layout: Layout | None = None,
    ) -> Adapter:
        return read_adapter(
            folder,
            layout or layout_of(module),
            ModuleWeights(module),
            tiny_tokenizer,
            max_rank=max_rank,
            fingerprint=fingerprint,
        )

    return call


@pytest.fixture(scope="session")
def apply() -> Callable[[Any, Adapter], Any]:
    return applied
