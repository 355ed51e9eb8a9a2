"""Engines over tiny random models that differ only in who drafts for them."""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM

from cadenza.decoding import Engine, EngineConfig
from cadenza.decoding.block_pool import prefix_root
from cadenza.decoding.branch import Branch
from cadenza.decoding.detokenizer import IncrementalDetokenizer, StopStringFilter, TextStream
from cadenza.models import LoadedModel


@pytest.fixture(scope="session")
def other_tiny_model(tiny_model: LoadedModel) -> LoadedModel:
    """Other random weights: it agrees with `tiny_model` by chance only."""
    torch.manual_seed(17)
    module = LlamaForCausalLM(tiny_model.config).eval().requires_grad_(False)
    for parameter in module.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.3)
    return dataclasses.replace(tiny_model, module=module, name="other")


def _config(speculative: str | None) -> EngineConfig:
    return EngineConfig(
        max_num_seqs=48, kv_cache_memory_gb=0.05, speculative=speculative, num_speculative_tokens=4
    )


def draft_at_any_price(engine: Engine) -> None:
    """A model as large as the one it drafts for never pays, so that it would not be asked."""
    drafter: Any = engine._core._speculator._drafter
    drafter._pass_cost = 0.0


@pytest.fixture(scope="session")
def plain(tiny_model: LoadedModel) -> Iterator[Engine]:
    with Engine(tiny_model, _config(None)) as running:
        yield running


@pytest.fixture(scope="session")
def ngram(tiny_model: LoadedModel) -> Iterator[Engine]:
    with Engine(tiny_model, _config("ngram")) as running:
        yield running


@pytest.fixture(scope="session")
def same_model(tiny_model: LoadedModel) -> Iterator[Engine]:
    with Engine(tiny_model, _config("itself"), draft=tiny_model) as running:
        draft_at_any_price(running)
        yield running


@pytest.fixture(scope="session")
def other_model(tiny_model: LoadedModel, other_tiny_model: LoadedModel) -> Iterator[Engine]:
    with Engine(tiny_model, _config("other"), draft=other_tiny_model) as running:
        draft_at_any_price(running)
        yield running


@pytest.fixture(params=["ngram", "same_model", "other_model"])
def drafted(request: pytest.FixtureRequest) -> Engine:
    """Each of those that speculate."""
    engine: Engine = request.getfixturevalue(request.param)
    return engine


class _Silent:
    def decode(self, ids: object, *, skip_special_tokens: bool = True) -> str:
        return ""


@pytest.fixture(scope="session")
def new_branch() -> Callable[..., Branch]:
    """A branch without a model."""

    def make(prompt: Sequence[int], arrival: int = 0, number: int = 0) -> Branch:
        return Branch(
            order=(0, arrival, number),
            index=number,
            num_prompt_tokens=len(prompt),
            token_ids=list(prompt),
            text=TextStream(IncrementalDetokenizer(_Silent(), (), True), StopStringFilter((), False)),
            cache_root=prefix_root(),
        )

    return make
