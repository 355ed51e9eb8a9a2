"""Models whose result hangs on something that the arguments of attention do not show: served right, or refused.

Each of them agrees with transformers on a few tokens of a single sequence, which is all that a short check sees.
"""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM

from cadenza.decoding import Engine, EngineConfig, RequestError
from cadenza.models import LoadedModel, ModelError

SIZES = {
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
}
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0] * 8,
    "long_factor": [4.0] * 8,
    "original_max_position_embeddings": 64,
}
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0}
TRAPS: dict[str, tuple[str, dict[str, Any]]] = {
    "the window is only in the mask": ("Phimoe", {"sliding_window": 16, "num_local_experts": 4}),
    "long sequences change the rope of all": (
        "Phi3",
        {"rope_parameters": LONGROPE, "original_max_position_embeddings": 64},
    ),
    "the longest sequence sets the rope": (
        "Llama",
        {"rope_parameters": DYNAMIC, "max_position_embeddings": 64},
    ),
    "positions begin after the padding id": ("Roberta", {"is_decoder": True}),
}


def random_model(name: str, extra: dict[str, Any]) -> Any:
    config_class = getattr(transformers, f"{name}Config")
    config = config_class(**{**SIZES, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, **extra})
    torch.manual_seed(3)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.15)
    return model


def loaded(module: Any, like: LoadedModel) -> LoadedModel:
    return LoadedModel(
        source="random",
        name="random",
        path=Path("random"),
        module=module,
        config=module.config,
        tokenizer=like.tokenizer,
        device=torch.device("cpu"),
        dtype=torch.float32,
        fingerprint="fp_random",
        eos_token_ids=(2,),
        sampling_defaults={},
        max_model_len=200,
    )


@torch.inference_mode()
def prompt_logprobs(model: Any, prompt: list[int]) -> list[float]:
    log_probs = model(input_ids=torch.tensor([prompt]), use_cache=False).logits[0].float().log_softmax(-1)
    chosen: list[float] = log_probs[:-1].gather(1, torch.tensor(prompt[1:])[:, None])[:, 0].tolist()
    return chosen


@pytest.fixture
def tiny_engine(smollm2: LoadedModel) -> Callable[[Any], Engine]:
    config = EngineConfig(max_num_seqs=8, max_num_batched_tokens=512, kv_cache_memory_gb=0.02)
    return lambda module: Engine(loaded(module, smollm2), config)


@pytest.mark.parametrize("trap", TRAPS)
def test_served_right_or_refused(trap: str, tiny_engine: Callable[[Any], Engine]):
    """A prompt of 20 tokens and one of 150 in one batch: each as transformers computes it alone."""
    module = random_model(*TRAPS[trap])
    reference = copy.deepcopy(module)
    generator = torch.Generator().manual_seed(1)
    prompts = [torch.randint(3, 512, (length,), generator=generator).tolist() for length in (20, 150)]
    try:
        engine = tiny_engine(module)
    except ModelError as error:
        assert str(error).startswith(type(module).__name__)  # noqa: PT017 (refusing is one of two right ends)
        return
    with engine:
        for prompt in [prompt for prompt in prompts if len(prompt) >= engine.max_model_len]:
            with pytest.raises(RequestError, match="context length"):
                engine.generate(prompt, max_tokens=1)
            prompts.remove(prompt)
        completions = engine.generate_batch(prompts, max_tokens=1, temperature=0.0, prompt_logprobs=0)
    for prompt, completion in zip(prompts, completions, strict=True):
        assert completion.prompt is not None
        scored = [item.logprob for item in completion.prompt.logprobs or () if item]
        assert scored == pytest.approx(prompt_logprobs(reference, prompt), abs=1e-3)
