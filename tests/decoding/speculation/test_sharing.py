"""Rows for drafts: the shares are those of the best number of tokens per time that any shares bring."""

import itertools
import random

from cadenza.decoding.speculation.base import Wish
from cadenza.decoding.speculation.sharing import CPU_COST, StepCost, share_rows


def goodput(
    wishes: list[Wish], shares: tuple[int, ...], num_rows: int, num_tokens: int, cost: StepCost
) -> float:
    expected = [
        sum(wish.acceptance**number for number in range(1, share + 1))
        for wish, share in zip(wishes, shares, strict=True)
    ]
    drafting = sum(wish.cost * share for wish, share in zip(wishes, shares, strict=True))
    return (num_tokens + sum(expected)) / (cost(num_rows + sum(shares)) + drafting)


def test_no_other_shares_bring_more() -> None:
    rng = random.Random(4)
    for _ in range(200):
        drafting = rng.choice([0.0, 0.0, 0.5, 3.0])
        wishes = [Wish(rng.randrange(4), rng.choice([0.05, 0.3, 0.6, 0.9, 1.0]), drafting) for _ in range(3)]
        num_tokens = rng.randrange(3, 12)
        num_rows = num_tokens + rng.choice([0, 64])
        cost = StepCost(rng.choice([0, 10, 20]), rng.choice([1, 4, 12]))
        granted = share_rows(dict(enumerate(wishes)), num_rows, num_tokens, cost)
        own = tuple(granted.get(number, 0) for number in range(3))
        ranges = [range(wish.num_tokens + 1) for wish in wishes]
        best = max(
            goodput(wishes, shares, num_rows, num_tokens, cost) for shares in itertools.product(*ranges)
        )
        assert goodput(wishes, own, num_rows, num_tokens, cost) >= best - 1e-9


def test_one_branch_alone_may_draft_what_many_may_not() -> None:
    unlikely = Wish(8, 0.2)
    assert share_rows({"a": unlikely}, 1, 1, CPU_COST)
    many = dict.fromkeys(range(32), unlikely)
    assert not share_rows(many, 32, 32, CPU_COST)
    assert share_rows({**many, 0: Wish(2, 0.99)}, 32, 32, CPU_COST) == {0: 2}


def test_a_draft_model_as_dear_as_the_model_is_not_asked() -> None:
    assert share_rows({"a": Wish(8, 0.99)}, 1, 1, CPU_COST) == {"a": 8}
    assert share_rows({"a": Wish(8, 0.99, cost=CPU_COST.least)}, 1, 1, CPU_COST) == {}


def test_what_is_certain_is_always_worth_its_row() -> None:
    assert share_rows({"a": Wish(40, 1.0)}, 64, 64, CPU_COST) == {"a": 40}
    assert share_rows({"a": Wish(0, 1.0), "b": Wish(-1, 1.0)}, 1, 1, CPU_COST) == {}
    assert share_rows({}, 1, 1, CPU_COST) == {}
