"""The model's own weights, asked for through what it computes: a packed, quantized or absent layer has no other way.

The columns of W are the layer's answers to the rows of the identity. Everything here runs on the engine's thread;
`EngineWeights` is what other threads ask, a few columns at a time between steps.
"""

from collections.abc import Callable
from concurrent.futures import Future
from contextlib import nullcontext
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from cadenza.models.adapters.layout import Layout
from cadenza.models.offload.stream import LayerStream, streams_of

_WORK_AT_ONCE = 2**28  # multiplications in one call between two steps: some milliseconds
_ROWS_AT_ONCE = 4096  # of an embedding's table

Result = TypeVar("Result")
Call = Callable[[Callable[[], Result]], "Future[Result]"]
"""Runs a function on the engine's thread."""


class ModuleWeights:
    def __init__(self, module: Any, layout: Layout, dtype: torch.dtype, device: torch.device) -> None:
        self._module, self._layout = module, layout
        self._dtype, self._device = dtype, device
        self._biases: dict[str, Tensor | None] = {}

    def bias_here(self, name: str) -> Tensor | None:
        """[out_features] in the layer's dtype, on its device."""
        if "bias" not in self._layout.sites[name].shapes:
            return None
        bias = self._biases.get(name)
        if bias is None:
            bias = self._biases[name] = self._answers(name, self._zeros(name, 1))[0]
        return bias

    @torch.inference_mode()
    def columns(self, name: str, start: int, stop: int) -> Tensor:
        """[stop - start, out_features] float32: these columns of W, as rows."""
        x = self._zeros(name, stop - start)
        x[torch.arange(stop - start), torch.arange(start, stop)] = 1
        bias = self.bias_here(name)
        columns = self._answers(name, x)
        return (columns if bias is None else columns - bias).float()

    @torch.inference_mode()
    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """[stop - start, embedding_dim] float32 of an embedding's table."""
        module = self._module.get_submodule(name)
        rows: Tensor = module.forward(torch.arange(start, stop, device=self._device)).float()
        embed_scale = getattr(module, "embed_scale", None)
        return rows if embed_scale is None else rows / torch.as_tensor(embed_scale).float()

    def _zeros(self, name: str, count: int) -> Tensor:
        return torch.zeros(
            count, self._layout.sites[name].in_features, dtype=self._dtype, device=self._device
        )

    @torch.inference_mode()
    def _answers(self, name: str, x: Tensor) -> Tensor:
        """The layer's own output for x [rows, in_features], without adapters."""
        stream = self._stream_of(name)
        with nullcontext() if stream is None else stream.held():
            layer: nn.Module = self._module.get_submodule(name)
            y: Tensor = layer.forward(x)
        return y

    def _stream_of(self, name: str) -> LayerStream | None:
        for stream in streams_of(self._module):
            if name.startswith(f"{stream.name}."):
                return stream
        return None


class EngineWeights:
    """`models.adapters.base.BaseWeights` for other threads than the engine's."""

    def __init__(self, weights: ModuleWeights, layout: Layout, call: Call[Any]) -> None:
        self._weights, self._layout, self._call = weights, layout, call

    def linear(self, name: str) -> Tensor:
        """[out_features, in_features] float32."""
        site = self._layout.sites[name]
        width, at_once = site.in_features, max(16, _WORK_AT_ONCE // (site.in_features * site.out_features))
        parts = [
            self._ask(partial(self._weights.columns, name, start, min(start + at_once, width)))
            for start in range(0, width, at_once)
        ]
        return torch.cat(parts).T

    def bias(self, name: str) -> Tensor | None:
        bias: Tensor | None = self._ask(partial(self._weights.bias_here, name))
        return None if bias is None else bias.float().cpu()

    def embedding(self, name: str, start: int, stop: int) -> Tensor:
        """[stop - start, embedding_dim] float32."""
        return torch.cat(
            [
                self._ask(partial(self._weights.rows, name, first, min(first + _ROWS_AT_ONCE, stop)))
                for first in range(start, stop, _ROWS_AT_ONCE)
            ]
        )

    def _ask(self, function: Callable[[], Any]) -> Any:
        value = self._call(function).result()
        return value.cpu() if isinstance(value, Tensor) else value
