"""Sizes that are counted on shapes are those of the loaded module, byte for byte, at every precision."""

import copy
import functools
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from cadenza.models import ModelError
from cadenza.models.checkpoint import open_checkpoint
from cadenza.models.module import ModuleSource, load_module
from cadenza.models.outline import outline
from cadenza.models.packing import can_pack
from cadenza.models.quantization.methods import method_named
from cadenza.models.sizing import count_parameters, num_bytes, sized_module, weight_sizes

CPU = torch.device("cpu")
SIZES = {
    "vocab_size": 192,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}
EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
MLA = {"kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 12, "q_lora_rank": 24}
ROUTED = {"n_routed_experts": 4, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1}
MODELS: dict[str, dict[str, Any]] = {
    "Llama": SIZES | {"tie_word_embeddings": True},
    "Qwen2": SIZES,
    "Gemma": SIZES | {"head_dim": 32},
    "GPT2": {"vocab_size": 192, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 128},
    "Mixtral": SIZES | EXPERTS,
    "DeepseekV3": SIZES | {"num_experts_per_tok": 2, "moe_intermediate_size": 32, **MLA, **ROUTED},
}
PRECISIONS = [
    *(("float32", "none", 0), ("bfloat16", "none", 0), ("float16", "none", 0), ("float32", "int8", 0)),
    *(("float32", "int4", 32), ("float32", "int4", 64), ("float32", "int4", 128), ("bfloat16", "int4", 32)),
    *(("float32", "nf4", 0), ("float32", "fp8", 0), ("float32", "llm-int8", 0)),
]


@functools.cache
def random_model(name: str) -> Any:
    """In the folder of its own configuration; the same weights each time."""
    config = getattr(transformers, f"{name}Config")(**MODELS[name])
    torch.manual_seed(5)
    return transformers.AutoModelForCausalLM.from_config(config).eval()


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    found = {}
    for name in MODELS:
        found[name] = tmp_path_factory.mktemp(name)
        random_model(name).save_pretrained(found[name])
    return found


@pytest.mark.parametrize(("dtype_name", "quantization", "group_size"), PRECISIONS)
@pytest.mark.parametrize("name", MODELS)
def test_sizes_are_those_of_the_loaded_module(
    name: str, dtype_name: str, quantization: Any, group_size: int, folders: dict[str, Path], cache: Path
) -> None:
    dtype: torch.dtype = getattr(torch, dtype_name)
    try:
        method = method_named(quantization, group_size, CPU)
    except ModelError as error:
        pytest.skip(str(error))
    known = outline(str(folders[name]))
    shapes = sized_module(known.model_class, copy.deepcopy(known.config), dtype, method)
    sizes = weight_sizes(shapes, CPU, dtype, is_quantized=method is not None)

    checkpoint = open_checkpoint(folders[name], allow_pickle=False)
    loaded = load_module(
        ModuleSource(name, folders[name], checkpoint, known.model_class, known.config, dtype, CPU, False),
        method,
    )
    assert sizes.total == num_bytes(loaded)
    assert {tensor.device.type for tensor in shapes.state_dict().values()} == {"meta"}
    quantized = [
        tensor for tensor in loaded.state_dict().values() if tensor.dtype in (torch.int8, torch.uint8)
    ]
    if quantization in ("int8", "nf4"):
        assert quantized
    assert bool(sizes.kept) == (method is not None)
    assert sum(sizes.kept.values()) <= sizes.total - sum(tensor.nbytes for tensor in quantized)


def test_what_is_kept_is_named_for_what_it_is(folders: dict[str, Path]) -> None:
    def kept(name: str) -> dict[str, int]:
        known = outline(str(folders[name]))
        method = method_named("int8", 0, CPU)
        module = sized_module(known.model_class, known.config, torch.float32, method)
        return dict(weight_sizes(module, CPU, torch.float32, is_quantized=True).kept)

    assert kept("Mixtral")["routers, which decide by small differences"] == 2 * 4 * 64 * 4
    assert kept("GPT2")["embeddings that are not of tokens"] == 128 * 64 * 4
    assert kept("Gemma")["embeddings with a rule of their own"] == 192 * 64 * 4
    assert kept("Llama") == {"norms and biases": 5 * 64 * 4, "tables that are computed": 2 * 8 * 4}


def test_parameters_by_hand() -> None:
    def count(name: str) -> Any:
        model = random_model(name)
        return count_parameters(sized_module(type(model), model.config, torch.float32, None))

    attention = 64 * 64 * 2 + 64 * 32 * 2
    llama = count("Llama")
    layer = attention + 3 * 64 * 128 + 2 * 64
    assert llama.layers == (layer, layer)
    assert llama.embedding == 192 * 64
    assert llama.total == llama.active == 2 * layer + 192 * 64 + 64  # the output layer is tied
    mixtral = count("Mixtral")
    expert = 3 * 64 * 128
    assert mixtral.layers == (attention + 4 * 64 + 4 * expert + 2 * 64,) * 2
    assert mixtral.total - mixtral.active == 2 * 2 * expert
    deepseek = count("DeepseekV3")
    assert deepseek.total - deepseek.active == 2 * 3 * 64 * 32  # one of its layers is dense
    assert len(set(deepseek.layers)) == 2


def test_a_tied_output_layer_is_laid_out_beside_the_embedding() -> None:
    model = random_model("Llama")

    def in_use(device: str, dtype: torch.dtype) -> int:
        module = sized_module(type(model), model.config, dtype, None)
        sizes = weight_sizes(module, torch.device(device), dtype, is_quantized=False)
        return sizes.in_use - sizes.total

    assert in_use("cpu", torch.float32) == 192 * 64 * 4
    assert in_use("cpu", torch.bfloat16) == (192 * 64 * 2 if can_pack(CPU, torch.bfloat16) else 0)
    assert in_use("cuda", torch.float32) == 0
