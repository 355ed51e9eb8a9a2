"""What some adapters must know of the model's own weights. How they are got at is for whoever computes to say."""

from typing import Protocol

from torch import Tensor


class BaseWeights(Protocol):
    """The model's weights as it computes with them, by module name. Any thread may ask; it may have to wait."""

    def linear(self, name: str) -> Tensor:
        """[out_features, in_features] float32; of a quantized layer, what its operator multiplies with."""

    def bias(self, name: str) -> Tensor | None:
        """[out_features] float32."""

    def embedding(self, name: str, start: int, stop: int) -> Tensor:
        """[stop - start, embedding_dim] float32: these rows of the table."""
