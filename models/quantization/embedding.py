"""A token embedding in int8: one scale per token, rows dequantized as they are looked up."""

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cadenza.models.quantization.int8 import quantize_channels


class QuantizedEmbedding(nn.Module):
    qweight: Tensor
    scale: Tensor

    def __init__(self, num_embeddings: int, embedding_dim: int, dtype: torch.dtype) -> None:
        """Empty: the buffers are on meta."""
        super().__init__()
        self.num_embeddings, self.embedding_dim, self.dtype = num_embeddings, embedding_dim, dtype
        self.register_buffer(
            "qweight", torch.empty(num_embeddings, embedding_dim, dtype=torch.int8, device="meta")
        )
        self.register_buffer("scale", torch.empty(num_embeddings, dtype=torch.float32, device="meta"))

    @staticmethod
    def quantize(weight: Tensor) -> Mapping[str, Tensor]:
        """weight: [num_embeddings, embedding_dim]; symmetric, round to nearest."""
        return quantize_channels(weight)

    @property
    def weight(self) -> Tensor:
        """The shape and dtype that the weight stands for, for modeling code that asks; it has no data."""
        return torch.empty(self.num_embeddings, self.embedding_dim, dtype=self.dtype, device="meta")

    def forward(self, ids: Tensor) -> Tensor:
        """ids: [...] int; [..., embedding_dim] in the model's dtype."""
        rows = F.embedding(ids, self.qweight)
        return (rows.float() * self.scale[ids][..., None]).to(self.dtype)
