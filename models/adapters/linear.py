"""Changes of linear layers and embeddings: low-rank, DoRA's magnitudes, biases, whole weights, rows of tokens.

Knows one module at a time; what the vocabulary's modules must agree about is checked elsewhere.
"""

import numpy as np
from torch import Tensor

from cadenza.models.adapters import dora
from cadenza.models.adapters.adapter import EmbeddingChange, LinearChange
from cadenza.models.adapters.arrays import as_array, as_tensor
from cadenza.models.adapters.base import BaseWeights
from cadenza.models.adapters.keys import Group
from cadenza.models.adapters.low_rank import Terms, embedding_low_rank, linear_low_rank
from cadenza.models.adapters.saved import Vocabulary, take_parameter
from cadenza.models.errors import ModelError


def linear_change(group: Group, terms: Terms, base: BaseWeights, vocabulary: Vocabulary) -> LinearChange:
    if not group.site.is_everywhere:
        raise ModelError(
            f"{group.name} cannot be adapted: the model does not give it every token of a sequence in order"
        )
    weight = take_parameter(group, "weight", vocabulary)
    bias = take_parameter(group, "bias", vocabulary)
    out_features = group.site.out_features if weight is None else weight.shape[0]
    if weight is not None and vocabulary.is_base(group, weight, base):
        weight = None
    low_rank = linear_low_rank(group, terms, out_features)
    bias = _with_lora_bias(group, terms, base, bias, out_features)
    gain = None
    magnitude = group.take("lora_magnitude_vector")
    if low_rank is not None and terms.config.use_dora:
        if magnitude is None:
            raise ModelError(f"the adapter has use_dora and no {group.name}.lora_magnitude_vector")
        low_rank, gain = dora.linear(group.name, magnitude, low_rank, weight, base)
    elif magnitude is not None:
        raise ModelError(
            f"the adapter has {group.name}.lora_magnitude_vector without use_dora or its matrices"
        )
    return LinearChange(low_rank, gain, weight, bias)


def embedding_change(
    group: Group, terms: Terms, base: BaseWeights, vocabulary: Vocabulary
) -> EmbeddingChange:
    weight = take_parameter(group, "weight", vocabulary)
    num_tokens = group.site.shapes["weight"][0] if weight is None else weight.shape[0]
    if weight is not None and vocabulary.is_base(group, weight, base):
        weight = None
    low_rank = embedding_low_rank(group, terms, num_tokens)
    gain = None
    magnitude = group.take("lora_magnitude_vector")
    if low_rank is not None and terms.config.use_dora:
        if magnitude is None:
            raise ModelError(f"the adapter has use_dora and no {group.name}.lora_magnitude_vector")
        low_rank, gain = dora.embedding(group.name, magnitude, low_rank, weight, base)
    elif magnitude is not None:
        raise ModelError(
            f"the adapter has {group.name}.lora_magnitude_vector without use_dora or its matrices"
        )
    return EmbeddingChange(low_rank, gain, weight)


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
