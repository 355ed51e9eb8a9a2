"""Beam search against transformers' `generate`, and diverse beam search against what transformers 4.49 said.

Same token ids in the same order, scores equal to 1e-4: on the default model, and on tiny random models of several
architectures. Where no model's own EOS would come soon enough, a frequent token ends the texts (see make_goldens.py).
"""

import copy
import json
import runpy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from cadenza.decoding import Engine, EngineConfig
from cadenza.decoding.completion import Completion, collect
from cadenza.decoding.request import Delta, GenerationRequest, SamplingParams
from cadenza.decoding.strategies.spec import BeamSearch
from cadenza.models import LoadedModel

DATA = Path(__file__).parents[2] / "data" / "strategies"
TINY = runpy.run_path(str(DATA / "tiny_models.py"))
GOLDENS = json.loads((DATA / "diverse_beams.json").read_text(encoding="utf-8"))["models"]
NUM_TOKENS = 6
TOLERANCE = 1e-4

# a Latin square: any two of width, length penalty and way of stopping meet in each of their combinations
GRID = [
    BeamSearch(num_beams=width, length_penalty=(0.5, 1.0, 2.0)[(i + j) % 3], early_stopping=early)
    for i, width in enumerate((2, 4, 8))
    for j, early in enumerate((False, True, "never"))
]


@dataclass(frozen=True)
class Answers:
    token_ids: list[list[int]]
    scores: list[float]


def search(engine: Engine, jobs: Sequence[tuple[list[int], BeamSearch, SamplingParams]]) -> list[Answers]:
    """All at once: the searches share steps."""
    streams = [
        engine.submit(
            GenerationRequest(request_id="", prompt_token_ids=tuple(prompt), sampling=sampling, strategy=spec)
        )
        for prompt, spec, sampling in jobs
    ]
    found = []
    for stream, (_, _, sampling) in zip(streams, jobs, strict=True):
        events = list(stream)
        completion: Completion = collect(events, sampling.n)
        scores = {
            event.index: event.score for event in events if isinstance(event, Delta) and event.finish_reason
        }
        found.append(
            Answers([c.token_ids for c in completion.choices], [scores[i] for i in range(sampling.n)])
        )
    return found


@torch.inference_mode()
def by_transformers(
    model: Any, prompt: list[int], spec: BeamSearch, n: int, eos: int, **options: Any
) -> Answers:
    output = model.generate(
        torch.tensor([prompt]),
        attention_mask=torch.ones(1, len(prompt), dtype=torch.int64),
        num_beams=spec.num_beams,
        num_return_sequences=n,
        length_penalty=spec.length_penalty,
        early_stopping=spec.early_stopping,
        max_new_tokens=NUM_TOKENS,
        eos_token_id=eos,
        pad_token_id=0,
        do_sample=False,
        return_dict_in_generate=True,
        output_scores=True,
        **options,
    )
    texts = [until_end(row[len(prompt) :], eos) for row in output.sequences.tolist()]
    return Answers(texts, output.sequences_scores.tolist())


def until_end(tokens: list[int], eos: int) -> list[int]:
    return tokens[: tokens.index(eos) + 1] if eos in tokens else tokens


def assert_equal(ours: Answers, theirs: Answers) -> None:
    assert ours.token_ids == theirs.token_ids
    assert ours.scores == pytest.approx(theirs.scores, abs=TOLERANCE)


def diverse_spec(case: dict[str, Any]) -> BeamSearch:
    names = ("num_beams", "num_beam_groups", "diversity_penalty", "length_penalty", "early_stopping")
    return BeamSearch(**{name: case[name] for name in names if name in case})


# the default model

EOS = GOLDENS["smollm2"]["eos_token_id"]
PROMPTS = GOLDENS["smollm2"]["prompts"]


def ending(n: int, num_tokens: int = NUM_TOKENS, **fields: Any) -> SamplingParams:
    """EOS takes the place of the model's own, as in transformers' `eos_token_id`."""
    return SamplingParams(n=n, max_tokens=num_tokens, ignore_eos=True, stop_token_ids=(EOS,), **fields)


def test_default_model_equals_transformers(engine: Engine, reference: Any):
    specs = [GRID[number % len(GRID)] for number in range(len(PROMPTS))]
    sizes = [1 + number % spec.num_beams for number, spec in enumerate(specs)]
    jobs = list(zip(PROMPTS, specs, map(ending, sizes), strict=True))
    for (prompt, spec, sampling), ours in zip(jobs, search(engine, jobs), strict=True):
        assert_equal(ours, by_transformers(reference, prompt, spec, sampling.n, EOS))


def test_default_model_equals_transformers_under_penalties(engine: Engine, reference: Any):
    spec = BeamSearch(num_beams=3)
    for number, options in enumerate(({"repetition_penalty": 1.3}, {"min_new_tokens": 5})):
        fields = {"min_tokens": 5} if "min_new_tokens" in options else options
        jobs = [(prompt, spec, ending(3, **fields)) for prompt in PROMPTS[3 + number : 15 : 6]]
        for (prompt, _, _), ours in zip(jobs, search(engine, jobs), strict=True):
            assert_equal(ours, by_transformers(reference, prompt, spec, 3, EOS, **options))


def test_default_model_equals_diverse_goldens(engine: Engine):
    cases = GOLDENS["smollm2"]["cases"][::2]  # each prompt once
    jobs = [
        (PROMPTS[case["prompt"]], diverse_spec(case), ending(case["num_beams"], case["max_tokens"]))
        for case in cases
    ]
    for case, ours in zip(cases, search(engine, jobs), strict=True):
        assert_equal(ours, Answers(case["token_ids"], case["scores"]))


# tiny models


def served(smollm2: LoadedModel, module: Any, eos: int) -> LoadedModel:
    return LoadedModel(
        source="random",
        name="random",
        path=Path("random"),
        module=module,
        config=module.config.get_text_config(decoder=True),
        tokenizer=smollm2.tokenizer,  # its ids beyond the model's vocabulary are never used
        device=torch.device("cpu"),
        dtype=torch.float32,
        fingerprint="fp_random",
        eos_token_ids=(eos,),
        sampling_defaults={},
        max_model_len=200,
    )


TINY_CONFIG = EngineConfig(max_num_seqs=16, kv_cache_memory_gb=0.02)


@pytest.fixture(scope="module", params=TINY["ARCHITECTURES"])
def tiny(request: pytest.FixtureRequest, smollm2: LoadedModel) -> Iterator[tuple[str, Engine, Any]]:
    """Its name, an engine for it, and transformers' own copy."""
    name = request.param
    module = TINY["tiny_model"](name)
    reference = copy.deepcopy(module)
    with Engine(served(smollm2, module, GOLDENS[name]["eos_token_id"]), TINY_CONFIG) as engine:
        yield name, engine, reference


def test_tiny_models_are_those_of_the_goldens(tiny: tuple[str, Engine, Any]):
    name, _, reference = tiny
    golden = GOLDENS[name]
    assert TINY["fingerprint"](reference, golden["prompts"][0]) == pytest.approx(
        golden["fingerprint"], abs=1e-3
    )


def test_tiny_models_equal_transformers(tiny: tuple[str, Engine, Any]):
    name, engine, reference = tiny
    assert_grid_equal(engine, reference, GOLDENS[name]["prompts"], GOLDENS[name]["eos_token_id"])


def test_sliding_windows_equal_transformers(smollm2: LoadedModel):
    """16 wide: two of the prompts are longer, so beams have forgotten what they share."""
    module = TINY["tiny_model"]("Mistral", sliding_window=16)
    reference, eos = copy.deepcopy(module), GOLDENS["Llama"]["eos_token_id"]
    with Engine(served(smollm2, module, eos), TINY_CONFIG) as engine:
        assert_grid_equal(engine, reference, GOLDENS["Llama"]["prompts"], eos)


def assert_grid_equal(engine: Engine, reference: Any, prompts: list[list[int]], eos: int) -> None:
    jobs = [
        (prompts[number % 3], spec, SamplingParams(n=spec.num_beams, max_tokens=NUM_TOKENS))
        for number, spec in enumerate(GRID)
    ]
    for (prompt, spec, sampling), ours in zip(jobs, search(engine, jobs), strict=True):
        assert_equal(ours, by_transformers(reference, prompt, spec, sampling.n, eos))


def test_tiny_models_equal_diverse_goldens(tiny: tuple[str, Engine, Any]):
    name, engine, _ = tiny
    golden = GOLDENS[name]
    jobs = [
        (
            golden["prompts"][case["prompt"]],
            diverse_spec(case),
            SamplingParams(n=case["num_beams"], max_tokens=case["max_tokens"]),
        )
        for case in golden["cases"]
    ]
    for case, ours in zip(golden["cases"], search(engine, jobs), strict=True):
        assert_equal(ours, Answers(case["token_ids"], case["scores"]))
