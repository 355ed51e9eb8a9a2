"""The model runner: one forward pass over the packed rows of a step.

transformers' own modeling code runs on [1, T] token ids with explicit positions and no cache of its own; our
attention reads and writes the paged KV cache. Only the logits that someone reads are computed. Knows tensors
and branches; no requests, no sampling.
"""

import inspect
from collections.abc import Collection, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch
from torch import Tensor

from cadenza.decoding import attention
from cadenza.decoding.adapters.runtime import AdapterRuntime
from cadenza.decoding.attention import AttentionBatch, DecodeGroup, PromptChunk, bucket_length
from cadenza.decoding.branch import Branch
from cadenza.decoding.kv_cache import KVCache
from cadenza.decoding.scheduler import Span, Step


@dataclass(frozen=True, slots=True)
class StepLogits:
    logits: Tensor
    """[rows, V] float32."""
    last_row: dict[Branch, int]
    """Where the logits that choose a branch's next token are, for branches whose last token was computed. The rows
    of its drafts follow."""
    prompt_rows: dict[Branch, tuple[int, int]]
    """First row and number of rows of a branch's prompt tokens in this step, where all were asked for."""
    hidden: dict[Branch, Tensor]
    """[tokens of the span, d] last hidden states, what the output layer reads, where they were asked for."""


@dataclass(frozen=True, slots=True)
class Rows:
    """Tokens in the order of the packed rows: their places in the cache, and who attends together."""

    token_ids: list[int]
    positions: list[int]
    slots: list[int]
    chunks: list[PromptChunk]
    groups: list[DecodeGroup]
    row_of: dict[tuple[Branch, int], int]
    """The packed row of (branch, position), in order."""


class ModelRunner:
    def __init__(
        self, module: Any, cache: KVCache, device: torch.device, adapters: AdapterRuntime | None = None
    ) -> None:
        """`module` is a transformers causal LM that `probe` accepted; its attention becomes ours. adapters: None where
        it computes every branch as it is, whatever adapters the branch has."""
        self._module = module
        self._adapters = adapters
        self._cache = cache
        self._device = device
        self._selects_logits = selects_logits(module)
        self._hidden: Tensor | None = None
        self._keeps_hidden = False
        module.get_decoder().register_forward_hook(self._keep_hidden)

    def _keep_hidden(self, _module: Any, _inputs: Any, output: Any) -> None:
        if self._keeps_hidden:
            self._hidden = output[0][0]

    @torch.inference_mode()
    def __call__(
        self,
        step: Step,
        wants_prompt_logits: Iterable[Branch] = (),
        wants_hidden: Collection[Branch] = (),
    ) -> StepLogits:
        """Compute every span of the step; `step.spans` must not be empty."""
        self._cache.copy_blocks(step.copies)
        rows = pack(step, self._cache.block_size, self._device)
        wanted, last_row, prompt_rows = _wanted_rows(step, rows, set(wants_prompt_logits))
        self._keeps_hidden = bool(wants_hidden)
        logits = self._forward(rows, wanted)
        hidden, self._hidden = self._hidden, None
        own = [span for span in step.spans if span.branch in wants_hidden]
        return StepLogits(
            logits, last_row, prompt_rows, {} if hidden is None else _hidden_of(own, rows, hidden)
        )

    def _forward(self, rows: Rows, wanted: Sequence[int]) -> Tensor:
        """Logits [len(wanted), V] float32 of the packed rows `wanted`."""

        def as_tensor(values: Sequence[Any]) -> Tensor:
            return torch.tensor(values, dtype=torch.int64, device=self._device)

        keep = as_tensor(wanted if wanted else [0])
        selection = {"logits_to_keep": keep} if self._selects_logits else {}
        token_ids = as_tensor(rows.token_ids)
        adapted: AbstractContextManager[None] = nullcontext()
        if self._adapters is not None:
            owners = [branch.adapters for branch, _ in rows.row_of]
            adapted = self._adapters.step(owners, wanted or [0], token_ids)
        with adapted:
            output = self._module(
                input_ids=token_ids[None],
                position_ids=as_tensor([rows.positions]),
                use_cache=False,
                attention_batch=AttentionBatch(self._cache, as_tensor(rows.slots), rows.chunks, rows.groups),
                **selection,
            )
        logits: Tensor = output.logits[0]
        if not self._selects_logits:
            logits = logits[keep]
        return logits[: len(wanted)].float()


def selects_logits(module: Any) -> bool:
    """Whether the module can be asked for the logits of some tokens only."""
    return "logits_to_keep" in inspect.signature(module.forward).parameters


def pack(step: Step, block_size: int, device: torch.device) -> Rows:
    """Decode rows first, grouped by bucket, then prompt chunks. Drafts are decode rows, as what they may become."""
    rows = Rows([], [], [], [], [], {})
    decode_rows = [
        (branch, position)
        for branch, start, end in ((span.branch, span.start, span.end) for span in step.spans)
        for position in range(max(start, branch.num_prompt_tokens), end + len(step.drafts.get(branch, ())))
    ]
    decode_rows.sort(key=lambda row: bucket_length(row[1] + 1))
    for bucket, members in groupby(decode_rows, key=lambda row: bucket_length(row[1] + 1)):
        same_bucket = list(members)
        for start in range(0, len(same_bucket), attention.MAX_GROUP_ROWS):
            part = same_bucket[start : start + attention.MAX_GROUP_ROWS]
            _add_group(rows, part, bucket // block_size, block_size, device)
            for branch, position in part:
                _add_row(rows, branch, position, block_size, step.drafts.get(branch, ()))
    for span in step.spans:
        if span.start < span.branch.num_prompt_tokens:
            _add_chunk(rows, span, block_size, device)
    return rows


def _add_group(
    rows: Rows, members: Sequence[tuple[Branch, int]], num_blocks: int, block_size: int, device: torch.device
) -> None:
    first_row = len(rows.token_ids)
    tables = [_padded(branch.block_table, num_blocks) for branch, _ in members]
    positions = [position for _, position in members]
    rows.groups.append(
        DecodeGroup(
            first_row,
            len(members),
            torch.tensor(tables, device=device),
            torch.tensor(positions, device=device),
        )
    )


def _add_chunk(rows: Rows, span: Span, block_size: int, device: torch.device) -> None:
    branch, end = span.branch, min(span.end, span.branch.num_prompt_tokens)
    num_blocks = -(-end // attention.TILE) * attention.TILE // block_size
    table = torch.tensor(_padded(branch.block_table, num_blocks), device=device)
    first_row = len(rows.token_ids)
    rows.chunks.append(PromptChunk(first_row, end - span.start, span.start, table))
    for position in range(span.start, end):
        _add_row(rows, branch, position, block_size)


def _add_row(rows: Rows, branch: Branch, position: int, block_size: int, drafts: Sequence[int] = ()) -> None:
    rows.row_of[branch, position] = len(rows.token_ids)
    ahead = position - branch.num_tokens
    rows.token_ids.append(branch.token_ids[position] if ahead < 0 else drafts[ahead])
    rows.positions.append(position)
    rows.slots.append(branch.block_table[position // block_size] * block_size + position % block_size)


def _padded(table: Sequence[int], length: int) -> list[int]:
    return [*table[:length], *[0] * (length - len(table))]


def _hidden_of(spans: Sequence[Span], rows: Rows, hidden: Tensor) -> dict[Branch, Tensor]:
    return {
        span.branch: hidden[[rows.row_of[span.branch, at] for at in range(span.start, span.end)]].float()
        for span in spans
    }


def _wanted_rows(
    step: Step, rows: Rows, wants_prompt: set[Branch]
) -> tuple[list[int], dict[Branch, int], dict[Branch, tuple[int, int]]]:
    """The packed rows whose logits are read, and where each branch finds its own among them."""
    wanted: list[int] = []
    last_row: dict[Branch, int] = {}
    prompt_rows: dict[Branch, tuple[int, int]] = {}
    for span in step.spans:
        branch = span.branch
        if branch in wants_prompt and span.start < branch.num_prompt_tokens:
            first = rows.row_of[branch, span.start]
            count = min(span.end, branch.num_prompt_tokens) - span.start
            prompt_rows[branch] = (len(wanted), count)
            wanted += range(first, first + count)
        if span.reaches_end:
            end = span.end + len(step.drafts.get(branch, ()))
            if branch in prompt_rows and branch.num_generated == 0:
                last_row[branch] = len(wanted) - 1
            else:
                last_row[branch] = len(wanted)
                wanted += (rows.row_of[branch, position] for position in range(span.end - 1, end))
    return wanted, last_row, prompt_rows
