"""The step's bitmask: filled in threads, applied to logits of any width, and a failure stays with its request."""

import dataclasses
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from cadenza.decoding import (
    Engine,
    EngineConfig,
    GenerationRequest,
    RequestFailed,
    RequestStream,
    SamplingParams,
)
from cadenza.decoding.bitmask import BitmaskFiller
from cadenza.decoding.block_pool import prefix_root
from cadenza.decoding.branch import Branch
from cadenza.decoding.completion import collect
from cadenza.decoding.constraints.constraint import Constraint
from cadenza.decoding.constraints.errors import MatcherError
from cadenza.decoding.constraints.spec import ConstraintSpec
from cadenza.decoding.detokenizer import IncrementalDetokenizer, StopStringFilter, TextStream
from cadenza.decoding.logits import LogitsPipeline
from cadenza.decoding.processors import apply_bitmask
from cadenza.decoding.row import Row
from cadenza.models import LoadedModel

PROMPT = tuple(range(1000, 1012))
NO_LIMITS = SamplingParams(temperature=0.0)


class _Silent:
    def decode(self, ids: object, *, skip_special_tokens: bool = True) -> str:
        return ""


class Scripted:
    """A matcher that allows a set of tokens, or raises what it is told to raise."""

    is_complete = is_ended = limited = False

    def __init__(self, allowed: set[int], raises: BaseException | None = None, seconds: float = 0.0) -> None:
        self.allowed, self.raises, self.seconds = allowed, raises, seconds
        self.remaining: list[int] = []
        self.threads: set[int] = set()

    def fill(self, row: NDArray[np.int32], remaining: int) -> None:
        time.sleep(self.seconds)
        self.remaining.append(remaining)
        self.threads.add(threading.get_ident())
        if self.raises is not None:
            raise self.raises
        words = row.view(np.uint32)
        for token_id in self.allowed:
            words[token_id // 32] |= np.uint32(1 << (token_id % 32))


class Panic(BaseException):
    """As native code raises it."""


def branch(number: int, matcher: Any) -> Branch:
    text = TextStream(IncrementalDetokenizer(_Silent(), (), True), StopStringFilter((), False))
    return Branch((0, number, 0), 0, 1, [1], text, prefix_root(), matcher=matcher)


def row(logits_row: int, mask: int | None, **sampling: Any) -> Row:
    params = dataclasses.replace(NO_LIMITS, **sampling)
    return Row(logits_row, params, 1, 0, (), (), (), None, mask)


def allowed_by(words: Any, width: int) -> list[bool]:
    """Read token by token: a token without a bit is not allowed."""
    numbers = [int(word) & 0xFFFFFFFF for word in words]
    return [
        token // 32 < len(numbers) and bool(numbers[token // 32] >> (token % 32) & 1)
        for token in range(width)
    ]


@pytest.mark.parametrize("width", [1, 31, 32, 33, 64, 70, 95, 96, 97, 128, 200])
@pytest.mark.parametrize("masked", [(0, 1, 2), (None, 1, 0), (2, None, 2), (None, 0, None)])
def test_exactly_the_tokens_whose_bit_is_set_keep_their_logits(
    width: int, masked: tuple[int | None, ...]
) -> None:
    """Logits narrower and wider than the mask of 96 tokens, rows without a mask among them, shared masks."""
    rng = np.random.default_rng(width)
    bitmask = torch.from_numpy(rng.integers(-(2**31), 2**31, (3, 3), dtype=np.int64).astype(np.int32))
    before = torch.from_numpy(rng.normal(size=(3, width)).astype(np.float32))
    after = apply_bitmask(before.clone(), [row(number, mask) for number, mask in enumerate(masked)], bitmask)
    for number, mask in enumerate(masked):
        kept = [True] * width if mask is None else allowed_by(bitmask[mask], width)
        for token in range(width):
            expected = before[number, token] if kept[token] else -torch.inf
            assert after[number, token] == expected, (number, token)


def test_the_choice_is_the_likeliest_allowed_token_and_padding_never_comes() -> None:
    """An embedding of 130 rows for a vocabulary of 100, a mask of 128 bits."""
    logits = torch.zeros(2, 130)
    logits[:, 129], logits[:, 110], logits[:, 40], logits[0, 7] = 9.0, 8.0, 7.0, 3.0
    words = np.zeros((1, 4), np.uint32)
    words[0, 0], words[0, 3] = 1 << 7 | 1 << 2, 1 << (110 - 96)
    bitmask = torch.from_numpy(words.view(np.int32))
    choices = LogitsPipeline(100, "raw_logprobs")(logits, [row(0, 0), row(1, None)], bitmask)
    assert [choice.token_id for choice in choices] == [7, 40]
    nothing = torch.zeros((1, 4), dtype=torch.int32)
    assert LogitsPipeline(100, "raw_logprobs")(logits, [row(0, 0)], nothing)[0].token_id is None


def test_rows_are_filled_in_place_in_other_threads_and_wide_enough() -> None:
    filler = BitmaskFiller(97)
    members = [branch(number, Scripted({number, 96}, seconds=0.02)) for number in range(40)]
    filling = filler.start([(member, number) for number, member in enumerate(members)])
    assert filling is not None
    step = filling.result()
    assert step.words is not None
    assert step.words.shape == (40, 4)
    assert step.words.dtype == torch.int32
    assert not step.errors
    for number, member in enumerate(members):
        found = allowed_by(step.words[step.row_of[member]], 128)
        assert [token for token, is_set in enumerate(found) if is_set] == sorted({number, 96})
        assert member.matcher.remaining == [number]  # type: ignore[union-attr]
    threads = set().union(*(member.matcher.threads for member in members))  # type: ignore[union-attr]
    assert threading.get_ident() not in threads
    assert len(threads) > 1
    assert filler.start([]) is None


def test_the_matchers_that_fail_are_named_and_the_others_rows_are_whole() -> None:
    raised = {1: MatcherError("out of fuel"), 3: Panic("index out of bounds"), 4: MemoryError()}
    members = [branch(number, Scripted({5}, raised.get(number))) for number in range(6)]
    filling = BitmaskFiller(64).start([(member, 9) for member in members])
    assert filling is not None
    step = filling.result()
    assert step.words is not None
    assert step.errors == {members[number]: error for number, error in raised.items()}
    for number in {0, 2, 5}:
        assert step.words[step.row_of[members[number]]].tolist() == [1 << 5, 0]


# in the engine


@pytest.fixture(scope="module")
def tiny(tiny_model: LoadedModel) -> Iterator[Engine]:
    with Engine(tiny_model, EngineConfig(max_num_seqs=16, kv_cache_memory_gb=0.05)) as running:
        yield running


@pytest.fixture(scope="module")
def words(tiny: Engine) -> Constraint:
    return tiny.constraints.compile(ConstraintSpec.regex(r"([a-z]+ ){3}[a-z]+\.")).result()


def submit(engine: Engine, constraint: Any, max_tokens: int = 40, **sampling: Any) -> RequestStream:
    params = SamplingParams(max_tokens=max_tokens, **{"seed": 7, **sampling})
    return engine.submit(
        GenerationRequest(request_id="t", prompt_token_ids=PROMPT, sampling=params, constraint=constraint)
    )


class Failing:
    """A real matcher, of which one method fails after some calls."""

    def __init__(self, inner: Any, method: str, error: BaseException, after: int) -> None:
        self._inner, self._method, self._error, self._left = inner, method, error, after

    def __getattr__(self, name: str) -> Any:
        if name == self._method:
            self._left -= 1
            if self._left < 0:
                raise self._error
        return getattr(self._inner, name)


class Substitute:
    """Stands for a compiled constraint, with other matchers."""

    min_tokens = 1

    def __init__(self, make: Callable[[], Any]) -> None:
        self.matcher = make


@pytest.mark.parametrize("after", [0, 2])
@pytest.mark.parametrize(
    ("method", "error"),
    [
        ("fill", MatcherError("out of fuel")),
        ("fill", Panic("unreachable code")),
        ("accept", MatcherError("too many readings")),
        ("accept", KeyError("a defect")),
        ("forced", MatcherError("too many readings")),
        ("is_ended", ValueError("a defect")),
    ],
)
def test_whatever_fails_in_a_matcher_fails_its_request_and_no_other(
    tiny: Engine, words: Constraint, method: str, error: BaseException, after: int
) -> None:
    others = [submit(tiny, words, seed=1), submit(tiny, None, seed=2)]
    expected = [collect(stream, 1).choices[0].token_ids for stream in others]
    broken = Substitute(lambda: Failing(words.matcher(), method, error, after))
    among = [submit(tiny, words, seed=1), submit(tiny, broken), submit(tiny, None, seed=2)]
    with pytest.raises(RequestFailed, match="matcher failed") as failed:
        collect(among[1], 1)
    assert str(error) in str(failed.value)
    assert [collect(among[place], 1).choices[0].token_ids for place in (0, 2)] == expected
    assert not tiny.is_closed


def test_a_fork_that_fails_fails_its_request_and_no_other(tiny: Engine, words: Constraint) -> None:
    broken = Substitute(lambda: Failing(words.matcher(), "fork", MatcherError("no"), 0))
    streams = [submit(tiny, broken, n=3), submit(tiny, words)]
    with pytest.raises(RequestFailed):
        collect(streams[0], 3)
    assert collect(streams[1], 1).choices[0].finish_reason
    assert not tiny.is_closed


def test_a_failing_branch_takes_its_siblings_with_it(tiny: Engine, words: Constraint) -> None:
    made: list[Any] = []

    class Sibling(Failing):
        def fork(self) -> Any:
            made.append(Failing(self._inner.fork(), "fill", MatcherError("the second"), 1))
            return made[-1]

    stream = submit(tiny, Substitute(lambda: Sibling(words.matcher(), "none", MatcherError(), 0)), n=2)
    with pytest.raises(RequestFailed, match="the second"):
        collect(stream, 2)
    assert len(made) == 1
    assert tiny.stats().num_running == 0


def test_aborted_while_its_mask_is_being_filled(tiny: Engine, words: Constraint) -> None:
    """Nothing of it is left, and nothing waits for it."""
    started = threading.Event()

    class Slow(Failing):
        def fill(self, row: NDArray[np.int32], remaining: int) -> None:
            started.set()
            time.sleep(0.2)
            self._inner.fill(row, remaining)

    expected = collect(submit(tiny, words, seed=4), 1).choices[0].token_ids
    slow = submit(tiny, Substitute(lambda: Slow(words.matcher(), "none", MatcherError(), 0)), n=2)
    other = submit(tiny, words, seed=4)
    assert started.wait(10)
    slow.abort()
    assert collect(other, 1).choices[0].token_ids == expected
    assert tiny.stats().num_running == 0
    assert tiny.stats().kv_cache_usage == 0


def test_a_step_that_fails_leaves_the_fills_it_started_behind(
    tiny: Engine, words: Constraint, monkeypatch: pytest.MonkeyPatch
) -> None:
    runner = type(tiny._core._runner)
    original, calls = runner.__call__, []

    def failing(self: Any, *arguments: Any) -> Any:
        calls.append(arguments)
        if len(calls) == 3:
            raise RuntimeError("device lost")
        return original(self, *arguments)

    monkeypatch.setattr(runner, "__call__", failing)
    stream = submit(tiny, words)
    with pytest.raises(RequestFailed, match="device lost"):
        collect(stream, 1)
    assert collect(submit(tiny, words), 1).choices[0].finish_reason
    assert tiny.stats().kv_cache_usage == 0


def test_no_tokens_at_all_where_the_empty_text_is_complete(tiny: Engine) -> None:
    optional = tiny.constraints.compile(ConstraintSpec.regex("(yes)?")).result()
    assert optional.min_tokens == 0
    choice = collect(submit(tiny, optional, max_tokens=0), 1).choices[0]
    assert (choice.text, choice.token_ids, choice.finish_reason) == ("", [], "length")
    assert choice.closed_early is True


def test_log_probabilities_of_the_prompt_beside_a_constraint(tiny: Engine, words: Constraint) -> None:
    plain = collect(submit(tiny, words, seed=9), 1)
    scored = collect(submit(tiny, words, seed=9, prompt_logprobs=1), 1)
    assert scored.choices[0].token_ids == plain.choices[0].token_ids
    assert scored.prompt is not None
    assert scored.prompt.logprobs is not None
    assert len(scored.prompt.logprobs) == len(PROMPT)


def test_many_threads_may_ask_for_engines_answers(tiny: Engine, words: Constraint) -> None:
    """Each seed has one answer, whoever asks at the same time."""
    with ThreadPoolExecutor(8) as pool:
        seeds = [seed % 5 for seed in range(25)]
        answers = list(
            pool.map(
                lambda seed: tuple(collect(submit(tiny, words, seed=seed), 1).choices[0].token_ids), seeds
            )
        )
    assert all(answers[place] == answers[place % 5] for place in range(25))
