"""LoRA's two matrices (Hu et al. 2021, arXiv:2106.09685): checked against the layer, scaled, the right way round.

Knows of one module at a time, and nothing of biases, magnitudes or saved weights.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from cadenza.models.adapters.adapter import LowRank
from cadenza.models.adapters.arrays import scaled, transposed
from cadenza.models.adapters.config import AdapterConfig
from cadenza.models.adapters.keys import Group
from cadenza.models.adapters.locate import CONFIG
from cadenza.models.errors import ModelError


@dataclass(frozen=True, slots=True)
class Terms:
    """What an adapter is read by."""

    config: AdapterConfig
    max_rank: int
    token_ids: Mapping[str, Sequence[int]]
    """Of `token_rows.token_ids`."""


def linear_low_rank(group: Group, terms: Terms, out_features: int) -> LowRank | None:
    """out_features: of the layer with the tokens that the adapter adds."""
    pair = group.take_pair("lora_A.weight", "lora_B.weight")
    if pair is None:
        return None
    a, b = pair
    name, in_features = _pattern_name(group, terms, "weight"), group.site.in_features
    is_turned = name != group.trained_name and group.site.is_transposed
    rank = checked_rank(name, terms)
    if is_turned:  # a `Conv1D`'s weight as a parameter: peft takes its first dimension for the outputs
        check_shapes(group.name, a, b, rank, (out_features, in_features), ("output", "input"))
        return LowRank(transposed(b), scaled(transposed(a), terms.config.scaling_of(name)))
    check_shapes(group.name, a, b, rank, (in_features, out_features), ("input", "output"))
    return LowRank(a, scaled(b, terms.config.scaling_of(name)))


def embedding_low_rank(group: Group, terms: Terms, num_tokens: int) -> LowRank | None:
    """num_tokens: rows of the table with the tokens that the adapter adds."""
    dim = group.site.shapes["weight"][1]
    pair = group.take_pair("lora_embedding_A", "lora_embedding_B")
    if pair is not None:
        a, b = pair
        rank = checked_rank(group.trained_name, terms)
        check_shapes(group.name, a, b, rank, (num_tokens, dim), ("tokens", "output"), stem="lora_embedding_")
        return LowRank(a, scaled(b, terms.config.scaling_of(group.trained_name)))
    name = _pattern_name(group, terms, "weight")
    pair = None if name == group.trained_name else group.take_pair("lora_A.weight", "lora_B.weight")
    if pair is None:
        return None
    a, b = pair  # the table as a parameter: [rank, dim] and [tokens, rank]
    check_shapes(group.name, a, b, checked_rank(name, terms), (dim, num_tokens), ("input", "tokens"))
    return LowRank(transposed(b), scaled(transposed(a), terms.config.scaling_of(name)))


def targeted_parameters(group: Group, config: AdapterConfig) -> list[str]:
    """Those of the module that the adapter names in target_parameters, in the module's order."""

    def is_targeted(parameter: str) -> bool:
        name = f"{group.trained_name}.{parameter}"
        return any(name == target or name.endswith(f".{target}") for target in config.target_parameters)

    return [parameter for parameter in group.site.shapes if is_targeted(parameter)]


def _pattern_name(group: Group, terms: Terms, parameter: str) -> str:
    """What rank and alpha patterns are matched with."""
    is_parameter = parameter in targeted_parameters(group, terms.config)
    return f"{group.trained_name}.{parameter}" if is_parameter else group.trained_name


def checked_rank(name: str, terms: Terms) -> int:
    rank = terms.config.rank_of(name)
    if rank > terms.max_rank:
        raise ModelError(f"{name} has rank {rank}, which is more than --max-lora-rank {terms.max_rank}")
    return rank


def check_shapes(
    name: str,
    a: Tensor,
    b: Tensor,
    rank: int,
    wanted: tuple[int, int],
    words: tuple[str, str],
    stem: str = "lora_",
) -> None:
    """a: [rank, wanted[0]]; b: [wanted[1], rank]."""
    for letter, tensor, axis in (("A", a, 1), ("B", b, 0)):
        if tensor.ndim != 2:
            raise ModelError(f"{name}.{stem}{letter} has {tensor.ndim} dimensions instead of 2")
        if tensor.shape[axis] != wanted[1 - axis]:
            word = words[1 - axis] if words[1 - axis] == "tokens" else f"{words[1 - axis]} features"
            raise ModelError(
                f"{name}.{stem}{letter} has {tensor.shape[axis]} {word}, the model's layer has {wanted[1 - axis]}"
            )
        if tensor.shape[1 - axis] != rank:
            raise ModelError(f"{name}.{stem}{letter} has rank {tensor.shape[1 - axis]}, {CONFIG} says {rank}")
