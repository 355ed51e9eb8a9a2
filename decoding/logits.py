"""The logits pipeline: from the forward pass to one token per row, in one call for the whole batch.

`LogitsPipeline.__call__` reads as its specification. Small tensors of parameters are rebuilt from the rows each
step; what no row uses is skipped. Knows token ids and parameters; no blocks, no text, no requests.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from cadenza.decoding.dry import Dry
from cadenza.decoding.explanation import explain
from cadenza.decoding.request import Decision, SamplingParams, TokenExplanation, TokenLogprob
from cadenza.kernels.sampling import SamplingRows, divide_by_temperature, draw, survivors
from cadenza.kernels.thresholds import ThresholdRows

LogprobsMode = Literal["raw_logprobs", "processed_logprobs"]


@dataclass(frozen=True, slots=True)
class Candidates:
    """A wish for the most likely tokens, where a strategy searches instead of drawing one."""

    count: int
    normalized: bool
    """Whether they are scored by the distribution that masks, penalties and bias leave. If not, those act on the
    log-probabilities of the model, as in transformers' beam search, so that scores of texts can be compared."""


@dataclass(frozen=True, slots=True)
class Row:
    """One branch that needs a token."""

    logits_row: int
    """Its row in the forward pass' logits; branches that were just forked share one."""
    sampling: SamplingParams
    seed: int
    branch: int
    prompt: Sequence[int]
    generated: Sequence[int]
    banned: Sequence[int]
    """Token ids that may not come now: ends before min_tokens, last tokens of bad words."""
    num_logprobs: int | None
    """Alternatives wanted; 0: the chosen token's log-probability only; None: no log-probabilities."""
    mask: int | None = None
    """Its row in the step's bitmask, where a constraint says what may come."""
    candidates: Candidates | None = None
    """None: one token is drawn."""
    explain: bool = False
    dry: Dry | None = None
    mirostat_mu: float | None = None
    """Mirostat's state; None: its first token."""


@dataclass(frozen=True, slots=True)
class Choice:
    token_id: int | None
    """None: the row's bans leave no token, or its logits are not numbers; or candidates were asked for."""
    logprob: TokenLogprob | None
    decision: Decision
    candidates: tuple[tuple[int, float], ...] = ()
    """(token id, log-probability), best first; of equal ones the lower token first."""
    explanation: TokenExplanation | None = None
    mirostat_mu: float | None = None
    """Mirostat's state after this token. None where nothing was learned: a token that was not drawn says nothing
    about what to leave to the next draw."""


class LogitsPipeline:
    def __init__(self, vocab_size: int, logprobs_mode: LogprobsMode) -> None:
        self._vocab_size = vocab_size
        self._logprobs_mode = logprobs_mode

    def __call__(self, logits: Tensor, rows: Sequence[Row], bitmask: Tensor | None = None) -> list[Choice]:
        """logits: [number of distinct rows, V] float32, left as they are; bitmask: [any, ceil(V / 32)] int32 on the
        host. One choice for each of `rows`."""
        choices = self._choose(logits, rows, bitmask)
        return [
            self._explained(logits, row, bitmask, choice) if row.explain else choice
            for row, choice in zip(rows, choices, strict=True)
        ]

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
        parameters = _parameters(rows, logits.device)
        drawn = draw(logits, parameters)
        is_possible = logits.gather(1, drawn.tokens[:, None])[:, 0] > -torch.inf
        if self._logprobs_mode == "processed_logprobs":
            raw = processed_logits(logits, parameters) if _wants_logprobs(rows) else raw
        return _choices(raw, drawn.tokens, is_possible, rows, _next_mu(rows, drawn.surprise))

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
        raw = _gather(logits, rows)
        normalized = torch.tensor([row.candidates is None or row.candidates.normalized for row in rows])
        scores = torch.where(normalized[:, None].to(raw.device), raw, raw.log_softmax(dim=-1))
        scores = self._process(scores, rows, bitmask)
        return torch.where(normalized[:, None].to(raw.device), scores.log_softmax(dim=-1), scores)

    def _process(self, logits: Tensor, rows: Sequence[Row], bitmask: Tensor | None) -> Tensor:
        """In place: what may come, and how much of it."""
        logits = mask_vocabulary(logits, rows, self._vocab_size)
        logits = logits if bitmask is None else apply_bitmask(logits, rows, bitmask)
        logits = apply_penalties(logits, rows)
        return add_bias(logits, rows)

    def scored(self, logits: Tensor, row: Row, bitmask: Tensor | None, token_id: int) -> Choice:
        """What the model says of a token that a strategy or a constraint decided on."""
        decision: Decision = "closing" if row.candidates is None else "searched"
        choice = Choice(token_id, self._logprob(logits, row, bitmask, token_id), decision)
        return self._explained(logits, row, bitmask, choice) if row.explain else choice

    def _explained(self, logits: Tensor, row: Row, bitmask: Tensor | None, choice: Choice) -> Choice:
        """From the row by itself, as it would be without others beside it."""
        if choice.token_id is None:
            return choice
        if row.candidates is None:
            processed = self._process(_gather(logits, [row]), [row], bitmask)
            final = processed_logits(processed, _parameters([row], logits.device))[0]
        else:
            final = self._search_scores(logits, [row], bitmask)[0]
        raw = logits[row.logits_row]
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
    return logits[torch.tensor([row.logits_row for row in rows], device=logits.device)]


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
    log_probs = logits.float().log_softmax(dim=-1)
    chosen = log_probs.gather(1, tokens[:, None])
    ranks = (log_probs > chosen).sum(dim=-1) + 1
    width = min(max(num_alternatives), logits.shape[-1])
    values, ids = log_probs.topk(width, dim=-1)
    result = []
    for token, logprob, rank, top_ids, top_values, wanted in zip(
        tokens.tolist(),
        chosen[:, 0].tolist(),
        ranks.tolist(),
        ids.tolist(),
        values.tolist(),
        num_alternatives,
        strict=True,
    ):
        pairs = list(zip(top_ids[:wanted], top_values[:wanted], strict=True))
        # of equally likely tokens, the chosen one is listed first: a greedy choice is its own best alternative
        pairs.sort(key=lambda pair: (-pair[1], pair[0] != token))
        if pairs and rank <= wanted and all(top != token for top, _ in pairs):
            pairs[rank - 1 :] = [(token, logprob), *pairs[rank - 1 : -1]]
        result.append(TokenLogprob(token, logprob, rank, tuple(pairs)))
    return result


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


def _next_mu(rows: Sequence[Row], surprise: Tensor | None) -> list[float | None]:
    """Mirostat's feedback: less surprise is allowed after a token of more than tau bits, more after one of less."""
    if surprise is None:
        return [None] * len(rows)
    return [
        _mu(row) - row.sampling.mirostat_eta * (bits - row.sampling.mirostat_tau)
        if row.sampling.is_stateful
        else None
        for row, bits in zip(rows, surprise.tolist(), strict=True)
    ]


def _mu(row: Row) -> float:
    return 2.0 * row.sampling.mirostat_tau if row.mirostat_mu is None else row.mirostat_mu


def _wants_logprobs(rows: Sequence[Row]) -> bool:
    return any(row.num_logprobs is not None for row in rows)


def _parameters(rows: Sequence[Row], device: torch.device) -> SamplingRows:
    def column(values: Iterable[float], dtype: torch.dtype) -> Tensor:
        return torch.tensor(list(values), dtype=dtype, device=device)

    return SamplingRows(
        temperature=column((row.sampling.temperature for row in rows), torch.float32),
        top_k=column((max(row.sampling.top_k, 0) for row in rows), torch.int64),
        top_p=column((row.sampling.top_p for row in rows), torch.float32),
        min_p=column((row.sampling.min_p for row in rows), torch.float32),
        typical_p=column((row.sampling.typical_p for row in rows), torch.float32),
        seed=column((_as_signed(row.seed) for row in rows), torch.int64),
        branch=column((row.branch for row in rows), torch.int64),
        position=column((len(row.generated) for row in rows), torch.int64),
        thresholds=_thresholds(rows, device) if any(row.sampling.has_thresholds for row in rows) else None,
    )


def _thresholds(rows: Sequence[Row], device: torch.device) -> ThresholdRows:
    def column(values: Iterable[float]) -> Tensor:
        return torch.tensor(list(values), dtype=torch.float32, device=device)

    params = [row.sampling for row in rows]
    return ThresholdRows(
        dynatemp_range=column(each.dynatemp_range for each in params),
        dynatemp_exponent=column(each.dynatemp_exponent for each in params),
        top_n_sigma=column(each.top_n_sigma for each in params),
        epsilon_cutoff=column(each.epsilon_cutoff for each in params),
        eta_cutoff=column(each.eta_cutoff for each in params),
        xtc_probability=column(each.xtc_probability for each in params),
        xtc_threshold=column(each.xtc_threshold for each in params),
        mirostat=torch.tensor([each.mirostat for each in params], device=device),
        mirostat_mu=column(map(_mu, rows)),
    )


def _as_signed(seed: int) -> int:
    """The int64 of the same 64 bits."""
    return (seed + 2**63) % 2**64 - 2**63


def _flatten(lists: Iterable[tuple[int, Sequence[int]]]) -> tuple[list[int], list[int]]:
    pairs = [(number, item) for number, items in lists for item in items]
    return [number for number, _ in pairs], [item for _, item in pairs]
