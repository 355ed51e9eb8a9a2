"""The scheduler with branches and a block pool only; `SimulatedCache` says what the tensors would hold."""

import random
from collections.abc import Sequence
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cadenza.decoding.attention import TILE
from cadenza.decoding.block_pool import BlockPool, prefix_root
from cadenza.decoding.branch import Branch
from cadenza.decoding.detokenizer import IncrementalDetokenizer, StopStringFilter, TextStream
from cadenza.decoding.scheduler import Scheduler, Span, Step

BLOCK = 16


class _Silent:
    def decode(self, ids: object, *, skip_special_tokens: bool = True) -> str:
        return ""


def new_branch(arrival: int, prompt: Sequence[int], *, priority: int = 0, reads_cache: bool = True) -> Branch:
    return Branch(
        order=(priority, arrival, 0),
        index=0,
        num_prompt_tokens=len(prompt),
        token_ids=list(prompt),
        text=TextStream(IncrementalDetokenizer(_Silent(), (), True), StopStringFilter((), False)),
        cache_root=prefix_root(),
        reads_cache=reads_cache,
    )


class SimulatedCache:
    """Each slot holds the tokens up to its own: exactly what a key and a value depend on."""

    def __init__(self) -> None:
        self._slots: dict[tuple[int, int], tuple[int, ...]] = {}

    def run(self, step: Step, pool: BlockPool) -> None:
        for source, target in step.copies:
            for offset in range(BLOCK):
                self._slots[target, offset] = self._slots.get((source, offset), ())
        for span in step.spans:
            self._write(span, pool)
        for span in step.spans:
            self._check(span)

    def _write(self, span: Span, pool: BlockPool) -> None:
        branch = span.branch
        for position in range(span.start, span.end):
            block = branch.block_table[position // BLOCK]
            assert pool.refs(block) == 1, "a block that others read is written"
            self._slots[block, position % BLOCK] = tuple(branch.token_ids[: position + 1])

    def _check(self, span: Span) -> None:
        """Everything that the span's last row attends to is there."""
        branch = span.branch
        for position in range(span.end):
            held = self._slots[branch.block_table[position // BLOCK], position % BLOCK]
            assert held == tuple(branch.token_ids[: position + 1])


@dataclass
class Job:
    """A request: what the engine would do with its branches."""

    root: Branch
    num_new: int
    n: int = 1
    branches: list[Branch] = field(default_factory=list)


@dataclass
class Simulation:
    """The engine's loop without a model: schedule, compute, complete, append a token where the end was reached."""

    num_blocks: int
    max_num_seqs: int = 8
    budget: int = 128
    prefix_caching: bool = True

    def __post_init__(self) -> None:
        self.pool = BlockPool(self.num_blocks, BLOCK)
        self.scheduler = Scheduler(self.pool, self.max_num_seqs, self.budget, self.prefix_caching)
        self.cache = SimulatedCache()
        self.jobs: dict[Branch, Job] = {}
        self.finished: list[Branch] = []

    def add(self, job: Job) -> Branch:
        self.jobs[job.root] = job
        self.scheduler.add(job.root)
        return job.root

    def add_prompt(self, prompt: Sequence[int], num_new: int = 1, n: int = 1, priority: int = 0) -> Branch:
        return self.add(Job(new_branch(len(self.jobs), prompt, priority=priority), num_new, n))

    def step(self) -> Step:
        were_running = list(self.scheduler.running)
        step = self.scheduler.schedule()
        self._check_plan(step, were_running)
        self.cache.run(step, self.pool)
        self.scheduler.complete(step)
        for branch in [span.branch for span in step.spans if span.reaches_end]:
            self._append(branch)
        return step

    def run(self, max_steps: int = 3000) -> list[Step]:
        steps = []
        while self.scheduler.has_work:
            assert len(steps) < max_steps, "no end in sight"
            steps.append(self.step())
        return steps

    def remove(self, job: Job) -> None:
        for branch in job.branches or [job.root]:
            if branch in self.jobs and branch not in self.finished:
                self.scheduler.remove(branch)
                self.finished.append(branch)

    def _append(self, branch: Branch) -> None:
        job = self.jobs[branch]
        ready = [branch]
        if not job.branches:
            job.branches = [branch, *(branch.fork(index, index) for index in range(1, job.n))]
            for fork in job.branches[1:]:
                self.jobs[fork] = job
                self.scheduler.replace([], [fork])
            ready = [each for each in job.branches if self.scheduler.is_running(each)]
        for each in ready:
            each.token_ids.append(1000 * (each.index + 1) + each.num_generated)
            if each.num_generated >= job.num_new:
                self.scheduler.remove(each)
                self.finished.append(each)

    def _check_plan(self, step: Step, were_running: list[Branch]) -> None:
        assert step.spans, "there is work, but nothing was scheduled"
        scheduled = [span.branch for span in step.spans]
        assert len(set(scheduled)) == len(scheduled)
        assert sum(span.end - span.start for span in step.spans) <= self.budget
        assert len(self.scheduler.running) <= self.max_num_seqs
        for span in step.spans:
            assert self.scheduler.is_running(span.branch)
            assert span.start == span.branch.num_computed < span.end <= span.branch.num_tokens
            if span.start < span.branch.num_prompt_tokens:
                assert span.start % TILE == 0
            if span.end < span.branch.num_prompt_tokens:
                assert span.end % TILE == 0
        preempted = [branch for branch in were_running if not self.scheduler.is_running(branch)]
        assert all(branch.order < victim.order for branch in scheduled for victim in preempted)
        assert all(victim.block_table == [] and victim.num_computed == 0 for victim in preempted)


def prompt_of(length: int, family: int = 0) -> list[int]:
    """Prompts of one family begin alike."""
    return [family * 1000 + position for position in range(length)]


def planned(step: Step) -> list[tuple[int, int, int]]:
    """(arrival, start, end) of each span."""
    return [(span.branch.order[1], span.start, span.end) for span in step.spans]


def test_a_long_prompt_is_cut_at_tiles_under_the_budget():
    sim = Simulation(num_blocks=64, budget=160)
    sim.add_prompt(prompt_of(300), num_new=2)
    assert [planned(step) for step in sim.run()] == [
        [(0, 0, 128)],
        [(0, 128, 256)],
        [(0, 256, 300)],
        [(0, 300, 301)],
    ]


def test_decoding_goes_first_then_the_prompt_in_progress_then_new_ones():
    sim = Simulation(num_blocks=64, budget=128)
    sim.add_prompt(prompt_of(10, 1), num_new=9)
    sim.step()
    sim.add_prompt(prompt_of(200, 2))
    sim.add_prompt(prompt_of(30, 3))
    assert planned(sim.step()) == [(0, 10, 11), (1, 0, 64), (2, 0, 30)]
    assert planned(sim.step()) == [(0, 11, 12), (1, 64, 128)]
    assert planned(sim.step()) == [(0, 12, 13), (1, 128, 200)]


def test_no_more_branches_than_max_num_seqs():
    sim = Simulation(num_blocks=64, max_num_seqs=3)
    for _ in range(5):
        sim.add_prompt(prompt_of(4), num_new=2)
    sim.step()
    assert (len(sim.scheduler.running), len(sim.scheduler.waiting)) == (3, 2)
    sim.run()
    assert len(sim.finished) == 5


def test_priority_decides_then_arrival():
    sim = Simulation(num_blocks=64, max_num_seqs=1)
    for priority in (5, 0, 0, -1):
        sim.add_prompt(prompt_of(4), num_new=1, priority=priority)
    sim.run()
    assert [branch.order[1] for branch in sim.finished] == [3, 1, 2, 0]


def test_the_last_in_order_is_preempted_and_comes_back():
    """Three branches of 5 blocks, growing, in a pool of 16: the third must make room, then the second."""
    sim = Simulation(num_blocks=16, prefix_caching=False)
    for _ in range(3):
        sim.add_prompt(prompt_of(78), num_new=60)
    order = []
    while not sim.finished:
        before = list(sim.scheduler.running)
        sim.step()
        order += [branch.order[1] for branch in before if branch in sim.scheduler.waiting]
    assert order[0] == 2
    assert 0 not in order
    sim.run()
    assert [branch.order[1] for branch in sim.finished] == [0, 1, 2]
    assert sim.scheduler.num_preemptions >= len(order) > 0
    assert sim.pool.num_held == 0


def test_a_preempted_branch_computes_its_answer_again_after_its_prompt():
    sim = Simulation(num_blocks=8, prefix_caching=False)
    sim.add_prompt(prompt_of(60, 1), num_new=40)
    second = sim.add_prompt(prompt_of(40, 2), num_new=40)
    while second not in sim.scheduler.waiting or second.num_generated == 0:
        sim.step()
    assert (second.num_computed, second.block_table) == (0, [])
    num_generated = second.num_generated
    while second in sim.scheduler.waiting:
        step = sim.step()
    assert planned(step)[-1] == (1, 0, 40 + num_generated)
    sim.run()
    assert second.num_generated == 40


def test_forks_share_the_prompt_and_copy_the_block_that_they_write():
    sim = Simulation(num_blocks=32)
    sim.add_prompt(prompt_of(40), num_new=3, n=3)
    sim.step()
    assert sim.pool.num_held == 3  # 40 tokens; three branches
    step = sim.step()
    assert len(step.spans) == 3
    assert len(step.copies) == 2  # the last one to write keeps the original
    assert sim.pool.num_held == 5
    tables = [span.branch.block_table for span in step.spans]
    assert tables[0][:2] == tables[1][:2] == tables[2][:2]
    assert len({table[2] for table in tables}) == 3
    assert sim.step().copies == []
    assert sim.pool.num_held == 0


def test_forks_of_whole_blocks_copy_nothing():
    sim = Simulation(num_blocks=32)
    sim.add_prompt(prompt_of(48), num_new=3, n=4)
    assert [step.copies for step in sim.run()] == [[], [], []]


def test_forks_beyond_the_limit_wait_and_compute_the_prompt_themselves():
    sim = Simulation(num_blocks=32, max_num_seqs=2, prefix_caching=False)
    sim.add_prompt(prompt_of(20), num_new=2, n=5)
    sim.step()
    assert (len(sim.scheduler.running), len(sim.scheduler.waiting)) == (2, 3)
    sim.run()
    assert sorted(branch.index for branch in sim.finished) == [0, 1, 2, 3, 4]


def test_a_prompt_hits_whole_tiles_but_never_its_last_token():
    sim = Simulation(num_blocks=64, budget=256)
    sim.add_prompt(prompt_of(128))
    sim.run()
    same, longer, other = (
        sim.add_prompt(prompt)
        for prompt in (prompt_of(128), prompt_of(150), [*prompt_of(100), 7, *prompt_of(150)[101:]])
    )
    step = sim.step()
    assert [branch.num_cached_tokens for branch in (same, longer, other)] == [64, 128, 64]
    assert planned(step)[:2] == [(1, 64, 128), (2, 128, 150)]
    assert sim.scheduler.prefix_cache_hits == 64 + 128 + 64
    assert sim.scheduler.prefix_cache_queries == 128 + 128 + 150 + 150


def test_a_prompt_whose_every_logit_is_wanted_reads_no_cache_but_feeds_it():
    sim = Simulation(num_blocks=64)
    first = new_branch(0, prompt_of(100), reads_cache=False)
    second = new_branch(1, prompt_of(100), reads_cache=False)
    third = new_branch(2, prompt_of(100))
    for branch in (first, second, third):
        sim.add(Job(branch, 1))
        sim.run()
    assert [branch.num_cached_tokens for branch in (first, second, third)] == [0, 0, 64]


def test_answers_are_not_published():
    """Their keys and values were computed row by row: to the last bit, a prompt would compute others."""
    sim = Simulation(num_blocks=64)
    branch = sim.add_prompt(prompt_of(60), num_new=100)
    sim.run()
    follow_up = sim.add_prompt(branch.token_ids)
    sim.run()
    assert follow_up.num_cached_tokens == 0


def test_no_hits_where_prefix_caching_is_off():
    sim = Simulation(num_blocks=64, prefix_caching=False)
    for _ in range(2):
        branch = sim.add_prompt(prompt_of(130))
        sim.run()
        assert branch.num_cached_tokens == 0
    assert sim.scheduler.prefix_cache_hits == 0


@pytest.mark.parametrize("num_steps", [0, 1, 2, 4])
def test_removing_a_branch_frees_its_blocks_at_once(num_steps: int):
    """While it waits, computes its prompt, or decodes with forks."""
    sim = Simulation(num_blocks=32, budget=64)
    job = Job(new_branch(0, prompt_of(100)), num_new=50, n=3)
    sim.add(job)
    for _ in range(num_steps):
        sim.step()
    sim.remove(job)
    assert sim.pool.num_held == 0
    assert not sim.scheduler.has_work


arrivals = st.lists(
    st.fixed_dictionaries(
        {
            "at": st.integers(0, 30),
            "length": st.integers(1, 200),
            "family": st.integers(0, 2),
            "num_new": st.integers(1, 50),
            "n": st.integers(1, 4),
            "priority": st.integers(0, 2),
            "removed_after": st.none() | st.integers(0, 40),
        }
    ),
    min_size=1,
    max_size=10,
)


@settings(max_examples=120, deadline=None, derandomize=True)
@given(arrivals, st.integers(16, 48), st.integers(1, 6), st.integers(64, 200), st.booleans())
def test_every_branch_comes_to_its_end(
    plan: list[dict[str, int]], num_blocks: int, max_num_seqs: int, spare: int, prefix_caching: bool
):
    """Random arrivals, priorities, forks and removals in little memory; `Simulation` checks every step."""
    sim = Simulation(num_blocks, max_num_seqs, max_num_seqs + spare, prefix_caching)
    jobs = [
        Job(
            new_branch(number, prompt_of(item["length"], item["family"]), priority=item["priority"]),
            item["num_new"],
            item["n"],
        )
        for number, item in enumerate(plan)
    ]
    for now in range(5000):
        for job, item in zip(jobs, plan, strict=True):
            if item["at"] == now:
                sim.add(job)
            if item["removed_after"] is not None and item["at"] + item["removed_after"] == now:
                sim.remove(job)
        if sim.scheduler.has_work:
            sim.step()
        elif now > 71:
            break
    assert not sim.scheduler.has_work
    assert sim.pool.num_held == 0
    for job, item in zip(jobs, plan, strict=True):
        if item["removed_after"] is None:
            assert [branch.num_generated for branch in job.branches] == [item["num_new"]] * item["n"]


class ForcedRuns(Simulation):
    """Constraints append runs of tokens that are computed together."""

    rng: random.Random

    def _append(self, branch: Branch) -> None:
        super()._append(branch)
        if branch not in self.finished and self.scheduler.is_running(branch) and self.rng.random() < 0.4:
            branch.token_ids += [5] * self.rng.randint(1, 40)


@pytest.mark.parametrize("seed", range(20))
def test_a_run_of_forced_tokens_takes_no_blocks_from_branches_of_the_same_step(seed: int):
    sim = ForcedRuns(num_blocks=20, prefix_caching=False)
    sim.rng = random.Random(seed)
    for _ in range(4):
        sim.add_prompt(prompt_of(sim.rng.randint(5, 90)), num_new=100, n=sim.rng.choice([1, 1, 2]))
    sim.run()
    assert sim.scheduler.num_preemptions > 0
    assert sim.pool.num_held == 0


# Searches: branches of one request that wait for each other, fork in mid-answer and are dropped.


@dataclass
class Search(Job):
    """Like a beam search: when all beams are computed, the next ones are children of some of them."""

    width: int = 3
    seed: int = 0
    ready: set[Branch] = field(default_factory=set)
    num_forks: int = 0


@dataclass
class SearchSimulation(Simulation):
    def add_search(self, prompt: Sequence[int], num_new: int, width: int, seed: int = 0) -> None:
        self.add(Search(new_branch(len(self.jobs), prompt), num_new, width=width, seed=seed))

    def _append(self, branch: Branch) -> None:
        job = self.jobs[branch]
        if not isinstance(job, Search):
            return super()._append(branch)
        job.branches = job.branches or [branch]
        job.ready.add(branch)
        if not job.ready.issuperset(job.branches):
            return None
        rng = random.Random((job.seed, job.branches[0].num_tokens).__repr__())
        parents = [rng.choice(job.branches) for _ in range(job.width)]
        beams = [
            parent if parent not in parents[:at] else self._fork(job, parent)
            for at, parent in enumerate(parents)
        ]
        for fork in [beam for beam in beams if beam not in job.branches]:
            self.scheduler.replace([], [fork])
        for lost in [beam for beam in job.branches if beam not in beams]:
            self.scheduler.remove(lost)
            self.finished.append(lost)
        for number, beam in enumerate(beams):
            beam.token_ids.append(rng.randrange(10) * 100 + number)
        job.branches, job.ready = beams, set()
        if beams[0].num_generated >= job.num_new:
            self.remove(job)
        return None

    def _fork(self, job: Search, parent: Branch) -> Branch:
        job.num_forks += 1
        fork = parent.fork(job.num_forks, 0)
        self.jobs[fork] = job
        return fork


@pytest.mark.parametrize("prefix_caching", [True, False])
@pytest.mark.parametrize("seed", range(12))
def test_searches_come_to_their_end_however_short_of_blocks_and_seats(seed: int, prefix_caching: bool):
    """Two searches that each hold half of the seats, or of the blocks, would wait for each other for ever."""
    rng = random.Random(seed)
    sim = SearchSimulation(
        num_blocks=rng.choice([14, 20, 40]), max_num_seqs=4, budget=80, prefix_caching=prefix_caching
    )
    for number in range(5):
        length = rng.randrange(1, 90)
        if rng.random() < 0.7:
            sim.add_search(prompt_of(length, number % 2), rng.randrange(1, 30), rng.randrange(2, 5), seed)
        else:
            sim.add_prompt(prompt_of(length, number % 2), rng.randrange(1, 40), rng.randrange(1, 4))
        for _ in range(rng.randrange(6)):
            if sim.scheduler.has_work:
                sim.step()
    sim.run()
    assert sim.pool.num_held == 0


def test_an_idle_branch_is_left_alone_until_it_gets_a_token():
    sim = SearchSimulation(num_blocks=40)
    sim.add_search(prompt_of(20), num_new=9, width=2)
    sim.step()
    first, second = sim.scheduler.running
    sim.jobs[first].ready = {first}  # as if its sibling's result had come late
    second.token_ids.append(7)
    second.num_computed = 19
    first.num_computed = first.num_tokens
    step = sim.scheduler.schedule()
    assert [span.branch for span in step.spans] == [second]


def test_a_preempted_beam_shares_its_siblings_blocks_again():
    sim = SearchSimulation(num_blocks=64, prefix_caching=False)
    sim.add_search(prompt_of(100), num_new=60, width=2)
    for _ in range(3):
        sim.step()
    first, second = sim.scheduler.running
    sim.scheduler._preempt(second)
    step = sim.scheduler.schedule()
    assert [span.start for span in step.spans if span.branch is second] == [64]  # in its prompt, at a tile
    assert first.block_table[:4] == second.block_table[:4]
    assert sim.pool.refs(first.block_table[0]) == 2


def test_an_earlier_request_takes_the_seat_of_a_later_one():
    sim = SearchSimulation(num_blocks=64, max_num_seqs=3)
    sim.add_search(prompt_of(10, 1), num_new=20, width=3)
    for _ in range(2):
        sim.add_prompt(prompt_of(10, 2), num_new=20)
    sim.step()
    assert {branch.order[1] for branch in sim.scheduler.running} == {0}
    assert len(sim.scheduler.running) == 3
    sim.run()


def test_equal_prompts_that_come_together_are_computed_once():
    """What is left of the budget is no tile: who comes next waits a step, and then finds the prompt in the cache."""
    sim = Simulation(num_blocks=64, budget=128)
    for _ in range(4):
        sim.add_prompt(prompt_of(100), num_new=2)
    assert [planned(step) for step in sim.run()] == [
        [(0, 0, 100)],
        [(0, 100, 101), (1, 64, 100), (2, 64, 100), (3, 64, 100)],
        [(1, 100, 101), (2, 100, 101), (3, 100, 101)],
    ]
