"""Rejection sampling against float64 and its definition, interpreted and, where there is one, on a GPU."""

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor

from cadenza.kernels.noise import gumbel, philox

pytest.importorskip("triton")

from cadenza.kernels.rejection import rejection, rejection_bytes, rejection_reference
from cadenza.kernels.verification import verify


def keys_of(num_rows: int, first: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """(seed, branch, position) of rows that differ in one or another of them."""
    row = torch.arange(first, first + num_rows)
    return (row // 7 + (1 << 40), (row % 3).int(), (row * 5).int())


def drawn_from(q: Tensor, number: int) -> Tensor:
    """[R] int32 tokens of softmax q."""
    generator = torch.Generator().manual_seed(number)
    return torch.multinomial(q.double().softmax(-1), 1, generator=generator)[:, 0].int()


def on(device: torch.device, *tensors: Tensor) -> list[Tensor]:
    return [tensor.to(device) for tensor in tensors]


CASES = {
    "bfloat16, ragged": (5, 4500, torch.bfloat16, 2, 3),
    "float32, a few tokens": (12, 11, torch.float32, 0, 5),
    "float16, whole blocks": (3, 8192, torch.float16, 0, 0),
}


@pytest.mark.parametrize("name", CASES)
def test_tokens_equal_float64(name, kernel_device):
    """Rows with drafts that stay, that fall, and without; NaN around all logits."""
    num_rows, num_columns, dtype, before, after = CASES[name]
    generator = torch.Generator().manual_seed(num_columns)
    wide = torch.full((2, num_rows, before + num_columns + after), torch.nan, dtype=dtype)
    values = torch.randn(2, num_rows, num_columns, generator=generator) * 3
    values[0, :, 3] = -torch.inf
    wide[:, :, before : before + num_columns] = values.to(dtype)
    p, q = wide[:, :, before : before + num_columns].to(kernel_device).unbind()
    drafts = drawn_from(q.cpu(), 1)
    drafts[0] = p[0].float().argmax()
    drafts[-2] = 3  # impossible: it falls
    drafts[-1] = -1
    q[-1] = torch.nan
    arguments = (p, q, *on(kernel_device, drafts, *keys_of(num_rows)))
    found = rejection(*arguments)
    assert found.dtype == torch.int32
    assert found.tolist() == rejection_reference(*arguments).tolist()
    assert 0 < sum(one == two for one, two in zip(found.tolist(), drafts.tolist(), strict=True)) < num_rows


def test_the_definition_holds_row_by_row(kernel_device):
    """Coin and noise of their own counters, in NumPy's float64."""
    p, q = torch.randn(2, 10, 9, generator=torch.Generator().manual_seed(2)).unbind()
    drafts = drawn_from(q, 5)
    seed, branch, position = keys_of(10)
    found = rejection(*on(kernel_device, p, q, drafts, seed, branch, position)).tolist()
    for row, draft in enumerate(drafts.tolist()):
        at = [column[row : row + 1].long() for column in (seed, position, branch)]
        words = [
            philox(at[0], (torch.tensor([token]), at[1], at[2], torch.tensor([word])))[0]
            for token, word in [(0, 2), *((token, 3) for token in range(9))]
        ]
        own_p, own_q = p[row].double().softmax(-1).numpy(), q[row].double().softmax(-1).numpy()
        expected = draft
        if (float(words[0]) + 0.5) / 2**32 * own_q[draft] >= own_p[draft]:
            with np.errstate(divide="ignore"):
                residual = np.log(np.maximum(own_p - own_q, 0.0))
            expected = int(np.argmax(residual + gumbel(torch.cat(words[1:])).numpy()))
        assert found[row] == expected


def test_what_comes_is_distributed_as_p(kernel_device):
    """The reference at length, the kernel over as many rows as take no time; p knows nothing of q."""
    p, q = torch.tensor([[2.0, 1.0, 0.0, -1.0, 0.5, -torch.inf], [0.0, 1.5, -2.0, 1.0, 0.3, 1.0]]).unbind()
    for draw, num_rows in ((rejection_reference, 40_000), (rejection, 150)):
        drafts = drawn_from(q.expand(num_rows, 6), 9)
        rows = on(kernel_device, p.expand(num_rows, 6), q.expand(num_rows, 6), drafts, *keys_of(num_rows, 13))
        found = draw(*rows)
        if draw is rejection:
            assert torch.equal(found, rejection_reference(*rows))
        counts = np.bincount(found.cpu().numpy(), minlength=6)
        expected = p.double().softmax(-1).numpy() * num_rows
        assert counts[5] == 0
        # A correct draw fails this with probability 1e-4; the seeds are fixed, so it never flickers.
        assert stats.chisquare(counts[:5], expected[:5]).pvalue > 1e-4
        stayed = float((found.cpu() == drafts).double().mean())
        overlap = float(torch.minimum(p.softmax(-1), q.softmax(-1)).sum())
        assert abs(stayed - overlap) < 5 * (0.25 / num_rows) ** 0.5


def test_a_draft_from_p_itself_stays_and_verification_sees_what_fell(kernel_device):
    p = torch.randn(6, 20, generator=torch.Generator().manual_seed(3))
    drafts = drawn_from(p, 2)
    q = p.clone()
    q[2, drafts[2]] += 30.0  # certain of what p is not: p/q is below 0.5
    p[2, drafts[2]] = -20.0
    drafts[5] = -1
    rows = on(kernel_device, p, q, drafts, *keys_of(6))
    found = rejection(*rows)
    assert found[:2].tolist() == drafts[:2].tolist()
    assert found[2] != drafts[2]
    starts = torch.tensor([0, 6], dtype=torch.int32, device=kernel_device)
    verified = verify(found, rows[2], starts)
    assert verified.num_accepted.tolist() == [2]
    assert verified.is_reached.tolist() == [1, 1, 1, 0, 0, 0]


def test_a_draft_stays_where_nothing_could_replace_it(kernel_device):
    """q is p, and this coin is one of the few that float32 rounds up to 1."""
    p = torch.randn(1, 20, generator=torch.Generator().manual_seed(4))
    number = torch.tensor([[6], [0], [7401574]], dtype=torch.int32)
    seed = torch.tensor([5])
    coin = philox(seed, (torch.tensor([0]), number[2].long(), torch.tensor([0]), torch.tensor([2])))[0]
    assert float(coin.float()) == 2.0**32
    rows = on(kernel_device, p, p, number[0], seed, number[1], number[2])
    assert rejection(*rows).tolist() == rejection_reference(*rows).tolist() == [6]


def test_what_is_no_distribution_is_said(kernel_device):
    p, q = torch.zeros(2, 6, 50).unbind()
    p[0, 7], p[1, 7], p[2] = torch.nan, torch.inf, -torch.inf
    q[3, 7], q[4] = torch.nan, -torch.inf
    drafts = torch.tensor([1, 1, 1, 1, 1, 1], dtype=torch.int32)
    rows = on(kernel_device, p, q, drafts, *keys_of(6))
    assert rejection(*rows).tolist() == rejection_reference(*rows).tolist() == [-1, -1, -1, -1, -1, 1]


def test_a_row_is_the_same_in_any_company_and_none_is_none(kernel_device):
    p, q = (torch.randn(2, 4, 300, generator=torch.Generator().manual_seed(8)) * 2).unbind()
    rows = on(kernel_device, p, q, drawn_from(q, 3), *keys_of(4))
    together = rejection(*rows)
    assert torch.equal(rejection(*(column[[3, 1]] for column in rows)), together[[3, 1]])
    assert rejection(*(column[:0] for column in rows)).shape == (0,)


def test_the_bytes_that_must_move():
    assert rejection_bytes(5, 1000, 2, torch.bfloat16) == 7 * 4000 + 5 * 24
