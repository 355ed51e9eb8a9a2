"""What may come next, and how much of it, before temperature: masks, penalties, bias. All of them work in place.

Knows rows of logits and their parameters; not what becomes of them.
"""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from cadenza.decoding.row import Row


def mask_vocabulary(logits: Tensor, rows: Sequence[Row], vocab_size: int) -> Tensor:
    """-inf, in place, for what a row must not choose, and for the padding of the embedding beyond the vocabulary."""
    logits[:, vocab_size:] = -torch.inf
    for number, row in enumerate(rows):
        if row.sampling.allowed_token_ids is not None:
            allowed = torch.tensor(row.sampling.allowed_token_ids, device=logits.device)
            kept = logits[number, allowed]
            logits[number] = -torch.inf
            logits[number, allowed] = kept
    at, ids = _flatten((number, row.banned) for number, row in enumerate(rows))
    if at:
        logits[torch.tensor(at), torch.tensor(ids)] = -torch.inf
    return logits


def apply_bitmask(logits: Tensor, rows: Sequence[Row], bitmask: Tensor) -> Tensor:
    """-inf, in place, for the tokens whose bit is not set: bit t & 31 of word t >> 5 of a row's mask. A token beyond
    the mask has no bit."""
    at = [number for number, row in enumerate(rows) if row.mask is not None]
    words = bitmask[[row.mask for row in rows if row.mask is not None]].to(logits.device)
    is_allowed = unpack_bits(words)
    width = min(is_allowed.shape[1], logits.shape[1])
    if len(at) == len(logits):
        logits[:, :width].masked_fill_(~is_allowed[:, :width], -torch.inf)
        logits[:, width:] = -torch.inf
    else:
        for number, allowed in zip(at, is_allowed, strict=True):
            logits[number, :width].masked_fill_(~allowed[:width], -torch.inf)
            logits[number, width:] = -torch.inf
    return logits


def unpack_bits(words: Tensor) -> Tensor:
    """[..., W] int32 → [..., 32 W] bool, lowest bits first."""
    shifts = torch.arange(8, dtype=torch.uint8, device=words.device)
    return (words.view(torch.uint8)[..., None] >> shifts & 1).flatten(-2).bool()


def apply_penalties(logits: Tensor, rows: Sequence[Row]) -> Tensor:
    """In place. Repetition (Keskar et al. 2019) counts prompt and answer: positive logits are divided, negative
    ones multiplied. Frequency and presence (OpenAI) count the answer only: subtracted per time, and once. DRY looks
    at prompt and answer.
    """
    for number, row in enumerate(rows):
        params = row.sampling
        if params.repetition_penalty != 1.0:
            seen = torch.tensor(list({*row.prompt, *row.generated}), device=logits.device)
            values = logits[number, seen]
            penalized = torch.where(
                values > 0, values / params.repetition_penalty, values * params.repetition_penalty
            )
            logits[number, seen] = penalized
        if (params.frequency_penalty != 0.0 or params.presence_penalty != 0.0) and row.generated:
            ids, counts = torch.tensor(row.generated, device=logits.device).unique(return_counts=True)
            logits[number, ids] -= params.frequency_penalty * counts + params.presence_penalty
        if row.dry is not None and (penalties := row.dry.penalties([*row.prompt, *row.generated])):
            repeating = torch.tensor(list(penalties), device=logits.device)
            logits[number, repeating] -= torch.tensor(list(penalties.values()), device=logits.device)
    return logits


def add_bias(logits: Tensor, rows: Sequence[Row]) -> Tensor:
    """In place: OpenAI's logit_bias."""
    for number, row in enumerate(rows):
        if row.sampling.logit_bias:
            ids = torch.tensor(list(row.sampling.logit_bias), device=logits.device)
            bias = torch.tensor(list(row.sampling.logit_bias.values()), device=logits.device)
            logits[number, ids] += bias
    return logits


def _flatten(lists: Iterable[tuple[int, Sequence[int]]]) -> tuple[list[int], list[int]]:
    pairs = [(number, item) for number, items in lists for item in items]
    return [number for number, _ in pairs], [item for _, item in pairs]
