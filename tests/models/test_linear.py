"""Packed linear layers: the product in float64, and each row the same to the last bit in whatever company."""

import copy

import pytest
import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM
from transformers.activations import ACT2FN
from transformers.pytorch_utils import Conv1D

from cadenza.models.activation import RowwiseActivation
from cadenza.models.linear import PACKED_DTYPES, PackedLinear, PackedMember
from cadenza.models.packing import can_pack, pack

CPU = torch.device("cpu")
SHAPES = [(1, 1), (7, 5), (48, 32), (100, 333), (576, 192), (1024, 64), (1025, 64), (1536, 576), (4099, 9)]
COUNTS = [1, 2, 3, 4, 7, 8, 9, 16, 17, 31, 32, 33, 63, 64, 65, 99]

pytestmark = pytest.mark.skipif(not can_pack(CPU, torch.float32), reason="this torch has no oneDNN")


def random_layer(in_features: int, out_features: int, *, bias: bool = True) -> tuple[PackedLinear, nn.Linear]:
    torch.manual_seed(in_features * 10_007 + out_features)
    linear = nn.Linear(in_features, out_features, bias=bias).requires_grad_(False)
    return PackedLinear(linear.weight, linear.bias), linear


@pytest.mark.parametrize("dtype", [dtype for dtype in PACKED_DTYPES if dtype != torch.float32])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("in_features", "out_features"), SHAPES)
def test_in_half_precision_the_result_is_rounded_and_a_row_is_alone(
    in_features: int, out_features: int, bias: bool, dtype: torch.dtype
):
    torch.manual_seed(in_features * 10_007 + out_features)
    linear = nn.Linear(in_features, out_features, bias=bias).requires_grad_(False).to(dtype)
    packed = PackedLinear(linear.weight, linear.bias)
    assert packed.weight.dtype == dtype
    x = torch.randn(100, in_features).to(dtype)
    everything = packed(x)
    assert everything.dtype == dtype
    expected = x.double() @ linear.weight.double().T + (linear.bias.double() if bias else 0.0)
    step = torch.finfo(
        dtype
    ).eps  # rounded once after the sum, which has errors of its own, and perhaps the bias
    torch.testing.assert_close(everything.double(), expected, rtol=step, atol=1e-2 * step)
    for count in COUNTS:
        for first in (0, 100 - count):
            assert torch.equal(packed(x[first : first + count]), everything[first : first + count])


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("in_features", "out_features"), SHAPES)
def test_the_product_is_that_of_float64(in_features: int, out_features: int, bias: bool):
    packed, linear = random_layer(in_features, out_features, bias=bias)
    for shape in ((in_features,), (1, in_features), (2, 9, in_features)):
        x = torch.randn(shape)
        expected = x.double() @ linear.weight.double().T
        if bias:
            expected += linear.bias.double()
        torch.testing.assert_close(packed(x).double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("in_features", "out_features"), SHAPES)
def test_a_row_does_not_depend_on_the_number_of_rows(in_features: int, out_features: int):
    packed, _ = random_layer(in_features, out_features)
    x = torch.randn(100, in_features)
    everything = packed(x)
    for count in COUNTS:
        for first in (0, 100 - count):
            assert torch.equal(packed(x[first : first + count]), everything[first : first + count])


def test_rows_need_not_lie_together():
    packed, _ = random_layer(64, 32)
    x = torch.randn(40, 128)
    assert torch.equal(packed(x[::3, :64]), packed(x[:, :64].contiguous())[::3])
    assert torch.equal(packed(x[:, 64:].view(2, 20, 64).transpose(0, 1)[5]), packed(x[[5, 25], 64:]))


def test_no_rows_give_no_rows():
    packed, _ = random_layer(64, 32)
    assert packed(torch.empty(0, 64)).shape == (0, 32)


def test_every_linear_layer_is_replaced_and_nothing_else():
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        tie_word_embeddings=True,
    )
    model = LlamaForCausalLM(config).eval().requires_grad_(False)
    before = copy.deepcopy(model)
    assert pack(model) == 2 * 7 + 1
    assert pack(model) == 0
    assert not any(type(part) is nn.Linear for part in model.modules())
    ids = torch.arange(20)[None]
    torch.testing.assert_close(model(ids).logits, before(ids).logits, rtol=1e-4, atol=1e-5)
    # the embedding that the head was tied to is still there
    assert torch.equal(model.get_input_embeddings().weight, before.get_input_embeddings().weight)


def test_conv1d_is_a_linear_layer_with_its_weight_transposed():
    conv = Conv1D(nf=48, nx=32).requires_grad_(False)
    nn.init.normal_(conv.bias)
    parent = nn.ModuleDict({"layer": conv})
    x = torch.randn(5, 32)
    expected = conv(x)
    assert pack(parent) == 1
    torch.testing.assert_close(parent["layer"](x), expected, rtol=1e-5, atol=1e-5)


def test_gpt2_gives_the_logits_that_it_gave():
    model = GPT2LMHeadModel(GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=2)).eval()
    before = copy.deepcopy(model)
    assert pack(model.requires_grad_(False)) == 2 * 4 + 1
    ids = torch.arange(20)[None]
    torch.testing.assert_close(model(ids).logits, before(ids).logits, rtol=1e-4, atol=1e-5)


def test_subclasses_of_linear_layers_are_left_alone():
    """Whoever made one, such as a quantizer, computes something else than a plain product."""

    class Doubled(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return 2 * super().forward(x)

    parent = nn.ModuleDict({"layer": Doubled(4, 4)})
    assert pack(parent) == 0
    assert type(parent["layer"]) is Doubled


def test_what_cannot_be_packed_says_so():
    assert not can_pack(torch.device("cuda"), torch.float32)
    assert not can_pack(CPU, torch.float64)
    assert can_pack(CPU, torch.float16) == torch.ops.mkldnn._is_mkldnn_fp16_supported()
    assert can_pack(CPU, torch.bfloat16) == torch.ops.mkldnn._is_mkldnn_bf16_supported()


@pytest.mark.parametrize("dtype", PACKED_DTYPES)
def test_fused_layers_of_any_precision_are_the_layers(dtype: torch.dtype):
    """Of which one has a bias and one has none."""
    torch.manual_seed(0)
    parent = nn.ModuleDict({"q": nn.Linear(64, 32), "k": nn.Linear(64, 16, bias=False)})
    parent = parent.requires_grad_(False).to(dtype)
    x = torch.randn(5, 64).to(dtype)
    expected = [parent[name](x) for name in "qk"]
    pack(parent, [(parent, ["q", "k"])])
    for name, one in zip("qk", expected, strict=True):
        assert type(parent[name]) is PackedMember
        assert parent[name].weight.dtype == dtype
        torch.testing.assert_close(parent[name](x), one)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["silu", "gelu", "gelu_pytorch_tanh", "gelu_new"])
def test_an_activation_of_a_row_is_the_same_in_any_company(name: str, dtype: torch.dtype):
    """torch's own is not, for widths that do not fill whole vectors."""
    activation = RowwiseActivation(ACT2FN[name])
    for width in (100, 333, 576):
        x = (torch.randn(70, width, generator=torch.Generator().manual_seed(width)) * 3).to(dtype)
        everything = activation(x)
        torch.testing.assert_close(everything, ACT2FN[name](x))
        for count in (*range(1, 9), 31, 32, 33, 69):
            assert torch.equal(activation(x[:count]), everything[:count])
