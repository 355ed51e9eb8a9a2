"""Every strategy with every kind of constraint, with and without an adapter, streamed and not, on the real model over
a real socket.

The table in docs/strategies.md is what these tests have found: each cell was run, and has to be there. A cell's
answers are valid by an independent judge (re, jsonschema, lark), and the streamed and the whole answer, computed in
one batch with all the other cells of the row, half of them with an adapter and half without, are the same to the last
field.
"""

import asyncio
import itertools
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import jsonschema
import lark
import pytest

PAGE = Path(__file__).parents[2] / "docs" / "strategies.md"
PROMPT = "Question: Which colour is the sky, and why? Answer:"
CHOICES = ["blue", "green", "grey", "black", "red as blood"]
REGEX = r"(blue|grey), because [a-z]{2,12}( [a-z]{2,12}){1,4}\."
SCHEMA = {
    "type": "object",
    "properties": {"colour": {"type": "string", "maxLength": 12}, "sure": {"type": "boolean"}},
    "required": ["colour", "sure"],
    "additionalProperties": False,
}
GRAMMAR = 'start: "(" WORD ("," start)? ")"\nWORD: /[a-z]{2,8}/'

CONSTRAINTS: dict[str, tuple[dict[str, Any], Callable[[str], object]]] = {
    "free": ({}, lambda text: True),
    "choice": ({"structured_outputs": {"choice": CHOICES}}, lambda text: text in CHOICES),
    "regex": ({"structured_outputs": {"regex": REGEX}}, lambda text: re.fullmatch(REGEX, text)),
    "JSON schema": (
        {"structured_outputs": {"json": SCHEMA}},
        lambda text: jsonschema.validate(json.loads(text), SCHEMA) is None,
    ),
    "grammar": (
        {"structured_outputs": {"grammar": GRAMMAR}},
        lambda text: lark.Lark(GRAMMAR).parse(text) is not None,
    ),
}
SAMPLED = {"seed": 7, "temperature": 0.9}
STRATEGIES: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0},
    "greedy, penalties": {"temperature": 0, "repetition_penalty": 1.3, "frequency_penalty": 0.5},
    "DRY": {"temperature": 0, "dry_multiplier": 0.8, "dry_allowed_length": 1},
    "temperature": {"seed": 7, "temperature": 1.4},
    "dynamic temperature": {**SAMPLED, "dynatemp_range": 0.6},
    "top-k": {**SAMPLED, "top_k": 8},
    "top-p": {**SAMPLED, "top_p": 0.8},
    "min-p": {**SAMPLED, "min_p": 0.1},
    "typical-p": {**SAMPLED, "typical_p": 0.8},
    "top-n-sigma": {**SAMPLED, "top_n_sigma": 1.0},
    "epsilon cut-off": {**SAMPLED, "epsilon_cutoff": 0.01},
    "eta cut-off": {**SAMPLED, "eta_cutoff": 0.01},
    "XTC": {**SAMPLED, "xtc_probability": 0.7, "xtc_threshold": 0.1},
    "mirostat 1": {**SAMPLED, "mirostat": 1, "mirostat_tau": 3.0},
    "mirostat 2": {**SAMPLED, "mirostat": 2, "mirostat_tau": 3.0},
    "several samples": {**SAMPLED, "n": 3},
    "best of": {**SAMPLED, "n": 2, "best_of": 4},
    "beam search": {"num_beams": 4, "n": 2, "length_penalty": 0.5},
    "diverse beam search": {"num_beams": 4, "n": 2, "num_beam_groups": 2, "diversity_penalty": 0.8},
    "contrastive search": {"penalty_alpha": 0.6, "top_k": 4},
    "self-consistency": {**SAMPLED, "self_consistency": {"n": 5, "answer": "full_text"}},
    "speculation, greedy": {"temperature": 0},
    "speculation, sampled": {**SAMPLED, "n": 2},
}
LEGEND = "whole ✓ stream ✓"
ADAPTER = "all of them with an adapter, in a mixed batch"
"""The table's last column."""


def _body(strategy: str, constraint: str, *, stream: bool, adapter: bool) -> dict[str, Any]:
    fields = {**STRATEGIES[strategy], **CONSTRAINTS[constraint][0]}
    fields |= {"model": "emoji"} if adapter else {}
    body = {"prompt": PROMPT, "max_tokens": 20, "stream": stream, **fields}
    return {**body, "stream_options": {"include_usage": True}} if stream else body


async def _whole(client: httpx.AsyncClient, body: dict[str, Any]) -> dict[str, Any]:
    response = await client.post("/v1/completions", json=body)
    assert response.status_code == 200, response.text
    answer = response.json()
    return _gist(answer["choices"], answer)


async def _streamed(client: httpx.AsyncClient, body: dict[str, Any]) -> dict[str, Any]:
    """What a client puts together from the chunks."""
    choices: dict[int, dict[str, Any]] = {}
    last: dict[str, Any] = {}
    async with client.stream("POST", "/v1/completions", json=body) as response:
        lines = [line[6:] async for line in response.aiter_lines() if line.startswith("data: ")]
    assert lines.pop() == "[DONE]"
    for chunk in map(json.loads, lines):
        assert "error" not in chunk, chunk
        for news in chunk["choices"]:
            choice = choices.setdefault(news["index"], {"index": news["index"], "text": ""})
            assert "finish_reason" not in choice or not news["text"], "text after the end"
            choice["text"] += news["text"]
            if news["finish_reason"] is not None:
                assert choice.get("finish_reason") is None, "two ends"
                choice.update({name: value for name, value in news.items() if name != "text"})
        last.update(chunk)
    return _gist([choices[index] for index in sorted(choices)], last)


def _gist(choices: list[dict[str, Any]], envelope: dict[str, Any]) -> dict[str, Any]:
    members = ("index", "text", "finish_reason", "stop_reason", "closed_early", "score")
    return {
        "choices": [{name: choice.get(name) for name in members} for choice in choices],
        "vote": envelope.get("vote"),
        "completion_tokens": envelope["usage"]["completion_tokens"],
    }


Cell = tuple[str, bool, bool]
"""(constraint, with the adapter, streamed)"""


async def _row(base_url: str, strategy: str) -> dict[Cell, dict[str, Any]]:
    """Of all cells of a strategy, computed in one batch."""
    cells = list(itertools.product(CONSTRAINTS, (False, True), (False, True)))
    async with httpx.AsyncClient(base_url=base_url, timeout=240) as client:
        answers = await asyncio.gather(
            *(
                (_streamed if stream else _whole)(
                    client, _body(strategy, constraint, stream=stream, adapter=adapter)
                )
                for constraint, adapter, stream in cells
            )
        )
    return dict(zip(cells, answers, strict=True))


async def _alone(base_url: str, strategy: str) -> dict[str, Any]:
    async with httpx.AsyncClient(base_url=base_url, timeout=60) as client:
        return await _whole(client, _body(strategy, "free", stream=False, adapter=True))


@pytest.fixture(scope="session")
def found() -> dict[str, dict[str, str]]:
    """What each cell has shown, by strategy and constraint."""
    return {}


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_strategy_with_every_constraint(
    base_url: str, speculating_url: str, found: dict[str, dict[str, str]], strategy: str
) -> None:
    speculates = strategy.startswith("speculation")
    answers = asyncio.run(_row(speculating_url if speculates else base_url, strategy))
    plain = asyncio.run(_row(base_url, strategy)) if speculates else answers
    assert answers == plain  # speculation never changes an answer
    assert answers["free", True, False] == asyncio.run(_alone(base_url, strategy))
    assert answers["free", True, False] != answers["free", False, False]  # the adapter is heard
    for constraint, adapter in itertools.product(CONSTRAINTS, (False, True)):
        _, is_valid = CONSTRAINTS[constraint]
        whole, streamed = answers[constraint, adapter, False], answers[constraint, adapter, True]
        assert whole["choices"]
        assert len(whole["choices"]) <= STRATEGIES[strategy].get("n", 1)
        assert [choice["index"] for choice in whole["choices"]] == list(range(len(whole["choices"])))
        for choice in whole["choices"]:
            assert is_valid(choice["text"]), choice
            assert choice["finish_reason"] in ("stop", "length")
            assert (choice["closed_early"] is None) == (constraint == "free")
        assert streamed == whole
        found.setdefault(strategy, {})[ADAPTER if adapter else constraint] = LEGEND


def test_the_table_in_the_docs_is_what_was_found(found: dict[str, dict[str, str]]) -> None:
    if found.keys() != STRATEGIES.keys():
        pytest.skip("only with all the rows")
    columns = [*CONSTRAINTS, ADAPTER]
    lines = [f"| | {' | '.join(columns)} |", "|---" * (len(columns) + 1) + "|"]
    for strategy, cells in found.items():
        lines.append(f"| {strategy} | {' | '.join(cells[column] for column in columns)} |")
    table = "\n".join(lines)
    assert table in PAGE.read_text(encoding="utf-8"), table
