"""What an adapter changes in a model, whatever kind of adapter it was: plain immutable values.

Every kind is a change of named modules' weights from W to W', and a weighted set of adapters is defined as
W + Σ scale · (W' - W) in every weight. For layers that are linear in their weights, which are nearly all, that is the
same as adding up what each adapter changes in the layer's output; nothing is ever merged.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from torch import Tensor

if TYPE_CHECKING:
    from cadenza.models.tokenizer import Tokenizer


@dataclass(frozen=True, slots=True)
class LowRank:
    """A change by `b @ a`; scaling (alpha / r, or alpha / sqrt(r) for rsLoRA) and DoRA's magnitudes are in b."""

    a: Tensor
    """[rank, in_features]; of an embedding [rank, tokens]; of experts [experts, rank, in_features]."""
    b: Tensor
    """[out_features, rank]; of an embedding [embedding_dim, rank]; of experts [experts, out_features, rank]."""

    @property
    def rank(self) -> int:
        return self.a.shape[-2]


@dataclass(frozen=True, slots=True)
class LinearChange:
    """Of a linear layer y = x Wᵀ + bias."""

    low_rank: LowRank | None = None
    gain: Tensor | None = None
    """[out_features] DoRA: the rows of W are multiplied by 1 + gain, before `low_rank` is added."""
    weight: Tensor | None = None
    """[out_features, in_features] in place of W (`modules_to_save`); more rows than W has where tokens were added."""
    bias: Tensor | None = None
    """[out_features] in place of the bias, or new where there was none."""
    rows: tuple[Tensor, Tensor] | None = None
    """([n] int64 token ids, [n, in_features]) rows in place of those of the weight: of an output layer some of whose
    tokens were trained (`trainable_token_indices`, tied or by its own name). Never beside `low_rank` or `gain`."""


@dataclass(frozen=True, slots=True)
class EmbeddingChange:
    """Of an embedding [tokens, embedding_dim]."""

    low_rank: LowRank | None = None
    gain: Tensor | None = None
    """[embedding_dim] DoRA: the columns of the table are multiplied by 1 + gain, before `low_rank` is added."""
    weight: Tensor | None = None
    """[tokens, embedding_dim] in place of the table, with more rows where tokens were added."""
    rows: tuple[Tensor, Tensor] | None = None
    """([n] int64 token ids, [n, embedding_dim]) rows in place of the table's. Never beside `low_rank`, `gain`."""


@dataclass(frozen=True, slots=True)
class ModuleChange:
    """Of any other module that computes each token by itself: a norm, a router, a mixture's experts."""

    values: Mapping[str, Tensor] = field(default_factory=dict)
    """In place of its parameters, by the parameter's name."""
    low_rank: Mapping[str, LowRank] = field(default_factory=dict)
    """`b @ a` is added to its parameters of shape [out_features, in_features] or [experts, out_features, in_features],
    and to those that lie as [experts, in_features, out_features], where a is then [experts, rank, out_features]."""


Change = LinearChange | EmbeddingChange | ModuleChange


@dataclass(frozen=True, slots=True, eq=False)
class Adapter:
    """One adapter's content. Two of equal digest compute the same."""

    digest: str
    """SHA-256, in hexadecimal, of everything that decides what it computes, and of the model that it was read for."""
    changes: Mapping[str, Change]
    """By the name of the module in the model."""
    rank: int
    """The largest of its low-rank changes to linear layers; 0 without any."""
    num_bytes: int
    """Of all its tensors."""
    tokenizer: "Tokenizer | None" = None
    """Where it brings one that differs from the model's: with more tokens, or another chat template."""
    num_tokens: int | None = None
    """The size of the vocabulary with the tokens that it adds; None: it adds none."""
    base_model_name: str | None = None
    """What it says it was trained on; only told, never checked."""
