"""What the engine computes with adapters of every kind is what peft's own unmerged model computes."""

import copy
import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import transformers

from cadenza.decoding import Engine, EngineConfig
from cadenza.decoding.completion import Completion, collect
from cadenza.decoding.request import GenerationRequest, SamplingParams
from cadenza.models import LoadedModel

PROMPTS = {
    "short": (7, 40, 3, 11, 500),
    "long": tuple((37 * number + 3) % 900 for number in range(90)),
}
SHAPE = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "max_position_embeddings": 512,
    "pad_token_id": None,
}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {}),
    "tied": ("Llama", {"tie_word_embeddings": True}),
    "qwen2": ("Qwen2", {}),
    "qwen3": ("Qwen3", {}),
    "gpt2": ("GPT2", {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 512}),
    "gemma3": ("Gemma3", {}),
    "mixtral": ("Mixtral", {"num_local_experts": 3}),
    "gpt_oss": (
        "GptOss",
        {"num_local_experts": 3, "num_experts_per_tok": 2, "layer_types": ["full_attention"] * 2},
    ),
}
KINDS = {
    "llama": [
        "lora",
        "rslora",
        "patterns",
        "dora",
        "lora_bias",
        "saved",
        "saved_mlp",
        "saved_embeddings",
        "embedding",
        "dora_embedding",
        "head",
        "head_tokens",
        "parameters",
        {"target_modules": "all-linear", "r": 40},
    ],
    "tied": ["tied_embeddings", "tied_lora", "tokens", "lora"],
    "qwen2": ["dora", "bias_lora_only", "bias_all", "lora_bias"],
    "qwen3": [{"target_modules": ["k_proj"], "modules_to_save": ["q_norm", "k_norm"]}],
    "gpt2": [
        {"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True, "use_dora": True},
        {"target_modules": ["c_fc"], "fan_in_fan_out": True, "bias": "all"},
        {"target_modules": ["c_fc"], "fan_in_fan_out": True, "modules_to_save": ["c_attn"]},
    ],
    "gemma3": ["embedding", "dora"],
    "mixtral": ["experts", "lora"],
    "gpt_oss": [
        {
            "target_modules": ["o_proj"],
            "target_parameters": ["experts.gate_up_proj", "experts.down_proj", "router.weight"],
        }
    ],
}
SAMPLING = SamplingParams(max_tokens=4, temperature=0, logprobs=2, prompt_logprobs=0, ignore_eos=True)


@pytest.fixture
def model_of(smollm2: LoadedModel) -> Callable[[str], LoadedModel]:
    def make(architecture: str) -> LoadedModel:
        name, own = MODELS[architecture]
        torch.manual_seed(11)
        shape = {} if architecture == "gpt2" else SHAPE
        config_class = "Gemma3TextConfig" if name == "Gemma3" else f"{name}Config"
        config = getattr(transformers, config_class)(
            **{"vocab_size": smollm2.config.vocab_size} | shape | own
        )
        model_class = "GPT2LMHeadModel" if name == "GPT2" else f"{name}ForCausalLM"
        module = getattr(transformers, model_class)(config).eval().requires_grad_(False)
        for parameter in module.parameters():
            noise = torch.randn(parameter.shape) * 0.2
            parameter.copy_(noise if parameter.dim() > 1 else parameter + noise)
        module.tie_weights()
        return dataclasses.replace(smollm2, module=module, config=config, max_model_len=256)

    return make


@pytest.fixture(params=MODELS)
def case(
    request: pytest.FixtureRequest,
    model_of: Callable[[str], LoadedModel],
    adapter_makers: ModuleType,
    tmp_path: Path,
) -> Iterator[tuple[str, Engine, dict[str, Any]]]:
    """(architecture, an engine with an adapter of each kind, peft's models by name; "": without)."""
    model = model_of(request.param)
    original = copy.deepcopy(model.module)
    references: dict[str, Any] = {"": original}
    config = EngineConfig(
        enable_lora=True, max_loras=16, max_lora_rank=64, kv_cache_memory_gb=0.05, max_num_seqs=32
    )
    with Engine(model, config) as engine:
        assert engine.adapters is not None
        for number, kind in enumerate(KINDS[request.param]):
            name = kind if isinstance(kind, str) else f"own-{number}"
            folder, references[name] = adapter_makers.make_adapter(
                original, tmp_path / name, kind, seed=number, scale=0.2
            )
            engine.adapters.load(name, str(folder)).result()
        yield request.param, engine, references


def _ask(engine: Engine, wanted: list[tuple[str, str]]) -> list[Completion]:
    """The answers of adapters to prompts, computed together, none of them from the prefix cache."""
    assert engine.adapters is not None
    engine.reset_prefix_cache()
    streams = []
    for name, prompt in wanted:
        adapters = engine.adapters.acquire([(name, 1.0)] if name else []).result()
        streams.append(
            engine.submit(
                GenerationRequest(
                    request_id=name,
                    prompt_token_ids=PROMPTS[prompt],
                    sampling=SAMPLING,
                    adapters=adapters if name else None,
                )
            )
        )
        adapters.release()
    return [collect(stream, 1) for stream in streams]


@torch.no_grad()
def _difference(reference: Any, prompt: tuple[int, ...], completion: Completion) -> float:
    """The largest between the engine's log-probabilities and the reference's for the same tokens."""
    choice = completion.choices[0]
    assert completion.prompt is not None
    assert completion.prompt.logprobs is not None
    tokens = [*prompt, *choice.token_ids]
    ours = [entry for entry in (*completion.prompt.logprobs[1:], *choice.logprobs) if entry is not None]
    assert len(ours) == len(tokens) - 1
    logits = reference(input_ids=torch.tensor([tokens]), use_cache=False).logits[0].double()
    theirs = logits[:-1].log_softmax(-1)
    return max(abs(theirs[at, entry.token_id].item() - entry.logprob) for at, entry in enumerate(ours))


def test_log_probabilities_are_pefts_alone_and_mixed(case: tuple[str, Engine, dict[str, Any]]) -> None:
    architecture, engine, references = case
    wanted = [(name, prompt) for name in references for prompt in PROMPTS]
    alone = [_ask(engine, [one])[0] for one in wanted]
    mixed = _ask(engine, wanted)
    for (name, prompt), single, among_others in zip(wanted, alone, mixed, strict=True):
        for completion in (single, among_others):
            assert _difference(references[name], PROMPTS[prompt], completion) < 1e-4, (architecture, name)
        if architecture not in ("mixtral", "gpt_oss"):  # a mixture's router is transformers' own
            assert among_others == single, name
    answers = {tuple(completion.choices[0].token_ids) for completion in alone}
    assert len(answers) > len(references)  # the adapters do change what is said
