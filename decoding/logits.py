"""The logits pipeline: from the forward pass to one token per row, in one call for the whole batch.

`LogitsPipeline.__call__` reads as its specification. Small tensors of parameters are rebuilt from the rows each
step; what no row uses is skipped. Knows token ids and parameters; no blocks, no text, no requests.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor

from cadenza.decoding.explanation import explain
from cadenza.decoding.parameters import next_mu, sampling_rows
from cadenza.decoding.processors import add_bias, apply_bitmask, apply_penalties, mask_vocabulary, unpack_bits
from cadenza.decoding.request import Decision, TokenLogprob
from cadenza.decoding.row import Choice, Row
from cadenza.kernels.sampling import SamplingRows, divide_by_temperature, draw, survivors

_SCORED_AT_ONCE = 64  # rows: of 128k tokens in float32 each copy takes 33 MB

LogprobsMode = Literal["raw_logprobs", "processed_logprobs"]


class LogitsPipeline:
    def __init__(self, vocab_size: int, logprobs_mode: LogprobsMode, num_columns: int | None = None) -> None:
        """num_columns: of the model's logits, which may be padded; None: no adapter ever adds more."""
        self._vocab_size, self._num_columns = vocab_size, num_columns
        self._logprobs_mode = logprobs_mode

    def __call__(self, logits: Tensor, rows: Sequence[Row], bitmask: Tensor | None = None) -> list[Choice]:
        """logits: [number of distinct rows, V], left as they are; bitmask: [any, ceil(V / 32)] int32 on the
        host. One choice for each of `rows`."""
        choices: dict[int, Choice] = {}
        sizes = {row.num_tokens for row in rows}
        for size in sizes:  # a row is computed as wide as its own vocabulary is, whoever is beside it
            numbers = [number for number, row in enumerate(rows) if row.num_tokens == size]
            own_rows = [rows[number] for number in numbers]
            own = self._choose(self.columns(logits, size), own_rows, bitmask)
            choices.update(zip(numbers, own, strict=True))
        return [
            self._explained(logits, row, bitmask, choices[number]) if row.explain else choices[number]
            for number, row in enumerate(rows)
        ]

    def columns(self, logits: Tensor, num_tokens: int | None) -> Tensor:
        """Those of the model, and of the tokens that adapters add up to a vocabulary of `num_tokens`."""
        return logits[:, : self._num_scored(num_tokens, logits.shape[1])]

    def _num_scored(self, num_tokens: int | None, num_columns: int) -> int:
        """How many of the logits' columns the model's own distribution is over."""
        if self._num_columns is None:
            return num_columns
        return min(max(self._num_columns, num_tokens or 0), num_columns)

    def _choose(self, logits: Tensor, rows: Sequence[Row], bitmask: Tensor | None) -> list[Choice]:
        searching = [number for number, row in enumerate(rows) if row.candidates is not None]
        if not searching:
            return self._draw(logits, rows, bitmask)
        drawing = [number for number, row in enumerate(rows) if row.candidates is None]
        choices: dict[int, Choice] = {}
        for numbers, choose in ((searching, self._search), (drawing, self._draw)):
            if numbers:
                own = choose(logits, [rows[number] for number in numbers], bitmask)
                choices.update(zip(numbers, own, strict=True))
        return [choices[number] for number in range(len(rows))]

    def _draw(self, logits: Tensor, rows: Sequence[Row], bitmask: Tensor | None) -> list[Choice]:
        raw = _gather(logits, rows)
        logits = raw.clone() if self._wants_raw_logprobs(rows) else raw
        logits = self._process(logits, rows, bitmask)
        parameters = sampling_rows(rows, logits.device)
        drawn = draw(logits, parameters)
        largest = logits.amax(dim=-1)
        is_possible = (largest > -torch.inf) & (largest < torch.inf)  # neither is true of a NaN
        if self._logprobs_mode == "processed_logprobs":
            raw = processed_logits(logits, parameters) if _wants_logprobs(rows) else raw
        return _choices(raw, drawn.tokens, is_possible, rows, next_mu(rows, drawn.surprise))

    def _search(self, logits: Tensor, rows: Sequence[Row], bitmask: Tensor | None) -> list[Choice]:
        scores = self._search_scores(logits, rows, bitmask)
        width = min(max(row.candidates.count for row in rows if row.candidates), scores.shape[-1])
        values, ids = scores.topk(width, dim=-1)
        choices = []
        for row, row_ids, row_values in zip(rows, ids.tolist(), values.tolist(), strict=True):
            assert row.candidates is not None
            pairs = sorted(zip(row_ids, row_values, strict=True), key=lambda pair: (-pair[1], pair[0]))
            possible = tuple(pair for pair in pairs[: row.candidates.count] if pair[1] > -torch.inf)
            choices.append(Choice(None, None, "searched", possible))
        return choices

    def _search_scores(self, logits: Tensor, rows: Sequence[Row], bitmask: Tensor | None) -> Tensor:
        """[R, V] log-probabilities that a strategy compares."""
        scores = _gather(logits, rows)
        is_normalized = [row.candidates is None or row.candidates.normalized for row in rows]
        normalized = torch.tensor(is_normalized, device=scores.device)
        if not all(is_normalized):
            scores[~normalized] = scores[~normalized].log_softmax(dim=-1)
        scores = self._process(scores, rows, bitmask)
        if any(is_normalized):
            scores[normalized] = scores[normalized].log_softmax(dim=-1)
        return scores

    def _process(self, logits: Tensor, rows: Sequence[Row], bitmask: Tensor | None) -> Tensor:
        """In place: what may come, and how much of it. Rows of one size of vocabulary."""
        logits = mask_vocabulary(logits, rows, rows[0].num_tokens or self._vocab_size)
        logits = logits if bitmask is None else apply_bitmask(logits, rows, bitmask)
        logits = apply_penalties(logits, rows)
        return add_bias(logits, rows)

    def scored(self, logits: Tensor, row: Row, bitmask: Tensor | None, token_id: int) -> Choice:
        """What the model says of a token that a strategy or a constraint decided on."""
        logits = self.columns(logits, row.num_tokens)
        decision: Decision = "closing" if row.candidates is None else "searched"
        choice = Choice(token_id, self._logprob(logits, row, bitmask, token_id), decision)
        return self._explained(logits, row, bitmask, choice) if row.explain else choice

    def _explained(self, logits: Tensor, row: Row, bitmask: Tensor | None, choice: Choice) -> Choice:
        """From the row by itself, as it would be without others beside it."""
        if choice.token_id is None:
            return choice
        logits = self.columns(logits, row.num_tokens)
        if row.candidates is None:
            processed = self._process(_gather(logits, [row]), [row], bitmask)
            final = processed_logits(processed, sampling_rows([row], logits.device))[0]
        else:
            final = self._search_scores(logits, [row], bitmask)[0]
        raw = logits[row.logits_row].float()
        allowed = None
        if bitmask is not None and row.mask is not None:
            allowed = torch.zeros_like(raw, dtype=torch.bool)
            bits = unpack_bits(bitmask[row.mask].to(raw.device))[: len(raw)]
            allowed[: len(bits)] = bits
        explanation = explain(raw, final, allowed, choice.token_id, choice.decision)
        return replace(choice, explanation=explanation)

    def _logprob(
        self, logits: Tensor, row: Row, bitmask: Tensor | None, token_id: int
    ) -> TokenLogprob | None:
        if row.num_logprobs is None:
            return None
        own = logits[row.logits_row : row.logits_row + 1]
        if self._logprobs_mode == "processed_logprobs":
            if row.candidates is None:  # nothing else could have come
                return TokenLogprob(token_id, 0.0, 1, ((token_id, 0.0),)[: row.num_logprobs])
            own = self._search_scores(logits, [row], bitmask)
        return token_logprobs(own, torch.tensor([token_id], device=own.device), [row.num_logprobs])[0]

    def _wants_raw_logprobs(self, rows: Sequence[Row]) -> bool:
        return self._logprobs_mode == "raw_logprobs" and _wants_logprobs(rows)


def _gather(logits: Tensor, rows: Sequence[Row]) -> Tensor:
    return logits[torch.tensor([row.logits_row for row in rows], device=logits.device)].float()


def processed_logits(logits: Tensor, parameters: SamplingRows) -> Tensor:
    """What the draw sees: after temperature and truncation, -inf where cut off. Greedy rows stay as they are."""
    greedy = parameters.temperature == 0
    result = divide_by_temperature(logits, torch.where(greedy, 1.0, parameters.temperature))
    for group in survivors(logits, parameters, ~greedy):
        if group.candidates is None:
            result[group.rows] = group.values
        else:
            left = torch.full_like(result[group.rows], -torch.inf)
            result[group.rows] = left.scatter_(1, group.candidates, group.values)
    return result


def token_logprobs(logits: Tensor, tokens: Tensor, num_alternatives: Sequence[int]) -> list[TokenLogprob]:
    """Log-probability, rank and best alternatives of `tokens` [R] under logits [R, V]."""
    if len(tokens) > _SCORED_AT_ONCE:
        pieces = range(0, len(tokens), _SCORED_AT_ONCE)
        parts = [slice(at, at + _SCORED_AT_ONCE) for at in pieces]
        return [
            found
            for own in parts
            for found in token_logprobs(logits[own], tokens[own], num_alternatives[own])
        ]
    log_probs = logits.float().log_softmax(dim=-1)
    chosen = log_probs.gather(1, tokens[:, None])
    ranks = (log_probs > chosen).sum(dim=-1) + 1
    width = min(max(num_alternatives), logits.shape[-1])
    values, ids = log_probs.topk(width, dim=-1)
    return [
        with_alternatives(token, logprob, rank, top_ids[:wanted], top_values[:wanted])
        for token, logprob, rank, top_ids, top_values, wanted in zip(
            tokens.tolist(),
            chosen[:, 0].tolist(),
            ranks.tolist(),
            ids.tolist(),
            values.tolist(),
            num_alternatives,
            strict=True,
        )
    ]


def with_alternatives(
    token: int, logprob: float, rank: int, top_ids: Sequence[int], top_values: Sequence[float]
) -> TokenLogprob:
    """top_ids, top_values: as many of the most likely tokens as are wanted."""
    pairs = list(zip(top_ids, top_values, strict=True))
    # of equally likely tokens, the chosen one is listed first: a greedy choice is its own best alternative
    pairs.sort(key=lambda pair: (-pair[1], pair[0] != token))
    if pairs and rank <= len(pairs) and all(top != token for top, _ in pairs):
        pairs[rank - 1 :] = [(token, logprob), *pairs[rank - 1 : -1]]
    return TokenLogprob(token, logprob, rank, tuple(pairs))


def _choices(
    logits: Tensor,
    tokens: Tensor,
    is_possible: Tensor,
    rows: Sequence[Row],
    next_mu: Sequence[float | None],
) -> list[Choice]:
    wanted = [number for number, row in enumerate(rows) if row.num_logprobs is not None]
    logprobs: dict[int, TokenLogprob] = {}
    if wanted:
        index = torch.tensor(wanted, device=logits.device)
        alternatives = [rows[number].num_logprobs or 0 for number in wanted]
        logprobs = dict(zip(wanted, token_logprobs(logits[index], tokens[index], alternatives), strict=True))
    return [
        Choice(
            token if possible else None,
            logprobs.get(number),
            "greedy" if row.sampling.is_greedy else "sampled",
            mirostat_mu=mu,
        )
        for number, (row, token, possible, mu) in enumerate(
            zip(rows, tokens.tolist(), is_possible.tolist(), next_mu, strict=True)
        )
    ]


def _wants_logprobs(rows: Sequence[Row]) -> bool:
    return any(row.num_logprobs is not None for row in rows)
