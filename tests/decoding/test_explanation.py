"""Why each token came: numbers against a float64 reference, decisions against what the constraint allows."""

import itertools
import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from cadenza.decoding import BeamSearch, Engine, EngineConfig, TokenExplanation
from cadenza.decoding.completion import CompletionChoice
from cadenza.decoding.constraints.spec import ConstraintSpec
from cadenza.decoding.logits import LogitsPipeline
from cadenza.decoding.request import SamplingParams
from cadenza.decoding.row import Row
from cadenza.models import LoadedModel

Floats = NDArray[np.float64]

VOCAB, WIDTH = 500, 512  # twelve logits are padding of the embedding
PROMPT, GENERATED = [1, 2, 3, 3], [3, 4, 4, 400]
FLOAT32 = 2e-6
"""Relative: a few roundings of float32, through an exponential."""

PROCESSORS: dict[str, dict[str, Any]] = {
    "allowed": {"allowed_token_ids": tuple(range(0, VOCAB, 2))},
    "repetition": {"repetition_penalty": 1.3},
    "counts": {"frequency_penalty": 0.6, "presence_penalty": -0.4},
    "bias": {"logit_bias": {4: 3.0, 5: -7.5, 6: 1.25}},
    "mask": {},
    "banned": {},
}
DRAWS: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0.0, "top_k": 3},
    "plain": {},
    "warm": {"temperature": 1.7},
    "top-k": {"temperature": 0.8, "top_k": 20},
    "top-p": {"temperature": 0.8, "top_p": 0.7},
    "min-p": {"min_p": 0.05},
    "typical": {"typical_p": 0.6},
    "epsilon": {"epsilon_cutoff": 0.004},
    "several": {"temperature": 1.2, "top_k": 40, "typical_p": 0.9, "top_p": 0.8, "min_p": 0.02},
}
SUBSETS = [set(names) for size in range(7) for names in itertools.combinations(PROCESSORS, size)]


def softmax(logits: Floats) -> Floats:
    powers = np.exp(logits - logits.max())
    return powers / powers.sum()


def processed(
    raw: Floats, params: SamplingParams, mask: NDArray[np.bool_] | None, banned: list[int]
) -> Floats:
    """What penalties, bias and bans make of a row, one token after the other."""
    logits = raw.copy()
    for token in range(WIDTH):
        if params.repetition_penalty != 1.0 and token in PROMPT + GENERATED:
            logits[token] *= (
                params.repetition_penalty if logits[token] <= 0 else 1 / params.repetition_penalty
            )
        count = GENERATED.count(token)
        logits[token] -= params.frequency_penalty * count + params.presence_penalty * (count > 0)
        logits[token] += params.logit_bias.get(token, 0.0)
        is_allowed = params.allowed_token_ids is None or token in params.allowed_token_ids
        if token >= VOCAB or not is_allowed or token in banned or (mask is not None and not mask[token]):
            logits[token] = -np.inf
    return logits


def drawn_from(logits: Floats, params: SamplingParams) -> Floats:
    """The distribution that temperature and truncations leave."""
    if params.temperature == 0:
        return softmax(logits)
    probs = softmax(logits / params.temperature)

    def keep(kept: NDArray[np.bool_]) -> Floats:
        return np.where(kept, probs, 0.0) / probs[kept].sum()

    def nucleus(order: NDArray[np.int64], mass: float) -> NDArray[np.bool_]:
        kept = np.zeros(WIDTH, bool)
        before = np.cumsum(probs[order]) - probs[order]
        kept[order[before < mass]] = True
        return kept

    if params.epsilon_cutoff:
        probs = keep(probs >= min(params.epsilon_cutoff, probs.max()))
    if params.top_k:
        probs = keep(probs >= np.sort(probs)[-params.top_k])
    if params.typical_p < 1:
        with np.errstate(divide="ignore", invalid="ignore"):
            surprise = -np.log(probs)
            entropy = np.nansum(np.where(probs > 0, probs * surprise, 0.0))
        probs = keep(nucleus(np.argsort(np.abs(surprise - entropy), kind="stable"), params.typical_p))
    if params.top_p < 1:
        probs = keep(nucleus(np.argsort(-probs, kind="stable"), params.top_p))
    return keep(probs >= params.min_p * probs.max())


def words_of(mask: NDArray[np.bool_]) -> torch.Tensor:
    padded = np.zeros(WIDTH, bool)
    padded[: len(mask)] = mask
    return torch.from_numpy(np.packbits(padded, bitorder="little").view(np.int32).copy())


def example(draw: str, subset: set[str], number: int) -> tuple[Row, Floats, NDArray[np.bool_] | None]:
    """A row, its raw logits (whose float32 values are exact), and its mask."""
    random = np.random.default_rng(number)
    raw = random.normal(scale=3.0, size=WIDTH).astype(np.float32).astype(np.float64)
    mask = random.random(VOCAB) < 0.3 if "mask" in subset else None
    fields = {name: value for key in subset for name, value in PROCESSORS[key].items()}
    row = Row(
        logits_row=0,
        sampling=SamplingParams(**{**fields, **DRAWS[draw]}),
        seed=number,
        branch=0,
        prompt=PROMPT if "repetition" in subset else [],
        generated=GENERATED,
        banned=[7, 8, 9] if "banned" in subset else [],
        num_logprobs=None,
        mask=None if mask is None else 0,
        explain=True,
    )
    padded = None if mask is None else np.concatenate([mask, np.zeros(WIDTH - VOCAB, bool)])
    return row, raw, padded


@pytest.mark.parametrize("draw", DRAWS)
def test_numbers_equal_a_float64_reference(draw: str) -> None:
    pipeline = LogitsPipeline(VOCAB, "raw_logprobs")
    for number, subset in enumerate(SUBSETS):
        row, raw, mask = example(draw, subset, number)
        words = None if mask is None else words_of(mask)[None]
        logits = torch.from_numpy(raw.astype(np.float32))[None]
        (choice,) = pipeline(logits, [row], words)
        found, token = choice.explanation, choice.token_id
        assert found is not None
        assert token is not None
        probs = softmax(raw)
        final = drawn_from(processed(raw, row.sampling, mask, list(row.banned)), row.sampling)
        assert found.token_id == token
        assert found.raw_probability == pytest.approx(probs[token], rel=FLOAT32)
        assert found.final_probability == pytest.approx(final[token], rel=FLOAT32 * 10)
        assert final[token] > 0
        assert found.rank == 1 + int((raw > raw[token]).sum())
        assert found.entropy == pytest.approx(-(probs * np.log(probs)).sum(), rel=FLOAT32)
        removed = 0.0 if mask is None else probs[~mask].sum()
        assert found.mass_removed == pytest.approx(removed, rel=FLOAT32)
        assert found.decision == ("greedy" if draw == "greedy" else "sampled")
        assert found.lost == ()


def test_a_row_is_explained_alike_in_any_batch() -> None:
    pipeline = LogitsPipeline(VOCAB, "raw_logprobs")
    examples = [
        example(draw, subset, number)
        for number, (draw, subset) in enumerate(zip(itertools.cycle(DRAWS), SUBSETS, strict=False))
    ]
    logits = torch.stack([torch.from_numpy(raw.astype(np.float32)) for _, raw, _ in examples])
    everything = np.ones(WIDTH, bool)
    words = torch.stack([words_of(everything if mask is None else mask) for _, _, mask in examples])
    together = pipeline(
        logits,
        [
            Row(**{**fields_of(row), "logits_row": number, "mask": None if mask is None else number})
            for number, (row, _, mask) in enumerate(examples)
        ],
        words,
    )
    for number, ((row, _, _), among) in enumerate(zip(examples, together, strict=True)):
        (alone,) = pipeline(logits[number][None], [row], words[number][None])
        assert alone == among


def fields_of(row: Row) -> dict[str, Any]:
    return {name: getattr(row, name) for name in row.__slots__}


def test_nothing_is_explained_unasked() -> None:
    row, raw, _ = example("plain", set(), 0)
    quiet = Row(**{**fields_of(row), "explain": False})
    logits = torch.from_numpy(raw.astype(np.float32))[None].repeat(2, 1)
    asked, unasked = LogitsPipeline(VOCAB, "raw_logprobs")(logits, [row, quiet])
    assert asked.explanation is not None
    assert unasked.explanation is None
    assert unasked.token_id == asked.token_id


@pytest.fixture(scope="module")
def tiny(tiny_model: LoadedModel) -> Iterator[Engine]:
    with Engine(tiny_model, EngineConfig(kv_cache_memory_gb=0.02, max_num_seqs=8)) as running:
        yield running


def check_one_per_token(choice: CompletionChoice) -> list[TokenExplanation]:
    assert [entry.token_id for entry in choice.explanations] == choice.token_ids
    return choice.explanations


def test_the_models_own_distribution(engine: Engine, reference: Any) -> None:
    """Of the real model, against transformers' logits of the whole text."""
    prompt = engine.tokenizer.encode("The three primary colours are")
    choice = engine.generate(prompt, max_tokens=8, temperature=0.9, seed=5, explain=True).choices[0]
    entries = check_one_per_token(choice)
    with torch.inference_mode():
        logits = reference(torch.tensor([prompt + choice.token_ids])).logits[0, len(prompt) - 1 : -1].double()
    probs = logits.softmax(-1)
    for row, entry in zip(probs, entries, strict=True):
        chosen = row[entry.token_id]
        assert entry.raw_probability == pytest.approx(chosen.item(), rel=1e-3)
        assert entry.rank == int((row > chosen).sum()) + 1
        assert entry.entropy == pytest.approx(-(row * row.log()).sum().item(), rel=1e-3)
        assert entry.mass_removed == 0.0
        assert entry.decision == "sampled"


@pytest.mark.parametrize(
    "fields",
    [
        {"temperature": 0.0},
        {"seed": 3},
        {"seed": 3, "n": 3, "top_k": 30},
        {"seed": 1, "presence_penalty": 1.5},
    ],
)
def test_asking_changes_no_token(tiny: Engine, fields: dict[str, Any]) -> None:
    prompt = list(range(40, 60))
    for constraint in (None, ConstraintSpec.regex("(foo|bar)baz[0-9]{2,20}")):
        shared = {"constraint": constraint, "max_tokens": 16, "logprobs": 1, **fields}
        plain = tiny.generate(prompt, **shared)
        told = tiny.generate(prompt, **shared, explain=True)
        for before, after in zip(plain.choices, told.choices, strict=True):
            assert before.token_ids == after.token_ids
            assert before.logprobs == after.logprobs
            assert before.num_forced_tokens == after.num_forced_tokens
            assert before.explanations == []
            for entry, logprob in zip(check_one_per_token(after), after.logprobs, strict=True):
                assert entry.raw_probability == pytest.approx(math.exp(logprob.logprob), rel=1e-5)
                assert entry.rank == logprob.rank


def test_what_a_choice_of_words_removes(engine: Engine, reference: Any) -> None:
    """The first token may be any beginning of a word: everything else is removed."""
    words = ["yes", "no", "nobody"]
    prompt = engine.tokenizer.encode("Is water wet? Answer:")
    spec = ConstraintSpec.choice(words)
    choice = engine.generate(prompt, temperature=0.0, constraint=spec, max_tokens=8, explain=True).choices[0]
    entry = check_one_per_token(choice)[0]
    with torch.inference_mode():
        probs = reference(torch.tensor([prompt])).logits[0, -1].double().softmax(-1)
    texts = [engine.tokenizer.token_bytes(token) for token in range(engine.tokenizer.vocab_size)]
    special = engine.tokenizer.special_ids
    possible = [
        token
        for token, text in enumerate(texts)
        if text and token not in special and any(word.encode().startswith(text) for word in words)
    ]
    left = probs[possible]
    assert len(possible) > 4
    assert entry.mass_removed == pytest.approx(1 - left.sum().item(), rel=1e-6)
    assert entry.final_probability == pytest.approx((left.max() / left.sum()).item(), rel=1e-3)
    assert entry.decision == "greedy"


def test_forced_tokens(tiny: Engine) -> None:
    """A run of text without alternative, and a first token that is the only one in its mask."""
    choice = tiny.generate(
        [5, 6, 7], constraint=ConstraintSpec.regex("(q|z)uvwxyz 123456"), max_tokens=40, seed=2, explain=True
    ).choices[0]
    first, *rest = check_one_per_token(choice)
    assert first.decision == "sampled"
    assert [entry.decision for entry in rest] == ["forced"] * len(rest)
    for entry in rest:
        assert entry.final_probability == 1.0
        assert entry.mass_removed == pytest.approx(1.0 - entry.raw_probability, abs=1e-12)
    only = tiny.generate([5, 6, 7], constraint=ConstraintSpec.choice("a"), max_tokens=9, seed=2, explain=True)
    entry = check_one_per_token(only.choices[0])[0]
    assert (entry.decision, entry.final_probability) == ("forced", 1.0)
    assert entry.mass_removed == pytest.approx(1.0 - entry.raw_probability, abs=1e-12)


SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string"}, "tags": {"type": "array", "items": {"type": "string"}}},
    "required": ["name", "tags"],
    "additionalProperties": False,
}


@pytest.mark.parametrize(
    "spec", [ConstraintSpec.json_schema(SCHEMA), ConstraintSpec.regex("([a-z]{3} ){0,40}[a-z]{3}\\.")]
)
def test_tokens_that_close(tiny: Engine, spec: ConstraintSpec) -> None:
    """A random model would go on for ever: the budget's last tokens are not its choice."""
    for seed in range(4):
        short = tiny.generate([9, 8, 7], constraint=spec, max_tokens=30, seed=seed, explain=True).choices[0]
        entries = check_one_per_token(short)
        assert short.closed_early
        decisions = [entry.decision for entry in entries]
        assert decisions[-1] == "closing"
        assert decisions[0] in ("sampled", "forced")
        assert set(decisions) <= {"sampled", "forced", "closing"}


def test_beams_say_who_lost(tiny: Engine) -> None:
    completion = tiny.generate(
        list(range(30, 50)), max_tokens=6, strategy=BeamSearch(num_beams=3), n=3, explain=True, logprobs=0
    )
    for choice in completion.choices:
        for entry, logprob in zip(check_one_per_token(choice), choice.logprobs, strict=True):
            assert entry.decision == "searched"
            assert entry.raw_probability == pytest.approx(math.exp(logprob.logprob), rel=1e-5)
            assert entry.final_probability == pytest.approx(entry.raw_probability, rel=1e-5)
            assert 1 <= len(entry.lost) <= 3
            assert entry.token_id not in [token for token, _ in entry.lost]
            scores = [score for _, score in entry.lost]
            assert scores == sorted(scores, reverse=True)


def test_forced_runs_under_speculation(tiny_model: LoadedModel, tiny: Engine) -> None:
    """Tokens that are checked several at a time are explained like those that come one by one."""
    fields: dict[str, Any] = {
        "constraint": ConstraintSpec.regex("(abc abc abc (one|two) )+"),
        "max_tokens": 40,
        "seed": 4,
        "explain": True,
    }
    prompt = tiny.tokenizer.encode("abc abc abc one abc abc abc one abc abc abc")
    config = EngineConfig(kv_cache_memory_gb=0.02, max_num_seqs=8, speculative="ngram")
    with Engine(tiny_model, config) as speculating:
        assert speculating.generate(prompt, **fields).choices == tiny.generate(prompt, **fields).choices
        assert speculating.stats().spec_decode_num_draft_tokens > 0
