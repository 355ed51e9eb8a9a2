"""Puts kernels into a transformers model, instance by instance, wherever a trial shows that they compute the same.

To be called once, when layers are packed and before the model is compared with itself (`decoding.probe`). Whatever is
not recognised stays as it is; whatever is given tensors of another device computes as before.
"""

from itertools import pairwise
from typing import Any

from torch import nn

from cadenza.models.fusion.feed_forward import FusedFeedForward, gated_form
from cadenza.models.fusion.layers import FusedLayer, layer_form
from cadenza.models.fusion.norms import FusedNorm, norm_form
from cadenza.models.fusion.rotation import rotating_forward
from cadenza.models.fusion.stand_in import own_forward, replace_forward


def fuse(module: nn.Module) -> dict[str, int]:
    """How many were replaced of "norms", "feed_forwards", "rotations" and "layers". Needs Triton."""
    parts = [(part, original) for part in module.modules() if (original := own_forward(part)) is not None]
    norms: dict[nn.Module, FusedNorm] = {}
    layers: dict[nn.Module, FusedLayer] = {}
    count = {"norms": 0, "feed_forwards": 0, "rotations": 0, "layers": 0}

    def put(kind: str, part: nn.Module, forward: Any) -> Any:
        replace_forward(part, forward)
        count[kind] += 1
        return forward

    for part, original in parts:
        if (norm := norm_form(part)) is not None:
            norms[part] = put("norms", part, FusedNorm(part, norm, original))
        elif (gated := gated_form(part)) is not None:
            put("feed_forwards", part, FusedFeedForward(part, gated, original))
        elif (rotating := rotating_forward(part)) is not None:
            put("rotations", part, rotating)
    first_norms: dict[FusedLayer, FusedNorm] = {}
    for part, original in parts:
        if (form := layer_form(part, norms)) is not None:
            second = norms[part.get_submodule(form.second_norm)]
            layers[part] = put("layers", part, FusedLayer(part, form, second, original))
            first_norms[layers[part]] = norms[part.get_submodule(form.first_norm)]
    _hand_on(module, layers, first_norms, norms)
    return count


def _hand_on(
    module: nn.Module,
    layers: dict[nn.Module, FusedLayer],
    first_norms: dict[FusedLayer, FusedNorm],
    norms: dict[nn.Module, FusedNorm],
) -> None:
    """Tell each layer which norm comes next, most likely: a wrong guess costs a norm that nobody asks for."""
    for parent in module.modules():
        for stack in parent.children():
            if not isinstance(stack, nn.ModuleList):
                continue
            chain = [layers.get(part) for part in stack]
            for layer, following in pairwise(chain):
                if layer is not None and following is not None:
                    layer.following = first_norms[following]
            last = chain[-1] if chain else None
            if last is not None:
                width = first_norms[last].width
                final = [norms[child] for child in parent.children() if child in norms]
                final = [norm for norm in final if norm.width == width]
                last.following = final[0] if len(final) == 1 else None
