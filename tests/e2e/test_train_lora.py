"""The trainer of the examples, on a tiny model: it computes what single chats would give; what it saves is the same."""

import json
import math
import random
import runpy
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture(scope="module")
def trainer() -> dict[str, Any]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(EXAMPLES))
        names = runpy.run_path(str(EXAMPLES / "train_lora.py"))
        sys.modules.pop("emoji_messages")
    return names


@pytest.fixture
def tiny() -> Any:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    return LlamaForCausalLM(LlamaConfig(vocab_size=49152, num_key_value_heads=2, **sizes)).eval()


@pytest.fixture(scope="module")
def tokenizer(smollm2_path: Path) -> Any:
    return AutoTokenizer.from_pretrained(smollm2_path)


def test_chats_side_by_side_are_computed_as_each_by_itself(
    trainer: dict[str, Any], tiny: Any, tokenizer: Any
) -> None:
    examples = trainer["messages_of"](trainer["MESSAGES"])[::30]
    packed = trainer["batch_of"](examples, tokenizer, random.Random(1))
    draw, prompts, answers = random.Random(1), [], []
    for message, _ in examples:
        prompts.append(trainer["prompt_ids"](tokenizer, trainer["varied"](message, draw)))
    for _, feeling in examples:
        answers.append(tokenizer.encode(f"({feeling}{draw.choice(trainer['ANIMALS'])}){tokenizer.eos_token}"))
    assert packed["input_ids"].shape[1] < sum(map(len, prompts))
    losses: list[float] = []
    with torch.inference_mode():
        for prompt, answer in zip(prompts, answers, strict=True):
            logprobs = tiny(torch.tensor([prompt + answer])).logits[0].double().log_softmax(-1)
            places = range(len(prompt) - 1, len(prompt) + len(answer) - 1)
            losses += [-logprobs[place, token].item() for place, token in zip(places, answer, strict=True)]
        assert trainer["answer_loss"](tiny, packed).item() == pytest.approx(
            math.fsum(losses) / len(losses), abs=1e-5
        )


def test_what_is_saved_is_what_was_trained(
    trainer: dict[str, Any], tiny: Any, tokenizer: Any, tmp_path: Path
) -> None:
    """In float16, without a model card, and with the name of the base instead of its path."""
    from peft import LoraConfig, PeftModel, get_peft_model
    from safetensors.torch import load_file

    model = get_peft_model(tiny, LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"))
    trainer["train"](model, tokenizer, steps=3, batch_size=2, lr=1e-2, seed=0)
    ids = torch.tensor([trainer["prompt_ids"](tokenizer, "Hi!")])
    with torch.inference_mode():
        trained = model.eval()(ids).logits
    trainer["save"](model, tmp_path, "some/base")
    assert {file.name for file in tmp_path.iterdir()} == {"adapter_config.json", "adapter_model.safetensors"}
    assert (
        json.loads((tmp_path / "adapter_config.json").read_text())["base_model_name_or_path"] == "some/base"
    )
    assert {t.dtype for t in load_file(tmp_path / "adapter_model.safetensors").values()} == {torch.float16}
    with torch.inference_mode():
        base = model.unload()
        plain = base(ids).logits
        saved = PeftModel.from_pretrained(base, tmp_path).eval()(ids).logits
    assert (trained - plain).abs().max() > 1e-3
    torch.testing.assert_close(saved, trained, atol=2e-4, rtol=0)
