"""A step's tokens side by side, [1, T]: no row is padding. Decode rows first, then prompt chunks.

Knows branches and blocks; no tensors, no devices.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from cadenza.decoding.branch import Branch

if TYPE_CHECKING:
    from cadenza.decoding.scheduler import Span, Step


@dataclass(frozen=True, slots=True)
class Chunk:
    """Consecutive prompt tokens of one branch. `start` is a multiple of TILE."""

    first_row: int
    num_rows: int
    start: int
    block_table: Sequence[int]


@dataclass(slots=True)
class PackedRows:
    """The tokens in the order of their rows, and where each one's key and value go."""

    token_ids: list[int] = field(default_factory=list)
    positions: list[int] = field(default_factory=list)
    slots: list[int] = field(default_factory=list)
    row_of: dict[tuple[Branch, int], int] = field(default_factory=dict)
    """The row of (branch, position), in order."""
    block_tables: list[Sequence[int]] = field(default_factory=list)
    """Of the decode rows, the first ones: their branches'."""
    chunks: list[Chunk] = field(default_factory=list)

    @property
    def num_decode_rows(self) -> int:
        return len(self.block_tables)

    def add(self, branch: Branch, position: int, block_size: int, drafts: Sequence[int] = ()) -> None:
        self.row_of[branch, position] = len(self.token_ids)
        ahead = position - branch.num_tokens
        self.token_ids.append(branch.token_ids[position] if ahead < 0 else drafts[ahead])
        self.positions.append(position)
        self.slots.append(branch.block_table[position // block_size] * block_size + position % block_size)


def pack(step: "Step", block_size: int, order: Callable[[int], int] | None = None) -> PackedRows:
    """Drafts are decode rows, as what they may become. Generated tokens are decode rows always, also when a preempted
    branch computes them again, so that its cache equals the lost one bit for bit.

    order: what decode rows are sorted by, a function of their positions.
    """
    rows = PackedRows()
    decode_rows = [
        (branch, position)
        for branch, start, end in ((span.branch, span.start, span.end) for span in step.spans)
        for position in range(max(start, branch.num_prompt_tokens), end + len(step.drafts.get(branch, ())))
    ]
    if order is not None:
        decode_rows.sort(key=lambda row: order(row[1]))
    for branch, position in decode_rows:
        rows.block_tables.append(branch.block_table)
        rows.add(branch, position, block_size, step.drafts.get(branch, ()))
    for span in step.spans:
        if span.start < span.branch.num_prompt_tokens:
            _add_chunk(rows, span, block_size)
    return rows


def _add_chunk(rows: PackedRows, span: "Span", block_size: int) -> None:
    branch, end = span.branch, min(span.end, span.branch.num_prompt_tokens)
    rows.chunks.append(Chunk(len(rows.token_ids), end - span.start, span.start, branch.block_table))
    for position in range(span.start, end):
        rows.add(branch, position, block_size)
