"""Activation functions whose result for a row does not depend on the other rows.

torch computes an activation over the flat tensor, split among threads, in whole vectors and a scalar remainder for
each piece. The two differ in the last bit, so that which element is a remainder, and with it a row's result, would
depend on the number of rows. Here rows are padded to whole vectors and computed in pieces too small to be split.
"""

import inspect

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.activations import ACT2CLS

_VECTOR = 64  # a multiple of what torch computes at once on any CPU, in elements
_UNSPLIT = 16384  # elements; torch gives no piece below 20000 to a second thread

_classes = {value[0] if isinstance(value, tuple) else value for value in ACT2CLS.values()}
ACTIVATIONS = tuple(part for part in _classes if inspect.isclass(part) and issubclass(part, nn.Module))
"""Every activation module that transformers' models use."""


class RowwiseActivation(nn.Module):
    def __init__(self, activation: nn.Module) -> None:
        super().__init__()
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:
        """x: [..., width]; the activation of every element."""
        width = x.shape[-1]
        if width % _VECTOR == 0 and x.numel() <= _UNSPLIT:
            plain: Tensor = self.activation.forward(x.contiguous())
            return plain
        rows = F.pad(x.reshape(-1, width), (0, -width % _VECTOR))
        pieces = rows.split(max(1, _UNSPLIT // rows.shape[1]))
        return torch.cat([self.activation.forward(piece) for piece in pieces])[:, :width].view(x.shape)
