"""Fused models compute what they computed before: in Triton's interpreter and, where there is one, on a GPU."""

import pytest
import torch

pytest.importorskip("triton")

from cadenza.models.fusion.fuse import fuse
from cadenza.models.offload.stream import LayerStream
from cadenza.models.packing import pack, watch_siblings
from cadenza.models.weights import FileWeights

ARCHITECTURES = {
    # norms, feed-forward layers, rotations, layers; of two layers
    "llama": (5, 2, 2, 2),
    "mistral": (5, 2, 2, 2),
    "qwen2": (5, 2, 2, 2),
    "qwen3": (9, 2, 2, 2),  # norms of queries and keys
    "gemma": (5, 2, 2, 2),
    "gemma2": (9, 2, 2, 0),  # four norms a layer
    "gemma3_text": (13, 2, 2, 0),
    "phi3": (5, 2, 2, 2),  # merged projections, dropout
    "glm": (5, 2, 2, 2),  # neighbours rotate, half of each head
    "olmo2": (9, 2, 2, 0),  # norms behind the products
    "cohere": (0, 2, 2, 0),  # layer norms, one sum a layer
    "granite": (5, 2, 2, 0),  # sums have a factor
    "mixtral": (5, 0, 2, 2),  # experts
    "gpt_oss": (5, 0, 2, 2),  # experts that return their scores
    "gpt_neox": (0, 0, 2, 0),
    "gpt2": (0, 0, 0, 0),
}
KINDS = ("norms", "feed_forwards", "rotations", "layers")


def assert_close(actual, expected, error=1e-4):
    assert (actual - expected).abs().max() <= error * expected.abs().max()


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_logits_are_what_they_were(architecture, new_model, logits_of, kernel_device, called):
    module = new_model(architecture).to(kernel_device)
    expected = logits_of(module)
    counts = dict(zip(KINDS, ARCHITECTURES[architecture], strict=True))
    assert fuse(module) == counts
    assert not called
    assert_close(logits_of(module), expected)
    assert called["rotary"] == counts["rotations"]
    assert called["gated_activation"] == counts["feed_forwards"]
    assert called["rms_norm"] + called["add_rms_norm"] == counts["norms"]
    assert called["add_rms_norm"] == 2 * counts["layers"]


@pytest.mark.parametrize("architecture", ["llama", "gemma"])
def test_in_16_bit(architecture, new_model, logits_of, kernel_device, called):
    module = new_model(architecture)
    expected = logits_of(module)
    module = module.to(torch.float16).to(kernel_device)
    unfused = logits_of(module).float().cpu()
    fuse(module)
    fused = logits_of(module)
    assert fused.dtype == torch.float16
    assert called["add_rms_norm"] == 4
    scale = expected.abs().max()
    assert (fused.float().cpu() - expected).abs().max() <= 2 * (unfused - expected).abs().max() + 1e-3 * scale


def test_what_kernels_do_not_compute_in_stays(new_model, logits_of, kernel_device, called):
    module = new_model("llama").double().to(kernel_device)
    expected = logits_of(module)
    fuse(module)
    assert torch.equal(logits_of(module), expected)
    assert not called


def test_without_triton_nothing_changes(new_model, logits_of):
    """A fused model whose tensors are elsewhere: as before, bit for bit."""
    module = new_model("qwen3")
    expected = logits_of(module)
    assert fuse(module)["layers"] == 2
    assert torch.equal(logits_of(module), expected)


def test_several_sequences_at_once(new_model, kernel_device, called):
    """Rotations stay transformers' own there."""
    module = new_model("llama").to(kernel_device)
    ids = torch.tensor([[1, 2, 3], [9, 8, 7]], device=kernel_device)
    expected = module(input_ids=ids).logits
    fuse(module)
    assert_close(module(input_ids=ids).logits, expected)
    assert called["rotary"] == 0
    assert called["add_rms_norm"] == 4


def test_packed_layers(new_model, logits_of, triton_interpreter):
    """Query, key and value are views of one product, gate and up too; activations are wrapped."""
    triton_interpreter.skip_where_it_fails()
    module = new_model("qwen3")
    with watch_siblings(module) as siblings:
        expected = logits_of(module)
    pack(module, siblings)
    assert fuse(module) == {"norms": 9, "feed_forwards": 2, "rotations": 2, "layers": 2}
    with triton_interpreter.interpreted():
        assert_close(logits_of(module), expected)


def test_only_the_instance_changes(new_model, logits_of, kernel_device, called):
    module, other = (new_model("llama").to(kernel_device) for _ in range(2))
    fuse(module)
    logits_of(other)
    assert not called
    assert fuse(module) == dict.fromkeys(KINDS, 0)
    logits_of(module)
    assert called["add_rms_norm"] == 4


def test_hidden_states_and_attentions_can_be_asked_for(new_model, kernel_device):
    module = new_model("llama").to(kernel_device)
    module.set_attn_implementation("eager")
    ids = torch.tensor([[4, 8, 15]], device=kernel_device)
    asked = {"output_hidden_states": True, "output_attentions": True}
    expected = module(input_ids=ids, **asked)
    fuse(module)
    for _ in range(2):  # hooks that record stay once they are there
        result = module(input_ids=ids, **asked)
        for kind in ("hidden_states", "attentions"):
            assert len(result[kind]) == len(expected[kind])
            for one, other in zip(result[kind], expected[kind], strict=True):
                assert_close(one, other)
        assert_close(module(input_ids=ids).logits, expected.logits)


def test_a_cache_of_transformers_own(new_model, kernel_device):
    """Arguments reach the attention as they did."""
    module = new_model("llama").to(kernel_device)
    ids = torch.tensor([[4, 8, 15]], device=kernel_device)
    expected = module.generate(ids, max_new_tokens=3, do_sample=False, eos_token_id=None)
    fuse(module)
    assert torch.equal(module.generate(ids, max_new_tokens=3, do_sample=False, eos_token_id=None), expected)


def test_layers_whose_weights_come_and_go(new_model, logits_of, kernel_device, called):
    """accelerate puts weights on meta whenever their module is not called: the norms' too."""
    from accelerate import cpu_offload

    module = new_model("llama")
    expected = logits_of(module)
    cpu_offload(module, kernel_device)
    assert module.model.norm.weight.is_meta
    assert fuse(module)["layers"] == 2
    with torch.inference_mode():
        logits = module(input_ids=torch.tensor([[1, 5, 9, 2, 7]], device=kernel_device)).logits[0]
    assert_close(logits.cpu(), expected)
    assert called["rms_norm"] == 5
    assert called["add_rms_norm"] == 0


def test_layers_that_are_streamed(new_model, logits_of, kernel_device, called):
    """The norm of a layer that is not there yet cannot take the sum before it; the model's last norm can."""
    module = new_model("llama").to(kernel_device)
    expected = logits_of(module)
    for number, layer in enumerate(module.model.layers):
        name = f"model.layers.{number}"
        held = {f"{name}.{key}": value.clone() for key, value in layer.state_dict().items()}
        LayerStream(name, layer, FileWeights({}, held), kernel_device, is_resident=False)
    assert module.model.layers[0].input_layernorm.weight.is_meta
    assert fuse(module) == {"norms": 5, "feed_forwards": 2, "rotations": 2, "layers": 2}
    for _ in range(2):
        called.clear()
        assert_close(logits_of(module), expected)
        assert called == {"rms_norm": 2, "add_rms_norm": 3, "rotary": 2, "gated_activation": 2}
    assert module.model.layers[0].input_layernorm.weight.is_meta
