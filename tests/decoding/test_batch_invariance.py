"""To the last bit, an answer does not depend on its company, whatever the machine's threads and the model's widths.

torch computes activations over the flat tensor, split among threads, with other code for the remainder of a vector:
a row's result can then depend on how many rows there are. Widths and thread counts here are chosen to meet that.
Mixtures of experts are not covered: transformers multiplies the rows of an expert together.
"""

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM

from cadenza.decoding import Engine, EngineConfig
from cadenza.decoding.completion import Completion
from cadenza.models import LoadedModel
from cadenza.models.linear import PACKED_DTYPES
from cadenza.models.quantization.base import Method
from cadenza.models.quantization.int8 import Int8
from cadenza.models.quantization.swap import quantize_modules

SIZES = {
    "vocab_size": 512,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
}
DENSE: dict[str, tuple[str, dict[str, Any]]] = {
    "silu": ("Llama", {"intermediate_size": 1536}),
    "silu, odd width": ("Llama", {"intermediate_size": 100}),
    "tanh gelu": ("Gemma2", {"intermediate_size": 1536, "head_dim": 32, "sliding_window": 16}),
    "gelu": ("GPTNeoX", {"intermediate_size": 1536}),
    "new gelu": ("GPT2", {"n_inner": 1536}),
}


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def tiny_engine(
    name: str,
    extra: dict[str, Any],
    like: LoadedModel,
    dtype: torch.dtype = torch.float32,
    method: Method | None = None,
) -> Engine:
    torch.manual_seed(3)
    config = getattr(transformers, f"{name}Config")(**{**SIZES, **extra})
    module = (
        AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval().requires_grad_(False)
    )
    for parameter in module.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.15)
    if method is not None:
        tensors = module.state_dict()
        for layer, replaced in quantize_modules(module, method, dtype).items():
            quantized = module.get_submodule(layer)
            for key, tensor in replaced.quantize(tensors[replaced.weight_name]).items():
                setattr(quantized, key, tensor)
            if f"{layer}.bias" in tensors:
                quantized.bias = torch.nn.Parameter(tensors[f"{layer}.bias"], requires_grad=False)
    model = dataclasses.replace(like, module=module.to(dtype), config=config, dtype=dtype, max_model_len=200)
    return Engine(model, EngineConfig(max_num_seqs=24, kv_cache_memory_gb=0.02, enable_prefix_caching=False))


def run(engine: Engine, prompts: list[list[int]]) -> list[Completion]:
    return engine.generate_batch(
        prompts, temperature=1.0, seed=5, max_tokens=6, ignore_eos=True, logprobs=0, prompt_logprobs=0
    )


def check(engine: Engine) -> None:
    """Each of 14 prompts in a batch of all, against the same prompt alone."""
    generator = torch.Generator().manual_seed(1)
    lengths = (3, 70, 150, 31, 33, 1, 64, 17, 101, 9, 77, 20, 5, 40)
    prompts = [torch.randint(3, 512, (length,), generator=generator).tolist() for length in lengths]
    with engine:
        together = run(engine, prompts)
        for prompt, expected in zip(prompts, together, strict=True):
            assert run(engine, [prompt]) == [expected]


@pytest.mark.parametrize("num_threads", [1, 2, 3, 5])
@pytest.mark.parametrize("name", DENSE)
def test_alone_equals_in_a_batch(
    name: str, num_threads: int, threads: Callable[[int], None], smollm2: LoadedModel
):
    threads(num_threads)
    check(tiny_engine(*DENSE[name], smollm2))


@pytest.mark.skipif(torch.bfloat16 not in PACKED_DTYPES, reason="this CPU has no products in bfloat16")
@pytest.mark.parametrize("num_threads", [1, 2])
@pytest.mark.parametrize("name", DENSE)
def test_alone_equals_in_a_batch_in_bfloat16(
    name: str, num_threads: int, threads: Callable[[int], None], smollm2: LoadedModel
):
    threads(num_threads)
    check(tiny_engine(*DENSE[name], smollm2, torch.bfloat16))


@pytest.mark.parametrize("num_threads", [1, 2])
@pytest.mark.parametrize("name", ["silu, odd width", "new gelu"])
def test_alone_equals_in_a_batch_in_int8(
    name: str, num_threads: int, threads: Callable[[int], None], smollm2: LoadedModel
):
    threads(num_threads)
    engine = tiny_engine(*DENSE[name], smollm2, method=Int8())
    assert "8-bit activations" in str(engine.description.linear)
    check(engine)
