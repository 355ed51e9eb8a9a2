"""Hooks on what was fused, set before or after, do what they do on the model as it was."""

import pytest
import torch

pytest.importorskip("triton")

from cadenza.models.fusion.fuse import fuse


def scale_output(_module, _args, output):
    return output * 1.5


def change_output_in_place(_module, _args, output):
    """As adapters do."""
    output[:, 1] += 1.0


def change_input(_module, args):
    return (args[0] + 0.5,)


def change_input_in_place(_module, args):
    args[0][:, 0] -= 1.0


FORWARD = (scale_output, change_output_in_place)
MODULES = ["model.layers.1.input_layernorm", "model.layers.0.post_attention_layernorm", "model.norm"]


@pytest.mark.parametrize("hook", [scale_output, change_output_in_place, change_input, change_input_in_place])
@pytest.mark.parametrize("name", [*MODULES, "model.layers.0.mlp"])
def test_a_hook_does_what_it_did(name, hook, new_model, logits_of, kernel_device, called):
    module = new_model("llama").to(kernel_device)
    plain = logits_of(module)

    def register():
        part = module.get_submodule(name)
        return part.register_forward_hook(hook) if hook in FORWARD else part.register_forward_pre_hook(hook)

    handle = register()
    expected = logits_of(module)
    assert (expected - plain).abs().max() > 1e-2 * plain.abs().max()
    handle.remove()
    fuse(module)
    register()  # only now, as adapters' are
    result = logits_of(module)
    assert called["add_rms_norm"] >= 3
    assert (result - expected).abs().max() <= 1e-4 * expected.abs().max()


@pytest.mark.parametrize("hook", FORWARD)
@pytest.mark.parametrize("name", ["model.layers.0", "model.layers.1", "model.layers.0.self_attn.o_proj"])
def test_a_hook_on_a_layer_or_a_product(name, hook, new_model, logits_of, kernel_device):
    module = new_model("llama").to(kernel_device)
    fused = new_model("llama").to(kernel_device)
    fuse(fused)
    for each in (module, fused):
        each.get_submodule(name).register_forward_hook(hook)
    expected = logits_of(module)
    assert (logits_of(fused) - expected).abs().max() <= 1e-4 * expected.abs().max()


def test_a_hook_on_an_activation(new_model, logits_of, kernel_device, called):
    module, fused = (new_model("llama").to(kernel_device) for _ in range(2))
    fuse(fused)
    for each in (module, fused):
        for layer in each.model.layers[:1]:
            layer.mlp.act_fn = torch.nn.SiLU()  # transformers' own may be shared
            layer.mlp.act_fn.register_forward_hook(scale_output)
    expected = logits_of(module)
    assert (logits_of(fused) - expected).abs().max() <= 1e-4 * expected.abs().max()
    assert called["gated_activation"] == 1
