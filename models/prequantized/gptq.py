"""GPTQ (AutoGPTQ, GPTQModel) and AWQ (AutoAWQ): integers packed into int32 words, scales and zeros by groups.

Both store a layer's weight transposed, [in, out]. GPTQ packs along the inputs, and keeps zeros less one (checkpoint
format "gptq"; "gptq_v2" keeps them as they are); g_idx names each input's group, in any order with act-order.
AWQ packs eight 4-bit integers along the outputs in the order 0 2 4 6 1 3 5 7.
"""

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from cadenza.models.errors import ModelError
from cadenza.models.prequantized.base import Format, Parts, Stored, layers_with, parts_of
from cadenza.models.prequantized.lattice import Lattice, group_of_each, unpack

_AWQ_PLACES = torch.tensor([0, 4, 1, 5, 2, 6, 3, 7])
"""Where in a word the integer of each of eight outputs is."""


def gptq(config: Mapping[str, Any]) -> Format:
    kind = config.get("checkpoint_format", "gptq")
    if config.get("is_marlin_format") or kind not in ("gptq", "gptq_v2"):
        raise ModelError(f"GPTQ checkpoints in the {kind} layout cannot be read; only gptq and gptq_v2 can")
    bits, group_size = int(config.get("bits", 4)), int(config.get("group_size", 128))
    if bits not in (2, 3, 4, 8):
        raise ModelError(f"GPTQ with {bits} bits is not known; 2, 3, 4 and 8 are")
    return Format(
        f"GPTQ {bits}-bit",
        bits,
        partial(_gptq_weights, offset=1 if kind == "gptq" else 0, group_size=group_size),
        group_size=group_size if group_size > 0 else None,
        is_reordered=bool(config.get("desc_act")) and group_size > 0,
    )


def awq(config: Mapping[str, Any]) -> Format:
    version = str(config.get("version") or config.get("format") or "gemm").lower()
    if version != "gemm":
        raise ModelError(f"AWQ checkpoints in the {version} layout cannot be read; only gemm can")
    bits, group_size = int(config.get("bits", config.get("w_bit", 4))), int(config.get("group_size", 128))
    if bits != 4:
        raise ModelError(f"AWQ with {bits} bits is not known; 4 is")
    return Format("AWQ 4-bit", bits, _awq_weights, group_size=group_size if group_size > 0 else None)


def _gptq_weights(stored: Parts, offset: int, group_size: int) -> dict[str, Stored]:
    found = {}
    for layer in layers_with(stored, "qweight"):
        names = _required(stored, layer, "GPTQ") | parts_of(stored, layer, "g_idx")
        out_features = stored[names["scales"]].shape[1]
        bits = _bits_of(stored[names["qzeros"]], out_features, layer)
        in_features = stored[names["qweight"]].shape[0] * 32 // bits
        num_groups = len(stored[names["scales"]])
        if "g_idx" not in names and num_groups != (1 if group_size < 1 else -(-in_features // group_size)):
            raise ModelError(
                f"{layer}scales has {num_groups} groups for {in_features} inputs, not of {group_size} each"
            )
        read = partial(_read_gptq, bits=bits, offset=offset, group_size=group_size)
        found[layer + "weight"] = Stored(names, (out_features, in_features), read)
    return found


def _awq_weights(stored: Parts) -> dict[str, Stored]:
    found = {}
    for layer in layers_with(stored, "qweight"):
        names = _required(stored, layer, "AWQ")
        qweight, scales = stored[names["qweight"]], stored[names["scales"]]
        if (
            _bits_of(stored[names["qzeros"]], scales.shape[1], layer) != 4
            or qweight.shape[1] * 8 != scales.shape[1]
        ):
            raise ModelError(f"{layer}qweight {list(qweight.shape)} is not in AWQ's gemm layout")
        found[layer + "weight"] = Stored(names, (scales.shape[1], qweight.shape[0]), _read_awq)
    return found


def _required(stored: Parts, layer: str, method: str) -> dict[str, str]:
    names = parts_of(stored, layer, "qweight", "qzeros", "scales")
    if missing := {"qzeros", "scales"} - names.keys():
        raise ModelError(f"{layer}qweight lacks its {min(missing)}, which {method} weights need")
    return names


def _bits_of(qzeros: Tensor, out_features: int, layer: str) -> int:
    """Bits of one zero, hence of one weight: layers of a checkpoint may differ."""
    bits = qzeros.shape[1] * 32 // out_features
    if bits not in (2, 3, 4, 8) or bits * out_features != qzeros.shape[1] * 32:
        raise ModelError(
            f"{layer}qzeros has {qzeros.shape[1]} words for {out_features} outputs: not a GPTQ or AWQ layout"
        )
    return bits


def _read_gptq(parts: Parts, bits: int, offset: int, group_size: int) -> Lattice:
    values = unpack(parts["qweight"].T.contiguous(), bits)
    zeros = (unpack(parts["qzeros"], bits) + offset) & (2**bits - 1)
    scales = parts["scales"].float()
    in_features = values.shape[1]
    if "g_idx" in parts:
        group_of: Tensor | None = parts["g_idx"].long()
        if torch.equal(parts["g_idx"].long(), torch.arange(in_features) * len(scales) // in_features):
            group_of = None
    else:
        group_of = None if group_size < 1 else group_of_each(in_features, group_size)
    return Lattice(values, scales.T, zeros.T, group_of)


def _read_awq(parts: Parts) -> Lattice:
    qweight, qzeros = (_in_output_order(unpack(parts[name], 4)) for name in ("qweight", "qzeros"))
    return Lattice(qweight.T.contiguous(), parts["scales"].float().T, qzeros.T)


def _in_output_order(integers: Tensor) -> Tensor:
    """[rows, out] as they lie in the words → [rows, out] by output."""
    return integers.view(len(integers), -1, 8)[:, :, _AWQ_PLACES].view(len(integers), -1)
