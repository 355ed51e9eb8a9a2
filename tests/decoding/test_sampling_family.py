"""Top-n-sigma, epsilon, eta, XTC, mirostat, dynamic temperature and DRY in the engine: each changes the answer, none
breaks what holds for every other way of sampling. The distributions themselves are tested with the kernels.
"""

import itertools
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from cadenza.decoding import Engine, EngineConfig, GenerationRequest, SamplingParams
from cadenza.decoding.completion import Completion, CompletionChoice, collect
from cadenza.decoding.constraints.constraint import Constraint
from cadenza.decoding.constraints.spec import ConstraintSpec
from cadenza.decoding.dry import Breakers, Dry
from cadenza.decoding.logits import LogitsPipeline
from cadenza.decoding.processors import apply_penalties
from cadenza.decoding.row import Choice, Row
from cadenza.models import LoadedModel

PROMPT = "The old clock on the wall had stopped at ten past four, and nobody in the house"
NUM_TOKENS = 12
PEAKED = {"temperature": 0.5}
"""The random model's distributions are flat: nothing in them is a top choice."""

EACH: dict[str, dict[str, Any]] = {
    "top-n-sigma": {"top_n_sigma": 1.0},
    "epsilon": {"epsilon_cutoff": 0.01},
    "eta": {"eta_cutoff": 0.1},
    "XTC": {"xtc_probability": 0.7, "xtc_threshold": 0.01, **PEAKED},
    "mirostat 1": {"mirostat": 1, "mirostat_tau": 3.0, "mirostat_eta": 0.3},
    "mirostat 2": {"mirostat": 2, "mirostat_tau": 3.0, "mirostat_eta": 0.3},
    "dynamic temperature": {"dynatemp_range": 0.7, "dynatemp_exponent": 1.5},
    "DRY": {"dry_multiplier": 2.0, "dry_allowed_length": 1, "dry_sequence_breakers": ()},
    "all": {
        "top_n_sigma": 3.0,
        "epsilon_cutoff": 1e-5,
        "eta_cutoff": 1e-4,
        "top_k": 4000,
        "top_p": 0.98,
        "min_p": 0.001,
        "xtc_probability": 0.5,
        "xtc_threshold": 0.02,
        "mirostat": 2,
        "dynatemp_range": 0.4,
        "dry_multiplier": 0.8,
        "repetition_penalty": 1.1,
    },
}
SUBFIELDS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "xtc_threshold": ({"xtc_probability": 1.0, "xtc_threshold": 0.5, **PEAKED}, {"xtc_threshold": 0.01}),
    "mirostat_tau": ({"mirostat": 2}, {"mirostat_tau": 2.0}),
    "mirostat_eta": ({"mirostat": 2, "mirostat_tau": 2.0}, {"mirostat_eta": 0.9}),
    "dynatemp_exponent": ({"dynatemp_range": 0.9}, {"dynatemp_exponent": 4.0}),
    "dry_base": ({"dry_multiplier": 0.01}, {"dry_base": 4.0}),
    "dry_allowed_length": ({"dry_multiplier": 5.0}, {"dry_allowed_length": 6}),
    "dry_sequence_breakers": ({"dry_multiplier": 5.0}, {"dry_sequence_breakers": ("a", "e")}),
    "dry_penalty_last_n": ({"dry_multiplier": 5.0}, {"dry_penalty_last_n": 4}),
}


@pytest.fixture(scope="module")
def tiny(tiny_model: LoadedModel) -> Iterator[Engine]:
    with Engine(tiny_model, EngineConfig(max_num_seqs=32, kv_cache_memory_gb=0.02)) as running:
        yield running


def request(
    engine: Engine, prompt: str, fields: Mapping[str, Any], constraint: Constraint | None = None
) -> GenerationRequest:
    sampling = SamplingParams(
        **{"max_tokens": NUM_TOKENS, "seed": 11, "ignore_eos": constraint is None, **fields}
    )
    ids = tuple(engine.tokenizer.encode(prompt))
    return GenerationRequest(
        request_id="test", prompt_token_ids=ids, sampling=sampling, constraint=constraint
    )


def complete(engine: Engine, prompt: str = PROMPT, **fields: Any) -> Completion:
    asked = request(engine, prompt, fields)
    return collect(engine.submit(asked), asked.sampling.n)


def answer(engine: Engine, prompt: str = PROMPT, **fields: Any) -> CompletionChoice:
    return complete(engine, prompt, **fields).choices[0]


# every field does something


@pytest.mark.parametrize("name", [name for name in EACH if name != "DRY"])
def test_each_changes_what_is_drawn(tiny: Engine, name: str):
    own = EACH[name]
    without = {"temperature": own["temperature"]} if "temperature" in own else {}
    assert answer(tiny, **own).token_ids != answer(tiny, **without).token_ids


@pytest.mark.parametrize("name", SUBFIELDS)
def test_each_of_their_own_fields_changes_it_further(tiny: Engine, name: str):
    base, more = SUBFIELDS[name]
    if name.startswith("dry"):
        base = {**base, **few_words(tiny), "max_tokens": 60}
    assert answer(tiny, **base).token_ids != answer(tiny, **{**base, **more}).token_ids


@pytest.mark.parametrize("name", [name for name in EACH if name not in ("DRY", "all")])
def test_greedy_is_greedy(tiny: Engine, name: str):
    fields = EACH[name] | {"temperature": 0.0}
    fields.pop("dynatemp_range", None)
    assert answer(tiny, **fields).token_ids == answer(tiny, temperature=0.0).token_ids


def few_words(engine: Engine) -> dict[str, Any]:
    """Greedily, and of four words: these will come again."""
    words = [
        engine.tokenizer.encode(word, add_special_tokens=False) for word in (" a", " red", " house", " on")
    ]
    return {"temperature": 0.0, "allowed_token_ids": tuple(token for (token,) in words)}


def test_dry_ends_a_loop(tiny: Engine):
    """With a penalty of 5, no phrase of six tokens comes three times."""

    def most_repeated(choice: CompletionChoice) -> int:
        ids = choice.token_ids
        return max(Counter(tuple(ids[at : at + 6]) for at in range(len(ids) - 5)).values())

    (house,) = tiny.tokenizer.encode(" house", add_special_tokens=False)
    fields = {**few_words(tiny), "max_tokens": 60, "logit_bias": {house: 3.0}}
    assert most_repeated(answer(tiny, **fields)) > 5
    assert most_repeated(answer(tiny, **fields, dry_multiplier=5.0, dry_sequence_breakers=())) < 3


def test_dry_looks_at_the_prompt_too(tiny: Engine):
    """A prompt that repeats itself: without DRY the biased token continues it, with DRY another one does."""
    ids = tiny.tokenizer.encode("red green blue red green")
    blue = tiny.tokenizer.encode(" blue")[0]
    assert blue in ids
    fields = {"temperature": 0.0, "logit_bias": {blue: 60.0}, "max_tokens": 1}
    assert answer(tiny, "red green blue red green", **fields).token_ids == [blue]
    dry = {"dry_multiplier": 100.0, "dry_allowed_length": 1}
    assert answer(tiny, "red green blue red green", **fields, **dry).token_ids != [blue]
    breaks = {"dry_sequence_breakers": ["green"]}
    assert answer(tiny, "red green blue red green", **fields, **dry, **breaks).token_ids == [blue]


# the same in any company


def test_requests_draw_the_same_alone_and_among_sixteen_others(tiny: Engine):
    """Tokens and log-probabilities, compared with ==."""
    each = [{**fields, "logprobs": 2} for fields in EACH.values()]
    alone = [answer(tiny, **fields) for fields in each]
    others = [
        {"top_p": 0.9},
        {"temperature": 0.0},
        {"typical_p": 0.8},
        {},
        *itertools.islice(EACH.values(), 4),
    ]
    asked = [request(tiny, f"{number} {PROMPT}", fields) for number, fields in enumerate(others)]
    streams = [tiny.submit(one) for one in [*asked, *(request(tiny, PROMPT, fields) for fields in each)]]
    together = [collect(stream, 1).choices[0] for stream in streams][len(others) :]
    assert len(streams) == 17
    assert [choice.token_ids for choice in together] == [choice.token_ids for choice in alone]
    assert [choice.logprobs for choice in together] == [choice.logprobs for choice in alone]


@pytest.mark.parametrize("name", ["mirostat 2", "XTC", "all"])
def test_choices_share_nothing(tiny: Engine, name: str):
    """Choice 1 of two is choice 1 of four: each has its own noise, and its own state of mirostat."""
    two, four = complete(tiny, n=2, **EACH[name]).choices, complete(tiny, n=4, **EACH[name]).choices
    assert [choice.token_ids for choice in two] == [choice.token_ids for choice in four[:2]]
    assert len({tuple(choice.token_ids) for choice in four}) == 4


def test_preempted_requests_draw_the_same(tiny_model: LoadedModel):
    """Too small a cache for all: branches are computed again, and mirostat goes on from where it was."""
    fields = {**EACH["mirostat 2"], **EACH["XTC"], "max_tokens": 36}
    prompts = [f"{number} {PROMPT}" for number in range(5)]
    with Engine(tiny_model, EngineConfig(max_num_seqs=8, kv_cache_memory_gb=0.00007)) as small:
        streams = [small.submit(request(small, prompt, fields)) for prompt in prompts]
        crowded = [collect(stream, 1).choices[0].token_ids for stream in streams]
        assert small._core.scheduler.num_preemptions > 0
        alone = [answer(small, prompt, **fields).token_ids for prompt in prompts]
    assert crowded == alone


# constraints


PATTERNS = {
    "regex": r"(red|green|blue)( [a-z]{2,6}){2,4}\.",
    "choice": "yes|no|yes, but not today|no, never",
    "forced": r"The answer to your question, dear reader, is [0-9]{3}\.",
}


@pytest.fixture(scope="module")
def constraints(tiny: Engine) -> dict[str, Constraint]:
    asked = {name: ConstraintSpec.regex(pattern) for name, pattern in PATTERNS.items() if name != "choice"}
    asked["choice"] = ConstraintSpec.choice(PATTERNS["choice"].split("|"))
    return {name: tiny.constraints.compile(spec).result() for name, spec in asked.items()}


def constrained(engine: Engine, constraint: Constraint, **fields: Any) -> CompletionChoice:
    return collect(engine.submit(request(engine, PROMPT, fields, constraint)), 1).choices[0]


@pytest.mark.parametrize("name", EACH)
@pytest.mark.parametrize("kind", PATTERNS)
def test_constraints_hold_whatever_is_cut_off(
    tiny: Engine, constraints: Mapping[str, Constraint], kind: str, name: str
):
    """XTC excludes the likely tokens, DRY the repeated ones, down to the tokens that the constraint leaves."""
    extreme = {
        "DRY": {"dry_multiplier": 1e38, "dry_base": 1e6},
        "XTC": {"xtc_probability": 1.0, "xtc_threshold": 0.0},
    }
    constraint = constraints[kind]
    for max_tokens in (constraint.min_tokens, 40):
        fields = {**EACH[name], **extreme.get(name, {}), "max_tokens": max_tokens}
        text = constrained(tiny, constraint, **fields).text
        assert re.fullmatch(PATTERNS[kind], text), text


@pytest.mark.parametrize("version", [1, 2])
def test_forced_tokens_teach_mirostat_nothing(
    tiny: Engine, constraints: Mapping[str, Constraint], version: int
):
    """With log-probabilities the model is asked about each forced token, without it is not: the answer is one."""
    fields = {"mirostat": version, "mirostat_tau": 2.0, "mirostat_eta": 1.0, "max_tokens": 30}
    for kind in PATTERNS:
        silent = constrained(tiny, constraints[kind], **fields)
        asked = constrained(tiny, constraints[kind], **fields, logprobs=0)
        assert asked.token_ids == silent.token_ids


# mirostat's state


@pytest.mark.parametrize("version", [1, 2])
def test_mirostat_follows_the_surprise(tiny: Engine, monkeypatch: pytest.MonkeyPatch, version: int):
    """Every step's logits again in float64: what was left, how surprising the token was, where mu went."""
    steps: list[tuple[Tensor, Row, Choice]] = []
    call = LogitsPipeline.__call__

    def spy(
        self: LogitsPipeline, logits: Tensor, rows: Sequence[Row], bitmask: Tensor | None = None
    ) -> list[Choice]:
        choices = call(self, logits, rows, bitmask)
        steps.extend(
            (logits[row.logits_row].clone(), row, choice) for row, choice in zip(rows, choices, strict=True)
        )
        return choices

    monkeypatch.setattr(LogitsPipeline, "__call__", spy)
    tau, eta = 4.0, 0.4
    chosen = answer(tiny, mirostat=version, mirostat_tau=tau, mirostat_eta=eta, temperature=0.8)
    assert len(steps) == len(chosen.token_ids) == NUM_TOKENS
    mu, num_kept = 2 * tau, []
    for logits, row, choice in steps:
        assert (2 * tau if row.mirostat_mu is None else row.mirostat_mu) == pytest.approx(mu, abs=1e-4)
        vocab_size = tiny.tokenizer.vocab_size
        probs = (logits[:vocab_size].double() / 0.8).softmax(-1).numpy()
        likely = np.sort(probs)[::-1]
        count = (
            kept_by_zipf(likely, mu, len(logits))
            if version == 1
            else max(int((-np.log2(likely) <= mu).sum()), 1)
        )
        token = choice.token_id
        assert token is not None
        assert probs[token] >= likely[count - 1] * (1 - 1e-5)
        surprise = -np.log2(probs[token] / likely[:count].sum())
        mu -= eta * (surprise - tau)
        assert choice.mirostat_mu == pytest.approx(mu, abs=1e-3)
        mu = choice.mirostat_mu or 0.0
        num_kept.append(count)
    assert len(set(num_kept)) > NUM_TOKENS // 2


def kept_by_zipf(likely: np.ndarray[Any, Any], mu: float, vocab_size: int) -> int:
    steps = np.log(np.arange(2, 101) / np.arange(1, 100))
    exponent = (steps * np.log(likely[:99] / likely[1:100])).sum() / (steps**2).sum()
    excess = exponent - 1
    k = (excess * 2**mu / (1 - vocab_size**-excess)) ** (1 / exponent)
    return int(np.clip(k, 1, len(likely)))


# the pipeline


def row(**fields: Any) -> Row:
    own = {name: fields.pop(name) for name in ("dry", "mirostat_mu", "prompt", "generated") if name in fields}
    return Row(
        **{
            "logits_row": 0,
            "prompt": (2,),
            "generated": (),
            "banned": (),
            "num_logprobs": 3,
            "seed": 5,
            "branch": 0,
            **own,
        },
        sampling=SamplingParams(**fields),
    )


@pytest.mark.parametrize("name", [name for name in EACH if name != "DRY"])
def test_processed_logprobs_are_those_of_the_distribution_drawn_from(name: str):
    """None is of a token without probability there, and mirostat learns from that probability."""
    logits = torch.randn(1, 30, generator=torch.Generator().manual_seed(2)) * 1.5
    pipeline = LogitsPipeline(30, "processed_logprobs")
    fields = {**EACH[name], "top_k": 0, "xtc_threshold": 0.1}
    for position in range(40):
        asked = row(**fields, generated=[1] * position)
        (choice,) = pipeline(logits, [asked])
        assert choice.logprob is not None
        assert choice.logprob.logprob > -np.inf
        if choice.mirostat_mu is not None:
            bits = -choice.logprob.logprob / np.log(2)
            expected = 2 * asked.sampling.mirostat_tau - asked.sampling.mirostat_eta * (
                bits - asked.sampling.mirostat_tau
            )
            assert choice.mirostat_mu == pytest.approx(expected, abs=1e-4)


def test_penalties_of_dry_leave_masks_the_lowest():
    logits = torch.tensor([[1.0, -torch.inf, 3.0, -torch.inf]])
    dry = Dry(1e38, 1e6, 1, -1, Breakers())
    apply_penalties(logits, [row(dry=dry, generated=[1, 2, 3, 1, 2, 3, 1, 2, 1, 2])])
    assert logits[0, [1, 3]].tolist() == [-torch.inf, -torch.inf]
    assert logits[0, 0] == 1.0
    assert torch.isfinite(logits[0, 2])


def test_what_depends_on_more_than_tokens_says_so():
    assert SamplingParams(mirostat=1).is_stateful
    assert not SamplingParams(mirostat=2, temperature=0.0).is_stateful
    assert not SamplingParams(**EACH["XTC"]).is_stateful
    assert not SamplingParams().has_thresholds
    assert all(SamplingParams(**EACH[name]).has_thresholds for name in EACH if name != "DRY")
