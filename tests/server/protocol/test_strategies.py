"""Every way to ask for a strategy, what contradicts it, and what an answer shows of it."""

import json
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from cadenza.decoding.request import (
    Delta,
    Event,
    GenerationRequest,
    RequestError,
    SamplingParams,
    TokenExplanation,
)
from cadenza.decoding.strategies.spec import (
    DRAWING_FIELDS,
    BeamSearch,
    BestOf,
    ContrastiveSearch,
    StrategySpec,
    check_search,
)
from cadenza.decoding.voting.answer import LastNumber
from cadenza.decoding.voting.spec import SelfConsistency
from cadenza.server.protocol.chat import ChatRequest
from cadenza.server.protocol.completion import CompletionRequest
from cadenza.server.protocol.sampling import sampling_params
from cadenza.server.protocol.strategies import StrategyFields
from cadenza.server.protocol.wire import parse

Post = Callable[..., Any]


def completion(**fields: Any) -> CompletionRequest:
    return parse(CompletionRequest, json.dumps({"prompt": "x", **fields}).encode())


def chat(**fields: Any) -> ChatRequest:
    messages = [{"role": "user", "content": "Hi"}]
    return parse(ChatRequest, json.dumps({"messages": messages, **fields}).encode())


def refused(**fields: Any) -> RequestError:
    with pytest.raises(RequestError) as caught:
        completion(**fields)
    return caught.value


VOTE = {"n": 4, "answer": "last_number"}

ASKED: list[tuple[dict[str, Any], StrategySpec | None]] = [
    ({}, None),
    ({"n": 3}, None),
    ({"use_beam_search": True, "n": 3}, BeamSearch(num_beams=3)),
    ({"use_beam_search": True}, BeamSearch(num_beams=1)),
    ({"use_beam_search": True, "n": 3, "num_beams": 3}, BeamSearch(num_beams=3)),
    ({"num_beams": 4}, BeamSearch(num_beams=4)),
    ({"num_beams": 4, "n": 4, "temperature": 0}, BeamSearch(num_beams=4)),
    ({"num_beams": 2, "length_penalty": 0.5}, BeamSearch(num_beams=2, length_penalty=0.5)),
    ({"num_beams": 2, "length_penalty": -1}, BeamSearch(num_beams=2, length_penalty=-1.0)),
    ({"num_beams": 2, "early_stopping": True}, BeamSearch(num_beams=2, early_stopping=True)),
    ({"num_beams": 2, "early_stopping": "never"}, BeamSearch(num_beams=2, early_stopping="never")),
    (
        {"num_beams": 4, "num_beam_groups": 2, "diversity_penalty": 0.8},
        BeamSearch(num_beams=4, num_beam_groups=2, diversity_penalty=0.8),
    ),
    ({"penalty_alpha": 0.6, "top_k": 4}, ContrastiveSearch(penalty_alpha=0.6, top_k=4)),
    ({"best_of": 4}, BestOf(best_of=4)),
    ({"best_of": 4, "n": 2}, BestOf(best_of=4)),
    ({"self_consistency": VOTE}, SelfConsistency(n=4, answer=LastNumber())),
]


@pytest.mark.parametrize(("fields", "spec"), ASKED)
def test_what_asks_for_a_strategy(fields: dict[str, Any], spec: StrategySpec | None) -> None:
    assert completion(**fields).strategy == spec
    if "best_of" not in fields:
        assert chat(**fields).strategy == spec


NEUTRAL: dict[str, Any] = {
    "use_beam_search": False,
    "num_beams": 1,
    "length_penalty": 1,
    "early_stopping": False,
    "num_beam_groups": 1,
    "diversity_penalty": 0.0,
    "penalty_alpha": 0.0,
    "self_consistency": None,
    "best_of": 1,
    "explain": False,
}


def test_neutral_values_ask_for_nothing() -> None:
    for fields in ({name: value} for name, value in NEUTRAL.items()):
        assert completion(**fields).strategy is None
        assert chat(**fields).strategy is None
    assert completion(**{**NEUTRAL, "best_of": 3, "n": 3}).strategy is None
    assert set(NEUTRAL) >= set(StrategyFields.model_fields) - {"n", "top_k"}


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"num_beams": 0}, "num_beams"),
    ({"num_beams": True}, "num_beams"),
    ({"num_beams": 2.0}, "num_beams"),
    ({"num_beams": 2, "n": 3}, "n"),
    ({"num_beams": 4, "use_beam_search": True, "n": 2}, "num_beams"),
    ({"num_beams": 4, "use_beam_search": True}, "num_beams"),
    ({"num_beams": 4, "num_beam_groups": 3, "diversity_penalty": 0.5}, "num_beam_groups"),
    ({"num_beams": 4, "num_beam_groups": 0}, "num_beam_groups"),
    ({"num_beams": 4, "num_beam_groups": 2}, "diversity_penalty"),
    ({"num_beams": 4, "num_beam_groups": 2, "diversity_penalty": -1.0}, "diversity_penalty"),
    ({"num_beams": 4, "diversity_penalty": 0.5}, "diversity_penalty"),
    ({"num_beams": 4, "early_stopping": "always"}, "early_stopping"),
    ({"num_beams": 4, "early_stopping": 0}, "early_stopping"),
    ({"num_beams": 4, "length_penalty": "1"}, "length_penalty"),
    ({"length_penalty": 2.0}, "length_penalty"),
    ({"early_stopping": True}, "early_stopping"),
    ({"early_stopping": "never", "num_beams": 1}, "early_stopping"),
    ({"num_beam_groups": 2}, "num_beam_groups"),
    ({"diversity_penalty": 0.5}, "diversity_penalty"),
    ({"length_penalty": 2.0, "penalty_alpha": 0.6, "top_k": 4}, "length_penalty"),
    ({"length_penalty": 0.0, "self_consistency": VOTE}, "length_penalty"),
    ({"penalty_alpha": 0.6}, "top_k"),
    ({"penalty_alpha": 0.6, "top_k": 1}, "top_k"),
    ({"penalty_alpha": 1.5, "top_k": 4}, "penalty_alpha"),
    ({"penalty_alpha": -0.5, "top_k": 4}, "penalty_alpha"),
    ({"penalty_alpha": 0.6, "top_k": 4, "n": 2}, "n"),
    ({"best_of": 0}, "best_of"),
    ({"best_of": 129}, "best_of"),
    ({"self_consistency": VOTE, "n": 2}, "n"),
    ({"self_consistency": {"n": 0, "answer": "last_number"}}, "self_consistency.n"),
    ({"self_consistency": {"n": 4}}, "self_consistency.answer"),
    ({"explain": "yes"}, "explain"),
    ({"explain": 1}, "explain"),
]


@pytest.mark.parametrize(("fields", "param"), REFUSED)
def test_what_contradicts_itself_is_refused_by_name(fields: dict[str, Any], param: str) -> None:
    error = refused(**fields)
    assert error.param == param
    assert param in str(error)


def test_at_most_one_strategy() -> None:
    ways: list[dict[str, Any]] = [
        {"use_beam_search": True},
        {"penalty_alpha": 0.6, "top_k": 4},
        {"self_consistency": VOTE},
        {"best_of": 4},
    ]
    for number, first in enumerate(ways):
        for second in ways[number + 1 :]:
            error = refused(**first, **second)
            assert error.param == next(iter(second))
            assert next(iter(first)) in str(error)


MODELS_OWN = {"temperature": 0.6, "top_k": 50, "top_p": 0.9, "repetition_penalty": 1.1}


def params(**fields: Any) -> SamplingParams:
    return sampling_params(completion(**fields), defaults=MODELS_OWN, logprobs=None, prompt_logprobs=None)


@pytest.mark.parametrize("search", [{"num_beams": 4}, {"penalty_alpha": 0.6, "top_k": 4}])
def test_a_search_draws_nothing(search: dict[str, Any]) -> None:
    """What the model's defaults say of drawing is left out; what the client says of it is refused."""
    own = params(**search)
    assert (own.temperature, own.top_k, own.top_p, own.repetition_penalty) == (1.0, 0, 1.0, 1.1)
    check_search(own, "a search")
    check_search(params(**search, temperature=0, top_p=1.0, top_n_sigma=-1, seed=3), "a search")
    check_search(params(**{"top_k": -1, **search}), "a search")
    values: dict[str, Any] = {"mirostat": 2, "dynatemp_range": 0.5, "top_k": 3}
    for name in {*DRAWING_FIELDS, "temperature"} - search.keys():
        with pytest.raises(RequestError) as caught:
            check_search(params(**search, **{name: values.get(name, 0.25)}), "a search")
        assert caught.value.param == name


def test_drawing_keeps_the_models_defaults() -> None:
    for fields in ({}, {"best_of": 3}, {"self_consistency": VOTE}):
        own = params(**fields)
        assert (own.temperature, own.top_k, own.top_p) == (0.6, 50, 0.9)


def test_the_engine_is_told(complete: Post, chat: Post, engine: Any) -> None:
    assert complete(num_beams=4, n=2, explain=True).status_code == 200
    assert chat(use_beam_search=True, n=3).status_code == 200
    first, second = engine.submitted
    assert (first.strategy, first.explain, first.sampling.n) == (BeamSearch(num_beams=4), True, 2)
    assert (second.strategy, second.explain, second.sampling.n) == (BeamSearch(num_beams=3), False, 3)


@pytest.mark.parametrize(
    ("fields", "param"), [({"use_beam_search": True, "n": 9}, "n"), ({"num_beams": 9}, "num_beams")]
)
def test_the_width_is_named_as_the_client_did(
    complete: Post, engine: Any, fields: dict[str, Any], param: str
) -> None:
    def script(request: GenerationRequest) -> Iterator[Event]:
        raise RequestError("num_beams must be at most 8, got 9", "num_beams")

    engine.script = script
    error = complete(**fields).json()["error"]
    assert error["param"] == param
    assert error["message"].startswith(f"{param} must be")


def why(token_id: int, **fields: Any) -> TokenExplanation:
    return TokenExplanation(token_id, 0.25, 0.5, 2, 1.5, 0.125, **{"decision": "searched", **fields})


def two_of_three(engine: Any) -> Callable[[GenerationRequest], Iterator[Event]]:
    """A search that has found two texts where three were asked for, and tells of the second at the end."""

    def script(request: GenerationRequest) -> Iterator[Event]:
        yield engine.prompt_done(request)
        lost = ((1001, -2.5), (1002, float("-inf")))
        yield Delta(0, "one", (11,), explanations=(why(11, lost=lost),))
        yield Delta(0, "", (12,), None, "stop", explanations=(why(12),), score=-0.5)
        yield Delta(1, "two", (13,), None, "length", explanations=(why(13, decision="closing"),), score=-1.5)

    return script


def test_choices_that_never_come_leave_no_trace(chat: Post, complete: Post, engine: Any, events: Any) -> None:
    engine.script = two_of_three(engine)
    for post, fields in ((chat, {}), (complete, {}), (complete, {"echo": True, "return_token_ids": True})):
        body = {"num_beams": 4, "n": 3, **fields}
        whole = post(**body).json()
        assert [choice["index"] for choice in whole["choices"]] == [0, 1]
        assert [choice["score"] for choice in whole["choices"]] == [-0.5, -1.5]
        chunks = events(post(**body, stream=True))
        assert {choice["index"] for chunk in chunks for choice in chunk["choices"]} == {0, 1}
        ends = [c for chunk in chunks for c in chunk["choices"] if c["finish_reason"]]
        assert [(end["index"], end["score"]) for end in ends] == [(0, -0.5), (1, -1.5)]


def test_a_late_choice_has_its_role_in_its_first_chunk(chat: Post, engine: Any, events: Any) -> None:
    engine.script = two_of_three(engine)
    for body in ({"num_beams": 3}, {"use_beam_search": True}):
        deltas: dict[int, list[dict[str, Any]]] = {}
        chunks = events(chat(**body, n=3, stream=True))
        for choice in (choice for chunk in chunks for choice in chunk["choices"]):
            deltas.setdefault(choice["index"], []).append(choice["delta"])
        assert chunks[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
        for own in deltas.values():
            assert [delta.get("role") for delta in own] == ["assistant", *[None] * (len(own) - 1)]


def test_explanations_on_the_wire(
    chat: Post, complete: Post, engine: Any, tokenizer: Any, events: Any
) -> None:
    engine.script = two_of_three(engine)
    for post in (chat, complete):
        whole = post(num_beams=4, n=3, explain=True).json()
        first, second = (choice["explanation"] for choice in whole["choices"])
        assert [entry["token_id"] for entry in (*first, *second)] == [11, 12, 13]
        assert first[0] == {
            "token": tokenizer.token_string(11),
            "token_id": 11,
            "bytes": list(tokenizer.token_bytes(11)),
            "raw_probability": 0.25,
            "final_probability": 0.5,
            "rank": 2,
            "entropy": 1.5,
            "mass_removed": 0.125,
            "decision": "searched",
            "lost": [
                {"token": tokenizer.token_string(1001), "token_id": 1001, "score": -2.5},
                {"token": tokenizer.token_string(1002), "token_id": 1002, "score": -9999.0},
            ],
        }
        assert "lost" not in first[1]
        assert second[0]["decision"] == "closing"
        streamed: dict[int, list[Any]] = {}
        for chunk in events(post(num_beams=4, n=3, explain=True, stream=True)):
            for choice in chunk["choices"]:
                streamed.setdefault(choice["index"], []).extend(choice.get("explanation", []))
        assert streamed == {0: first, 1: second}


def test_no_tokens_no_explanations(chat: Post, complete: Post, engine: Any) -> None:
    """Asked for, the member is there; unasked, it is not."""

    def script(request: GenerationRequest) -> Iterator[Event]:
        yield engine.prompt_done(request)
        yield Delta(0, "", finish_reason="length")

    engine.script = script
    for post in (chat, complete):
        assert post(max_tokens=0, explain=True).json()["choices"][0]["explanation"] == []
        assert "explanation" not in post(max_tokens=0).json()["choices"][0]
