"""Random sequences of everything that can be asked of the library, against an oracle that has no locks, queues or
threads: one list of what is in memory, one table of names."""

import random
from collections import Counter
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

import pytest

from cadenza.decoding.adapters.errors import AdapterRefused, GenerationMismatch, UnknownAdapter
from cadenza.decoding.adapters.library import AdapterLibrary
from cadenza.decoding.adapters.set import AdapterSet
from cadenza.decoding.request import RequestError
from cadenza.models import ModelError
from cadenza.models.adapters.adapter import Adapter

NAMES, FOLDERS, CONTENTS = "xyz", "FGHI", "abcde"
DAMAGED = "!"


@dataclass
class Given:
    number: int
    content: str
    folder: str


@dataclass
class Entry:
    current: Given
    previous: Given | None
    is_pinned: bool


class Waits(Exception):
    """It cannot be done before somebody ends."""


@dataclass
class Oracle:
    capacity: int
    disk: dict[str, str]
    names: dict[str, Entry] = field(default_factory=dict)
    numbers: Counter[str] = field(default_factory=Counter)
    memory: list[str] = field(default_factory=list)
    users: Counter[str] = field(default_factory=Counter)
    newest: str = ""

    def pinned(self, without: str = "") -> set[str]:
        return {
            entry.current.content for name, entry in self.names.items() if entry.is_pinned and name != without
        }

    def wanted(self) -> set[str]:
        entries = self.names.values()
        return {given.content for entry in entries for given in (entry.current, entry.previous) if given}

    def staying(self) -> set[str]:
        return {content for content in self.memory if self.users[content] or content in self.pinned()}

    def touch(self, content: str) -> None:
        self.memory = [other for other in self.memory if other != content] + [content]

    def add(self, content: str) -> None:
        if content not in self.memory:
            self.newest = content
        self.touch(content)

    def trim(self) -> None:
        staying = self.staying()
        self.memory = [content for content in self.memory if content in staying or content in self.wanted()]
        staying.add(self.newest)
        while len(self.memory) > self.capacity and not set(self.memory) <= staying:
            self.memory.remove(next(content for content in self.memory if content not in staying))

    def check(self, name: str, expected: int | None, in_place: bool) -> None:
        number = self.names[name].current.number if name in self.names else 0
        if (number != expected) if expected is not None else (number > 0 and not in_place):
            raise GenerationMismatch("")

    def read(self, folder: str, content: str | None = None) -> str:
        if self.disk[folder] == DAMAGED or content not in (None, self.disk[folder]):
            raise AdapterRefused("")
        return self.disk[folder]

    def publish(self, name: str, given: Given, pin: bool | None) -> None:
        entry = self.names.get(name)
        pin = (entry is not None and entry.is_pinned) if pin is None else pin
        pinned = self.pinned(without=name) | ({given.content} if pin else set())
        others = {entry.current.content for key, entry in self.names.items() if key != name} | {given.content}
        if len(pinned) + bool(others - pinned) > self.capacity:
            raise AdapterRefused("")
        self.numbers[name] += 1
        previous = None
        if entry is not None:
            previous = entry.previous if entry.current.content == given.content else entry.current
        self.names[name] = Entry(Given(self.numbers[name], given.content, given.folder), previous, pin)
        self.add(given.content)
        self.trim()

    def load(self, name: str, folder: str, expected: int | None, in_place: bool, pin: bool | None) -> None:
        self.check(name, expected, in_place)
        if len(self.memory) > self.capacity:
            raise Waits
        self.publish(name, Given(0, self.read(folder), folder), pin)

    def unload(self, name: str, expected: int | None) -> None:
        if name not in self.names:
            raise UnknownAdapter("")
        self.check(name, expected, True)
        del self.names[name]
        self.trim()

    def roll_back(self, name: str, expected: int | None) -> None:
        if name not in self.names:
            raise UnknownAdapter("")
        self.check(name, expected, True)
        if (before := self.names[name].previous) is None:
            raise GenerationMismatch("")
        if before.content not in self.memory:
            if len(self.memory) > self.capacity:
                raise Waits
            self.read(before.folder, before.content)
        self.publish(name, before, None)

    def acquire(self, names: list[str]) -> set[str]:
        if not set(names) <= self.names.keys():
            raise UnknownAdapter("")
        folders = {self.names[name].current.content: self.names[name].current.folder for name in names[::-1]}
        needed = sorted(folders)
        if len(self.pinned() | set(needed)) > self.capacity:
            raise RequestError("")
        claimed: list[str] = []

        def claim() -> None:
            for content in needed:
                if content in self.memory and content not in claimed:
                    claimed.append(content)
                    self.users[content] += 1
                    self.touch(content)

        claim()
        try:
            for name in names:
                content = self.names[name].current.content
                if content in self.memory:
                    continue
                if len(self.memory) > self.capacity or len(self.staying()) >= self.capacity:
                    raise Waits
                self.read(folders[content], content)
                self.add(content)
                claim()
                self.trim()
        except Exception:
            for content in claimed:
                self.users[content] -= 1
                self.trim()
            raise
        for content in needed if len(claimed) else ():
            self.touch(content)
        return set(needed)

    def release(self, contents: set[str]) -> None:
        for content in sorted(contents):
            self.users[content] -= 1
            self.trim()


@dataclass
class Pair:
    """The library and its oracle, of which the same is asked."""

    library: AdapterLibrary
    work: Callable[[], None]
    oracle: Oracle
    warmed: set[str]
    """And not forgotten since."""
    held: list[tuple[AdapterSet, set[str]]] = field(default_factory=list)

    def ask(self, expect: Callable[[], Any], ask: Callable[[], Any]) -> Any:
        """What both give; None where both refuse, or would wait, for the same reason."""
        expected, refusal = None, None
        try:
            expected = expect()
        except Exception as error:
            refusal = error
        if refusal is None or isinstance(refusal, Waits):
            answer = ask()
            if isinstance(answer, Future):
                self.work()
                if refusal is not None:
                    assert not answer.done()
                    assert answer.cancel()
                    self.work()
                    return None
                answer = answer.result(0)
            return answer, expected
        with pytest.raises(type(refusal)) as raised:  # noqa: PT012
            answer = ask()
            self.work()
            answer.result(0)
        assert type(raised.value) is type(refusal)
        return None

    def compare(self) -> None:
        oracle = self.oracle
        shown = {info.name: info for info in self.library.list()}
        assert shown.keys() == oracle.names.keys()
        for name, entry in oracle.names.items():
            info = shown[name]
            assert (info.generation, info.digest, info.path) == (
                entry.current.number,
                entry.current.content,
                entry.current.folder,
            )
            assert info.previous_generation == (entry.previous.number if entry.previous else None)
            assert info.is_pinned == entry.is_pinned
            assert info.is_in_memory == (entry.current.content in oracle.memory)
        memory = self.library._stock.memory
        assert list(memory._contents) == oracle.memory
        assert len(memory) <= memory.capacity + 1
        assert self.warmed <= oracle.wanted() | set(oracle.memory)
        for adapters, contents in self.held:
            assert {term.adapter.digest for term in adapters.terms} == contents

    def step(self, noise: random.Random) -> None:
        library, oracle = self.library, self.oracle
        name, folder = noise.choice(NAMES), noise.choice(FOLDERS)
        number = oracle.names[name].current.number if name in oracle.names else 0
        expected = noise.choice([None, None, None, number, number, noise.randrange(4)])
        match noise.choice(
            ["write", "load", "load", "load", "unload", "roll_back", *["acquire"] * 4, *["release"] * 3]
        ):
            case "write":
                oracle.disk[folder] = noise.choice(CONTENTS + DAMAGED)
            case "load":
                in_place, pin = noise.random() < 0.8, noise.choice([None, None, None, False, True])
                self.ask(
                    lambda: oracle.load(name, folder, expected, in_place, pin),
                    lambda: library.load(
                        name, folder, expected_generation=expected, in_place=in_place, pin=pin
                    ),
                )
            case "unload":
                self.ask(
                    lambda: oracle.unload(name, expected),
                    lambda: library.unload(name, expected_generation=expected),
                )
            case "roll_back":
                self.ask(
                    lambda: oracle.roll_back(name, expected),
                    lambda: library.roll_back(name, expected_generation=expected),
                )
            case "acquire":
                names = noise.sample(NAMES, noise.choice([1, 1, 2, 3]))
                got = self.ask(
                    lambda: oracle.acquire(names), lambda: library.acquire([(each, 1.0) for each in names])
                )
                if got is not None:
                    self.held.append(got)
            case "release" if self.held:
                adapters, contents = self.held.pop(noise.randrange(len(self.held)))
                adapters.release()
                oracle.release(contents)


@pytest.mark.parametrize("capacity", [1, 2, 3, 4])
def test_the_library_does_what_the_oracle_says(
    make_library_by_hand: Callable[..., Any], capacity: int
) -> None:
    for seed in range(60):
        noise = random.Random(1000 * capacity + seed)
        disk = {folder: noise.choice(CONTENTS) for folder in FOLDERS}

        def read(folder: str, disk: dict[str, str] = disk) -> Adapter:
            if disk[folder] == DAMAGED:
                raise ModelError("damaged")
            return Adapter(disk[folder], {}, 1, 1)

        oracle, warmed = Oracle(capacity, disk), set[str]()

        library, work = make_library_by_hand(
            read=read,
            max_in_memory=capacity,
            warm=lambda adapter, warmed=warmed: warmed.add(adapter.digest),
            forget=warmed.discard,
        )
        pair = Pair(library, work, oracle, warmed)
        for _ in range(60):
            pair.step(noise)
            pair.compare()
        for adapters, _ in pair.held:
            adapters.release()
        for info in library.list():
            assert info.num_users == 0
            library.unload(info.name)
        assert not library._stock.memory._contents
        assert not warmed
        assert not list(library._stock.waiting)
