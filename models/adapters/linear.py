"""Changes of linear layers and embeddings: low-rank, DoRA's magnitudes, biases, whole weights, rows of tokens.

Knows one module at a time; what the vocabulary's modules must agree about is checked elsewhere.
"""

import numpy as np
from torch import Tensor

from cadenza.models.adapters import dora
from cadenza.models.adapters.adapter import EmbeddingChange, LinearChange, LowRank
from cadenza.models.adapters.arrays import as_array, as_tensor
from cadenza.models.adapters.base import BaseWeights
from cadenza.models.adapters.keys import Group
from cadenza.models.adapters.low_rank import Terms, embedding_low_rank, linear_low_rank
from cadenza.models.adapters.saved import Vocabulary, take_parameter
from cadenza.models.adapters.token_rows import Rows, extended, take_rows
from cadenza.models.errors import ModelError


def linear_change(group: Group, terms: Terms, base: BaseWeights, vocabulary: Vocabulary) -> LinearChange:
    weight, num_rows, rows = _weight_and_rows(group, terms, base, vocabulary, group.site.in_features)
    out_features = group.site.out_features if num_rows is None else num_rows
    bias = take_parameter(group, "bias", vocabulary)
    bias = _with_lora_bias(group, terms, base, bias, out_features)
    low_rank = linear_low_rank(group, terms, out_features)
    magnitude = _take_magnitude(group, terms, low_rank)
    if low_rank is None or magnitude is None:
        return LinearChange(low_rank, None, weight, bias, rows)
    low_rank, gain = dora.linear(group.name, magnitude, low_rank, weight, base)
    return LinearChange(low_rank, gain, weight, bias, rows)


def embedding_change(
    group: Group, terms: Terms, base: BaseWeights, vocabulary: Vocabulary
) -> EmbeddingChange:
    num_tokens, dim = group.site.shapes["weight"]
    weight, num_rows, rows = _weight_and_rows(group, terms, base, vocabulary, dim)
    low_rank = embedding_low_rank(group, terms, num_tokens if num_rows is None else num_rows)
    magnitude = _take_magnitude(group, terms, low_rank)
    if low_rank is None or magnitude is None:
        return EmbeddingChange(low_rank, None, weight, rows)
    low_rank, gain = dora.embedding(group.name, magnitude, low_rank, weight, base)
    return EmbeddingChange(low_rank, gain, weight, rows)


def _weight_and_rows(
    group: Group, terms: Terms, base: BaseWeights, vocabulary: Vocabulary, dim: int
) -> tuple[Tensor | None, int | None, Rows | None]:
    """(the weight in place of the model's, its number of rows, rows in place of single ones)."""
    weight = take_parameter(group, "weight", vocabulary)
    if weight is not None and vocabulary.is_base(group, weight, base):
        weight = None
    rows = take_rows(group, terms.token_ids, dim)
    if rows is not None and (whole := extended(group, weight, rows, base)) is not None:
        weight, rows = whole, None
    return weight, None if weight is None else weight.shape[0], rows


def _take_magnitude(group: Group, terms: Terms, low_rank: LowRank | None) -> Tensor | None:
    """DoRA's, which is there exactly where the configuration and the matrices say so."""
    magnitude, is_dora = group.take("lora_magnitude_vector"), low_rank is not None and terms.config.use_dora
    if is_dora and magnitude is None:
        raise ModelError(f"the adapter has use_dora and no {group.name}.lora_magnitude_vector")
    if magnitude is not None and not is_dora:
        raise ModelError(
            f"the adapter has {group.name}.lora_magnitude_vector without use_dora or its matrices"
        )
    return magnitude


def _with_lora_bias(
    group: Group, terms: Terms, base: BaseWeights, bias: Tensor | None, out_features: int
) -> Tensor | None:
    """lora_bias: the second matrix has a bias of its own, which is scaled as the matrix is."""
    extra = group.take("lora_B.bias")
    if extra is None:
        return bias
    if tuple(extra.shape) != (out_features,):
        raise ModelError(f"{group.name}.lora_B.bias has shape {tuple(extra.shape)}, not ({out_features},)")
    values = as_array(extra) * terms.config.scaling_of(group.trained_name)
    before = bias if bias is not None else base.bias(group.name)
    if before is None:
        return as_tensor(values)
    return as_tensor(np.add(as_array(before), values))
