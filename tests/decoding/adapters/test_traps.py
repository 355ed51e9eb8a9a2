"""What an adapter may change without being a layer's plain matrix: positions, other orientations, tokens of its own."""

import copy
import dataclasses
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import transformers
from transformers import AutoTokenizer

from cadenza.decoding import Engine, EngineConfig
from cadenza.decoding.adapters.errors import AdapterRefused
from cadenza.decoding.completion import Completion
from cadenza.models import LoadConfig, LoadedModel, ModelError

PROMPT = [7, 40, 3, 11, 500, 9, 77]
CONFIG = EngineConfig(enable_lora=True, max_loras=4, max_num_seqs=8, kv_cache_memory_gb=0.02)
SCORED = {"temperature": 0, "max_tokens": 4, "logprobs": 1, "prompt_logprobs": 0, "ignore_eos": True}
SMALL = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "max_position_embeddings": 256}


@pytest.fixture
def model_of(smollm2: LoadedModel) -> Callable[..., LoadedModel]:
    def make(config_class: str, model_class: str, **own: Any) -> LoadedModel:
        torch.manual_seed(11)
        config = getattr(transformers, config_class)(vocab_size=smollm2.config.vocab_size, **own)
        module = getattr(transformers, model_class)(config).eval().requires_grad_(False)
        for parameter in module.parameters():
            noise = torch.randn(parameter.shape) * 0.2
            parameter.copy_(noise if parameter.dim() > 1 else parameter + noise)
        return dataclasses.replace(smollm2, module=module, config=config, max_model_len=128)

    return make


def _save(model: LoadedModel, folder: Path) -> Path:
    model.module.save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((model.path / name).read_bytes())
    return folder


def _load(engine: Engine, **folders: Path) -> None:
    assert engine.adapters is not None
    for name, folder in folders.items():
        engine.adapters.load(name, str(folder)).result()


@torch.no_grad()
def _difference(reference: Any, completion: Completion) -> float:
    """The largest between the completion's log-probabilities and the reference's."""
    assert completion.prompt is not None
    assert completion.prompt.logprobs is not None
    choice = completion.choices[0]
    tokens = torch.tensor([[*PROMPT, *choice.token_ids]])
    theirs = reference(input_ids=tokens, use_cache=False).logits[0].double().log_softmax(-1)
    ours = [entry for entry in (*completion.prompt.logprobs[1:], *choice.logprobs) if entry is not None]
    return max(abs(theirs[at, entry.token_id].item() - entry.logprob) for at, entry in enumerate(ours))


def test_positions_are_looked_up_by_position(
    model_of: Callable[..., LoadedModel], adapter_makers: ModuleType, tmp_path: Path
) -> None:
    model = model_of("GPT2Config", "GPT2LMHeadModel", n_embd=32, n_layer=2, n_head=2, n_positions=128)
    original = copy.deepcopy(model.module)
    low_rank, adapted = adapter_makers.make_adapter(
        original, tmp_path / "lora", {"target_modules": ["wpe", "c_attn"], "fan_in_fan_out": True}
    )
    kind = {"target_modules": ["c_attn"], "fan_in_fan_out": True, "modules_to_save": ["wpe"]}
    saved, replaced = adapter_makers.make_adapter(original, tmp_path / "saved", kind)
    with Engine(model, CONFIG) as engine:
        _load(engine, lora=low_rank, saved=saved)
        assert _difference(adapted, engine.generate(PROMPT, adapter="lora", **SCORED)) < 1e-4
        assert _difference(replaced, engine.generate(PROMPT, adapter="saved", **SCORED)) < 1e-4


@pytest.mark.parametrize(
    ("architecture", "own", "module"),
    [
        ("OPT", {"ffn_dim": 96, "word_embed_proj_dim": 64}, "embed_positions"),
        ("Phi", {"qk_layernorm": True, "intermediate_size": 96}, "q_layernorm"),
    ],
)
def test_modules_whose_rows_are_no_tokens_are_refused(
    model_of: Callable[..., LoadedModel],
    adapter_makers: ModuleType,
    tmp_path: Path,
    architecture: str,
    own: dict[str, Any],
    module: str,
) -> None:
    """OPT's positions begin at the third row of their table; Phi's norms are given all tokens head by head."""
    model = model_of(f"{architecture}Config", f"{architecture}ForCausalLM", **SMALL, **own)
    kind = {"target_modules": ["q_proj"], "modules_to_save": [module]}
    folder, _ = adapter_makers.make_adapter(copy.deepcopy(model.module), tmp_path / "adapter", kind)
    with (
        Engine(model, CONFIG) as engine,
        pytest.raises(AdapterRefused, match=rf"{module} cannot be adapted: .* every token"),
    ):
        _load(engine, adapter=folder)


def test_a_quantized_conv1d_lies_as_it_lay_before(
    model_of: Callable[..., LoadedModel], adapter_makers: ModuleType, tmp_path: Path
) -> None:
    """A square one cannot be told by its shape."""
    model = model_of("GPT2Config", "GPT2LMHeadModel", n_embd=64, n_layer=2, n_head=2, n_positions=128)
    source, original = _save(model, tmp_path / "model"), copy.deepcopy(model.module)
    kinds = {
        "saved": {"target_modules": ["c_attn"], "modules_to_save": ["attn.c_proj", "c_fc"]},
        "parameters": {"target_modules": [], "target_parameters": ["attn.c_proj.weight"]},
    }
    with Engine.load(str(source), LoadConfig(device="cpu", quantization="int8"), CONFIG) as engine:
        own = _difference(original, engine.generate(PROMPT, **SCORED))
        for name, kind in kinds.items():
            folder, adapted = adapter_makers.make_adapter(original, tmp_path / name, kind, scale=0.3)
            _load(engine, **{name: folder})
            assert _difference(adapted, engine.generate(PROMPT, adapter=name, **SCORED)) < 2 * own, name


def test_tokens_that_only_one_adapter_of_a_set_knows(
    fresh_tiny_model: LoadedModel, smollm2_path: Path, adapter_makers: ModuleType, tmp_path: Path
) -> None:
    """Who does not know a token changes nothing of its row; in the base it is a row of zeros."""
    original = copy.deepcopy(fresh_tiny_model.module)
    size = original.config.vocab_size
    tokenizer = AutoTokenizer.from_pretrained(smollm2_path)
    tokenizer.add_tokens(["<|joy|>"], special_tokens=True)
    kind = {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "lm_head"]}
    more, grown = adapter_makers.make_adapter(
        original, tmp_path / "more", kind, prepare=lambda model: model.resize_token_embeddings(size + 1)
    )
    tokenizer.save_pretrained(more)
    others = {
        "rows": {"target_modules": ["q_proj"], "trainable_token_indices": [7, size - 1]},
        "low_rank": {"target_modules": ["embed_tokens"]},
        "whole": {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]},
    }
    prompt, seen = [*PROMPT, size], {}
    with Engine(fresh_tiny_model, CONFIG) as engine:
        _load(engine, more=more)
        module: Any = engine.model.module
        module.get_input_embeddings().register_forward_hook(lambda *given: seen.update(last=given[2][0, -1]))
        row = grown.get_input_embeddings().weight[size].detach()
        for name, other in others.items():
            _load(engine, **{name: adapter_makers.make_adapter(original, tmp_path / name, other)[0]})
            for scale in (1.0, 0.5):
                engine.generate(prompt, adapter={"more": scale, name: 1.0}, max_tokens=1)
                torch.testing.assert_close(seen["last"], scale * row, rtol=1e-6, atol=1e-6)


def test_biases_alone_on_layers_that_wait_elsewhere(
    model_of: Callable[..., LoadedModel], adapter_makers: ModuleType, tmp_path: Path
) -> None:
    """The layer's own bias must be known before its forward pass, inside which it cannot be brought again."""
    shape = SMALL | {"num_hidden_layers": 4, "hidden_size": 32, "num_key_value_heads": 1}
    model = model_of("LlamaConfig", "LlamaForCausalLM", intermediate_size=48, attention_bias=True, **shape)
    source = _save(model, tmp_path / "model")
    folder, adapted = adapter_makers.make_adapter(model.module, tmp_path / "bias", "bias_all")
    config = EngineConfig(enable_lora=True, max_num_batched_tokens=128, kv_cache_memory_gb=0.005)
    with pytest.raises(ModelError, match="does not fit into a max_memory") as refusal:
        Engine.load(str(source), LoadConfig(device="cpu", max_memory="1MiB"), config)
    least = float(str(refusal.value).partition("at least ")[2].split()[0]) + 0.06
    with Engine.load(str(source), LoadConfig(device="cpu", max_memory=f"{least}MiB"), config) as engine:
        assert engine.model.placement is not None
        _load(engine, bias=folder)
        assert _difference(adapted, engine.generate(PROMPT, adapter="bias", **SCORED)) < 1e-4
