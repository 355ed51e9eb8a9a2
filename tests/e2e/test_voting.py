"""Self-consistency with the official client against a live server: chat and completions, streamed and not."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

EXAMPLE = Path(__file__).parents[2] / "examples" / "self_consistency.py"
PROMPT = "Seven plus two is"
VOTING = {"n": 6, "answer": {"regex": "[a-z]+"}}
FIELDS: dict[str, Any] = {"model": "smollm2", "max_tokens": 4, "temperature": 0.8, "seed": 5}
PROGRESS = {"sample", "sample_answer", "answer", "votes", "samples_finished", "tokens_spent"}


def create(client: openai.OpenAI, route: str, prompt: Any = PROMPT, **fields: Any) -> Any:
    fields = {**FIELDS, **fields}
    if route == "chat":
        return client.chat.completions.create(messages=[{"role": "user", "content": prompt}], **fields)
    return client.completions.create(prompt=prompt, **fields)


def text_of(choice: Any) -> str:
    return choice.message.content if hasattr(choice, "message") else choice.text


def new_text(choice: Any) -> str:
    return (choice.delta.content if hasattr(choice, "delta") else choice.text) or ""


def last_word(text: str) -> str | None:
    """The last run of small letters, without a regular expression."""
    words = "".join(letter if "a" <= letter <= "z" else " " for letter in text).split()
    return words[-1] if words else None


@pytest.mark.parametrize("route", ["chat", "completions"])
def test_the_winner_is_that_of_a_recount(client: openai.OpenAI, route: str) -> None:
    """Six choices with the same seed are the samples that the vote counts."""
    choices = create(client, route, n=6).choices
    answer = create(client, route, extra_body={"self_consistency": VOTING})
    answers = [last_word(text_of(choice)) for choice in choices]
    votes = {given: answers.count(given) for given in answers if given is not None}
    winner = max(votes, key=lambda given: (votes[given], -answers.index(given)))
    assert len(answer.choices) == 1
    assert text_of(answer.choices[0]) == text_of(choices[answers.index(winner)])
    assert answer.vote["answer"] == winner
    assert answer.vote["sample"] == answers.index(winner)
    num_run = answer.vote["samples_finished"]
    assert answer.vote["counts"] == {
        given: answers[:num_run].count(given) for given in answers[:num_run] if given
    }
    assert answer.vote["samples_stopped"] == 6 - num_run
    assert answer.usage.completion_tokens == answer.vote["tokens_spent"]


@pytest.mark.parametrize("route", ["chat", "completions"])
def test_a_stream_tells_of_every_sample_and_then_the_winner(client: openai.OpenAI, route: str) -> None:
    body = {"self_consistency": {**VOTING, "weight": "logprob"}, "return_token_ids": True, "explain": True}
    logprobs: Any = {"logprobs": True} if route == "chat" else {"logprobs": 0}
    whole = create(client, route, extra_body=body, **logprobs)
    options = {"stream": True, "stream_options": {"include_usage": True}}
    *chunks, last = create(client, route, extra_body=body, **logprobs, **options)
    assert (last.choices, last.usage) == ([], whole.usage)
    votes = [(chunk.vote, chunk.choices[0]) for chunk in chunks if hasattr(chunk, "vote")]
    *progress, (outcome, final) = votes
    assert chunks[-1].vote == outcome == whole.vote
    assert final.finish_reason == whole.choices[0].finish_reason
    assert {vote["sample"] for vote, _ in progress} == set(range(outcome["samples_finished"]))
    for vote, choice in progress:
        assert vote.keys() == PROGRESS
        assert (choice.index, choice.finish_reason, new_text(choice)) == (0, None, "")
    assert "".join(new_text(chunk.choices[0]) for chunk in chunks) == text_of(whole.choices[0])
    token_ids = [token for chunk in chunks for token in getattr(chunk.choices[0], "token_ids", [])]
    assert token_ids == whole.choices[0].token_ids
    assert [entry["token_id"] for entry in whole.choices[0].explanation] == token_ids
    assert set(outcome["weights"]) == set(outcome["counts"])
    assert all(0 < outcome["weights"][given] <= votes for given, votes in outcome["counts"].items())


def test_several_prompts_vote_for_themselves(client: openai.OpenAI) -> None:
    body = {"self_consistency": VOTING}
    prompts = [PROMPT, "The sun is"]
    alone = [create(client, "completions", prompt, extra_body=body) for prompt in prompts]
    together = create(client, "completions", prompts, extra_body=body)
    assert [choice.text for choice in together.choices] == [answer.choices[0].text for answer in alone]
    assert together.votes == [answer.vote for answer in alone]
    assert not hasattr(together, "vote")
    chunks = create(client, "completions", prompts, extra_body=body, stream=True)
    finals = {c.choices[0].index: c.vote for c in chunks if c.choices[0].finish_reason is not None}
    assert finals == dict(enumerate(together.votes))


def test_a_vote_among_constrained_answers(client: openai.OpenAI) -> None:
    """A thought, then the field that is counted; every sample is valid, so that every sample votes."""
    properties = {"thought": {"type": "string", "maxLength": 12}, "answer": {"enum": ["yes", "no"]}}
    schema = {"type": "object", "properties": properties, "required": ["thought", "answer"]}
    body = {
        "self_consistency": {"n": 5, "answer": {"json_pointer": "/answer"}},
        "structured_outputs": {"json": schema},
    }
    answer = create(client, "chat", "Is the sky green?", extra_body=body, max_tokens=40)
    assert json.loads(text_of(answer.choices[0]))["answer"] == answer.vote["answer"]
    assert set(answer.vote["counts"]) <= {"yes", "no"}
    assert answer.vote["samples_without_answer"] == 0
    assert sum(answer.vote["counts"].values()) == answer.vote["samples_finished"]


@pytest.mark.parametrize("route", ["chat", "completions"])
@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"self_consistency": {"answer": "full_text"}}, "self_consistency.n"),
        ({"self_consistency": {"n": 4}}, "self_consistency.answer"),
        ({"self_consistency": {"n": 0, "answer": "full_text"}}, "self_consistency.n"),
        ({"self_consistency": {"n": 4, "answer": "first_number"}}, "self_consistency.answer"),
        (
            {"self_consistency": {"n": 4, "answer": {"regex": "a", "json_pointer": ""}}},
            "self_consistency.answer",
        ),
        ({"self_consistency": {"n": 4, "answer": {"regex": 1}}}, "self_consistency.answer"),
        ({"self_consistency": {"n": 4, "answer": {"regex": "("}}}, "self_consistency.answer.regex"),
        (
            {"self_consistency": {"n": 4, "answer": {"json_pointer": "a"}}},
            "self_consistency.answer.json_pointer",
        ),
        ({"self_consistency": {**VOTING, "weight": "votes"}}, "self_consistency.weight"),
        ({"self_consistency": {**VOTING, "min_samples": 7}}, "self_consistency.min_samples"),
        ({"self_consistency": {**VOTING, "confidence": 0.2}}, "self_consistency.confidence"),
        ({"self_consistency": {**VOTING, "samples": 4}}, "self_consistency.samples"),
        ({"self_consistency": VOTING, "n": 2}, "n"),
        ({"self_consistency": VOTING, "max_tokens": 0}, "max_tokens"),
        ({"self_consistency": VOTING, "num_beams": 2}, "self_consistency"),
    ],
)
def test_what_cannot_be_is_named(http: httpx.Client, route: str, fields: dict[str, Any], param: str) -> None:
    url = "/v1/chat/completions" if route == "chat" else "/v1/completions"
    prompt = {"messages": [{"role": "user", "content": "x"}]} if route == "chat" else {"prompt": "x"}
    response = http.post(url, json={**FIELDS, **prompt, **fields})
    assert response.status_code == 400
    error = response.json()["error"]
    assert error["param"] == param
    assert param in error["message"]


def test_a_hanging_pattern_is_named_where_it_hangs(http: httpx.Client) -> None:
    """In mid-stream it is an error event, in a whole answer a 400; the server goes on."""
    body = {
        **FIELDS,
        "prompt": "x",
        "max_tokens": 60,
        "self_consistency": {"n": 2, "answer": {"regex": "((x|xx)+)+[yz]"}},
        "structured_outputs": {"regex": "x{50}"},
    }
    response = http.post("/v1/completions", json=body)
    assert response.status_code == 400
    assert response.json()["error"]["param"] == "self_consistency.answer.regex"
    *_, error, done, _ = http.post("/v1/completions", json={**body, "stream": True}).text.split("\n\n")
    assert json.loads(error.removeprefix("data: "))["error"]["param"] == "self_consistency.answer.regex"
    assert done == "data: [DONE]"
    assert http.get("/health").status_code == 200


def test_the_example_runs_as_it_is(base_url: str) -> None:
    command = [sys.executable, str(EXAMPLE), f"{base_url}/v1"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert result.returncode == 0, result.stderr
    assert "sample 0 says" in result.stdout
    assert result.stdout.count("samples_finished") == 2
    assert '"sentiment":' in result.stdout
