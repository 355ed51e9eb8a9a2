"""From a folder that PEFT has written to an `Adapter`, or the first reason why it cannot be served exactly."""

from pathlib import Path
from typing import TYPE_CHECKING

from cadenza.models.adapters.adapter import Adapter
from cadenza.models.adapters.base import BaseWeights
from cadenza.models.adapters.layout import Layout

if TYPE_CHECKING:
    from cadenza.models.tokenizer import Tokenizer


def read_adapter(
    folder: Path,
    layout: Layout,
    base: BaseWeights,
    tokenizer: "Tokenizer",
    *,
    max_rank: int,
    fingerprint: str,
) -> Adapter:
    """fingerprint: of the model. Raises ModelError: one line that names what is at fault. Safe on any thread; computes
    on one core only."""
    raise NotImplementedError
