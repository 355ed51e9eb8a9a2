"""What is no gated layer, decoder layer or rotation, although it looks like one, is left alone."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn
from transformers import LlamaConfig
from transformers.activations import ACT2FN
from transformers.models.cohere import modeling_cohere
from transformers.models.gemma3n import modeling_gemma3n
from transformers.models.glm import modeling_glm
from transformers.models.gpt_neox import modeling_gpt_neox
from transformers.models.gpt_oss import modeling_gpt_oss
from transformers.models.llama import modeling_llama
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaMLP
from transformers.models.phi3.modeling_phi3 import Phi3MLP

pytest.importorskip("triton")

from cadenza.models.fusion.feed_forward import GatedForm, activation_kind, gated_form
from cadenza.models.fusion.fuse import fuse
from cadenza.models.fusion.layers import layer_form
from cadenza.models.fusion.norms import FusedNorm, norm_form
from cadenza.models.fusion.rotation import RotaryForm, rotary_form, rotating_forward

CONFIG = LlamaConfig(hidden_size=16, intermediate_size=24, num_attention_heads=2, num_key_value_heads=1)
CONFIG._attn_implementation = "eager"


class OtherNames(nn.Module):
    def __init__(self):
        super().__init__()
        self.w2, self.w1, self.w3 = nn.Linear(6, 4), nn.Linear(4, 6), nn.Linear(4, 6)
        self.nonlinearity = nn.GELU(approximate="tanh")

    def forward(self, hidden):
        return self.w2(self.w1(hidden) * self.nonlinearity(self.w3(hidden)))


class Clamped(LlamaMLP):
    def forward(self, x):
        return self.down_proj(self.act_fn(self.gate_proj(x)).clamp(max=20) * self.up_proj(x))


class Ungated(LlamaMLP):
    def forward(self, x):
        return self.down_proj(self.act_fn(self.gate_proj(x)) + self.up_proj(x))


class UpFirst(Phi3MLP):
    def forward(self, x):
        up, gate = self.gate_up_proj(x).chunk(2, dim=-1)
        return self.down_proj(self.activation_fn(gate) * up)


@pytest.mark.parametrize(
    ("module", "expected"),
    [
        (LlamaMLP(CONFIG), GatedForm("gate_proj", "up_proj", "down_proj", "act_fn", "silu")),
        (OtherNames(), GatedForm("w3", "w1", "w2", "nonlinearity", "gelu_tanh")),
        (Phi3MLP(CONFIG), GatedForm("gate_up_proj", None, "down_proj", "activation_fn", "silu", True)),
        (UpFirst(CONFIG), GatedForm("gate_up_proj", None, "down_proj", "activation_fn", "silu", False)),
        (Clamped(CONFIG), None),
        (Ungated(CONFIG), None),
        (nn.Sequential(nn.Linear(4, 4), nn.SiLU(), nn.Linear(4, 4)), None),
    ],
    ids=lambda value: type(value).__name__,
)
def test_a_gated_layer_is_known_by_what_it_computes(module, expected):
    assert gated_form(module.to("meta").eval()) == expected


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("silu", "silu"),
        ("swish", "silu"),
        ("gelu_pytorch_tanh", "gelu_tanh"),
        ("gelu_new", "gelu_tanh"),
        ("gelu", None),
        ("quick_gelu", None),
        ("relu", None),
        ("gelu_10", None),
    ],
)
def test_activations(name, expected):
    assert activation_kind(ACT2FN[name]) == expected


class Scaled(LlamaDecoderLayer):
    def forward(self, hidden_states, **kwargs):
        return super().forward(hidden_states, **kwargs) * 1.01


class Parallel(LlamaDecoderLayer):
    def forward(self, hidden_states, **kwargs):
        attended, _ = self.self_attn(hidden_states=self.input_layernorm(hidden_states), **kwargs)
        return hidden_states + attended + self.mlp(self.post_attention_layernorm(hidden_states))


class Swapped(LlamaDecoderLayer):
    """The names tell the contrary of what it does; one argument is not for the attention."""

    def forward(self, hidden_states, unread=None, **kwargs):
        attended, _ = self.self_attn(self.post_attention_layernorm(hidden_states), flag=True, **kwargs)
        hidden_states = attended + hidden_states
        return hidden_states + self.mlp(self.input_layernorm(hidden_states))


class Renaming(LlamaDecoderLayer):
    def forward(self, hidden_states, attention_mask=None, **kwargs):
        attended, _ = self.self_attn(hidden_states=self.input_layernorm(hidden_states), mask=attention_mask)
        hidden_states = attended + hidden_states
        return hidden_states + self.mlp(self.post_attention_layernorm(hidden_states))


def form_of(layer_class):
    layer = layer_class(CONFIG, 0).eval()
    norms = {
        part: FusedNorm(part, norm_form(part), part.forward) for part in layer.children() if norm_form(part)
    }
    return layer_form(layer, norms)


def test_a_layer_is_known_by_what_it_computes():
    names = ("input_layernorm", "self_attn", "post_attention_layernorm", "mlp")
    form = form_of(LlamaDecoderLayer)
    assert (form.first_norm, form.attention, form.second_norm, form.feed_forward) == names
    assert form.keyword == "hidden_states"
    assert form.kept == frozenset()
    form = form_of(Swapped)
    assert (form.first_norm, form.second_norm) == ("post_attention_layernorm", "input_layernorm")
    assert form.keyword is None
    assert form.defaults == {"flag": True}
    assert form.kept == {"unread"}


@pytest.mark.parametrize("layer_class", [Scaled, Parallel, Renaming])
def test_what_a_layer_adds_or_renames_is_seen(layer_class):
    assert form_of(layer_class) is None


def two_of_three(q, k, cos, sin):
    return modeling_llama.apply_rotary_pos_emb(q, k, cos, sin * 1.001)


@pytest.mark.parametrize(
    ("function", "expected"),
    [
        (modeling_llama.apply_rotary_pos_emb, RotaryForm("halves", is_partial=False)),
        (modeling_gpt_neox.apply_rotary_pos_emb, RotaryForm("halves", is_partial=True)),
        (modeling_gpt_oss.apply_rotary_pos_emb, RotaryForm("halves_of_pairs", is_partial=False)),
        (modeling_cohere.apply_rotary_pos_emb, RotaryForm("neighbours", is_partial=False)),
        (modeling_glm.apply_rotary_pos_emb, RotaryForm("neighbours_by_halves", is_partial=True)),
        (modeling_gemma3n.apply_rotary_pos_emb, None),  # one tensor at a time
        (modeling_llama.eager_attention_forward, None),
        (two_of_three, None),
    ],
)
def test_a_rotation_is_known_by_what_it_computes(function, expected):
    assert rotary_form(function) == expected


def test_a_forward_that_is_not_simple_stays():
    def wrapped(self, q, k, cos, sin):
        return modeling_llama.apply_rotary_pos_emb(q, k, cos, sin)

    wrapped.__wrapped__ = modeling_llama.LlamaAttention.forward
    module = SimpleNamespace()
    assert rotating_forward(type("Attention", (nn.Module,), {"forward": wrapped})()) is None
    held = modeling_llama.apply_rotary_pos_emb

    def closed(self, q, k, cos, sin):
        return held(q, k, cos, sin), module

    assert rotating_forward(type("Attention", (nn.Module,), {"forward": closed})()) is None


def test_an_instance_with_a_forward_of_its_own_is_left_alone():
    module = LlamaMLP(CONFIG).eval()
    module.forward = lambda x: x
    assert fuse(module) == {"norms": 0, "feed_forwards": 0, "rotations": 0, "layers": 0}
    x = torch.ones(1)
    assert module(x) is x
