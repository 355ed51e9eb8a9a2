"""Which norms are recognised, and what a norm finds of its sum."""

import pytest
import torch
from torch import nn
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.gemma4.modeling_gemma4 import Gemma4RMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.olmo2.modeling_olmo2 import Olmo2RMSNorm

pytest.importorskip("triton")

from cadenza.models.fusion.norms import FusedNorm, NormForm, norm_form
from cadenza.models.fusion.stand_in import own_forward, replace_forward


class Custom(LlamaRMSNorm):
    """Another name, another formula."""

    def forward(self, x):
        wide = x.float()
        return (
            wide / (wide.square().sum(-1, keepdim=True) / wide.shape[-1] + self.variance_epsilon).sqrt()
        ).to(x.dtype) * self.weight


class EpsOutside(Custom):
    def forward(self, x):
        return x / (x.square().mean(-1, keepdim=True).sqrt() + self.variance_epsilon) * self.weight


class Clipped(Custom):
    def forward(self, x):
        return super().forward(x.clamp(-40, 40))


class Shifted(Custom):
    def __init__(self, width):
        super().__init__(width)
        self.bias = nn.Parameter(torch.zeros(width))


class Doubled(Custom):
    def __init__(self, width, factor):
        super().__init__(width)
        self.factor = factor

    def forward(self, x):
        return super().forward(x) * self.factor


@pytest.mark.parametrize(
    ("module", "expected"),
    [
        (LlamaRMSNorm(32, eps=1e-5), NormForm(1e-5, 0.0, True)),
        (Custom(32), NormForm(1e-6, 0.0, True)),
        (Olmo2RMSNorm(32), NormForm(1e-6, 0.0, False)),
        (GemmaRMSNorm(32), NormForm(1e-6, 1.0, False)),
        (Gemma4RMSNorm(32), NormForm(1e-6, 0.0, False)),
        (Gemma4RMSNorm(32, with_scale=False), NormForm(1e-6, 0.0, False)),
        (nn.RMSNorm(32, eps=1e-6), NormForm(1e-6, 0.0, False)),
        (Doubled(32, 1.0), NormForm(1e-6, 0.0, True)),
        (Doubled(32, 2.0), None),
        (EpsOutside(32), None),
        (Clipped(32), None),
        (Shifted(32), None),
        (nn.LayerNorm(32), None),
        (nn.LayerNorm(32, bias=False), None),
        (nn.Linear(32, 32), None),
    ],
    ids=lambda value: type(value).__name__,
)
def test_a_norm_is_known_by_what_it_computes(module, expected):
    assert norm_form(module) == expected


def test_weights_are_not_asked():
    assert norm_form(LlamaRMSNorm(32).to("meta")) == NormForm(1e-6, 0.0, True)


@pytest.fixture
def fused(kernel_device):
    module = LlamaRMSNorm(16).to(kernel_device).requires_grad_(False)
    module.weight.copy_(torch.randn(16))
    form, original = norm_form(module), own_forward(module)
    norm = FusedNorm(module, form, original)
    replace_forward(module, norm)
    return norm


def random(device, seed):
    return torch.randn(1, 3, 16, generator=torch.Generator().manual_seed(seed)).to(device)


def test_the_norm_of_a_sum_is_found_once_and_only_with_it(fused, kernel_device, called):
    x, residual = random(kernel_device, 1), random(kernel_device, 2)
    total = fused.add(x, residual)
    assert torch.equal(total, x + residual)
    expected = type(fused.module).forward(fused.module, total)
    equal = total.clone()
    other = fused.module(random(kernel_device, 3))
    assert not torch.allclose(other, expected)
    torch.testing.assert_close(fused.module(equal), expected)
    assert called == {"add_rms_norm": 1, "rms_norm": 2}
    torch.testing.assert_close(fused.module(total), expected)
    assert called == {"add_rms_norm": 1, "rms_norm": 2}
    assert not vars(total)  # nothing stays with it
    torch.testing.assert_close(fused.module(total), expected)
    assert called["rms_norm"] == 3


def test_another_norm_does_not_take_it(fused, kernel_device, called):
    other = LlamaRMSNorm(16).to(kernel_device).requires_grad_(False)
    replace_forward(other, FusedNorm(other, norm_form(other), own_forward(other)))
    total = fused.add(random(kernel_device, 1), random(kernel_device, 2))
    torch.testing.assert_close(other(total), type(other).forward(other, total))
    torch.testing.assert_close(fused.module(total), type(other).forward(fused.module, total))
    assert called == {"add_rms_norm": 1, "rms_norm": 1}


def test_a_sum_that_was_changed_is_normed_anew(fused, kernel_device):
    total = fused.add(random(kernel_device, 1), random(kernel_device, 2))
    total[0, 1] += 3
    torch.testing.assert_close(fused.module(total), type(fused.module).forward(fused.module, total))


def test_what_does_not_fit_is_added_by_torch(fused, kernel_device, called):
    x, row = random(kernel_device, 1), random(kernel_device, 2)[:, :1]
    assert torch.equal(fused.add(x, row), row + x)
    assert torch.equal(fused.add(x.double(), x), x + x.double())
    narrow = x[..., :8]
    assert torch.equal(fused.add(narrow, narrow), narrow + narrow)
    assert not called


def test_other_arguments_go_to_its_own_forward(fused, kernel_device, called):
    x = random(kernel_device, 1)
    expected = fused.module(x)
    torch.testing.assert_close(fused.module(hidden_states=x), expected)
    wanting = x.clone().requires_grad_()
    fused.module(wanting).sum().backward()
    assert wanting.grad is not None
    assert called["rms_norm"] == 1
