"""Requests that wait for adapters: in order, not for ever, one read for all of them, and never for each other."""

import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

import pytest

from cadenza.decoding.adapters.errors import (
    AdapterRefused,
    AdaptersBusy,
    GenerationMismatch,
    UnknownAdapter,
)
from cadenza.decoding.adapters.library import AdapterInfo, AdapterLibrary
from cadenza.decoding.adapters.set import AdapterSet
from cadenza.decoding.request import EngineClosed

SECONDS = 30.0
Make = Callable[..., AdapterLibrary]
MakeByHand = Callable[..., tuple[AdapterLibrary, Callable[[], None]]]


def load(library: AdapterLibrary, name: str, path: str, **options: Any) -> AdapterInfo:
    return library.load(name, path, **options).result(SECONDS)


def ask(library: AdapterLibrary, names: str) -> "Future[AdapterSet]":
    return library.acquire([(name, 1.0) for name in names])


def acquire(library: AdapterLibrary, names: str) -> AdapterSet:
    return ask(library, names).result(SECONDS)


def fill(library: AdapterLibrary, shelf: Any, names: str) -> dict[str, str]:
    """Adapters of one letter each, loaded in order."""
    paths = {name: shelf.write(name, ord(name)) for name in names}
    for name, path in paths.items():
        load(library, name, path)
    return paths


def settle(library: AdapterLibrary, shelf: Any) -> None:
    """Until the loading thread has looked at what was asked before: a load that needs no room is answered after it."""
    with pytest.raises(AdapterRefused):
        load(library, "nothing", str(shelf.root / "nothing"))


def test_all_who_wait_for_one_adapter_share_one_read(shelf: Any, make_library: Make) -> None:
    library = make_library(max_in_memory=1)
    paths = fill(library, shelf, "ab")
    gate = shelf.gate(paths["a"])
    futures = [ask(library, "a") for _ in range(10)]
    assert gate.reached.wait(SECONDS)
    futures += [ask(library, "a") for _ in range(10)]
    assert not any(future.done() for future in futures)
    gate.opened.set()
    held = [future.result(SECONDS) for future in futures]
    assert len({id(each.terms[0].adapter) for each in held}) == 1
    assert shelf.num_reads[paths["a"]] == 2
    assert library.list()[0].num_users == 20
    for each in held:
        each.release()


def test_a_read_that_fails_fails_for_all_who_share_it(shelf: Any, make_library: Make) -> None:
    library = make_library(max_in_memory=1)
    paths = fill(library, shelf, "abc")
    gate = shelf.gate(paths["a"])
    futures = [ask(library, "a") for _ in range(3)]
    other = ask(library, "b")
    assert gate.reached.wait(SECONDS)
    shelf.write("a", 99)
    gate.opened.set()
    for future in futures:
        with pytest.raises(AdapterRefused, match="'a' have changed"):
            future.result(SECONDS)
    other.result(SECONDS).release()
    assert shelf.num_reads[paths["a"]] == 2


def test_who_finds_all_in_memory_does_not_wait_for_a_read(shelf: Any, make_library: Make) -> None:
    library = make_library(max_in_memory=2)
    paths = fill(library, shelf, "abc")
    gate = shelf.gate(paths["a"])
    waiting = ask(library, "a")
    assert gate.reached.wait(SECONDS)
    held = ask(library, "c").result(0)
    library.unload("b")
    assert library.list()[0].is_in_memory is False
    gate.opened.set()
    waiting.result(SECONDS).release()
    held.release()


def test_a_request_waits_for_room_until_somebody_ends(shelf: Any, make_library_by_hand: MakeByHand) -> None:
    library, work = make_library_by_hand(max_in_memory=2)
    for name in "abc":
        library.load(name, shelf.write(name, ord(name)))
    work()
    held = [ask(library, name).result(0) for name in "bc"]
    waiting = ask(library, "a")
    work()
    assert not waiting.done()
    held[0].release()
    work()
    assert waiting.result(0).names == ("a",)
    for each in (held[1], waiting.result(0)):
        each.release()


def test_first_come_first_served(shelf: Any, make_library: Make) -> None:
    library = make_library(max_in_memory=1)
    fill(library, shelf, "abcde")
    held = acquire(library, "e")
    answered: list[str] = []
    all_answered = threading.Event()

    def note(name: str, future: "Future[AdapterSet]") -> None:
        answered.append(name)
        if len(answered) == 4:
            all_answered.set()
        future.result(0).release()

    for name in "abcd":
        ask(library, name).add_done_callback(lambda future, name=name: note(name, future))
    held.release()
    assert all_answered.wait(SECONDS)
    assert answered == list("abcd")


def test_those_who_keep_using_an_adapter_cannot_keep_others_out(
    shelf: Any, make_library_by_hand: MakeByHand
) -> None:
    """Requests for b and c overlap without end; a waits for those of b, the older one, and b is given to no more."""
    library, work = make_library_by_hand(max_in_memory=2)
    for name in "abc":
        library.load(name, shelf.write(name, ord(name)))
    work()
    users = {name: ask(library, name).result(0) for name in "bc"}
    waiting = ask(library, "a")
    work()
    next_users = {name: ask(library, name) for name in "bc"}
    assert [next_users[name].done() for name in "bc"] == [False, True]
    users["b"].release()
    work()
    assert waiting.done()
    assert not next_users["b"].done()
    waiting.result(0).release()
    work()
    assert next_users["b"].done()
    assert [info.is_in_memory for info in library.list()] == [False, True, True]
    for held in (users["c"], *(future.result(0) for future in next_users.values())):
        held.release()


def test_sets_do_not_wait_for_each_other_for_ever(shelf: Any, make_library: Make) -> None:
    """Each needs all of memory: one is served after the other, whatever of theirs lies there."""
    library = make_library(max_in_memory=2)
    fill(library, shelf, "abcd")
    pairs = ["ab", "cd", "ac", "bd"] * 8
    failures: list[Exception] = []

    def use(pair: str) -> None:
        try:
            held = acquire(library, pair)
            assert held.names == tuple(pair)
            held.release()
        except Exception as error:
            failures.append(error)

    threads = [threading.Thread(target=use, args=(pair,)) for pair in pairs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(SECONDS)
    assert not failures
    assert sum(info.is_in_memory for info in library.list()) == 2


def test_nobody_waits_longer_than_is_allowed_for_room(shelf: Any, make_library: Make) -> None:
    library = make_library(max_in_memory=1, wait_seconds=0.05)
    fill(library, shelf, "ab")
    held = acquire(library, "b")
    futures = [ask(library, "a") for _ in range(3)]
    expected = (
        "adapter 'a' did not get into memory within 0.05 seconds .1 of 1 in memory are in use or pinned."
    )
    for future in futures:
        with pytest.raises(AdaptersBusy, match=expected):
            future.result(SECONDS)
    acquire(library, "b").release()
    held.release()
    acquire(library, "a").release()


def test_nobody_waits_longer_than_is_allowed_for_a_read(shelf: Any, make_library: Make) -> None:
    library = make_library(max_in_memory=1, wait_seconds=0.05)
    paths = fill(library, shelf, "ab")
    gate = shelf.gate(paths["a"])
    first, behind = ask(library, "a"), library.acquire([("a", 1.0)])
    for future in (first, behind):
        with pytest.raises(AdaptersBusy):
            future.result(SECONDS)
    gate.opened.set()
    settle(library, shelf)
    assert ask(library, "a").result(0).names == ("a",)  # what was read for nobody is there for the next


def test_a_load_waits_for_room_no_longer_either(shelf: Any, make_library: Make) -> None:
    """One beyond the bound may have been published; the next waits until that is made up for."""
    library = make_library(max_in_memory=1, wait_seconds=0.05)
    fill(library, shelf, "a")
    held = acquire(library, "a")
    fill(library, shelf, "b")
    also_held = acquire(library, "b")
    with pytest.raises(AdaptersBusy, match=r"'c' did not get into memory within 0.05 seconds"):
        fill(library, shelf, "c")
    assert [info.name for info in library.list()] == ["a", "b"]
    held.release()
    fill(library, shelf, "c")
    also_held.release()


def test_a_request_that_is_given_up_holds_nothing_and_keeps_nobody_waiting(
    shelf: Any, make_library: Make
) -> None:
    library = make_library(max_in_memory=2)
    fill(library, shelf, "abcd")
    held = acquire(library, "d")
    given_up, waiting = ask(library, "ab"), ask(library, "b")
    assert given_up.cancel()
    waiting.result(SECONDS).release()
    held.release()
    acquire(library, "cd").release()
    assert [info.num_users for info in library.list()] == [0, 0, 0, 0]


def test_whoever_makes_room_wakes_the_loading_thread(
    shelf: Any, make_library_by_hand: MakeByHand, monkeypatch: pytest.MonkeyPatch
) -> None:
    library, work = make_library_by_hand(max_in_memory=3)
    for name in "abcp":
        library.load(name, shelf.write(name, ord(name)), pin=name == "p")
    work()
    held = [ask(library, name).result(0) for name in "bc"]
    given_up, waiting = ask(library, "a"), ask(library, "a")
    work()
    notified: list[None] = []
    monkeypatch.setattr(library._changed, "notify_all", lambda: notified.append(None))
    assert given_up.cancel()
    assert len(notified) == 1
    work()
    assert not waiting.done()
    library.unload("p")
    assert len(notified) == 2
    work()
    waiting.result(0).release()
    for each in held:
        each.release()
    assert len(notified) == 2  # nobody waits any more


def test_what_is_granted_as_it_is_given_up_is_given_back(
    shelf: Any, make_library_by_hand: MakeByHand, monkeypatch: pytest.MonkeyPatch
) -> None:
    library, work = make_library_by_hand(max_in_memory=1)
    for name in "ab":
        library.load(name, shelf.write(name, ord(name)))
    work()
    waiting = ask(library, "a")
    grant = library._stock.grant

    def grant_too_late(job: Any) -> AdapterSet:
        assert job.future.cancel()
        return grant(job)

    monkeypatch.setattr(library._stock, "grant", grant_too_late)
    work()
    assert waiting.cancelled()
    assert [(info.num_users, info.is_in_memory) for info in library.list()] == [(0, True), (0, False)]


def test_a_load_that_is_given_up_is_not_published(shelf: Any, make_library: Make) -> None:
    library = make_library()
    path = shelf.write("bot", 1)
    gate = shelf.gate(path)
    under_way, queued = library.load("bot", path), library.load("bot", path)
    assert gate.reached.wait(SECONDS)
    assert under_way.cancel()
    assert queued.cancel()
    gate.opened.set()
    settle(library, shelf)
    assert library.list() == []
    assert load(library, "bot", path).generation == 1


def test_a_request_that_waited_for_a_generation_that_is_lost_gets_the_next(
    shelf: Any, make_library: Make
) -> None:
    """The folder was overwritten while the old content was on disk only, and the new one was published meanwhile."""
    library = make_library(max_in_memory=1)
    paths = fill(library, shelf, "abc")
    gate = shelf.gate(paths["b"])
    first = ask(library, "b")
    assert gate.reached.wait(SECONDS)
    waiting = ask(library, "a")
    shelf.write("a", 99)
    swap = library.load("a", paths["a"], in_place=True)
    queued_behind = ask(library, "a")
    gate.opened.set()
    held = first.result(SECONDS)
    assert swap.result(SECONDS).generation == 2
    held.release()
    for future in (waiting, queued_behind):
        got = future.result(SECONDS)
        assert got.terms[0].adapter.digest == shelf.digest(99)
        got.release()


def test_loads_and_requests_take_turns(shelf: Any, make_library: Make) -> None:
    library = make_library(max_in_memory=1)
    fill(library, shelf, "abcd")
    order: list[str] = []
    path = shelf.write("slow", 0)
    gate = shelf.gate(path)
    futures: list[Future[Any]] = [library.load("slow", path)]
    assert gate.reached.wait(SECONDS)
    for number in range(3):
        futures.append(library.load(f"new{number}", shelf.write(f"new{number}", number + 1)))
    for name in "abc":
        request = ask(library, name)
        request.add_done_callback(lambda future: future.result().release())
        futures.append(request)
    for future, name in zip(futures, ["slow", "new0", "new1", "new2", "a", "b", "c"], strict=True):
        future.add_done_callback(lambda future, name=name: order.append(name))
    gate.opened.set()
    for future in futures:
        future.result(SECONDS)
    settle(library, shelf)
    assert order == ["slow", "a", "new0", "b", "new1", "c", "new2"]


def test_under_fire_nothing_fails_and_no_set_has_two_generations(shelf: Any, make_library: Make) -> None:
    """Names are replaced, rolled back, unloaded and loaded while sets of them are acquired on other threads. Contents
    come from folders of their own, so that what memory lets go of can be read again."""
    library = make_library(max_in_memory=3)
    paths = {
        (name, version): shelf.write(f"{name}{version}", 10 * ord(name) + version)
        for name in "abcd"
        for version in (1, 2)
    }
    digest_of = {key: shelf.read_file(shelf.root / f"{key[0]}{key[1]}").digest for key in paths}
    for name in "abcd":
        load(library, name, paths[name, 1])
    ended = threading.Event()
    failures: list[BaseException] = []
    seen: set[str] = set()

    def use(start: int) -> None:
        try:
            step = start
            while not ended.is_set():
                step += 1
                names = {"abc"[step % 3], "abc"[step * start % 3]}
                held = library.acquire([(name, 0.5) for name in names]).result(SECONDS)
                got = {term.adapter.digest for term in held.terms}
                for name in names:
                    assert len(got & {digest_of[name, 1], digest_of[name, 2]}) == 1
                assert len(got) == len(names)
                seen.update(got)
                held.release()
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=use, args=(start,)) for start in range(1, 5)]
    for thread in threads:
        thread.start()
    for step in range(60):
        name = "abc"[step % 3]
        load(library, name, paths[name, 2 - step // 3 % 2], in_place=True)
        if step % 4 == 0:
            library.roll_back(name).result(SECONDS)
        library.unload("d")
        load(library, "d", paths["d", 1 + step % 2])
    with pytest.raises(GenerationMismatch):
        library.load("a", paths["a", 1], expected_generation=1)
    ended.set()
    for thread in threads:
        thread.join(SECONDS)
    assert not failures
    assert seen == {digest_of[name, version] for name in "abc" for version in (1, 2)}
    assert [info.num_users for info in library.list()] == [0, 0, 0, 0]
    assert sum(info.is_in_memory for info in library.list()) <= 3


def test_a_name_that_is_being_loaded_for_the_first_time_is_waited_for(shelf: Any, make_library: Make) -> None:
    library = make_library()
    fill(library, shelf, "a")
    path = shelf.write("b", 1)
    gate = shelf.gate(path)
    loading = library.load("b", path)
    assert gate.reached.wait(SECONDS)
    early = [ask(library, "b"), ask(library, "ab"), ask(library, "b")]
    assert not any(future.done() for future in early)
    acquire(library, "a").release()  # others do not wait for it
    with pytest.raises(UnknownAdapter):
        ask(library, "bc")
    early[2].cancel()
    gate.opened.set()
    assert loading.result(SECONDS).generation == 1
    sets = [future.result(SECONDS) for future in early[:2]]
    assert sets[0].terms[0].adapter in [term.adapter for term in sets[1].terms]
    for each in sets:
        each.release()
    assert [info.num_users for info in library.list()] == [0, 0]


def test_a_name_whose_first_load_fails_is_unknown_to_those_who_waited(shelf: Any, make_library: Make) -> None:
    library = make_library()
    shelf.write("bad", 1)
    path = shelf.damage("bad")
    gate = shelf.gate(path)
    loading = library.load("b", path)
    assert gate.reached.wait(SECONDS)
    waiting = ask(library, "b")
    gate.opened.set()
    with pytest.raises(AdapterRefused):
        loading.result(SECONDS)
    with pytest.raises(UnknownAdapter):
        waiting.result(SECONDS)


def test_who_waits_for_a_first_load_hears_that_the_library_closes(shelf: Any, make_library: Make) -> None:
    library = make_library()
    path = shelf.write("b", 1)
    gate = shelf.gate(path)
    loading = library.load("b", path)
    assert gate.reached.wait(SECONDS)
    waiting = ask(library, "b")
    closing = threading.Thread(target=library.close)
    closing.start()
    for future in (loading, waiting):
        with pytest.raises(EngineClosed):
            future.result(SECONDS)
    gate.opened.set()
    closing.join()


def test_who_waits_for_a_first_load_does_not_wait_for_ever(shelf: Any, make_library: Make) -> None:
    library = make_library(wait_seconds=0.05)
    path = shelf.write("b", 1)
    gate = shelf.gate(path)
    loading = library.load("b", path)
    assert gate.reached.wait(SECONDS)
    with pytest.raises(AdaptersBusy, match=r"adapter 'b' did not get into memory within 0\.05 seconds"):
        ask(library, "b").result(SECONDS)
    gate.opened.set()
    loading.result(SECONDS)
