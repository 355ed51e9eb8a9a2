"""Cases over the vocabulary: fused sampling, top tokens and edits of logits.

Logits are normal with a standard deviation of 3: flatter than a model's usually are, so that filters take more rounds.
The usual torch sorts, where there is a filter, and draws by an exponential race, as vLLM does, which no host waits for.
"""

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from kernel_cases.case import Case, Function, Sizes, Target, Work, column, integers, pairs, randn, rows_of
from torch import Tensor

TEMPERATURE, TOP_K, TOP_P, MIN_P = 0.8, 50, 0.9, 0.02
Kind = tuple[float, int, float, float, bool, bool]
"""Temperature, top-k, top-p, min-p, whether there is a bitmask, whether there are log-probabilities."""

KINDS: dict[str, Kind] = {
    "greedy": (0.0, 0, 1.0, 0.0, False, False),
    "temperature": (TEMPERATURE, 0, 1.0, 0.0, False, False),
    "top-k, top-p": (TEMPERATURE, TOP_K, TOP_P, 0.0, False, False),
    "bitmask, all filters": (TEMPERATURE, TOP_K, TOP_P, MIN_P, True, False),
    "log-probabilities, alternatives": (TEMPERATURE, TOP_K, TOP_P, 0.0, False, True),
}


def cases(sizes: Sizes) -> Iterator[Case]:
    largest = max(sizes.batches)
    for count in sizes.batches:
        for what, kind in KINDS.items():
            targets: tuple[Target, ...] = ()
            if count == largest:
                targets = (Target("floor", 1.5),)
                if kind[1]:  # without a filter, nobody sorts
                    targets += (Target("usual", 10.0),)
            yield Case(
                "fused_sampling",
                f"{what}, {rows_of(count)}",
                partial(_sampling, sizes, count, kind),
                is_quick=count == largest,
                is_compiled=count == largest,
                targets=targets,
            )
    for count in sizes.batches:
        yield Case(
            "top_tokens",
            f"best {sizes.alternatives}, {rows_of(count)}",
            partial(_top_tokens, sizes, count, sizes.alternatives),
            is_quick=count == largest,
            is_compiled=count == largest,
        )
    requests, width = sizes.beams
    yield Case(
        "top_tokens",
        f"beam step, {requests} requests of width {width}",
        partial(_top_tokens, sizes, requests * width, 2 * width),
    )
    for count in sizes.batches[:2]:
        yield Case(
            "logit_edits",
            f"{sizes.edits} edits each, {rows_of(count)}",
            partial(_edits, sizes, count),
            is_quick=count > 1,
            is_compiled=count == sizes.batches[:2][-1],
        )


def _sampling(sizes: Sizes, count: int, kind: Kind, device: torch.device) -> Work:
    from cadenza.kernels.fused_sampling import (
        FusedRows,
        fused_sampling,
        fused_sampling_bytes,
        fused_sampling_reference,
    )
    from cadenza.kernels.top_tokens import top_tokens, top_tokens_reference

    temperature, top_k, top_p, min_p, has_mask, has_logprobs = kind
    logits = random_logits(sizes, count, device)
    num_words = -(-sizes.vocabulary // 32)
    words = integers(count, num_words, seed=1, high=2**32, device=device, dtype=torch.int64)
    bitmask = (words - 2**31).to(torch.int32) if has_mask else None

    def same(value: float, dtype: torch.dtype = torch.int32) -> Tensor:
        return column(value, count, dtype, device)

    rows = FusedRows(
        logits_row=column(range(count), count, torch.int32, device),
        edited_row=same(-1),
        mask_row=column(range(count), count, torch.int32, device) if has_mask else same(-1),
        num_tokens=same(sizes.vocabulary),
        num_columns=same(sizes.vocabulary),
        temperature=same(temperature, torch.float32),
        top_k=same(top_k),
        top_p=same(top_p, torch.float32),
        min_p=same(min_p, torch.float32),
        seed=column(range(7, 7 + count), count, torch.int64, device),
        branch=same(0),
        position=same(11),
    )
    others = _top_rows(sizes, count, device)

    def kernel() -> Any:
        best = top_tokens(logits, None, others, sizes.alternatives) if has_logprobs else None
        return fused_sampling(logits, None, bitmask, rows, wants_logprobs=has_logprobs), best

    def reference() -> Any:
        best = top_tokens_reference(logits, None, others, sizes.alternatives) if has_logprobs else None
        return fused_sampling_reference(logits, None, bitmask, rows, wants_logprobs=has_logprobs), best

    def check() -> list[tuple[Tensor, Tensor]]:
        (draws, best), (true, true_best) = kernel(), reference()
        found = [(draws.tokens, true.tokens), (draws.status, true.status)]
        if has_logprobs:  # of rows where both drew the same token
            is_same = draws.tokens == true.tokens
            found += [
                (draws.logprob[is_same], true.logprob[is_same]),
                (draws.rank[is_same], true.rank[is_same]),
            ]
            found += [(best.tokens, true_best.tokens), (best.scores, true_best.scores)]
        return found

    width = sizes.alternatives if has_logprobs else 0

    def usual() -> Any:
        return usual_sampling(logits, bitmask, temperature, top_k, top_p, min_p, width)

    libraries = {}
    if top_k and not has_mask and not has_logprobs:
        libraries = {
            "flashinfer": lambda: _flashinfer(logits, temperature, top_k, top_p),
            "vllm": lambda: _vllm(logits, temperature, top_k, top_p),
        }
    num_bytes = fused_sampling_bytes(logits, rows, num_words, wants_logprobs=has_logprobs)
    return Work(
        kernel,
        reference,
        check,
        num_bytes,
        usual=usual,
        libraries=libraries,
        tolerance=1e-4,
        num_ties=count // 100,
    )


def usual_sampling(
    logits: Tensor,
    bitmask: Tensor | None,
    temperature: float,
    top_k: int,
    top_p: float,
    min_p: float,
    num_alternatives: int,
) -> Any:
    """Tokens [R], and the best tokens' log-probabilities where wanted: what people write in torch."""
    x = logits.float()
    best = x.log_softmax(dim=-1).topk(num_alternatives, dim=-1) if num_alternatives else None
    if bitmask is not None:
        token = torch.arange(x.shape[1], device=x.device)
        bits = (bitmask[:, token >> 5] >> (token & 31).to(torch.int32)) & 1
        x = x.masked_fill(bits == 0, -torch.inf)
    if temperature == 0:
        return x.argmax(dim=-1), best
    x = x / temperature
    if top_k or top_p < 1:
        ordered, order = x.sort(dim=-1, descending=True)
        if top_k:
            ordered = ordered.masked_fill(ordered < ordered[:, top_k - 1 : top_k], -torch.inf)
        probs = ordered.softmax(dim=-1)
        ordered = ordered.masked_fill(probs.cumsum(dim=-1) - probs >= top_p, -torch.inf)
        x = torch.empty_like(x).scatter_(1, order, ordered)
    probs = x.softmax(dim=-1)
    if min_p:
        probs = probs.masked_fill(probs < min_p * probs.amax(dim=-1, keepdim=True), 0.0)
    return (probs / torch.empty_like(probs).exponential_()).argmax(dim=-1), best


def _flashinfer(logits: Tensor, temperature: float, top_k: int, top_p: float) -> Function:
    import flashinfer  # type: ignore[import-not-found]

    def run() -> Any:
        probs = (logits.float() / temperature).softmax(dim=-1)
        return flashinfer.sampling.top_k_top_p_sampling_from_probs(probs, top_k, top_p)

    return run


def _vllm(logits: Tensor, temperature: float, top_k: int, top_p: float) -> Function:
    from vllm.v1.sample.ops.topk_topp_sampler import (  # type: ignore[import-not-found]
        apply_top_k_top_p,
        random_sample,
    )

    k = torch.full((len(logits),), top_k, dtype=torch.int32, device=logits.device)
    p = torch.full((len(logits),), top_p, device=logits.device)

    def run() -> Any:
        left = apply_top_k_top_p(logits.float() / temperature, k, p)
        return random_sample(left.softmax(dim=-1, dtype=torch.float32), {})

    return run


def _top_tokens(sizes: Sizes, count: int, width: int, device: torch.device) -> Work:
    from cadenza.kernels.top_tokens import top_tokens, top_tokens_bytes, top_tokens_reference

    logits, rows = random_logits(sizes, count, device), _top_rows(sizes, count, device)

    def check() -> list[tuple[Tensor, Tensor]]:
        best, true = top_tokens(logits, None, rows, width), top_tokens_reference(logits, None, rows, width)
        return [(best.tokens, true.tokens), (best.status, true.status), (best.scores, true.scores)]

    return Work(
        kernel=lambda: top_tokens(logits, None, rows, width),
        reference=lambda: top_tokens_reference(logits, None, rows, width),
        check=check,
        num_bytes=top_tokens_bytes(count, sizes.vocabulary, 0, width, sizes.dtype),
        usual=lambda: logits.float().log_softmax(dim=-1).topk(width, dim=-1),
        tolerance=1e-4,
    )


def _top_rows(sizes: Sizes, count: int, device: torch.device) -> Any:
    from cadenza.kernels.top_tokens import TopRows

    return TopRows(
        logits_row=column(range(count), count, torch.int32, device),
        mask_row=column(-1, count, torch.int32, device),
        num_tokens=column(sizes.vocabulary, count, torch.int32, device),
        num_columns=column(sizes.vocabulary, count, torch.int32, device),
        is_normalized=column(0, count, torch.int32, device),
    )


def _edits(sizes: Sizes, count: int, device: torch.device) -> Work:
    from cadenza.kernels.logit_edits import Edits, edited_rows, edited_rows_bytes, edited_rows_reference

    logits = random_logits(sizes, count, device)
    n = count * sizes.edits
    step = sizes.vocabulary // sizes.edits
    edits = Edits(
        rows=torch.arange(count, device=device, dtype=torch.int32).repeat_interleave(sizes.edits),
        tokens=torch.arange(sizes.edits, device=device, dtype=torch.int32).repeat(count) * step,
        repetition=column(1.2, n, torch.float32, device),
        offset=randn(n, seed=2, device=device, dtype=torch.float32),
    )
    rows = column(range(count), count, torch.int32, device)
    return Work(
        kernel=lambda: edited_rows(logits, rows, edits),
        reference=lambda: edited_rows_reference(logits, rows, edits),
        check=lambda: pairs(edited_rows(logits, rows, edits), edited_rows_reference(logits, rows, edits)),
        num_bytes=edited_rows_bytes(count, sizes.vocabulary, n, sizes.dtype),
    )


def random_logits(sizes: Sizes, count: int, device: torch.device) -> Tensor:
    """Rows at distances of multiples of 16 elements."""
    stride = -(-sizes.vocabulary // 16) * 16
    whole = randn(count, stride, seed=0, device=device, dtype=sizes.dtype, scale=3.0)
    return whole[:, : sizes.vocabulary]
