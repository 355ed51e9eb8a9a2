"""A step's forward pass asks the device for no number, which the host would wait for, whoever wrote the layers.

There is no device here: operators that torch must know a number for, and tensors made from Python's, are counted as
they are dispatched, while a prompt and two tokens go through by kernels in Triton's interpreter.
"""

from typing import Any

import pytest
import torch
import transformers
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM

from cadenza.decoding import attention, probe
from cadenza.decoding.runner import ModelRunner
from cadenza.models.fusion.fuse import fuse

pytest.importorskip("triton")

SIZES = {
    "vocab_size": 128,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "max_position_embeddings": 64,
    "pad_token_id": None,
}
WAITS = {
    "aten::_local_scalar_dense",
    "aten::equal",
    "aten::lift_fresh",
    "aten::masked_select",
    "aten::nonzero",
    "aten::repeat_interleave",
    "aten::unique_consecutive",
    "aten::_unique2",
}


class Waits(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.counted: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name
        if name in WAITS:
            self.counted.append(name)
        return func(*args, **(kwargs or {}))


def test_what_waits_is_counted():
    with Waits() as waits:
        bool((torch.zeros(3) == 0).all())
        torch.tensor([1, 2])
    assert waits.counted == ["aten::_local_scalar_dense", "aten::lift_fresh"]


@pytest.mark.parametrize(
    "name", ["Llama", "Qwen2", "Qwen3", "Mistral", "Gemma2", "Gemma3Text", "Olmo2", "GPT2"]
)
@torch.inference_mode()
def test_a_forward_pass_waits_for_nothing(name, triton_interpreter, monkeypatch):
    triton_interpreter.skip_where_it_fails()
    own = {"n_embd": 32, "n_layer": 2, "n_head": 2, "vocab_size": 128} if name == "GPT2" else SIZES
    config = getattr(transformers, f"{name}Config")(**own)
    module = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    shapes = probe.layer_shapes(module, config)
    module.set_attn_implementation(attention.NAME)
    waits, steps = Waits(), []

    class Watched(ModelRunner):
        def __call__(self, *args: Any) -> Any:
            steps.append(self)
            with waits:
                return super().__call__(*args)

    monkeypatch.setattr(probe, "ModelRunner", Watched)
    with triton_interpreter.interpreted():
        fuse(module)
        probe._paged_logits(module, shapes, 16)
    assert len(steps) == 3
    assert waits.counted == []
