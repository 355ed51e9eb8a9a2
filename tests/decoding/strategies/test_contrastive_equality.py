"""Contrastive search gives the tokens of transformers 4.49, and those of its formula in float64."""

import copy
import dataclasses
import importlib.util
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM

from cadenza.decoding import Engine, EngineConfig, GenerationRequest, RequestStream, SamplingParams
from cadenza.decoding.completion import collect
from cadenza.decoding.strategies.spec import ContrastiveSearch
from cadenza.models import LoadedModel

DATA = Path(__file__).parents[2] / "data" / "strategies"
GOLDENS: dict[str, Any] = json.loads((DATA / "contrastive.json").read_text(encoding="utf-8"))["models"]
PROMPT = tuple(range(1000, 1012))


def submit(engine: Engine, prompt: Sequence[int], spec: ContrastiveSearch, **sampling: Any) -> RequestStream:
    return engine.submit(
        GenerationRequest(
            request_id="test",
            prompt_token_ids=tuple(prompt),
            sampling=SamplingParams(**sampling),
            strategy=spec,
        )
    )


# transformers 4.49 is the definition


def check_goldens(engine: Engine, golden: dict[str, Any], cases: Sequence[dict[str, Any]]) -> None:
    expected = [case["token_ids"][: case["max_tokens"]] for case in cases]
    streams = [
        submit(
            engine,
            golden["prompts"][case["prompt"]],
            ContrastiveSearch(penalty_alpha=case["penalty_alpha"], top_k=case["top_k"]),
            max_tokens=case["max_tokens"],
        )
        for case in cases
    ]
    for tokens, stream in zip(expected, streams, strict=True):
        choice = collect(stream, 1).choices[0]
        assert choice.token_ids == tokens
        assert choice.finish_reason == ("stop" if tokens[-1] == golden["eos_token_id"] else "length")
    assert engine.stats().kv_cache_usage == 0


def test_the_default_model_gives_transformers_tokens_for_twenty_prompts(engine: Engine) -> None:
    """Each prompt with one of the three settings. Of most answers the first tokens only: none depends on how many may
    follow it."""
    golden = GOLDENS["smollm2"]
    cases = [case for number, case in enumerate(golden["cases"]) if number % 3 == case["prompt"] % 3]
    assert sorted(case["prompt"] for case in cases) == list(range(20))
    assert len({(case["penalty_alpha"], case["top_k"]) for case in cases}) == 3
    for some in (cases[:7], cases[7:14], cases[14:]):  # as many as find places for all their candidates
        check_goldens(engine, golden, [{**case, "max_tokens": 8} for case in some])


@pytest.fixture(scope="module")
def tiny_models() -> ModuleType:
    spec = importlib.util.spec_from_file_location("tiny_models", DATA / "tiny_models.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", [name for name in GOLDENS if name != "smollm2"])
def test_tiny_models_of_many_architectures_give_transformers_tokens(
    smollm2: LoadedModel, tiny_models: ModuleType, name: str
) -> None:
    golden, module = GOLDENS[name], tiny_models.tiny_model(name)
    assert tiny_models.fingerprint(module, golden["prompts"][0]) == pytest.approx(
        golden["fingerprint"], abs=1e-3
    )
    model = dataclasses.replace(
        smollm2,
        module=module,
        config=module.config,
        max_model_len=256,
        eos_token_ids=(golden["eos_token_id"],),
    )
    with Engine(model, EngineConfig(max_num_seqs=32, kv_cache_memory_gb=0.02)) as engine:
        check_goldens(engine, golden, golden["cases"])


# penalties and bans, which the goldens do not have


@pytest.fixture(scope="module")
def plain_module(tiny_model: LoadedModel) -> Any:
    """A model of the tiny one's kind, as transformers runs it."""
    torch.manual_seed(3)
    module = LlamaForCausalLM(copy.deepcopy(tiny_model.config)).eval().requires_grad_(False)
    for parameter in module.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.3)
    module.set_attn_implementation("eager")
    return module


@pytest.fixture(scope="module")
def tiny(tiny_model: LoadedModel, plain_module: Any) -> Iterator[Engine]:
    model = dataclasses.replace(tiny_model, module=copy.deepcopy(plain_module))
    with Engine(model, EngineConfig(kv_cache_memory_gb=0.05)) as running:
        yield running


@torch.inference_mode()
def reference(module: Any, num_tokens: int, spec: ContrastiveSearch, **sampling: Any) -> list[int]:
    """Contrastive search from its formula, every candidate computed from the start, in float64."""
    module = copy.deepcopy(module).double()
    tokens = list(PROMPT)
    for number in range(num_tokens):
        logits = module(input_ids=torch.tensor([tokens])).logits[0, -1]
        for token in set(tokens):
            factor = sampling.get("repetition_penalty", 1.0)
            logits[token] = logits[token] / factor if logits[token] > 0 else logits[token] * factor
        for token, bias in sampling.get("logit_bias", {}).items():
            logits[token] += bias
        if number < sampling.get("min_tokens", 0):
            logits[module.config.eos_token_id] = -torch.inf
        probabilities, candidates = logits.softmax(-1).topk(spec.top_k)
        scores = []
        for token, probability in zip(candidates.tolist(), probabilities.tolist(), strict=True):
            output = module(input_ids=torch.tensor([[*tokens, token]]), output_hidden_states=True)
            states = output.hidden_states[-1][0]
            cosine = torch.nn.functional.cosine_similarity(states[-1:], states[:-1])
            scores.append((1 - spec.penalty_alpha) * probability - spec.penalty_alpha * float(cosine.max()))
        tokens.append(candidates[scores.index(max(scores))].item())
        if tokens[-1] == module.config.eos_token_id:
            break
    return tokens[len(PROMPT) :]


@pytest.mark.parametrize(
    "sampling",
    [
        {},
        {"repetition_penalty": 1.5},
        {"logit_bias": {0: 20.0}},  # the end of an answer is likely, but must not come yet
        {"logit_bias": {0: 20.0, 17: 19.0}, "min_tokens": 6},
    ],
)
def test_candidates_are_what_penalties_and_bans_leave(
    tiny: Engine, plain_module: Any, sampling: dict[str, Any]
) -> None:
    eos = tiny.model.eos_token_ids[0]
    if "logit_bias" in sampling:
        bias = {eos if token == 0 else token: value for token, value in sampling["logit_bias"].items()}
        sampling = {**sampling, "logit_bias": bias}
    spec = ContrastiveSearch(penalty_alpha=0.3, top_k=5)
    expected = reference(plain_module, 10, spec, **sampling)
    choices = collect(submit(tiny, PROMPT, spec, max_tokens=10, **sampling), 1).choices
    assert choices[0].token_ids == expected
