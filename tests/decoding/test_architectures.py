"""Tiny random models of many architectures against transformers' own: same greedy tokens, same log-probabilities.

Prompts of 3, 70 and 150 tokens run in one batch under a budget that cuts the longest into chunks. Sliding windows
are 16 wide, so that they matter to two of the prompts. What cannot work is refused by the name of its class.
"""

import copy
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM

from cadenza.decoding import Engine, EngineConfig, assembly
from cadenza.decoding.completion import Completion
from cadenza.models import LoadedModel, ModelError

NUM_TOKENS = 10
TOLERANCE = 1e-4
NEAR_TIE = 5e-5
PROMPT_LENGTHS = (3, 70, 150)

SIZES = {
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
WINDOW = {"sliding_window": 16}
MIXED = {"layer_types": ["sliding_attention", "full_attention"], **WINDOW}
QWEN_WINDOW = {"use_sliding_window": True, "max_window_layers": 1, **WINDOW}
EXPERTS = {"moe_intermediate_size": 32, "num_experts_per_tok": 2}
MLA = {"kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 12}
ROUTED = {"n_routed_experts": 4, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1, **EXPERTS}

SERVED: dict[str, dict[str, Any]] = {
    "Llama": {},
    "Llama, rope llama3": {
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": 10000.0,
            "factor": 4.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        }
    },
    "Mistral": WINDOW,
    "Mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2, **WINDOW},
    "Qwen2": QWEN_WINDOW,
    "Qwen2Moe": {"num_experts": 4, "shared_expert_intermediate_size": 48, **EXPERTS},
    "Qwen3": {"head_dim": 24, **QWEN_WINDOW},
    "Qwen3Moe": {"num_experts": 4, "head_dim": 24, **EXPERTS},
    "Gemma": {"head_dim": 32},
    "Gemma2": {
        "head_dim": 32,
        "attn_logit_softcapping": 5.0,
        "final_logit_softcapping": 8.0,
        "query_pre_attn_scalar": 20,
        **MIXED,
    },
    "Gemma3Text": {"head_dim": 32, "query_pre_attn_scalar": 20, **MIXED},
    "Phi": {"partial_rotary_factor": 0.5},
    "Phi3": WINDOW,
    "GPT2": {},
    "GPTBigCode": {},
    "GPTNeoX": {"rotary_pct": 0.25},
    "OPT": {"ffn_dim": 96, "word_embed_proj_dim": 32},
    "Olmo2": {},
    "Olmo3": MIXED,
    "Olmoe": {"num_experts": 4, "num_experts_per_tok": 2},
    "Starcoder2": WINDOW,
    "Cohere": {"logit_scale": 1.0},
    "Cohere2": {"logit_scale": 1.0, **MIXED},
    "Granite": {
        "embedding_multiplier": 2.0,
        "attention_multiplier": 0.4,
        "residual_multiplier": 0.5,
        "logits_scaling": 0.5,
    },
    "GptOss": {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 16, **MIXED},
    "SmolLM3": {"no_rope_layers": [1, 0]},
    "Glm4": {"head_dim": 16},
    "Exaone4": MIXED,
    "DeepseekV2": {"q_lora_rank": 24, "num_key_value_heads": 4, **MLA, **ROUTED},
    "DeepseekV3": {"q_lora_rank": 24, "num_key_value_heads": 4, **MLA, **ROUTED},
}
BY_KERNELS = ("Mistral", "Qwen3", "Gemma2", "GPTNeoX", "Cohere2", "GptOss", "DeepseekV3")
"""Windows, norms of heads, soft caps, partial and interleaved rotation, sinks, values narrower than keys. The others of
SERVED pass as well; they take their time."""
MIXTURES = {"Mixtral", "Qwen2Moe", "Qwen3Moe", "Olmoe", "GptOss", "DeepseekV2", "DeepseekV3"}

REFUSED: dict[str, dict[str, Any]] = {
    "Falcon": {},
    "Bloom": {"n_layer": 2, "n_head": 4},
    "Mpt": {"d_model": 64, "n_layers": 2, "n_heads": 4},
    "GPTJ": {"n_embd": 64, "n_layer": 2, "n_head": 4, "rotary_dim": 8},
    "Mamba": {"state_size": 4},
    "RecurrentGemma": {"lru_width": 64},
    "Llama4Text": {"attention_chunk_size": 16, "num_local_experts": 2, "intermediate_size_mlp": 96},
    "Lfm2": {"layer_types": ["conv", "full_attention"]},
    "Qwen3Next": {"num_experts": 4, **EXPERTS},
    "Jamba": {"num_experts": 2},
    "DiffLlama": {},
    "StableLm": {},
    "XGLM": {"d_model": 64, "num_layers": 2, "attention_heads": 4, "ffn_dim": 96},
}


def random_model(name: str, **extra: Any) -> Any:
    """A model whose weights are large enough for its logits to tell tokens apart."""
    config_class = getattr(transformers, f"{name.split(',')[0]}Config")
    config = config_class(**{**_known_sizes(config_class), **extra})
    torch.manual_seed(3)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.15)
        else:
            parameter.data += 0.1 * torch.randn_like(
                parameter
            )  # biases, norms, sinks: not the values they start with
    return model


def _known_sizes(config_class: Any) -> dict[str, int]:
    """Those of SIZES that this configuration has, by its own names or transformers' common ones."""
    default = config_class()
    return {name: value for name, value in SIZES.items() if hasattr(default, name)}


@pytest.fixture(scope="module")
def load(smollm2: LoadedModel) -> Callable[[Any], LoadedModel]:
    def build(module: Any) -> LoadedModel:
        return LoadedModel(
            source="random",
            name="random",
            path=Path("random"),
            module=module,
            config=module.config.get_text_config(decoder=True),
            tokenizer=smollm2.tokenizer,  # its ids beyond the model's vocabulary are never used
            device=torch.device("cpu"),
            dtype=torch.float32,
            fingerprint="fp_random",
            eos_token_ids=(2,),
            sampling_defaults={},
            max_model_len=200,
        )

    return build


def tiny_engine(model: LoadedModel) -> Engine:
    return Engine(model, EngineConfig(max_num_seqs=8, max_num_batched_tokens=128, kv_cache_memory_gb=0.02))


def random_prompts() -> list[list[int]]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(3, 512, (length,), generator=generator).tolist() for length in PROMPT_LENGTHS]


def run(engine: Engine, prompts: list[list[int]]) -> list[Completion]:
    return engine.generate_batch(
        prompts, temperature=0.0, max_tokens=NUM_TOKENS, ignore_eos=True, logprobs=0, prompt_logprobs=0
    )


@torch.inference_mode()
def by_transformers(model: Any, prompt: list[int]) -> tuple[list[int], list[float]]:
    """Greedy tokens of `generate`, and the log-probabilities of the prompt's tokens and of these."""
    output = model.generate(
        torch.tensor([prompt]),
        attention_mask=torch.ones(1, len(prompt), dtype=torch.int64),
        max_new_tokens=NUM_TOKENS,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
        return_dict_in_generate=True,
        output_logits=True,
    )
    steps = torch.cat(output.logits).float()
    best = steps.topk(2).values
    assert (best[:, 0] - best[:, 1]).min() > NEAR_TIE, "a near tie: choose another seed"
    forward = model(input_ids=torch.tensor([prompt]), use_cache=False).logits[0, :-1].float()
    log_probs = torch.cat([forward, steps]).log_softmax(-1)
    assert log_probs.max() > -4.0, "flat logits tell nothing"
    tokens = output.sequences[0]
    return tokens[len(prompt) :].tolist(), log_probs.gather(1, tokens[1:, None])[:, 0].tolist()


@pytest.mark.parametrize("name", SERVED)
def test_tokens_and_logprobs_equal_transformers(name: str, load: Callable[[Any], LoadedModel]):
    module = random_model(name, **SERVED[name])
    reference = copy.deepcopy(module)
    prompts = random_prompts()
    with tiny_engine(load(module)) as engine:
        together = run(engine, prompts)
        alone = [run(engine, [prompt])[0] for prompt in prompts] if name not in MIXTURES else together
    for prompt, completion in zip(prompts, together, strict=True):
        tokens, logprobs = by_transformers(reference, prompt)
        assert completion.choices[0].token_ids == tokens
        assert completion.prompt is not None
        assert completion.prompt.logprobs is not None
        assert completion.prompt.logprobs[0] is None
        scored = [*completion.prompt.logprobs[1:], *completion.choices[0].logprobs]
        assert [item.logprob for item in scored if item] == pytest.approx(logprobs, abs=TOLERANCE)
    # Rows of an expert are multiplied together in transformers' code: there the last bit depends on the batch.
    assert [completion.choices for completion in alone] == [completion.choices for completion in together]


@pytest.mark.parametrize("name", BY_KERNELS)
def test_by_kernels_too(
    name: str,
    load: Callable[[Any], LoadedModel],
    triton_interpreter: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
):
    """What an engine computes with on a GPU, in Triton's interpreter: a prompt beyond the window, and two tokens."""
    triton_interpreter.skip_where_it_fails()
    monkeypatch.setattr(assembly, "warm_up", lambda *args: None)  # nothing is compiled here
    module = random_model(name, **SERVED[name])
    reference = copy.deepcopy(module)
    prompt = random_prompts()[1][:40]
    with triton_interpreter.interpreted(), tiny_engine(load(module)) as engine:
        completion = engine.generate(
            prompt, temperature=0.0, max_tokens=3, ignore_eos=True, logprobs=0, prompt_logprobs=0
        )
    assert completion.prompt is not None
    assert completion.prompt.logprobs is not None
    choice = completion.choices[0]
    tokens = torch.tensor([[*prompt, *choice.token_ids]])
    with torch.inference_mode():
        logits = reference(input_ids=tokens, use_cache=False).logits[0, :-1].float()
    assert choice.token_ids == logits[len(prompt) - 1 :].argmax(dim=-1).tolist()
    expected = logits.log_softmax(-1).gather(1, tokens[0, 1:, None])[:, 0].tolist()
    scored = [*completion.prompt.logprobs[1:], *choice.logprobs]
    assert [item.logprob for item in scored if item] == pytest.approx(expected, abs=TOLERANCE)


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_work_is_refused_by_name(name: str, load: Callable[[Any], LoadedModel]):
    module = random_model(name, **REFUSED[name])
    with pytest.raises(ModelError, match=f"^{type(module).__name__}: "):
        tiny_engine(load(module))
