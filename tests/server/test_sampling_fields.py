"""Each sampling field reaches the engine, and its errors come back under the name that the client used."""

from collections.abc import Callable
from typing import Any

import pytest

from cadenza.decoding.request import RequestError, SamplingParams
from cadenza.server.protocol.sampling import SamplingFields

FIELDS: dict[str, tuple[Any, Any]] = {
    "n": (3, 3),
    "max_tokens": (7, 7),
    "min_tokens": (2, 2),
    "temperature": (0.5, 0.5),
    "top_k": (40, 40),
    "top_p": (0.9, 0.9),
    "min_p": (0.1, 0.1),
    "typical_p": (0.8, 0.8),
    "top_n_sigma": (1.5, 1.5),
    "epsilon_cutoff": (3e-4, 3e-4),
    "eta_cutoff": (6e-4, 6e-4),
    "xtc_probability": (0.5, 0.5),
    "xtc_threshold": (0.2, 0.2),
    "mirostat": (2, 2),
    "mirostat_tau": (3, 3.0),
    "mirostat_eta": (0.2, 0.2),
    "dynatemp_range": (0.5, 0.5),
    "dynatemp_exponent": (2, 2.0),
    "dry_multiplier": (0.8, 0.8),
    "dry_base": (2, 2.0),
    "dry_allowed_length": (3, 3),
    "dry_sequence_breakers": (["\n", "User:"], ("\n", "User:")),
    "dry_penalty_last_n": (64, 64),
    "repetition_penalty": (1.2, 1.2),
    "presence_penalty": (-0.5, -0.5),
    "frequency_penalty": (0.7, 0.7),
    "logit_bias": ({"5": -100}, {5: -100.0}),
    "bad_words": (["darn"], ("darn",)),
    "allowed_token_ids": ([1, 2], (1, 2)),
    "stop": (["a", "b"], ("a", "b")),
    "stop_token_ids": ([9], (9,)),
    "include_stop_str_in_output": (True, True),
    "ignore_eos": (True, True),
    "seed": (1234, 1234),
    "skip_special_tokens": (False, False),
    "prompt_logprobs": (3, 3),
}


def test_no_parameter_of_the_engine_is_out_of_reach() -> None:
    reachable = set(FIELDS) | {"logprobs"}
    assert reachable == {name for name in SamplingParams.__dataclass_fields__}


@pytest.mark.parametrize("name", FIELDS)
@pytest.mark.parametrize("route", ["chat", "complete"])
def test_each_field_reaches_the_engine(request: Any, engine: Any, name: str, route: str) -> None:
    sent, received = FIELDS[name]
    response = request.getfixturevalue(route)(**{name: sent})
    assert response.status_code == 200, response.text
    sampling = engine.submitted[0].sampling
    assert getattr(sampling, name) == received
    assert getattr(SamplingParams(), name) != received
    untouched = set(FIELDS) - {name, "max_tokens"}
    assert all(getattr(sampling, other) == getattr(SamplingParams(), other) for other in untouched)


def test_values_that_turn_a_truncation_off_are_fine(chat: Callable[..., Any], engine: Any) -> None:
    off = {"top_n_sigma": -1, "mirostat": 0, "dry_multiplier": 0, "dry_sequence_breakers": []}
    assert chat(**off, xtc_probability=0, epsilon_cutoff=0, eta_cutoff=0, dynatemp_range=0).status_code == 200
    sampling = engine.submitted[0].sampling
    assert not sampling.has_thresholds
    assert not sampling.is_stateful
    assert sampling.dry_sequence_breakers == ()


def test_one_stop_string_need_not_be_in_a_list(chat: Callable[..., Any], engine: Any) -> None:
    chat(stop="END")
    assert engine.submitted[0].sampling.stop == ("END",)


def test_max_completion_tokens_is_max_tokens(chat: Callable[..., Any], engine: Any) -> None:
    chat(max_completion_tokens=5)
    chat(max_completion_tokens=5, max_tokens=5)
    assert [request.sampling.max_tokens for request in engine.submitted] == [5, 5]


def test_default_lengths(chat: Callable[..., Any], complete: Callable[..., Any], engine: Any) -> None:
    chat()
    complete()
    complete(max_tokens=None)
    complete(max_tokens=0)
    assert [request.sampling.max_tokens for request in engine.submitted] == [None, 16, 16, 0]


def test_logprobs_of_chat(chat: Callable[..., Any], engine: Any) -> None:
    chat()
    chat(logprobs=True)
    chat(logprobs=True, top_logprobs=0)
    chat(logprobs=True, top_logprobs=4)
    assert [request.sampling.logprobs for request in engine.submitted] == [None, 0, 0, 4]


def test_logprobs_of_completions(complete: Callable[..., Any], engine: Any) -> None:
    complete()
    complete(logprobs=0)
    complete(logprobs=3)
    complete(logprobs=3, echo=True)
    complete(logprobs=3, echo=True, prompt_logprobs=5)
    asked = [(r.sampling.logprobs, r.sampling.prompt_logprobs) for r in engine.submitted]
    assert asked == [(None, None), (0, None), (3, None), (3, 3), (3, 5)]


def test_the_models_defaults_hold_where_the_client_is_silent(chat: Callable[..., Any], engine: Any) -> None:
    engine.model.sampling_defaults = {"temperature": 0.2, "top_p": 0.7}
    chat(top_p=0.95)
    assert engine.submitted[0].sampling.temperature == 0.2
    assert engine.submitted[0].sampling.top_p == 0.95


def test_priority_and_salt(chat: Callable[..., Any], engine: Any) -> None:
    chat(priority=-3, cache_salt="tenant")
    assert (engine.submitted[0].priority, engine.submitted[0].cache_salt) == (-3, "tenant")


@pytest.mark.parametrize(
    ("route", "fields", "param"),
    [
        ("chat", {"temperature": -1}, "temperature"),
        ("chat", {"top_p": 1.5}, "top_p"),
        ("chat", {"top_p": 0}, "top_p"),
        ("chat", {"top_k": -5}, "top_k"),
        ("chat", {"min_p": 2}, "min_p"),
        ("chat", {"presence_penalty": 2.5}, "presence_penalty"),
        ("chat", {"frequency_penalty": -2.5}, "frequency_penalty"),
        ("chat", {"repetition_penalty": 0}, "repetition_penalty"),
        ("chat", {"n": 0}, "n"),
        ("chat", {"max_tokens": -1}, "max_tokens"),
        ("chat", {"max_completion_tokens": -1}, "max_completion_tokens"),
        ("chat", {"max_tokens": 2, "min_tokens": 3}, "min_tokens"),
        ("chat", {"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ("chat", {"logprobs": True, "top_logprobs": -1}, "top_logprobs"),
        ("complete", {"logprobs": 21}, "logprobs"),
        ("complete", {"logprobs": -1}, "logprobs"),
        ("complete", {"prompt_logprobs": 21}, "prompt_logprobs"),
        ("chat", {"top_n_sigma": -2}, "top_n_sigma"),
        ("chat", {"epsilon_cutoff": 1}, "epsilon_cutoff"),
        ("chat", {"epsilon_cutoff": -0.1}, "epsilon_cutoff"),
        ("chat", {"eta_cutoff": 1}, "eta_cutoff"),
        ("chat", {"xtc_probability": 1.1}, "xtc_probability"),
        ("chat", {"xtc_threshold": -0.1}, "xtc_threshold"),
        ("chat", {"mirostat": 3}, "mirostat"),
        ("chat", {"mirostat": 2, "mirostat_tau": 0}, "mirostat_tau"),
        ("chat", {"mirostat": 2, "mirostat_eta": 1.1}, "mirostat_eta"),
        ("chat", {"temperature": 0.5, "dynatemp_range": 0.6}, "dynatemp_range"),
        ("chat", {"temperature": 0, "dynatemp_range": 0.1}, "dynatemp_range"),
        ("chat", {"dynatemp_range": 0.5, "dynatemp_exponent": -1}, "dynatemp_exponent"),
        ("chat", {"dry_multiplier": -1}, "dry_multiplier"),
        ("chat", {"dry_base": 0.9}, "dry_base"),
        ("chat", {"dry_allowed_length": 0}, "dry_allowed_length"),
        ("chat", {"dry_penalty_last_n": -2}, "dry_penalty_last_n"),
        ("chat", {"dry_sequence_breakers": [""]}, "dry_sequence_breakers"),
        ("chat", {"dry_sequence_breakers": ["é" * 21]}, "dry_sequence_breakers"),
        ("chat", {"dry_sequence_breakers": ["x"] * 33}, "dry_sequence_breakers"),
        ("chat", {"mirostat": True}, "mirostat"),
        ("chat", {"dry_sequence_breakers": "[]"}, "dry_sequence_breakers"),
        ("chat", {"logit_bias": {"x": 1}}, "logit_bias"),
        ("chat", {"logit_bias": {"5": 101}}, "logit_bias"),
        ("chat", {"allowed_token_ids": []}, "allowed_token_ids"),
        ("chat", {"stop": [""]}, "stop"),
        ("chat", {"seed": 2**64}, "seed"),
        ("complete", {"prompt": [1, 9999999]}, "prompt"),
        ("complete", {"prompt": [1, -1], "echo": True}, "prompt"),
        ("complete", {"prompt": ["x"] * 9}, "prompt"),
    ],
)
def test_what_is_out_of_range_is_a_400(
    request: Any, engine: Any, route: str, fields: dict[str, Any], param: str
) -> None:
    response = request.getfixturevalue(route)(**fields)
    assert response.status_code == 400
    error = response.json()["error"]
    assert error["type"] == "invalid_request_error"
    assert error["param"] == param
    assert param in error["message"]
    assert engine.submitted == []


def test_numbers_beyond_floats_are_refused(client: Any) -> None:
    for number in ("1e999", "-1e999", "NaN", "Infinity"):
        body = f'{{"prompt": "x", "temperature": {number}}}'
        response = client.post("/v1/completions", content=body, headers={"content-type": "application/json"})
        assert response.status_code == 400, number


def test_the_engines_own_refusal_names_the_clients_field(chat: Callable[..., Any], engine: Any) -> None:
    def refuse(request: Any) -> Any:
        raise RequestError("max_tokens must be less", "max_tokens", "some_code")

    engine.script = refuse
    for fields, param in (({"max_completion_tokens": 5}, "max_completion_tokens"), ({}, "max_tokens")):
        error = chat(**fields).json()["error"]
        assert (error["param"], error["code"]) == (param, "some_code")
        assert error["message"] == f"{param} must be less"


def test_truncation_keeps_the_end_of_the_prompt(complete: Callable[..., Any], engine: Any) -> None:
    prompt = list(range(100, 700))
    complete(prompt=prompt, max_tokens=12, truncate_prompt_tokens=-1)
    complete(prompt=prompt, max_tokens=12, truncate_prompt_tokens=3)
    assert engine.submitted[0].prompt_token_ids == tuple(prompt[-500:])
    assert engine.submitted[1].prompt_token_ids == tuple(prompt[-3:])


def test_shared_fields_are_all_optional() -> None:
    assert SamplingFields().new_tokens is None
