"""compressed-tensors (llm-compressor): int8 and fp8 as they are, integers of fewer bits packed into int32 words.

Scales are per tensor, per output channel, per group of inputs or per block of both. Activation scales, and scales of a
KV cache, are left unread: activations stay in the precision that is computed in. Needs only torch.
"""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from cadenza.models.errors import ModelError
from cadenza.models.prequantized.base import Format, Parts, Stored, layers_with, parts_of
from cadenza.models.prequantized.lattice import Lattice, by_output, group_of_each, unpack

_LAYOUTS = (
    "dense",
    "int-quantized",
    "float-quantized",
    "naive-quantized",
    "pack-quantized",
    "mixed-precision",
)
_IGNORED = (
    "input_scale",
    "input_zero_point",
    "output_scale",
    "output_zero_point",
    "k_scale",
    "v_scale",
    "q_scale",
)
_FLOAT8 = (torch.float8_e4m3fn, torch.float8_e5m2)
Blocks = Sequence[tuple[int, int]]
"""Outputs and inputs that share a scale: what the configuration allows."""


def compressed_tensors(config: Mapping[str, Any]) -> Format:
    groups = list((config.get("config_groups") or {}).values())
    layouts = {config.get("format") or "dense"} | {group["format"] for group in groups if group.get("format")}
    if unknown := sorted(layouts - set(_LAYOUTS)):
        raise ModelError(
            f"compressed-tensors in the {unknown[0]} layout cannot be read; {', '.join(_LAYOUTS)} can"
        )
    if (config.get("transform_config") or {}).get("config_groups"):
        raise ModelError("compressed-tensors with transforms (transform_config) cannot be read")
    if ((config.get("sparsity_config") or {}).get("format") or "dense") != "dense":
        raise ModelError("compressed-tensors with sparse weights (sparsity_config) cannot be read")
    weights = [group.get("weights") or {} for group in groups]
    bits = {int(scheme.get("num_bits", 8)) for scheme in weights if scheme}
    sizes = {scheme.get("group_size") for scheme in weights if scheme}
    kinds = "/".join(
        sorted({f"{scheme.get('type', 'int')}{scheme.get('num_bits', 8)}" for scheme in weights if scheme})
    )
    return Format(
        f"compressed-tensors {kinds}".rstrip(),
        max(bits, default=16),
        partial(_weights, bits=bits, blocks=[_block_of(scheme) for scheme in weights]),
        _IGNORED,
        next(iter(sizes)) if len(sizes) == 1 else None,
    )


def _block_of(scheme: Mapping[str, Any]) -> tuple[int, int]:
    if scheme.get("block_structure"):
        rows, columns = scheme["block_structure"]
        return int(rows), int(columns)
    group_size = int(scheme.get("group_size") or 0)
    return 1, group_size if group_size > 0 else 2**62


def _weights(stored: Parts, bits: set[int], blocks: Blocks) -> dict[str, Stored]:
    found = {}
    for layer in layers_with(stored, "weight_scale"):
        names = parts_of(stored, layer, "weight", "weight_scale", "weight_zero_point", "weight_g_idx")
        if "weight" in names:
            weight = stored[names["weight"]]
            if weight.dtype not in (torch.int8, torch.uint8, *_FLOAT8):
                raise ModelError(
                    f"{layer}weight has scales but is {weight.dtype}, which is no quantized type"
                )
            found[layer + "weight"] = Stored(names, tuple(weight.shape), partial(_read_plain, blocks=blocks))
    for layer in layers_with(stored, "weight_packed"):
        names = parts_of(
            stored,
            layer,
            "weight_packed",
            "weight_scale",
            "weight_zero_point",
            "weight_g_idx",
            "weight_shape",
        )
        if missing := {"weight_scale", "weight_shape"} - names.keys():
            raise ModelError(f"{layer}weight_packed lacks its {min(missing)}")
        out_features, in_features = (int(extent) for extent in stored[names["weight_shape"]])
        width = stored[names["weight_packed"]].shape[1]
        fitting = [number for number in sorted(bits) if -(-in_features * number // 32) == width]
        if len(fitting) != 1:
            raise ModelError(
                f"{layer}weight_packed has {width} words a row for {in_features} weights: unknown packing"
            )
        shape = (out_features, in_features)
        found[layer + "weight"] = Stored(
            names, shape, partial(_read_packed, shape=shape, bits=fitting[0], blocks=blocks)
        )
    return found


def _read_plain(parts: Parts, blocks: Blocks) -> Lattice:
    return _lattice(parts["weight"], parts, parts.get("weight_zero_point"), blocks)


def _read_packed(parts: Parts, shape: tuple[int, int], bits: int, blocks: Blocks) -> Lattice:
    """Integers are stored more by half of their range, so that none is negative."""
    half = 1 << bits - 1
    values = unpack(parts["weight_packed"], bits)[:, : shape[1]].to(torch.int16) - half
    zeros = parts.get("weight_zero_point")
    if zeros is not None and zeros.dtype == torch.int32 and parts["weight_scale"].shape[0] != zeros.shape[0]:
        zeros = unpack(zeros.T.contiguous(), bits).T[: shape[0]].to(torch.int16) - half
    return _lattice(values, parts, zeros, blocks)


def _lattice(values: Tensor, parts: Parts, zeros: Tensor | None, blocks: Blocks) -> Lattice:
    scales, (out_features, in_features) = parts["weight_scale"].float(), values.shape
    rows_together = None
    group_of = parts.get("weight_g_idx")
    if group_of is not None and bool((group_of < 0).any()):
        group_of = None
    elif group_of is not None:
        group_of = group_of.long()
    if scales.ndim == 2 and (scales.shape[1] > 1 or 1 < len(scales) < out_features):
        rows_together, group_size = _block(scales, values.shape, blocks)
        group_of = group_of_each(in_features, group_size) if group_of is None else group_of
    spread = None if zeros is None else by_output(zeros.float(), out_features, rows_together)
    return Lattice(values, by_output(scales, out_features, rows_together), spread, group_of)


def _block(scales: Tensor, shape: Sequence[int], blocks: Blocks) -> tuple[int, int]:
    """The one (outputs, inputs) block of the configuration that explains this many scales."""
    fitting = {
        (rows, columns)
        for rows, columns in blocks
        if (-(-shape[0] // rows), -(-shape[1] // columns)) == tuple(scales.shape)
    }
    if len(fitting) != 1:
        raise ModelError(
            f"a weight {list(shape)} has scales {list(scales.shape)}, which fit no group of its checkpoint"
        )
    return fitting.pop()
