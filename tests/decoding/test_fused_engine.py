"""The engine as it is on a GPU, by kernels, in Triton's interpreter and on a GPU where there is one, against the same
engine by torch on a CPU.

A small random model computes in float32. What is asked of both is one mixed batch: strategies, constraints, adapters,
drafts, penalties, log-probabilities. Their tokens must be equal.
"""

import dataclasses
import re
from collections.abc import Collection
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from cadenza.decoding import Engine, EngineConfig, assembly
from cadenza.decoding.completion import Completion, collect
from cadenza.decoding.constraints.spec import ConstraintSpec, constraint_spec
from cadenza.decoding.request import GenerationRequest, SamplingParams
from cadenza.decoding.strategies.spec import BeamSearch, ContrastiveSearch, StrategySpec
from cadenza.kernels.int4_linear import LAYOUTS
from cadenza.models import LoadConfig, LoadedModel, load_model
from cadenza.models.quantization.embedding import QuantizedEmbedding
from cadenza.models.quantization.int4 import Int4
from cadenza.models.quantization.int8 import Int8
from cadenza.models.quantization.swap import quantize_modules

pytest.importorskip("triton")

from cadenza.decoding import fused_attention

PROMPT = tuple(50 + 7 * number % 400 for number in range(70))
"""More than a tile of a prompt."""
REPEATED = tuple([60, 61, 62, 63, 64, 65] * 4)


@dataclasses.dataclass(frozen=True)
class Asked:
    prompt: tuple[int, ...]
    sampling: dict[str, Any]
    strategy: StrategySpec | None = None
    constraint: Any = None
    adapter: str | None = None


REQUESTS = {
    "greedy": Asked(PROMPT, {"temperature": 0.0, "logprobs": 3}),
    "two samples of one prompt": Asked(PROMPT, {"seed": 1, "n": 2, "top_p": 0.9, "logprobs": 0}),
    "truncated": Asked(PROMPT[:5], {"seed": 2, "temperature": 1.3, "top_k": 20, "min_p": 0.02}),
    "penalties": Asked(
        PROMPT[:9],
        {"seed": 3, "frequency_penalty": 0.5, "repetition_penalty": 1.2, "logit_bias": {5: 3.0}},
    ),
    "the prompt scored": Asked(PROMPT, {"temperature": 0.0, "prompt_logprobs": 1}),
    "repetition, for drafts": Asked(
        REPEATED, {"temperature": 0.0, "logit_bias": {60: 9.0, 61: 9.0}, "max_tokens": 8}
    ),
    "beams": Asked(PROMPT[:20], {}, strategy=BeamSearch(num_beams=2)),
    "contrastive": Asked(
        PROMPT[:11], {"temperature": 0.0}, strategy=ContrastiveSearch(penalty_alpha=0.5, top_k=2)
    ),
    "a choice": Asked(PROMPT[:3], {"seed": 4}, constraint=ConstraintSpec.choice(["yes", "no", "maybe so"])),
    "beams of a regex": Asked(
        PROMPT[:7], {}, strategy=BeamSearch(num_beams=2), constraint=re.compile("[ab]{3}c+d")
    ),
    "an adapter": Asked(PROMPT[:17], {"temperature": 0.0}, adapter="own"),
    "an adapter, drawn": Asked(PROMPT[:30], {"seed": 6, "typical_p": 0.8}, adapter="own"),
}
WITH_DRAFTS = ("two samples of one prompt", "repetition, for drafts", "a choice", "beams of a regex")
"""Rows with drafts, of which some are right and some are wrong, beside rows without."""


def new_model(like: LoadedModel, device: str = "cpu") -> LoadedModel:
    torch.manual_seed(11)
    config = LlamaConfig(
        vocab_size=1000,
        hidden_size=96,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=512,
        eos_token_id=like.eos_token_ids[0],
    )
    module = LlamaForCausalLM(config).eval().requires_grad_(False)
    for parameter in module.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.3)
    return dataclasses.replace(
        like,
        name="small",
        module=module.to(device),
        config=config,
        max_model_len=400,
        device=torch.device(device),
    )


def answers(
    model: LoadedModel, adapter: Path, names: Collection[str], **config: Any
) -> dict[str, Completion]:
    settings = EngineConfig(max_num_seqs=24, kv_cache_memory_gb=0.02, enable_lora=True, **config)
    with Engine(model, settings) as engine:
        assert engine.adapters is not None
        engine.adapters.load("own", str(adapter)).result()
        streams = {name: _submit(engine, name, REQUESTS[name]) for name in names}
        return {
            name: collect(stream, REQUESTS[name].sampling.get("n", 1)) for name, stream in streams.items()
        }


def _submit(engine: Engine, name: str, asked: Asked) -> Any:
    assert engine.adapters is not None
    adapters = None if asked.adapter is None else engine.adapters.acquire([(asked.adapter, 1.0)]).result()
    constraint = None
    if asked.constraint is not None:
        constraint = engine.constraints.compile(constraint_spec(asked.constraint)).result()
    stream = engine.submit(
        GenerationRequest(
            request_id=name,
            prompt_token_ids=asked.prompt,
            sampling=SamplingParams(**{"max_tokens": 5, **asked.sampling}),
            strategy=asked.strategy,
            constraint=constraint,
            adapters=adapters,
        )
    )
    if adapters is not None:
        adapters.release()
    return stream


needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")


@pytest.mark.parametrize("where", ["interpreter", pytest.param("cuda", marks=needs_gpu)])
@pytest.mark.parametrize(
    ("names", "config"),
    [(REQUESTS, {}), (WITH_DRAFTS, {"speculative": "ngram"})],
    ids=["plain", "with drafts"],
)
def test_a_mixed_batch_has_the_same_tokens_by_kernels(
    names, config, where, smollm2, make_adapter, tmp_path, triton_interpreter, monkeypatch
):
    monkeypatch.setattr(assembly, "warm_up", lambda *args: None)
    if config:  # as very long answers are: decode rows in several launches
        monkeypatch.setattr(fused_attention, "MOST_PARTIALS", 3)
    model = new_model(smollm2)
    adapter, _ = make_adapter(model.module, tmp_path / "own", "lora", seed=1, scale=0.2)
    expected = answers(model, adapter, names, **config)
    if where == "cuda":
        actual = answers(new_model(smollm2, "cuda"), adapter, names, **config)
    else:
        triton_interpreter.skip_where_it_fails()
        with triton_interpreter.interpreted():
            actual = answers(new_model(smollm2), adapter, names, **config)
    for name, completion in expected.items():
        own, other = completion.choices, actual[name].choices
        assert [choice.token_ids for choice in other] == [choice.token_ids for choice in own], name
        assert [choice.finish_reason for choice in other] == [choice.finish_reason for choice in own], name
        for one, two in zip(own, other, strict=True):
            assert_same_logprobs(one.logprobs, two.logprobs)
        assert completion.prompt is not None
        assert actual[name].prompt is not None
        one_prompt, two_prompt = completion.prompt.logprobs, actual[name].prompt.logprobs
        assert (one_prompt is None) == (two_prompt is None)
        if one_prompt is not None:
            assert_same_logprobs(one_prompt[1:], two_prompt[1:])


def assert_same_logprobs(expected: Any, actual: Any) -> None:
    assert [each.token_id for each in actual] == [each.token_id for each in expected]
    assert [each.rank for each in actual] == [each.rank for each in expected]
    for part in (lambda each: [each.logprob], lambda each: [value for _, value in each.top]):
        for one, two in zip(expected, actual, strict=True):
            np.testing.assert_allclose(part(two), part(one), atol=1e-3)


@pytest.mark.parametrize("method", [Int8(), Int4(64, LAYOUTS[0])], ids=["int8", "int4"])
def test_quantized_layers_multiply_with_the_very_weights_they_hold(
    method, smollm2, triton_interpreter, monkeypatch
):
    """A few rows' activations are not rounded, so that a model of the dequantized weights says the same."""
    triton_interpreter.skip_where_it_fails()
    monkeypatch.setattr(assembly, "warm_up", lambda *args: None)
    model = new_model(smollm2)
    tensors = {name: tensor.clone() for name, tensor in model.module.state_dict().items()}
    dense = new_model(smollm2).module
    for name, replaced in quantize_modules(model.module, method, torch.float32).items():
        layer = model.module.get_submodule(name)
        for key, tensor in replaced.quantize(tensors[replaced.weight_name]).items():
            setattr(layer, key, tensor)
        is_embedding = isinstance(layer, QuantizedEmbedding)
        weight = layer(torch.arange(layer.num_embeddings)) if is_embedding else layer.dequantized()
        dense.get_submodule(name).weight.copy_(weight)
    sampling = {"temperature": 0.0, "max_tokens": 3, "ignore_eos": True, "logprobs": 0}
    settings = EngineConfig(max_num_seqs=4, kv_cache_memory_gb=0.02)
    with triton_interpreter.interpreted(), Engine(model, settings) as engine:
        assert any("Triton" in operator for operator in engine.description.linear)
        assert "Triton" in engine.description.attention
        choice = engine.generate(list(PROMPT[:9]), **sampling).choices[0]
    tokens = torch.tensor([[*PROMPT[:9], *choice.token_ids]])
    with torch.inference_mode():
        logits = dense(input_ids=tokens, use_cache=False).logits[0, 8:-1]
    assert choice.token_ids == logits.argmax(dim=-1).tolist()
    expected = logits.log_softmax(-1).amax(dim=-1).tolist()
    assert [each.logprob for each in choice.logprobs] == pytest.approx(expected, abs=2e-4)


@needs_gpu
def test_the_default_model_says_the_same_on_a_gpu(smollm2_path):
    prompts = ["The capital of France is", "def fibonacci(n):", "Once upon a time, " * 40]
    texts = []
    for device in ("cpu", "cuda"):
        model = load_model(str(smollm2_path), LoadConfig(dtype="float32", device=device))
        with Engine(model, EngineConfig(kv_cache_memory_gb=0.5)) as engine:
            texts.append(
                [each.text for each in engine.generate_batch(prompts, temperature=0.0, max_tokens=48)]
            )
    assert texts[0] == texts[1]
