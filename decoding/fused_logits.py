"""The logits pipeline on a GPU: a handful of kernels for the whole batch, and one wait for their answers.

What the rows are asked for decides which kernels run at all: edited copies for rows with penalties, bias or bans, the
draw (`kernels.fused_sampling`), the most likely tokens for beams and alternatives (`kernels.top_tokens`). Rows with
truncations that no kernel has (typical-p, top-n-sigma, epsilon, eta, XTC, mirostat, a dynamic temperature), edited
beams, and log-probabilities of processed logits go through `logits` as on a CPU, which waits several times.
"""

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cadenza.decoding.edits import EditList, edits_of, has_edits
from cadenza.decoding.logits import LogitsPipeline, with_alternatives
from cadenza.decoding.parameters import as_signed
from cadenza.decoding.request import Decision, TokenLogprob
from cadenza.decoding.row import Choice, Row
from cadenza.kernels.fused_sampling import OK, FusedRows, fused_sampling
from cadenza.kernels.logit_edits import Edits, edited_rows
from cadenza.kernels.top_tokens import MAX_WIDTH, TopRows, top_tokens
from cadenza.kernels.upload import download, upload

_WORD_BITS = 32
_NONE = -1

Array = NDArray[np.generic]


class FusedLogitsPipeline(LogitsPipeline):
    def __call__(self, logits: Tensor, rows: Sequence[Row], bitmask: Tensor | None = None) -> list[Choice]:
        drawn = [number for number, row in enumerate(rows) if self._is_drawn(row)]
        searched = [number for number, row in enumerate(rows) if _is_searched(row)]
        choices: dict[int, Choice] = {}
        if drawn or searched:
            own = self._fused(logits, [rows[at] for at in drawn], [rows[at] for at in searched], bitmask)
            for number, choice in zip([*drawn, *searched], own, strict=True):
                choices[number] = (
                    self._explained(logits, rows[number], bitmask, choice) if rows[number].explain else choice
                )
        others = [number for number in range(len(rows)) if number not in choices]
        if others:
            rest = super().__call__(logits, [rows[number] for number in others], bitmask)
            choices.update(zip(others, rest, strict=True))
        return [choices[number] for number in range(len(rows))]

    def _is_drawn(self, row: Row) -> bool:
        wanted = row.num_logprobs
        return (
            row.candidates is None
            and row.sampling.typical_p == 1.0
            and not row.sampling.has_thresholds
            and (wanted is None or (self._logprobs_mode == "raw_logprobs" and wanted <= MAX_WIDTH))
        )

    def _fused(
        self, logits: Tensor, drawn: Sequence[Row], searched: Sequence[Row], bitmask: Tensor | None
    ) -> Iterator[Choice]:
        """The choices of `drawn`, then of `searched`: everything is launched before the first answer is waited for."""
        edited = [row for row in drawn if has_edits(row)]
        listed = [row for row in drawn if row.num_logprobs]
        masks = _Masks(bitmask, logits.shape[1])
        edits = edits_of(edited, logits.shape[1])
        parts: list[list[Array]] = [
            self._draw_columns(drawn, edited, masks, logits.shape[1]),
            self._top_columns(listed, None, logits.shape[1]),
            self._top_columns(searched, masks, logits.shape[1]),
            _edit_columns(edited, edits),
            [masks.words],
        ]
        tensors = iter(upload([array for part in parts for array in part], logits.device))
        draw_rows, listed_rows, searched_rows, edit_rows, (words,) = (
            [next(tensors) for _ in part] for part in parts
        )
        allowed = words if len(words) else None
        results: list[Tensor] = []
        if drawn:
            changed = edited_rows(logits, edit_rows[0], Edits(*edit_rows[1:])) if edited else None
            wants_logprobs = any(row.num_logprobs is not None for row in drawn)
            draws = fused_sampling(
                logits, changed, allowed, FusedRows(*draw_rows), wants_logprobs=wants_logprobs
            )
            results += [draws.tokens, draws.status, draws.logprob, draws.rank]
        if listed:
            width = min(max(row.num_logprobs or 0 for row in listed), logits.shape[1])
            tops = top_tokens(logits, None, TopRows(*listed_rows), width)
            results += [tops.tokens, tops.scores]
        if searched:
            width = min(max(row.candidates.count for row in searched if row.candidates), logits.shape[1])
            tops = top_tokens(logits, allowed, TopRows(*searched_rows), width)
            results += [tops.tokens, tops.scores]
        arrays = iter(download(results))
        if drawn:
            own = [next(arrays) for _ in range(4)]
            alternatives = [next(arrays) for _ in range(2)] if listed else []
            yield from _drawn_choices(drawn, own, alternatives)
        if searched:
            yield from _searched_choices(searched, next(arrays), next(arrays))

    def _draw_columns(
        self, rows: Sequence[Row], edited: Sequence[Row], masks: "_Masks", num_columns: int
    ) -> list[Array]:
        """In the order of `FusedRows`."""
        edited_row = {id(row): number for number, row in enumerate(edited)}
        params = [row.sampling for row in rows]
        return [
            _ints(row.logits_row for row in rows),
            _ints(edited_row.get(id(row), _NONE) for row in rows),
            _ints(masks.row_for(row) for row in rows),
            _ints(self._num_tokens(row, num_columns) for row in rows),
            _ints(self._num_scored(row.num_tokens, num_columns) for row in rows),
            _floats(each.temperature for each in params),
            _ints(min(max(each.top_k, 0), num_columns) for each in params),  # however large, it is an int32
            _floats(each.top_p for each in params),
            _floats(each.min_p for each in params),
            np.array([as_signed(row.seed) for row in rows], np.int64),
            _ints(row.branch for row in rows),
            _ints(len(row.generated) for row in rows),
        ]

    def _top_columns(self, rows: Sequence[Row], masks: "_Masks | None", num_columns: int) -> list[Array]:
        """In the order of `TopRows`. masks: None where the model's own distribution is asked for."""
        scored = [self._num_scored(row.num_tokens, num_columns) for row in rows]
        own = scored if masks is None else [self._num_tokens(row, num_columns) for row in rows]
        return [
            _ints(row.logits_row for row in rows),
            _ints(_NONE if masks is None else masks.row_for(row) for row in rows),
            _ints(own),
            _ints(scored),
            _ints(row.candidates is not None and row.candidates.normalized for row in rows),
        ]

    def _num_tokens(self, row: Row, num_columns: int) -> int:
        return min(row.num_tokens or self._vocab_size, num_columns)


def _is_searched(row: Row) -> bool:
    return row.candidates is not None and row.candidates.count <= MAX_WIDTH and not has_edits(row)


class _Masks:
    """The step's bitmask, and rows of it for requests that list the tokens they allow."""

    def __init__(self, bitmask: Tensor | None, num_columns: int) -> None:
        self._width = -(-num_columns // _WORD_BITS)
        """Also where the step's has fewer words: a list may allow tokens that an adapter adds."""
        self._step = None if bitmask is None else bitmask.numpy()
        self._own: list[NDArray[np.int32]] = []

    def row_for(self, row: Row) -> int:
        if row.sampling.allowed_token_ids is None:
            return _NONE if row.mask is None else row.mask
        own = np.zeros(self._width * _WORD_BITS, np.uint8)
        own[[token for token in row.sampling.allowed_token_ids if token < len(own)]] = 1
        words = np.packbits(own, bitorder="little").view(np.int32)
        if row.mask is not None and self._step is not None:
            words = words & _as_wide(self._step[row.mask : row.mask + 1], self._width)[0]
        self._own.append(words)
        return (0 if self._step is None else len(self._step)) + len(self._own) - 1

    @property
    def words(self) -> NDArray[np.int32]:
        """[rows, words] int32, once every row has asked."""
        if not self._own:
            return np.zeros((0, self._width), np.int32) if self._step is None else self._step
        step = [] if self._step is None else [_as_wide(self._step, self._width)]
        return np.concatenate([*step, np.stack(self._own)])


def _as_wide(words: NDArray[np.int32], width: int) -> NDArray[np.int32]:
    """[rows, width]: tokens beyond a mask are not allowed, those beyond the logits do not exist."""
    if words.shape[1] == width:
        return words
    return np.pad(words[:, :width], ((0, 0), (0, max(0, width - words.shape[1]))))


def _edit_columns(rows: Sequence[Row], edits: EditList) -> list[Array]:
    """The rows that are copied, then in the order of `Edits`."""
    return [
        _ints(row.logits_row for row in rows),
        edits.rows,
        edits.tokens,
        edits.repetition,
        edits.offset,
    ]


def _drawn_choices(
    rows: Sequence[Row], draws: Sequence[Array], alternatives: Sequence[Array]
) -> Iterator[Choice]:
    """draws: tokens, status, logprob, rank, each [R]; alternatives: tokens, scores, [rows that want any, width]."""
    tops = iter(zip(*(part.tolist() for part in alternatives), strict=True))
    for row, token, status, logprob, rank in zip(rows, *(part.tolist() for part in draws), strict=True):
        top_ids, top_scores = next(tops) if row.num_logprobs else ([], [])
        is_possible = status == OK
        found: TokenLogprob | None = None
        if is_possible and row.num_logprobs is not None:
            # fewer than are wanted, where so many are not possible
            wanted = slice(min(row.num_logprobs, sum(each >= 0 for each in top_ids)))
            found = with_alternatives(token, logprob, rank, top_ids[wanted], top_scores[wanted])
        decision: Decision = "greedy" if row.sampling.is_greedy else "sampled"
        yield Choice(token if is_possible else None, found, decision)


def _searched_choices(rows: Sequence[Row], tokens: Array, scores: Array) -> Iterator[Choice]:
    """tokens, scores: [R, width]."""
    for row, own_tokens, own_scores in zip(rows, tokens.tolist(), scores.tolist(), strict=True):
        assert row.candidates is not None
        pairs = zip(own_tokens[: row.candidates.count], own_scores, strict=False)
        yield Choice(None, None, "searched", tuple(pair for pair in pairs if pair[1] > -torch.inf))


def _ints(values: "Iterator[int] | Sequence[int]") -> Array:
    return np.array(list(values), np.int32)


def _floats(values: Iterator[float]) -> Array:
    return np.array(list(values), np.float32)
