"""Beam search in the engine: scores that the model confirms, ends, constraints, streaming, and little room.

The model is a tiny random one with the real vocabulary, so that beams fork and die all the time.
"""

import json
import re
from collections.abc import Iterator
from typing import Any

import jsonschema
import pytest

from cadenza.decoding import Delta, Engine, EngineConfig, GenerationRequest, RequestError, SamplingParams
from cadenza.decoding.completion import Completion
from cadenza.decoding.constraints.spec import ConstraintSpec
from cadenza.decoding.strategies.beam import BeamBranches
from cadenza.decoding.strategies.room import Room
from cadenza.decoding.strategies.spec import BeamSearch
from cadenza.models import LoadedModel

PROMPT = tuple(range(1000, 1070))
GROUPS = BeamSearch(num_beams=6, num_beam_groups=3, diversity_penalty=1.0)
SPECS = [BeamSearch(num_beams=4), BeamSearch(num_beams=5, early_stopping="never", length_penalty=0.0), GROUPS]
SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "tags": {"type": "array", "items": {"enum": ["a", "b"]}},
    },
    "required": ["name", "tags"],
}
CHOICES = ["red", "green", "blue", "one hundred and one"]


@pytest.fixture(scope="module")
def tiny(tiny_model: LoadedModel) -> Iterator[Engine]:
    with Engine(tiny_model, EngineConfig(max_num_seqs=16, kv_cache_memory_gb=0.02)) as running:
        yield running


def search(engine: Engine, spec: BeamSearch, prompt: Any = PROMPT, **fields: Any) -> Completion:
    return engine.generate(prompt, strategy=spec, **{"n": spec.num_beams, **fields})


def answers(completion: Completion) -> list[tuple[list[int], float | None, str | None]]:
    return [(choice.token_ids, choice.score, choice.finish_reason) for choice in completion.choices]


def raw_logprobs(engine: Engine, token_ids: list[int]) -> list[float]:
    """Of an answer's tokens, as the model says them of a prompt."""
    scored = engine.generate([*PROMPT, *token_ids], max_tokens=0, prompt_logprobs=0).prompt
    assert scored is not None
    assert scored.logprobs is not None
    return [item.logprob for item in scored.logprobs[len(PROMPT) :] if item is not None]


# scores


@pytest.mark.parametrize("length_penalty", [0.0, 2.0])
def test_scores_are_the_models_log_probabilities_of_the_tokens(tiny: Engine, length_penalty: float):
    """Long enough for several blocks: a fork that lost part of its past would have other numbers."""
    spec = BeamSearch(num_beams=8, length_penalty=length_penalty)
    completion = search(tiny, spec, max_tokens=60, ignore_eos=True, logprobs=0)
    assert len({tuple(choice.token_ids) for choice in completion.choices}) == 8
    scores = [choice.score for choice in completion.choices]
    assert scores == sorted(scores, reverse=True)
    for choice in completion.choices:
        expected = raw_logprobs(tiny, choice.token_ids)
        assert choice.score == pytest.approx(sum(expected) / len(expected) ** length_penalty, abs=1e-3)
        assert [item.logprob for item in choice.logprobs] == pytest.approx(expected, abs=1e-4)
        assert [item.token_id for item in choice.logprobs] == choice.token_ids


def test_wider_searches_that_stop_late_do_not_find_worse(tiny: Engine):
    best = [
        search(tiny, BeamSearch(num_beams=w, early_stopping="never"), max_tokens=12, ignore_eos=True, n=1)
        for w in (1, 16)
    ]
    assert best[0].choices[0].score < best[1].choices[0].score  # type: ignore[operator]
    greedy = tiny.generate(PROMPT, max_tokens=12, ignore_eos=True, temperature=0.0)
    assert best[0].choices[0].token_ids == greedy.choices[0].token_ids


# ends


@pytest.mark.parametrize("include", [False, True])
def test_a_beam_ends_where_any_branch_would(tiny: Engine, include: bool):
    spec = BeamSearch(num_beams=6, early_stopping="never", length_penalty=0.0)
    free = search(tiny, spec, max_tokens=20, ignore_eos=True).choices
    stop = tuple(choice.text[at : at + 4] for choice, at in zip(free, (8, 20, 31), strict=False))
    stop_ids = (free[-1].token_ids[9], free[2].token_ids[15])
    found = search(
        tiny,
        spec,
        max_tokens=20,
        min_tokens=2,
        stop=stop,
        stop_token_ids=stop_ids,
        include_stop_str_in_output=include,
    ).choices
    for choice in found:
        *before, last = choice.token_ids
        inner = tiny.tokenizer.decode(before)
        assert not any(text in inner for text in stop)
        assert not any(token in stop_ids for token in before[1:])
        if isinstance(choice.stop_reason, str):
            assert choice.stop_reason in tiny.tokenizer.decode(choice.token_ids)
            assert choice.text.endswith(choice.stop_reason) == include
        elif choice.stop_reason is not None:
            assert last == choice.stop_reason
        elif choice.finish_reason == "stop":
            assert last in tiny.model.eos_token_ids
        else:
            assert len(choice.token_ids) == 20
    assert {type(choice.stop_reason) for choice in found} >= {str, int}


def test_min_tokens_holds_every_end_back(tiny: Engine):
    spec = BeamSearch(num_beams=4, early_stopping=True)
    free = search(tiny, spec, max_tokens=12, ignore_eos=True).choices
    ends = tuple({token for choice in free for token in choice.token_ids[:8]})
    found = search(tiny, spec, max_tokens=12, min_tokens=6, stop_token_ids=ends, ignore_eos=True).choices
    assert all(not set(choice.token_ids[:6]) & set(ends) for choice in found)


def test_no_tokens_at_all(tiny: Engine):
    found = search(tiny, BeamSearch(num_beams=3), max_tokens=0).choices
    assert [(choice.token_ids, choice.finish_reason) for choice in found] == [([], "length")] * 3


# constraints


def is_json(text: str) -> bool:
    jsonschema.validate(json.loads(text), SCHEMA)
    return True


CONSTRAINTS = {
    "choice": (ConstraintSpec.choice(CHOICES), CHOICES.__contains__),
    "regex": (
        ConstraintSpec.regex("[a-z]{1,8}(, [0-9]{2,4}){1,3}"),
        re.compile("[a-z]{1,8}(, [0-9]{2,4}){1,3}").fullmatch,
    ),
    "schema": (ConstraintSpec.json_schema(SCHEMA), is_json),
    "grammar": (
        ConstraintSpec.grammar('start: "<" ITEM* start? ">"\nITEM: /[a-z]/'),
        lambda text: text.count("<") == text.count(">") and re.fullmatch("<[a-z<]*>+", text),
    ),
}


@pytest.mark.parametrize("spec", SPECS, ids=["beams", "never", "groups"])
@pytest.mark.parametrize("name", CONSTRAINTS)
def test_every_hypothesis_is_complete_and_valid_at_any_budget(tiny: Engine, name: str, spec: BeamSearch):
    constraint, is_valid = CONSTRAINTS[name]
    least = tiny.constraints.compile(constraint).result().min_tokens
    for budget in (least, least + 1, least + 3, 30):
        found = search(tiny, spec, constraint=constraint, max_tokens=budget).choices
        for choice in found:
            assert choice.finish_reason is not None
            assert len(choice.token_ids) <= budget
            assert is_valid(choice.text), (budget, choice.text)
            assert choice.closed_early == (choice.finish_reason == "length")


def test_no_more_choices_than_there_are_answers(tiny: Engine):
    found = search(
        tiny, BeamSearch(num_beams=8), constraint=ConstraintSpec.choice(["0", "1"]), max_tokens=8
    ).choices
    assert {choice.text for choice in found} == {"0", "1"}
    scores = [choice.score for choice in found]
    assert None not in scores
    assert scores == sorted(scores, reverse=True)  # type: ignore[type-var]


def test_a_constraints_scores_are_not_renormalized(tiny: Engine):
    """What a forced token costs counts, as it would without the constraint."""
    completion = search(
        tiny, BeamSearch(num_beams=4), constraint=CONSTRAINTS["schema"][0], max_tokens=40, logprobs=0
    )
    for choice in completion.choices:
        expected = raw_logprobs(tiny, choice.token_ids)
        assert choice.score == pytest.approx(sum(expected) / len(expected), abs=1e-3)


# streaming


def test_what_all_agree_on_goes_out_before_the_end(tiny: Engine, monkeypatch: pytest.MonkeyPatch):
    sent: list[int] = []
    agreed = BeamBranches._send_agreed

    def watched(self: BeamBranches, generation: Any) -> None:
        agreed(self, generation)
        sent.append(self._num_sent)

    monkeypatch.setattr(BeamBranches, "_send_agreed", watched)
    spec = ConstraintSpec.regex("The answer to this question is [0-9a-f]{8}")
    constraint = tiny.constraints.compile(spec).result()
    request = GenerationRequest(
        request_id="",
        prompt_token_ids=PROMPT,
        sampling=SamplingParams(n=3, max_tokens=60),
        strategy=BeamSearch(num_beams=4),
        constraint=constraint,
    )
    events = [event for event in tiny.submit(request) if isinstance(event, Delta)]
    assert sent == sorted(sent)
    assert len(set(sent) - {0}) > 1
    known = sum(len(event.token_ids) for event in events[: max(sent)])
    assert known == max(sent)
    assert all(event.index == 0 for event in events[: max(sent)])
    texts = ["".join(event.text for event in events if event.index == index) for index in range(3)]
    at_once = search(tiny, BeamSearch(num_beams=4), n=3, constraint=spec, max_tokens=60)
    assert texts == [choice.text for choice in at_once.choices]


# room


def test_beams_that_fill_the_batch(tiny: Engine, tiny_model: LoadedModel):
    """No seat is left for a fork while its parents' are still taken."""
    with Engine(tiny_model, EngineConfig(max_num_seqs=6, kv_cache_memory_gb=0.02)) as full:
        for spec in (BeamSearch(num_beams=6), GROUPS):
            expected = search(tiny, spec, max_tokens=24, ignore_eos=True)
            assert answers(search(full, spec, max_tokens=24, ignore_eos=True)) == answers(expected)


def test_short_of_blocks(tiny: Engine, tiny_model: LoadedModel):
    """Beams are preempted and recomputed; the answer is the same, and every block is free in the end."""
    fields = {"max_tokens": 60, "ignore_eos": True, "logprobs": 2}
    prompts = [list(PROMPT), list(PROMPT[::-1]), list(PROMPT[:5])]
    with Engine(tiny_model, EngineConfig(max_num_seqs=12, kv_cache_memory_gb=0.00014)) as small:
        for spec in (BeamSearch(num_beams=5), GROUPS):
            shared = {"strategy": spec, "n": spec.num_beams, **fields}
            expected = [tiny.generate(prompt, **shared) for prompt in prompts]
            found = small.generate_batch(prompts, **shared)
            assert [item.choices for item in found] == [item.choices for item in expected]
        stats = small.stats()
    assert stats.num_preemptions > 0
    assert stats.kv_cache_usage == 0.0


def test_together_as_alone(tiny: Engine):
    fields = {"max_tokens": 16, "logprobs": 1}
    alone = [search(tiny, spec, **fields) for spec in SPECS]
    requests = [
        GenerationRequest(
            request_id="",
            prompt_token_ids=PROMPT,
            sampling=SamplingParams(n=spec.num_beams, max_tokens=16, logprobs=1),
            strategy=spec,
        )
        for spec in SPECS
    ]
    sampled = SamplingParams(n=4, max_tokens=30, seed=1)
    others = tiny.submit(GenerationRequest(request_id="", prompt_token_ids=PROMPT[3:], sampling=sampled))
    streams = [tiny.submit(request) for request in requests]
    list(others)
    for stream, completion in zip(streams, alone, strict=True):
        ends = {e.index: e.score for e in stream if isinstance(e, Delta) and e.finish_reason}
        assert [ends[i] for i in range(len(ends))] == [choice.score for choice in completion.choices]
    assert tiny.stats().kv_cache_usage == 0.0


# what is said of a token


def test_explanations_name_what_lost(tiny: Engine):
    spec = BeamSearch(num_beams=4, length_penalty=0.0)
    completion = search(tiny, spec, max_tokens=10, ignore_eos=True, explain=True)
    for choice in completion.choices:
        assert [item.token_id for item in choice.explanations] == choice.token_ids
        for item in choice.explanations:
            assert item.decision == "searched"
            assert 0 < len(item.lost) <= 4
            assert item.token_id not in dict(item.lost)
            scores = [score for _, score in item.lost]
            assert scores == sorted(scores, reverse=True)
    last = completion.choices[-1]
    assert all(
        score <= last.score for choice in completion.choices for _, score in choice.explanations[-1].lost
    )  # type: ignore[operator]


# what is refused


@pytest.mark.parametrize(
    ("spec", "fields", "param"),
    [
        ({"num_beams": 17}, {}, "num_beams"),
        ({"num_beams": 2}, {"n": 3}, "n"),
        ({"num_beams": 2}, {"temperature": 0.7}, "temperature"),
        ({"num_beams": 2}, {"top_k": 5}, "top_k"),
        ({"num_beams": 2}, {"top_p": 0.9}, "top_p"),
        ({"num_beams": 2, "length_penalty": 1000.0}, {}, "length_penalty"),
    ],
)
def test_refusals_name_the_field(tiny: Engine, spec: dict[str, Any], fields: dict[str, Any], param: str):
    with pytest.raises(RequestError) as refused:
        tiny.generate(PROMPT, strategy=BeamSearch(**spec), **{"max_tokens": 4, **fields})
    assert refused.value.param == param


def test_room_for_all_beams_at_full_length():
    """A prompt of 72 tokens: a tile, four blocks of 16, is shared, and each beam has five more."""
    Room(num_kv_tokens=(4 + 3 * 5) * 16, block_size=16).check("num_beams", 3, 72, 70)
    assert Room(num_kv_tokens=(4 + 3 * 5) * 16, block_size=16).longest(3, 72) == 5 * 16 - 8
    with pytest.raises(RequestError, match="num_beams is 3") as refused:
        Room(num_kv_tokens=(4 + 3 * 5) * 16 - 1, block_size=16).check("num_beams", 3, 72, 70)
    assert refused.value.param == "num_beams"


def test_without_max_tokens_beams_may_grow_as_far_as_they_fit(tiny_model: LoadedModel):
    with Engine(tiny_model, EngineConfig(max_num_seqs=4, kv_cache_memory_gb=0.0001)) as small:
        assert small.max_model_len == 256
        fields = {"strategy": BeamSearch(num_beams=4), "ignore_eos": True}
        (choice,) = small.generate(PROMPT, **fields).choices
        assert choice.finish_reason == "length"
        assert 16 <= len(choice.token_ids) <= small.num_kv_tokens // 4
        with pytest.raises(RequestError, match="lower num_beams or max_tokens"):
            small.generate(PROMPT, **fields, max_tokens=len(choice.token_ids) + 1)
