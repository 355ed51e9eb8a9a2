"""The model runner: one forward pass over the packed rows of a step.

transformers' own modeling code runs on [1, T] token ids with explicit positions and no cache of its own; our
attention reads and writes the paged KV cache. Only the logits that someone reads are computed. Knows tensors
and branches; no requests, no sampling.
"""

import inspect
from collections.abc import Collection, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from cadenza.decoding import tiled_attention
from cadenza.decoding.adapters.runtime import AdapterRuntime
from cadenza.decoding.attention import AttentionBackend, StepInputs
from cadenza.decoding.branch import Branch
from cadenza.decoding.kv_cache import KVCache
from cadenza.decoding.packed_rows import PackedRows, pack
from cadenza.decoding.scheduler import Span, Step
from cadenza.kernels import ops


@dataclass(frozen=True, slots=True)
class StepLogits:
    logits: Tensor
    """[rows, V]: float32 from a CPU, of the model's own type from a GPU."""
    last_row: dict[Branch, int]
    """Where the logits that choose a branch's next token are, for branches whose last token was computed. The rows
    of its drafts follow."""
    prompt_rows: dict[Branch, tuple[int, int]]
    """First row and number of rows of a branch's prompt tokens in this step, where all were asked for."""
    hidden: dict[Branch, Tensor]
    """[tokens of the span, d] last hidden states, what the output layer reads, where they were asked for."""


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
        self._backend = backend_of(device)
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
        rows = pack(step, self._cache.block_size, self._backend.order)
        wanted, last_row, prompt_rows = _wanted_rows(step, rows, set(wants_prompt_logits))
        self._keeps_hidden = bool(wants_hidden)
        kept = wanted or [0]
        inputs = self._backend.step_inputs(rows, kept, self._cache, self._device)
        with self._adapted(rows, kept, inputs.token_ids):
            logits = self._forward(inputs)[: len(wanted)]
        hidden, self._hidden = self._hidden, None
        own = [span for span in step.spans if span.branch in wants_hidden]
        return StepLogits(
            logits, last_row, prompt_rows, {} if hidden is None else _hidden_of(own, rows, hidden)
        )

    def _adapted(
        self, rows: PackedRows, kept: Sequence[int], token_ids: Tensor
    ) -> AbstractContextManager[None]:
        if self._adapters is None:
            return nullcontext()
        owners = [branch.adapters for branch, _ in rows.row_of]
        return self._adapters.step(owners, kept, token_ids)

    def _forward(self, inputs: StepInputs) -> Tensor:
        """Logits [n, V] of the rows that are kept. Reads nothing but tensors on the device."""
        selection = {"logits_to_keep": inputs.kept} if self._selects_logits else {}
        output = self._module(
            input_ids=inputs.token_ids[None],
            position_ids=inputs.positions[None],
            use_cache=False,
            attention_batch=inputs.attention,
            **selection,
        )
        logits: Tensor = output.logits[0]
        if not self._selects_logits:
            logits = logits[inputs.kept]
        return logits.float() if self._device.type == "cpu" else logits


def backend_of(device: torch.device) -> AttentionBackend:
    if ops.runs_triton(device):
        import cadenza.decoding.fused_attention as fused_attention

        return fused_attention
    return tiled_attention


def selects_logits(module: Any) -> bool:
    """Whether the module can be asked for the logits of some tokens only."""
    return "logits_to_keep" in inspect.signature(module.forward).parameters


def _hidden_of(spans: Sequence[Span], rows: PackedRows, hidden: Tensor) -> dict[Branch, Tensor]:
    return {
        span.branch: hidden[[rows.row_of[span.branch, at] for at in range(span.start, span.end)]].float()
        for span in spans
    }


def _wanted_rows(
    step: Step, rows: PackedRows, wants_prompt: set[Branch]
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
