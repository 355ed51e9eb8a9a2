"""Adapters with everything else: weighted sets, tokens that they add, quantized bases, layers that wait elsewhere."""

import copy
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from cadenza.decoding import Engine, EngineConfig, RequestError
from cadenza.decoding.completion import Completion
from cadenza.decoding.strategies.spec import BeamSearch
from cadenza.models import LoadConfig, LoadedModel, ModelError

EMOJI_BOT = Path(__file__).parents[2] / "data" / "emoji_bot"
PROMPT = [7, 40, 3, 11, 500, 9, 77]
CONFIG = EngineConfig(
    enable_lora=True, max_loras=6, max_lora_rank=16, kv_cache_memory_gb=0.05, max_num_seqs=16
)
SCORED = {"temperature": 0, "max_tokens": 5, "logprobs": 1, "prompt_logprobs": 0, "ignore_eos": True}


def _load(engine: Engine, folders: dict[str, Path]) -> None:
    assert engine.adapters is not None
    for name, folder in folders.items():
        engine.adapters.load(name, str(folder)).result()


def _scores(completion: Completion) -> list[float]:
    assert completion.prompt is not None
    assert completion.prompt.logprobs is not None
    entries = [*completion.prompt.logprobs[1:], *completion.choices[0].logprobs]
    return [entry.logprob for entry in entries if entry is not None]


@torch.no_grad()
def _reference(model: Any, tokens: list[int]) -> list[float]:
    log_probs = model(input_ids=torch.tensor([tokens]), use_cache=False).logits[0].double().log_softmax(-1)
    return [log_probs[at, token].item() for at, token in enumerate(tokens[1:])]


def _least_memory(folder: Path, config: EngineConfig) -> str:
    """What a refusal says would be enough, and a little more, as it is rounded."""
    with pytest.raises(ModelError, match="does not fit into a max_memory") as refusal:
        Engine.load(str(folder), LoadConfig(device="cpu", max_memory="1MiB"), config)
    return f"{float(str(refusal.value).partition('at least ')[2].split()[0]) + 0.06}MiB"


def _largest(ours: list[float], theirs: list[float]) -> float:
    return max(abs(a - b) for a, b in zip(ours, theirs, strict=True))


def test_a_weighted_set_is_pefts_concatenation_of_the_adapters(
    fresh_tiny_model: LoadedModel, adapter_makers: ModuleType, tmp_path: Path
) -> None:
    original = copy.deepcopy(fresh_tiny_model.module)
    folders, peft_model = {}, None
    for number, (name, kind) in enumerate([("one", "lora"), ("two", "rslora"), ("three", "patterns")]):
        folders[name], made = adapter_makers.make_adapter(original, tmp_path / name, kind, seed=number)
        if peft_model is None:
            peft_model = made
        else:
            peft_model.load_adapter(str(folders[name]), name, autocast_adapter_dtype=False)
    assert peft_model is not None
    weights = {"one": 0.8, "two": 0.3, "three": 1.7}
    peft_model.add_weighted_adapter(
        ["default", "two", "three"], list(weights.values()), "set", combination_type="cat"
    )
    peft_model.set_adapter("set")
    with Engine(fresh_tiny_model, CONFIG) as engine:
        _load(engine, folders)
        alone = engine.generate(PROMPT, adapter=weights, **SCORED)
        reordered = engine.generate(PROMPT, adapter=list(reversed(weights.items())), **SCORED)
        single = engine.generate(PROMPT, adapter="one", **SCORED)
        negative = engine.generate(PROMPT, adapter={"one": 2.0, "two": -0.5}, **SCORED)
        nothing = engine.generate(PROMPT, adapter={"one": 0.0}, **SCORED)
        base = engine.generate(PROMPT, **SCORED)
    tokens = [*PROMPT, *alone.choices[0].token_ids]
    assert _largest(_scores(alone), _reference(peft_model, tokens)) < 1e-4
    assert _scores(reordered) == _scores(alone)
    assert len({tuple(_scores(each)) for each in (alone, single, negative, base)}) == 4
    assert _scores(nothing) == _scores(base)


def test_a_weighted_set_of_dense_changes_is_the_sum_of_the_differences(
    fresh_tiny_model: LoadedModel, adapter_makers: ModuleType, tmp_path: Path
) -> None:
    original = copy.deepcopy(fresh_tiny_model.module)
    merged = copy.deepcopy(original)
    folders, weights = {}, {"one": 0.6, "two": -0.4, "three": 0.9}
    for number, (name, kind) in enumerate([("one", "dora"), ("two", "saved"), ("three", "saved_embeddings")]):
        folders[name], made = adapter_makers.make_adapter(original, tmp_path / name, kind, seed=number)
        own = dict(made.merge_and_unload().named_parameters())
        base = dict(original.named_parameters())
        for parameter_name, parameter in merged.named_parameters():
            parameter += weights[name] * (own[parameter_name] - base[parameter_name])
    with Engine(fresh_tiny_model, CONFIG) as engine:
        _load(engine, folders)
        completion = engine.generate(PROMPT, adapter=weights, **SCORED)
    tokens = [*PROMPT, *completion.choices[0].token_ids]
    assert _largest(_scores(completion), _reference(merged, tokens)) < 1e-4


def test_more_adapters_than_slots_in_one_set_are_refused(
    fresh_tiny_model: LoadedModel, adapter_makers: ModuleType, tmp_path: Path
) -> None:
    original = copy.deepcopy(fresh_tiny_model.module)
    config = EngineConfig(enable_lora=True, max_loras=2, max_cpu_loras=3, kv_cache_memory_gb=0.05)
    names = ["a", "b", "c"]
    with Engine(fresh_tiny_model, config) as engine:
        _load(
            engine,
            {
                name: adapter_makers.make_adapter(original, tmp_path / name, "lora", seed=number)[0]
                for number, name in enumerate(names)
            },
        )
        with pytest.raises(RequestError, match="3 adapters, but there is room for 2") as refusal:
            engine.generate(PROMPT, adapter=dict.fromkeys(names, 1.0))
        assert refusal.value.param == "lora"
        assert engine.generate(PROMPT, adapter=dict.fromkeys(names[:2], 1.0), max_tokens=2).text is not None


def test_tokens_that_an_adapter_adds(
    fresh_tiny_model: LoadedModel, smollm2_path: Path, adapter_makers: ModuleType, tmp_path: Path
) -> None:
    original = copy.deepcopy(fresh_tiny_model.module)
    size = original.config.vocab_size
    tokenizer = AutoTokenizer.from_pretrained(smollm2_path)
    tokenizer.add_tokens(["<|joy|>", "<|grief|>", "<|calm|>"], special_tokens=True)
    joy, grief = tokenizer.convert_tokens_to_ids(["<|joy|>", "<|grief|>"])
    assert (joy, grief) == (size, size + 1)
    kind = {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "lm_head"]}
    folder, peft_model = adapter_makers.make_adapter(
        original, tmp_path / "more", kind, prepare=lambda model: model.resize_token_embeddings(size + 3)
    )
    tokenizer.save_pretrained(folder)
    with Engine(fresh_tiny_model, CONFIG) as engine:
        before = engine.generate(PROMPT, **SCORED, seed=1)
        _load(engine, {"more": folder})
        prompt = [*PROMPT, grief, 5, joy]
        plain = engine.generate(prompt, adapter="more", **SCORED)
        biased = engine.generate(
            prompt, adapter="more", temperature=1, seed=3, max_tokens=3, logit_bias={joy: 100}, logprobs=3
        )
        shown = engine.generate(
            prompt, adapter="more", max_tokens=2, logit_bias={joy: 100}, skip_special_tokens=False
        )
        engine.reset_prefix_cache()
        assert engine.generate(PROMPT, **SCORED, seed=1) == before
        for refused in ({"prompt": prompt}, {"prompt": PROMPT, "logit_bias": {joy: 1}}):
            with pytest.raises(RequestError, match="outside the vocabulary"):
                engine.generate(**refused)
        text = engine.generate(
            "so much <|joy|> in it", adapter="more", temperature=0, max_tokens=3, constraint={"type": "null"}
        ).text
    assert _largest(_scores(plain), _reference(peft_model, [*prompt, *plain.choices[0].token_ids])) < 1e-4
    assert biased.choices[0].token_ids == [joy] * 3
    raw = _reference(peft_model, [*prompt, joy, joy, joy])[-3:]
    assert _largest([entry.logprob for entry in biased.choices[0].logprobs], raw) < 1e-4
    assert shown.text == "<|joy|><|joy|>"
    assert text == "null"


@pytest.mark.parametrize("method", ["int8", "int4"])
def test_on_a_quantized_base_adapters_err_as_the_base_does(
    smollm2: LoadedModel, smollm2_path: Path, method: Any
) -> None:
    from peft import PeftModel

    text = [
        {"role": "user", "content": "My hamster died yesterday and I cannot stop crying about it at all."}
    ]
    prompt = smollm2.tokenizer.encode(smollm2.tokenizer.render_chat(text), add_special_tokens=False)
    reference = AutoModelForCausalLM.from_pretrained(smollm2_path, dtype=torch.float32).eval()
    adapted = PeftModel.from_pretrained(copy.deepcopy(reference), str(EMOJI_BOT)).eval()
    with Engine.load("smollm2", LoadConfig(device="cpu", quantization=method), CONFIG) as engine:
        _load(engine, {"emoji": EMOJI_BOT})
        wanted = {"temperature": 0, "max_tokens": 8, "prompt_logprobs": 0}
        errors, answers = [], []
        for adapter, model in ((None, reference), ("emoji", adapted)):
            completion = engine.generate(prompt, adapter=adapter, **wanted)
            ours = torch.tensor(_scores(completion), dtype=torch.float64)
            theirs = torch.tensor(_reference(model, prompt), dtype=torch.float64)
            errors.append(float((ours - theirs).pow(2).mean().sqrt()))
            answers.append(completion.text)
    own, with_adapter = errors
    assert 0 < with_adapter < 1.5 * own, errors
    assert answers[1].startswith("(")
    assert answers[1].endswith(")")
    assert not answers[0].startswith("(")


def test_layers_that_wait_elsewhere(
    new_tiny_model: Callable[..., LoadedModel],
    smollm2: LoadedModel,
    adapter_makers: ModuleType,
    tmp_path: Path,
) -> None:
    """Bit for bit a resident model's answers, also where an adapter asks for the model's own weights."""
    module = new_tiny_model(11, num_hidden_layers=4, attention_bias=True).module
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    source = tmp_path / "model"
    module.save_pretrained(source)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (source / name).write_bytes((smollm2.path / name).read_bytes())
    kinds = {"lora": "lora", "dora": "dora", "saved": "saved", "bias": "bias_all", "embed": "dora_embedding"}
    folders = {
        name: adapter_makers.make_adapter(module.eval(), tmp_path / name, kind)[0]
        for name, kind in kinds.items()
    }
    small = EngineConfig(
        enable_lora=True, max_loras=6, max_num_seqs=8, max_num_batched_tokens=128, kv_cache_memory_gb=0.005
    )
    answers = []
    budget = _least_memory(source, small)
    for load in (LoadConfig(device="cpu"), LoadConfig(device="cpu", max_memory=budget)):
        with Engine.load(str(source), load, small) as engine:
            _load(engine, folders)
            own = [engine.generate(PROMPT, adapter=name, **SCORED) for name in kinds]
            beams = engine.generate(
                PROMPT, adapter={"dora": 0.5, "lora": 1.5}, max_tokens=4, strategy=BeamSearch(num_beams=3)
            )
            answers.append(([_scores(each) for each in own], beams.text, engine.model.placement is not None))
    assert answers[0][:2] == answers[1][:2]
    assert [is_offloaded for _, _, is_offloaded in answers] == [False, True]
