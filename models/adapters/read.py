"""From a folder that PEFT has written to an `Adapter`, or the first reason why it cannot be served exactly."""

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from cadenza.models.adapters.adapter import (
    Adapter,
    Change,
    EmbeddingChange,
    LinearChange,
    LowRank,
    ModuleChange,
)
from cadenza.models.adapters.base import BaseWeights
from cadenza.models.adapters.config import AdapterConfig, read_config
from cadenza.models.adapters.experts import module_change
from cadenza.models.adapters.files import read_tensors
from cadenza.models.adapters.keys import Group, group_by_module
from cadenza.models.adapters.layout import Layout
from cadenza.models.adapters.linear import embedding_change, linear_change
from cadenza.models.adapters.low_rank import Terms
from cadenza.models.adapters.saved import Vocabulary
from cadenza.models.adapters.token_rows import token_ids
from cadenza.models.adapters.tokenizer import files_digest, has_tokenizer, read_tokenizer
from cadenza.models.adapters.vocabulary import fit_vocabulary
from cadenza.models.errors import ModelError

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
    config, tensors = read_config(folder), read_tensors(folder)
    groups = group_by_module(tensors, layout)
    terms = Terms(config, max_rank, token_ids(groups, layout, config))
    changes: dict[str, Change] = {}
    for name in sorted(groups):
        changes[name] = _change(groups[name], terms, base, Vocabulary(layout))
        groups[name].check_empty()
    found = read_tokenizer(folder, tokenizer)
    brought = (found or tokenizer).vocab_size if has_tokenizer(folder) else None
    changes, num_tokens = fit_vocabulary(changes, layout, tokenizer.vocab_size, brought)
    own_tokenizer = "" if found is None else files_digest(folder)
    return Adapter(
        digest=_digest(config, tensors, fingerprint, f"{own_tokenizer} {num_tokens}"),
        changes={name: change for name, change in changes.items() if _is_any(change)},
        rank=max((_rank(change) for change in changes.values()), default=0),
        num_bytes=_num_bytes(changes.values()),
        tokenizer=found,
        num_tokens=num_tokens,
        base_model_name=config.base_model_name,
    )


def _change(group: Group, terms: Terms, base: BaseWeights, vocabulary: Vocabulary) -> Change:
    if not group.site.is_everywhere:
        raise ModelError(
            f"{group.name} cannot be adapted: the model does not give it every token of a sequence in order"
        )
    match group.site.kind:
        case "linear":
            return linear_change(group, terms, base, vocabulary)
        case "embedding":
            return embedding_change(group, terms, base, vocabulary)
        case "other":
            return module_change(group, terms, vocabulary)


def _digest(config: AdapterConfig, tensors: Mapping[str, Tensor], fingerprint: str, vocabulary: str) -> str:
    """Of the content alone: the same wherever the folder lies. vocabulary: a tokenizer that is the model's own is no
    part of the adapter, and still says how many of the weights' rows are tokens."""
    sha = hashlib.sha256(f"{fingerprint}\n{config.meaning}\n{vocabulary}\n".encode())
    for name, tensor in tensors.items():
        sha.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        sha.update(_bytes(tensor))
    return sha.hexdigest()


def _bytes(tensor: Tensor) -> memoryview:
    """As they lie in memory; what `read_tensors` gives is contiguous."""
    values = tensor.view(torch.int16) if tensor.dtype == torch.bfloat16 else tensor
    return values.numpy().reshape(-1).view(np.uint8).data


def _tensors(change: Change) -> Iterator[Tensor]:
    low_rank = change.low_rank
    pairs = [low_rank] if isinstance(low_rank, LowRank) else [] if low_rank is None else low_rank.values()
    for pair in pairs:
        yield from (pair.a, pair.b)
    match change:
        case ModuleChange():
            yield from change.values.values()
        case LinearChange() | EmbeddingChange():
            others: list[Tensor | None] = [change.gain, change.weight, *(change.rows or ())]
            others += [change.bias] if isinstance(change, LinearChange) else []
            yield from (tensor for tensor in others if tensor is not None)


def _num_bytes(changes: Iterable[Change]) -> int:
    """Each once: tied layers share theirs."""
    tensors = {tensor.data_ptr(): tensor.nbytes for change in changes for tensor in _tensors(change)}
    return sum(tensors.values())


def _is_any(change: Change) -> bool:
    return any(True for _ in _tensors(change))


def _rank(change: Change) -> int:
    return change.low_rank.rank if isinstance(change, LinearChange) and change.low_rank is not None else 0
