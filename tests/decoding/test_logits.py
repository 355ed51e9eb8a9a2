"""The logits pipeline as tables of inputs and outputs, against transformers' processors and OpenAI's formula."""

import math
from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import NoBadWordsLogitsProcessor, RepetitionPenaltyLogitsProcessor

from cadenza.decoding.block_pool import prefix_root
from cadenza.decoding.branch import Branch
from cadenza.decoding.detokenizer import IncrementalDetokenizer, StopStringFilter, TextStream
from cadenza.decoding.generation import Generation
from cadenza.decoding.logits import (
    LogitsPipeline,
    LogprobsMode,
    token_logprobs,
)
from cadenza.decoding.processors import add_bias, apply_penalties, mask_vocabulary
from cadenza.decoding.request import GenerationRequest, SamplingParams
from cadenza.decoding.row import Row
from cadenza.decoding.strategies.independent import IndependentBranches
from cadenza.decoding.stream import RequestStream

INF = math.inf


def row(
    *,
    logits_row: int = 0,
    prompt: list[int] | None = None,
    generated: list[int] | None = None,
    banned: list[int] | None = None,
    seed: int = 0,
    branch: int = 0,
    num_logprobs: int | None = None,
    **sampling: Any,
) -> Row:
    return Row(
        logits_row=logits_row,
        sampling=SamplingParams(**{"temperature": 0.0, **sampling}),
        seed=seed,
        branch=branch,
        prompt=prompt or [],
        generated=generated or [],
        banned=banned or [],
        num_logprobs=num_logprobs,
    )


def logits_of(*rows: list[float]) -> Tensor:
    return torch.tensor(rows, dtype=torch.float32)


def pipeline(vocab_size: int = 5, mode: LogprobsMode = "raw_logprobs") -> LogitsPipeline:
    return LogitsPipeline(vocab_size, mode)


# penalties, bias, masks

PENALTY_CASES: dict[str, tuple[dict[str, Any], list[float]]] = {
    # logits are [2, 1, 0, -1, -2]
    "none": ({"prompt": [0], "generated": [4]}, [2.0, 1.0, 0.0, -1.0, -2.0]),
    "repetition, prompt and answer": (
        {"prompt": [0, 3], "generated": [3, 2], "repetition_penalty": 2.0},
        [1.0, 1.0, 0.0, -2.0, -2.0],
    ),
    "repetition below 1 rewards": (
        {"prompt": [0], "generated": [4], "repetition_penalty": 0.5},
        [4.0, 1.0, 0.0, -1.0, -1.0],
    ),
    "presence, the answer only": (
        {"prompt": [0], "generated": [1, 1, 3], "presence_penalty": 0.5},
        [2.0, 0.5, 0.0, -1.5, -2.0],
    ),
    "frequency, per time": (
        {"prompt": [0], "generated": [1, 1, 3], "frequency_penalty": 0.5},
        [2.0, 0.0, 0.0, -1.5, -2.0],
    ),
    "negative frequency rewards": (
        {"prompt": [], "generated": [4, 4], "frequency_penalty": -1.0},
        [2.0, 1.0, 0.0, -1.0, 0.0],
    ),
    "nothing generated yet": ({"prompt": [0, 1], "presence_penalty": 2.0}, [2.0, 1.0, 0.0, -1.0, -2.0]),
    "all three": (
        {
            "prompt": [0],
            "generated": [1, 1],
            "repetition_penalty": 2.0,
            "presence_penalty": 1.0,
            "frequency_penalty": 0.25,
        },
        [1.0, -1.0, 0.0, -1.0, -2.0],
    ),
}


@pytest.mark.parametrize("name", PENALTY_CASES)
def test_penalties(name: str):
    fields, expected = PENALTY_CASES[name]
    logits = logits_of([2.0, 1.0, 0.0, -1.0, -2.0], [2.0, 1.0, 0.0, -1.0, -2.0])
    result = apply_penalties(logits, [row(**fields), row()])
    assert result[0].tolist() == pytest.approx(expected)
    assert result[1].tolist() == [2.0, 1.0, 0.0, -1.0, -2.0]  # a neighbour keeps its own


@pytest.mark.parametrize("penalty", [0.7, 1.3, 5.0])
def test_repetition_penalty_equals_transformers(penalty: float):
    generator = torch.Generator().manual_seed(2)
    logits = torch.randn(1, 60, generator=generator) * 3
    ids = torch.randint(0, 60, (1, 25), generator=generator)
    expected = RepetitionPenaltyLogitsProcessor(penalty)(ids, logits.clone())
    own = row(prompt=ids[0, :9].tolist(), generated=ids[0, 9:].tolist(), repetition_penalty=penalty)
    assert torch.equal(apply_penalties(logits.clone(), [own]), expected)


def test_presence_and_frequency_follow_openais_formula():
    """mu[j] -> mu[j] - c[j] * alpha_frequency - float(c[j] > 0) * alpha_presence"""
    generator = torch.Generator().manual_seed(3)
    logits = torch.randn(1, 30, generator=generator)
    generated = torch.randint(0, 30, (50,), generator=generator).tolist()
    count = Counter(generated)
    expected = [
        value - count[token] * 0.3 - float(count[token] > 0) * 1.1
        for token, value in enumerate(logits[0].tolist())
    ]
    own = row(prompt=[1, 2, 3], generated=generated, frequency_penalty=0.3, presence_penalty=1.1)
    assert apply_penalties(logits.clone(), [own])[0].tolist() == pytest.approx(expected, abs=1e-5)


MASK_CASES: dict[str, tuple[dict[str, Any], list[float]]] = {
    "nothing": ({}, [0.0, 1.0, 2.0, 3.0, 4.0, -INF]),
    "allowed": ({"allowed_token_ids": (1, 3, 1)}, [-INF, 1.0, -INF, 3.0, -INF, -INF]),
    "banned": ({"banned": [0, 4, 4]}, [-INF, 1.0, 2.0, 3.0, -INF, -INF]),
    "allowed and banned": ({"allowed_token_ids": (1, 3), "banned": [3]}, [-INF, 1.0, -INF, -INF, -INF, -INF]),
}


@pytest.mark.parametrize("name", MASK_CASES)
def test_masks(name: str):
    """The sixth column is padding of the embedding, beyond the vocabulary of 5."""
    fields, expected = MASK_CASES[name]
    values = [0.0, 1.0, 2.0, 3.0, 4.0, 99.0]
    result = mask_vocabulary(logits_of(values, values), [row(), row(**fields)], vocab_size=5)
    assert result.tolist() == [MASK_CASES["nothing"][1], expected]


def test_bias_is_added_and_cannot_lift_a_ban():
    logits = logits_of([0.0, -INF, 2.0], [0.0, 1.0, 2.0])
    result = add_bias(logits, [row(logit_bias={0: 1.5, 1: 100.0, 2: -100.0}), row()])
    assert result.tolist() == [[1.5, -INF, -98.0], [0.0, 1.0, 2.0]]


@pytest.mark.parametrize("seed", range(5))
def test_bad_words_equal_transformers(seed: int):
    """Words of one, two and three tokens, over random answers of five token types."""
    generator = torch.Generator().manual_seed(seed)
    words = [[3], [0, 1], [2, 2, 4], [1, 0, 1]]
    for length in range(3, 9):  # older versions of transformers pass over words longer than the answer so far
        generated = torch.randint(0, 5, (length,), generator=generator).tolist()
        logits = torch.randn(1, 6, generator=generator)
        processor = NoBadWordsLogitsProcessor(words, eos_token_id=5)
        expected = processor(torch.tensor([generated], dtype=torch.int64).view(1, -1), logits.clone())
        result = mask_vocabulary(logits.clone(), [row(banned=banned(words, generated))], vocab_size=6)
        assert torch.equal(result, expected)


def banned(words: list[list[int]], generated: list[int]) -> list[int]:
    """What a request with these bad words may not choose next."""
    branch = Branch(
        order=(0, 0, 0),
        index=0,
        num_prompt_tokens=1,
        token_ids=[0, *generated],
        text=TextStream(IncrementalDetokenizer(_Silent(), (), True), StopStringFilter((), False)),
        cache_root=prefix_root(),
    )
    generation = Generation(
        request=GenerationRequest(request_id="test", prompt_token_ids=(0,)),
        stream=RequestStream("test", lambda stream: None),
        strategy=IndependentBranches(1),
        root=branch,
        seed=0,
        max_tokens=100,
        eos_token_ids=frozenset(),
        bad_words=words,
    )
    return list(generation.row(branch, 0).banned)


class _Silent:
    def decode(self, ids: object, *, skip_special_tokens: bool = True) -> str:
        return ""


# log-probabilities


def test_logprob_rank_and_alternatives():
    logits = logits_of([1.0, 3.0, 2.0, 0.0])
    log_probs = torch.log_softmax(logits[0].double(), -1).tolist()
    (found,) = token_logprobs(logits, torch.tensor([0]), [2])
    assert (found.token_id, found.rank) == (0, 3)
    assert found.logprob == pytest.approx(log_probs[0], abs=1e-6)
    assert [token for token, _ in found.top] == [1, 2]
    assert [value for _, value in found.top] == pytest.approx([log_probs[1], log_probs[2]], abs=1e-6)


def test_every_row_gets_as_many_alternatives_as_it_asked_for():
    logits = torch.arange(12.0).view(3, 4)
    found = token_logprobs(logits, torch.tensor([3, 3, 3]), [0, 4, 1])
    assert [len(item.top) for item in found] == [0, 4, 1]


@pytest.mark.parametrize("wanted", [1, 2, 3, 4])
@pytest.mark.parametrize("token", [1, 2, 3])
def test_the_chosen_one_of_equals_is_listed_first(token: int, wanted: int):
    """Tokens 1, 2 and 3 are equally likely: whichever was chosen has rank 1 and leads its alternatives."""
    (found,) = token_logprobs(logits_of([0.0, 2.0, 2.0, 2.0, 1.0]), torch.tensor([token]), [wanted])
    assert found.rank == 1
    assert found.top[0] == (token, found.logprob)
    assert len({other for other, _ in found.top}) == wanted
    assert {other for other, _ in found.top} <= ({1, 2, 3} if wanted <= 3 else {1, 2, 3, 4})


@pytest.mark.parametrize("wanted", [2, 3])
def test_a_tie_at_the_edge_of_the_alternatives_keeps_the_chosen(wanted: int):
    """Token 4 shares the second place with 2 and 3: of them it is the one to be listed."""
    (found,) = token_logprobs(logits_of([0.0, 5.0, 2.0, 2.0, 2.0]), torch.tensor([4]), [wanted])
    assert found.rank == 2
    assert [token for token, _ in found.top][:2] == [1, 4]
    assert len({token for token, _ in found.top}) == wanted
    values = [value for _, value in found.top]
    assert values == sorted(values, reverse=True)


def test_a_greedy_choice_is_its_own_first_alternative():
    generator = torch.Generator().manual_seed(4)
    logits = (torch.randn(50, 300, generator=generator) * 2).round()  # many ties
    rows = [row(logits_row=number, num_logprobs=3) for number in range(50)]
    for number, choice in enumerate(pipeline(300)(logits, rows)):
        assert choice.logprob is not None
        assert choice.token_id == int(logits[number].argmax())
        assert choice.logprob.rank == 1
        assert choice.logprob.top[0] == (choice.token_id, choice.logprob.logprob)


# the whole pipeline

PROCESSED = {"temperature": 2.0, "top_k": 2, "logit_bias": {4: -50.0}, "banned": [3], "num_logprobs": 5}
VALUES = [0.0, 1.0, 2.0, 3.0, 4.0]


def test_raw_logprobs_are_those_of_the_model():
    (choice,) = pipeline()(logits_of(VALUES), [row(**PROCESSED)])
    raw = torch.log_softmax(torch.tensor(VALUES), -1).tolist()
    assert choice.logprob is not None
    assert choice.token_id in (1, 2)
    assert choice.logprob.logprob == pytest.approx(raw[choice.token_id])
    assert [token for token, _ in choice.logprob.top] == [4, 3, 2, 1, 0]


def test_processed_logprobs_are_those_of_the_draw():
    """Token 3 is banned, 4 pushed down; top-k leaves 2 and 1, at temperature 2."""
    (choice,) = pipeline(mode="processed_logprobs")(logits_of(VALUES), [row(**PROCESSED)])
    expected = dict(zip([2, 1], torch.log_softmax(torch.tensor([2.0, 1.0]) / 2.0, -1).tolist(), strict=True))
    assert choice.logprob is not None
    assert choice.token_id is not None
    assert choice.logprob.logprob == pytest.approx(expected[choice.token_id])
    assert dict(choice.logprob.top[:2]) == pytest.approx(expected)
    assert [value for _, value in choice.logprob.top[2:]] == [-INF] * 3


def test_processed_logprobs_of_a_greedy_row_have_no_temperature():
    own = row(banned=[4], logit_bias={0: 2.5}, num_logprobs=2, top_k=1, top_p=0.1)
    (choice,) = pipeline(mode="processed_logprobs")(logits_of(VALUES), [own])
    expected = torch.log_softmax(torch.tensor([2.5, 1.0, 2.0, 3.0]), -1).tolist()
    assert choice.logprob is not None
    assert choice.token_id == 3
    assert choice.logprob.logprob == pytest.approx(expected[3])
    assert choice.logprob.top == ((3, pytest.approx(expected[3])), (0, pytest.approx(expected[0])))


def test_penalties_come_before_the_bias():
    """(2 - 1) + 1.5 beats 2.4; (2 + 1.5) / 2 for a repetition penalty after the bias would not."""
    own = row(generated=[0], repetition_penalty=2.0, logit_bias={0: 1.5})
    (choice,) = pipeline(2)(logits_of([2.0, 2.4]), [own])
    assert choice.token_id == 0


def test_forks_share_a_row_of_logits_without_sharing_its_changes():
    rows = [row(banned=[4]), row(branch=1), row(branch=2, allowed_token_ids=(0,)), row(branch=3)]
    logits = logits_of(VALUES)
    assert [choice.token_id for choice in pipeline()(logits, rows)] == [3, 4, 0, 4]
    assert logits.tolist() == [VALUES]


def test_rows_are_read_where_they_say():
    rows = [row(logits_row=2), row(logits_row=0), row(logits_row=2)]
    assert [c.token_id for c in pipeline(3)(torch.eye(3), rows)] == [2, 0, 2]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("fields", [{}, {"top_k": 2}, {"top_p": 0.5}, {"typical_p": 0.5}, {"min_p": 0.5}])
def test_a_row_with_nothing_left_says_so_and_harms_no_other(temperature: float, fields: dict[str, float]):
    dead = row(temperature=temperature, allowed_token_ids=(1,), banned=[1], num_logprobs=1, **fields)
    choices = pipeline()(logits_of(VALUES), [row(), dead, row(branch=1)])
    assert [choice.token_id for choice in choices] == [4, None, 4]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_that_are_not_numbers_choose_nothing(temperature: float):
    broken = row(logits_row=1, temperature=temperature)
    choices = pipeline()(logits_of(VALUES, [math.nan] * 5), [row(), broken])
    assert [choice.token_id for choice in choices] == [4, None]


@pytest.mark.parametrize("value", [math.nan, INF])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_one_logit_that_is_no_number_spoils_its_row_only(value, temperature):
    """Unless it is of a token that is not allowed."""
    rows = [
        row(logits_row=0, temperature=temperature),
        row(logits_row=1, temperature=temperature),
        row(logits_row=1, temperature=temperature, banned=[3]),
    ]
    choices = pipeline()(logits_of(VALUES, [2.0, 1.0, 0.0, value, -2.0]), rows)
    assert [choice.token_id is None for choice in choices] == [False, True, False]


@pytest.mark.parametrize("top_k", [2**31, 2**63 - 1, 2**70])
def test_a_top_k_beyond_any_vocabulary_is_all_of_it(top_k):
    logits = torch.zeros(1, 40)
    rows = [row(temperature=1.0, seed=seed) for seed in range(8)]
    limited = [row(temperature=1.0, seed=seed, top_k=top_k) for seed in range(8)]
    expected, found = (pipeline(40)(logits, own) for own in (rows, limited))
    assert [choice.token_id for choice in found] == [choice.token_id for choice in expected]


def test_seeds_of_64_bits_are_told_apart():
    """-1 and 2**64 - 1 are the same 64 bits; 2**63 and 0 are not."""
    logits = torch.zeros(1, 4000)
    seeds = [-1, 2**64 - 1, 0, 2**63, -(2**63)]
    drawn = [c.token_id for c in pipeline(4000)(logits, [row(temperature=1.0, seed=seed) for seed in seeds])]
    assert drawn[0] == drawn[1]
    assert drawn[3] == drawn[4]
    assert len({drawn[0], drawn[2], drawn[3]}) == 3
