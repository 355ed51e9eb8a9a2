"""Answers long enough for every bucket of decode rows, groups larger than one call takes, and other block sizes."""

import copy
import dataclasses
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from cadenza.decoding import Engine, EngineConfig
from cadenza.decoding.completion import Completion, CompletionChoice
from cadenza.decoding.tiled_attention import MAX_GROUP_ROWS, bucket_length
from cadenza.models import LoadedModel


@pytest.fixture(scope="module")
def long_model(smollm2: LoadedModel) -> LoadedModel:
    """A random model with a context of 1000 tokens and a vocabulary of 512."""
    torch.manual_seed(6)
    config = LlamaConfig(
        vocab_size=512,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=1024,
    )
    module = LlamaForCausalLM(config).eval().requires_grad_(False)
    for parameter in module.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.2)
    return dataclasses.replace(smollm2, module=module, config=config, max_model_len=1000)


@pytest.fixture(scope="module")
def reference(long_model: LoadedModel) -> Any:
    """Its weights as they were before an engine packed them."""
    return copy.deepcopy(long_model.module)


def run(
    model: LoadedModel, prompts: list[list[int]], settings: dict[str, Any], **sampling: Any
) -> list[Completion]:
    config = EngineConfig(**{"max_num_seqs": 8, "kv_cache_memory_gb": 0.01, **settings})
    with Engine(model, config) as engine:
        return engine.generate_batch(
            prompts, **{"temperature": 1.0, "seed": 1, "logprobs": 0, "ignore_eos": True, **sampling}
        )


def test_buckets_grow_by_halves_and_hold_their_rows():
    sizes = sorted({bucket_length(length) for length in range(1, 1001)})
    assert sizes == [64, 128, 192, 256, 384, 512, 768, 1024]
    assert all(bucket_length(length) >= length for length in range(1, 5000))
    assert all(bucket_length(size) == size for size in sizes)


def test_an_answer_through_every_bucket_has_the_logprobs_of_one_forward_pass(
    reference: Any, long_model: LoadedModel
):
    """Sampled, so that it does not fall into a loop; scored by transformers in one pass over the whole."""
    prompt = list(range(5, 45))
    (completion,) = run(long_model, [prompt], {}, max_tokens=760)
    (found,) = completion.choices
    tokens = torch.tensor([prompt + found.token_ids])
    with torch.inference_mode():
        log_probs = reference(tokens, use_cache=False).logits[0].float().log_softmax(-1)
    expected = log_probs[len(prompt) - 1 : -1].gather(1, torch.tensor(found.token_ids)[:, None])[:, 0]
    assert len(found.token_ids) == 760
    assert [item.logprob for item in found.logprobs] == pytest.approx(expected.tolist(), abs=1e-4)


@pytest.mark.parametrize("block_size", [1, 4, 32, 64])
def test_the_size_of_blocks_changes_nothing(reference: Any, long_model: LoadedModel, block_size: int):
    prompts = [list(range(5, 5 + length)) for length in (3, 64, 150)]
    usual = run(long_model, prompts, {}, max_tokens=20, n=2)
    assert run(long_model, prompts, {"block_size": block_size}, max_tokens=20, n=2) == usual


def test_more_rows_than_one_group_takes(reference: Any, long_model: LoadedModel):
    """All choices of one prompt are in the same bucket: too many for one call of attention."""
    fields: dict[str, Any] = {"n": MAX_GROUP_ROWS + 6, "max_tokens": 5}
    prompt = list(range(5, 40))
    (together,) = run(long_model, [prompt], {"max_num_seqs": 80}, **fields)
    (few,) = run(long_model, [prompt], {"max_num_seqs": 5}, **fields)
    assert _as_values(together.choices) == _as_values(few.choices)


def _as_values(choices: list[CompletionChoice]) -> list[tuple[list[int], list[float]]]:
    return [(choice.token_ids, [item.logprob for item in choice.logprobs]) for choice in choices]
