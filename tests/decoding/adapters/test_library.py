"""The library's names: what is published when, which generation it is, and who is told that he came too late."""

import threading
from collections.abc import Callable
from typing import Any

import pytest

from cadenza.decoding.adapters.errors import (
    AdapterRefused,
    GenerationMismatch,
    PathNotAllowed,
    UnknownAdapter,
)
from cadenza.decoding.adapters.library import AdapterInfo, AdapterLibrary
from cadenza.decoding.adapters.set import AdapterSet
from cadenza.decoding.request import EngineClosed, RequestError
from cadenza.models.adapters.adapter import Adapter
from cadenza.models.adapters.locate import AdapterPathError

SECONDS = 30.0
Make = Callable[..., AdapterLibrary]


def load(library: AdapterLibrary, name: str, path: str, **options: Any) -> AdapterInfo:
    return library.load(name, path, **options).result(SECONDS)


def acquire(library: AdapterLibrary, *names: str) -> AdapterSet:
    return library.acquire([(name, 1.0) for name in names]).result(SECONDS)


def digests(adapters: AdapterSet) -> list[str]:
    return [term.adapter.digest for term in adapters.terms]


def test_a_loaded_adapter_is_told_of_and_can_be_had(shelf: Any, make_library: Make) -> None:
    library = make_library()
    path = shelf.write("bot", 1)
    info = load(library, "bot", path, base_model_name="base")
    assert library.list() == [info]
    assert (info.name, info.generation, info.path, info.base_model_name) == ("bot", 1, path, "base")
    assert (info.digest, info.rank, info.num_bytes) == (shelf.digest(1), 2, (2 * 3 + 4 * 2) * 4)
    assert (info.is_pinned, info.is_in_memory, info.num_users, info.previous_generation) == (
        False,
        True,
        0,
        None,
    )
    held = acquire(library, "bot")
    assert digests(held) == [info.digest]
    assert held.names == ("bot",)
    assert library.list()[0].num_users == 1
    held.release()
    assert library.list()[0].num_users == 0
    assert shelf.num_reads[path] == 1


def test_nothing_is_had_of_nothing(make_library: Make) -> None:
    library = make_library()
    held = library.acquire([]).result(0)
    assert (held.terms, held.key) == ((), "")
    held.release()
    for ask in (
        lambda: library.acquire([("bot", 1.0)]),
        lambda: library.unload("bot"),
        lambda: library.roll_back("bot"),
    ):
        with pytest.raises(UnknownAdapter, match="'bot'"):
            ask()


def test_a_name_is_not_taken_twice_unless_it_is_said(shelf: Any, make_library: Make) -> None:
    library = make_library()
    load(library, "bot", shelf.write("one", 1))
    with pytest.raises(GenerationMismatch, match="'bot' is loaded already, at generation 1"):
        library.load("bot", shelf.write("two", 2))
    assert load(library, "bot", shelf.write("two", 2), in_place=True).generation == 2
    assert load(library, "new", shelf.write("one", 1), in_place=True).generation == 1


def test_a_name_stands_for_its_old_generation_until_the_new_one_is_ready(
    shelf: Any, make_library: Make
) -> None:
    """Read and warm: at each of these moments requests are given the old one."""
    warming = threading.Event()
    may_go_on = threading.Event()

    def warm(adapter: Adapter) -> None:
        if adapter.digest == second:
            warming.set()
            assert may_go_on.wait(SECONDS)

    library = make_library(warm=warm)
    path, second = shelf.write("bot", 1), shelf.digest(2)
    first = load(library, "bot", path).digest
    shelf.write("bot", 2)
    gate = shelf.gate(path)
    future = library.load("bot", path, in_place=True)
    assert gate.reached.wait(SECONDS)
    old = acquire(library, "bot")
    gate.opened.set()
    assert warming.wait(SECONDS)
    acquire(library, "bot").release()
    assert [info.generation for info in library.list()] == [1]
    may_go_on.set()
    assert future.result(SECONDS).generation == 2
    new = acquire(library, "bot")
    assert (digests(old), digests(new)) == ([first], [second])
    assert library.list()[0].num_users == 1
    for held in (old, new):
        held.release()


def test_expected_generations_are_compared_when_asked(shelf: Any, make_library: Make) -> None:
    library = make_library()
    path = shelf.write("bot", 1)
    with pytest.raises(GenerationMismatch, match="there is no adapter 'bot', but generation 1 was expected"):
        library.load("bot", path, expected_generation=1)
    assert load(library, "bot", path, expected_generation=0).generation == 1
    with pytest.raises(GenerationMismatch, match="is at generation 1, but it was expected not to exist"):
        library.load("bot", path, expected_generation=0)
    shelf.write("bot", 2)
    assert load(library, "bot", path, expected_generation=1).generation == 2
    for ask in (library.unload, library.roll_back):
        with pytest.raises(GenerationMismatch, match="is at generation 2, but generation 1 was expected"):
            ask("bot", expected_generation=1)
    assert library.roll_back("bot", expected_generation=2).result(SECONDS).generation == 3
    assert library.unload("bot", expected_generation=3).generation == 3


def test_of_two_that_expect_the_same_generation_one_is_too_late(shelf: Any, make_library: Make) -> None:
    library = make_library()
    load(library, "bot", shelf.write("old", 0))
    one, two = shelf.write("one", 1), shelf.write("two", 2)
    gate = shelf.gate(one)
    winner = library.load("bot", one, expected_generation=1)
    loser = library.load("bot", two, expected_generation=1)
    gate.opened.set()
    assert winner.result(SECONDS).generation == 2
    with pytest.raises(GenerationMismatch, match="is at generation 2, but generation 1 was expected"):
        loser.result(SECONDS)
    assert library.list()[0].digest == shelf.digest(1)
    first = library.load("new", one)
    second = library.load("new", two)
    assert first.result(SECONDS).generation == 1
    with pytest.raises(GenerationMismatch, match="loaded already"):
        second.result(SECONDS)


def test_a_roll_back_between_asking_and_publishing_is_not_lost(shelf: Any, make_library: Make) -> None:
    library = make_library()
    load(library, "bot", shelf.write("one", 1))
    load(library, "bot", shelf.write("two", 2), in_place=True)
    third = shelf.write("three", 3)
    gate = shelf.gate(third)
    load_third = library.load("bot", third, expected_generation=2)
    assert gate.reached.wait(SECONDS)
    roll_back = library.roll_back("bot")  # in turn, after the load that is under way
    gate.opened.set()
    assert load_third.result(SECONDS).generation == 3
    info = roll_back.result(SECONDS)
    assert (info.generation, info.digest, info.previous_generation) == (4, shelf.digest(2), 3)


def test_in_place_the_last_that_was_asked_for_wins(shelf: Any, make_library: Make) -> None:
    library = make_library()
    paths = [shelf.write(f"folder{number}", number) for number in range(5)]
    gate = shelf.gate(paths[0])
    futures = [library.load("bot", path, in_place=True) for path in paths]
    gate.opened.set()
    assert [future.result(SECONDS).generation for future in futures] == [1, 2, 3, 4, 5]
    assert library.list()[0].digest == shelf.digest(4)


def test_generations_count_up_after_an_unload_too(shelf: Any, make_library: Make) -> None:
    library = make_library()
    path = shelf.write("bot", 1)
    load(library, "bot", path)
    assert library.unload("bot").generation == 1
    assert library.list() == []
    info = load(library, "bot", path)
    assert (info.generation, info.previous_generation) == (2, None)
    with pytest.raises(GenerationMismatch, match="no generation before"):
        library.roll_back("bot")
    assert load(library, "other", path).generation == 1


def test_an_unload_takes_with_it_the_loads_that_were_asked_before(shelf: Any, make_library: Make) -> None:
    library = make_library()
    load(library, "bot", shelf.write("old", 0))
    path = shelf.write("new", 1)
    gate = shelf.gate(path)
    under_way = library.load("bot", path, in_place=True)
    queued = library.load("bot", path, in_place=True)
    assert gate.reached.wait(SECONDS)
    library.unload("bot")
    asked_after = library.load("bot", path)
    gate.opened.set()
    for future in (under_way, queued):
        with pytest.raises(GenerationMismatch, match="unloaded while it was being loaded"):
            future.result(SECONDS)
    assert asked_after.result(SECONDS).generation == 2


def test_rolling_back_goes_to_the_content_before_and_back_again(shelf: Any, make_library: Make) -> None:
    """Also where the one before came from the same folder, which holds another by now."""
    library = make_library()
    path = shelf.write("bot", 1)
    load(library, "bot", path)
    shelf.write("bot", 2)
    load(library, "bot", path, in_place=True)
    seen = [library.roll_back("bot").result(SECONDS) for _ in range(3)]
    assert [info.generation for info in seen] == [3, 4, 5]
    assert [info.previous_generation for info in seen] == [2, 3, 4]
    assert [info.digest for info in seen] == [shelf.digest(number) for number in (1, 2, 1)]
    assert shelf.num_reads[path] == 2


def test_loading_the_same_content_again_does_not_lose_the_one_before(shelf: Any, make_library: Make) -> None:
    library = make_library()
    load(library, "bot", shelf.write("one", 1))
    load(library, "bot", shelf.write("two", 2), in_place=True)
    again = load(library, "bot", shelf.write("copy", 2), in_place=True)
    assert (again.generation, again.previous_generation) == (3, 1)
    assert library.roll_back("bot").result(SECONDS).digest == shelf.digest(1)


def test_a_read_that_fails_leaves_all_as_it_was(shelf: Any, make_library: Make) -> None:
    library = make_library()
    path = shelf.write("bot", 1)
    before = load(library, "bot", path)
    shelf.damage("bot")
    for name in ("bot", "new"):
        with pytest.raises(AdapterRefused, match="no safetensors file") as refused:
            load(library, name, path, in_place=True)
        assert refused.value.param == "lora_path"
    assert library.list() == [before]
    acquire(library, "bot").release()
    with pytest.raises(UnknownAdapter):
        library.acquire([("new", 1.0)])


@pytest.mark.parametrize(
    ("raised", "given"),
    [
        (AdapterPathError("not from there"), PathNotAllowed),
        (RequestError("not so"), RequestError),
        (MemoryError("too large"), MemoryError),
    ],
    ids=["path", "request", "other"],
)
def test_whatever_a_read_raises_is_for_who_asked_and_the_thread_lives(
    shelf: Any, make_library: Make, raised: Exception, given: type[Exception]
) -> None:
    failures = [raised]

    def read(path: str) -> Adapter:
        if failures:
            raise failures.pop()
        adapter: Adapter = shelf.read(path)
        return adapter

    library = make_library(read=read)
    path = shelf.write("bot", 1)
    with pytest.raises(given, match=str(raised)):
        load(library, "bot", path)
    assert load(library, "bot", path).generation == 1


def test_an_adapter_that_cannot_be_warmed_is_not_published(shelf: Any, make_library: Make) -> None:
    def warm(adapter: Adapter) -> None:
        raise RequestError("too warm")

    library = make_library(warm=warm)
    with pytest.raises(RequestError, match="too warm"):
        load(library, "bot", shelf.write("bot", 1))
    assert library.list() == []


def test_scales_add_up_whatever_the_order_and_the_names(shelf: Any, make_library: Make) -> None:
    library = make_library()
    load(library, "one", shelf.write("one", 1))
    load(library, "copy", shelf.write("copy", 1))
    load(library, "two", shelf.write("two", 2))
    terms = [("one", 0.1), ("two", 0.5), ("copy", 0.2), ("one", 0.3), ("two", -0.25)]
    held = [library.acquire(order).result(0) for order in (terms, terms[::-1])]
    expected = {shelf.digest(1): 0.6, shelf.digest(2): 0.25}
    for each in held:
        assert {term.adapter.digest: term.scale for term in each.terms} == pytest.approx(expected)
    assert held[0].key == held[1].key
    assert held[0].names == ("one", "two", "copy")
    assert [info.num_users for info in library.list()] == [2, 2, 2]
    nothing = library.acquire([("one", 1.0), ("copy", -1.0)]).result(0)
    assert nothing.terms == ()
    assert [info.num_users for info in library.list()] == [2, 2, 2]
    for each in (*held, nothing):
        each.release()
    assert [info.num_users for info in library.list()] == [0, 0, 0]


@pytest.mark.parametrize("scale", [float("nan"), float("inf"), 1e308])
def test_scales_whose_sum_is_no_number_are_refused(shelf: Any, make_library: Make, scale: float) -> None:
    library = make_library()
    load(library, "bot", shelf.write("bot", 1))
    with pytest.raises(RequestError, match="finite") as refused:
        library.acquire([("bot", scale), ("bot", scale)])
    assert refused.value.param == "lora"


def library_threads() -> set[threading.Thread]:
    return {thread for thread in threading.enumerate() if thread.name.startswith("cadenza-adapters")}


def test_after_closing_nothing_waits_and_nothing_is_given(shelf: Any, make_library: Make) -> None:
    others = library_threads()
    library = make_library()
    load(library, "bot", shelf.write("bot", 1))
    held = acquire(library, "bot")
    path = shelf.write("slow", 2)
    gate = shelf.gate(path)
    futures = [library.load("slow", path, in_place=True) for _ in range(3)]
    assert gate.reached.wait(SECONDS)
    closing = threading.Thread(target=library.close)
    closing.start()
    for future in futures:
        with pytest.raises(EngineClosed):
            future.result(SECONDS)
    gate.opened.set()
    closing.join(SECONDS)
    assert library_threads() <= others
    for ask in (
        lambda: library.load("bot", path, in_place=True),
        lambda: library.acquire([("bot", 1.0)]),
        lambda: library.unload("bot"),
        lambda: library.roll_back("bot"),
    ):
        with pytest.raises(EngineClosed):
            ask()
    held.release()
    library.close()


def test_threads_are_started_when_there_is_something_to_read(make_library: Make) -> None:
    others = library_threads()
    library = make_library()
    library.acquire([]).result(0)
    assert library.list() == []
    assert library_threads() <= others
