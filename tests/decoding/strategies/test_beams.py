"""The bookkeeping of beam search against transformers' own `generate`, and against every text there is.

The model is a table: the logits of the next token are random numbers looked up by the last two tokens.
"""

import itertools
import math
import random
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from transformers import GenerationConfig, PretrainedConfig, PreTrainedModel
from transformers.generation import GenerationMixin
from transformers.modeling_outputs import CausalLMOutput

from cadenza.decoding.strategies.beams import Grown, Hypothesis, Search, num_candidates
from cadenza.decoding.strategies.spec import BeamSearch

EOS = 0
Text = tuple[int, ...]
PROMPT: Text = (1, 2)


class Table:
    def __init__(self, seed: int, vocab_size: int, spread: float = 1.5) -> None:
        generator = torch.Generator().manual_seed(seed)
        shape = (vocab_size, vocab_size, vocab_size)
        self.logits = spread * torch.randn(shape, generator=generator)
        self.log_probs = self.logits.log_softmax(-1).tolist()

    def options(self, text: Text) -> list[tuple[int, float]]:
        """After PROMPT and the text: (token, log-probability), most likely first."""
        row = self.log_probs[(PROMPT + text)[-2]][(PROMPT + text)[-1]]
        return sorted(enumerate(row), key=lambda pair: -pair[1])


class TableModel(PreTrainedModel, GenerationMixin):
    config_class = PretrainedConfig
    _no_split_modules = ()

    def __init__(self, table: Table) -> None:
        super().__init__(PretrainedConfig(vocab_size=len(table.logits), is_decoder=True))
        self.table = table
        self.weight = torch.nn.Parameter(torch.zeros(1))  # generate asks a parameter for its device
        self.generation_config = GenerationConfig()

    def forward(self, input_ids: Any, **_: Any) -> CausalLMOutput:
        return CausalLMOutput(logits=self.table.logits[input_ids[:, -2], input_ids[:, -1]][:, None])


def search(spec: BeamSearch, table: Table, max_length: int, ends: Sequence[int]) -> list[Hypothesis[Text]]:
    count = num_candidates(spec, len(ends))
    running = Search[Text].start(spec, max_length, ())
    while not running.is_done:
        running.step(
            lambda text: table.options(text)[:count],
            lambda text, token, logprob: Grown((*text, token), token, logprob, token in ends),
        )
    assert not running.live
    return running.complete


@torch.inference_mode()
def by_transformers(
    spec: BeamSearch, table: Table, max_length: int, ends: Sequence[int]
) -> list[Hypothesis[Text]]:
    output = TableModel(table).generate(
        torch.tensor([PROMPT]),
        attention_mask=torch.ones(1, len(PROMPT), dtype=torch.int64),
        num_beams=spec.num_beams,
        num_return_sequences=spec.num_beams,
        length_penalty=spec.length_penalty,
        early_stopping=spec.early_stopping,
        max_new_tokens=max_length,
        eos_token_id=list(ends),
        pad_token_id=0,
        do_sample=False,
        use_cache=False,
        return_dict_in_generate=True,
        output_scores=True,
    )
    texts = [until_end(row, ends) for row in output.sequences[:, len(PROMPT) :].tolist()]
    return [Hypothesis(*pair) for pair in zip(texts, output.sequences_scores.tolist(), strict=True)]


def until_end(tokens: list[int], ends: Sequence[int]) -> Text:
    length = next((at + 1 for at, token in enumerate(tokens) if token in ends), len(tokens))
    return tuple(tokens[:length])


def random_spec(rng: random.Random) -> BeamSearch:
    return BeamSearch(
        num_beams=rng.choice([2, 2, 3, 4, 5, 8]),
        length_penalty=rng.choice([0.0, 0.5, 1.0, 2.0, -1.0]),
        early_stopping=rng.choice([True, False, "never"]),
    )


@pytest.mark.parametrize("block", range(10))
def test_equals_transformers(block: int):
    for seed in range(block * 30, block * 30 + 30):
        rng = random.Random(seed)
        spec, max_length = random_spec(rng), rng.randint(1, 9)
        ends = rng.choice([[EOS], [EOS], [EOS, 3]])
        # enough tokens for every beam that transformers wants: it goes on with ended texts where there are too few
        table = Table(seed, 3 * spec.num_beams + rng.randint(1, 9), spread=rng.choice([0.5, 1.5, 3.0]))
        ours, theirs = search(spec, table, max_length, ends), by_transformers(spec, table, max_length, ends)
        assert [found.item for found in ours] == [found.item for found in theirs], seed
        assert [found.score for found in ours] == pytest.approx([found.score for found in theirs], abs=1e-4)


@pytest.mark.parametrize("length_penalty", [-1.0, 0.0, 0.5, 1.0, 2.0])
def test_a_search_wide_enough_finds_the_best_of_all_texts(length_penalty: float):
    """4 tokens, up to 4 long: with 4 ** 3 beams nothing is ever left out."""
    for seed in range(5):
        table, max_length = Table(seed, 4), 4
        spec = BeamSearch(num_beams=64, length_penalty=length_penalty, early_stopping="never")
        found = search(spec, table, max_length, [EOS])
        every = dict(all_texts(table, max_length, length_penalty))
        assert len({item.item for item in found}) == 64
        assert [item.score for item in found] == pytest.approx([every[item.item] for item in found])
        assert [item.score for item in found] == pytest.approx(sorted(every.values(), reverse=True)[:64])


def all_texts(table: Table, max_length: int, length_penalty: float) -> list[tuple[Text, float]]:
    found = []
    for length in range(1, max_length + 1):
        for text in itertools.product(range(4), repeat=length):
            if EOS in text[:-1] or (text[-1] != EOS and length < max_length):
                continue
            total = math.fsum(dict(table.options(text[:at]))[text[at]] for at in range(length))
            found.append((text, total / length**length_penalty))
    return found


def test_one_beam_is_greedy():
    for seed in range(20):
        table, text = Table(seed, 6), ()
        while not text or (len(text) < 8 and text[-1] != EOS):
            text = (*text, table.options(text)[0][0])
        found = search(BeamSearch(num_beams=1), table, 8, [EOS])
        assert [item.item for item in found] == [text]


def test_of_equal_scores_the_lower_beam_and_token_come_first():
    running = Search[Text].start(BeamSearch(num_beams=2), 2, ())
    for _ in range(2):
        running.step(
            lambda text: [(7, -1.0), (5, -1.0), (6, -1.0), (4, -1.0)],
            lambda text, token, logprob: Grown((*text, token), token, logprob, False),
        )
    assert [item.item for item in running.complete] == [(4, 4), (4, 5)]


def test_groups_without_a_penalty_search_alike():
    table = Table(1, 20)
    alone = search(BeamSearch(num_beams=2), table, 6, [EOS])
    grouped = search(BeamSearch(num_beams=4, num_beam_groups=2), table, 6, [EOS])
    assert [item.item for item in grouped] == [item.item for item in alone for _ in range(2)]


def test_a_penalty_drives_groups_apart():
    table = Table(2, 20)
    spec = BeamSearch(num_beams=4, num_beam_groups=4, diversity_penalty=100.0)
    found = search(spec, table, 5, [])
    columns = list(zip(*(item.item for item in found), strict=True))
    assert all(len(set(column)) == 4 for column in columns)


def test_groups_get_enough_candidates():
    """The same result as when every token is a candidate."""
    for seed in range(40):
        rng = random.Random(seed)
        groups = rng.choice([2, 3, 4])
        spec = BeamSearch(
            num_beams=groups * rng.choice([1, 2, 3]),
            num_beam_groups=groups,
            diversity_penalty=rng.choice([0.1, 0.7, 3.0]),
            early_stopping=rng.choice([True, False, "never"]),
        )
        table, ends = Table(seed, 40), rng.choice([[], [EOS], [EOS, 3, 4]])
        running = Search[Text].start(spec, 6, ())
        while not running.is_done:
            running.step(
                table.options,
                lambda text, token, logprob, ends=ends: Grown((*text, token), token, logprob, token in ends),
            )
        assert running.complete == search(spec, table, 6, ends)


def test_a_token_that_takes_anothers_place_has_its_own_rank():
    """Tokens 5 and 6 become 7 here. It comes once, and where its own log-probability puts it."""
    options = [(5, -0.1), (4, -1.0), (6, -1.5), (3, -2.0), (7, -3.0), (2, -4.0)]
    logprobs = dict(options)

    def grow(text: Text, token: int, logprob: float) -> Grown[Text]:
        token = 7 if token in (5, 6) else token
        return Grown((*text, token), token, logprobs[token], False)

    running = Search[Text].start(BeamSearch(num_beams=4), 1, ())
    running.step(lambda text: options, grow)
    assert [item.item for item in running.complete] == [(4,), (3,), (7,), (2,)]
    assert [item.score for item in running.complete] == [-1.0, -2.0, -3.0, -4.0]


def test_fewer_texts_than_beams_end_the_search():
    """Two answers, as of a choice: both are found, and nothing goes on."""
    answers = {(): [(1, -0.2), (2, -1.8)], (1,): [(EOS, -0.1)], (2,): [(EOS, -0.3)]}
    running = Search[Text].start(BeamSearch(num_beams=4, early_stopping="never"), 10, ())
    while not running.is_done:
        running.step(
            lambda text: answers[text],
            lambda text, token, logprob: Grown((*text, token), token, logprob, token == EOS),
        )
    assert [item.item for item in running.complete] == [(1, EOS), (2, EOS)]


def test_a_text_that_ends_behind_the_best_is_left_out():
    """transformers: only the num_beams best candidates may become hypotheses, so that bad short texts do not."""
    options = [(1, -0.1), (2, -0.2), (EOS, -0.3), (3, -0.4)]
    running = Search[Text].start(BeamSearch(num_beams=2), 5, ())
    running.step(lambda text: options, lambda text, t, logprob: Grown((*text, t), t, logprob, t == EOS))
    assert running.complete == []
    assert list(running.live) == [(1,), (2,)]
    wider = Search[Text].start(BeamSearch(num_beams=3), 5, ())
    wider.step(lambda text: options, lambda text, t, logprob: Grown((*text, t), t, logprob, t == EOS))
    assert [item.item for item in wider.complete] == [(EOS,)]
    assert list(wider.live) == [(1,), (2,), (3,)]


def test_never_waits_for_what_length_may_make_good():
    """An unlikely beginning with a certain rest: only "never" goes on after two short answers of nearly its score."""

    def options(text: Text) -> list[tuple[int, float]]:
        if not text:
            return [(EOS, -1.0), (1, -2.0)]
        return [(EOS, -0.005), (1, -0.01)] if text == (1,) else [(1, -0.01)]

    for early_stopping, best in ((False, (EOS,)), ("never", (1,) * 10)):
        running = Search[Text].start(BeamSearch(num_beams=2, early_stopping=early_stopping), 10, ())
        while not running.is_done:
            running.step(options, lambda text, t, logprob: Grown((*text, t), t, logprob, t == EOS))
        assert running.complete[0].item == best
