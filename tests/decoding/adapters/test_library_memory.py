"""The library's memory: what is kept, what goes first, what is read again, and that nothing is left in the end."""

import gc
import shutil
import threading
import weakref
from collections.abc import Callable
from typing import Any

import pytest

from cadenza.decoding.adapters.errors import AdapterRefused
from cadenza.decoding.adapters.library import AdapterInfo, AdapterLibrary
from cadenza.decoding.adapters.set import AdapterSet
from cadenza.decoding.request import RequestError
from cadenza.models import ModelError
from cadenza.models.adapters.adapter import Adapter

SECONDS = 30.0
Make = Callable[..., AdapterLibrary]


def load(library: AdapterLibrary, name: str, path: str, **options: Any) -> AdapterInfo:
    return library.load(name, path, **options).result(SECONDS)


def acquire(library: AdapterLibrary, *names: str) -> AdapterSet:
    return library.acquire([(name, 1.0) for name in names]).result(SECONDS)


def in_memory(library: AdapterLibrary) -> str:
    return " ".join(info.name for info in library.list() if info.is_in_memory)


def fill(library: AdapterLibrary, shelf: Any, names: str, **options: Any) -> dict[str, str]:
    """Adapters of one letter each, loaded in order."""
    paths = {name: shelf.write(name, ord(name)) for name in names}
    for name, path in paths.items():
        load(library, name, path, **options)
    return paths


def test_the_one_that_was_asked_for_least_recently_goes_first(shelf: Any, make_library: Make) -> None:
    library = make_library(max_in_memory=2)
    paths = fill(library, shelf, "ab")
    acquire(library, "a").release()
    fill(library, shelf, "c")
    assert in_memory(library) == "a c"
    acquire(library, "b").release()
    assert in_memory(library) == "b c"
    assert [shelf.num_reads[path] for path in paths.values()] == [1, 2]


def test_what_is_pinned_or_in_use_stays(shelf: Any, make_library: Make) -> None:
    library = make_library(max_in_memory=3)
    fill(library, shelf, "p", pin=True)
    fill(library, shelf, "ab")
    held = acquire(library, "a")
    fill(library, shelf, "cde")
    assert in_memory(library) == "p a e"
    held.release()
    fill(library, shelf, "f")
    assert in_memory(library) == "p e f"


def test_one_content_under_two_names_is_in_memory_once(shelf: Any, make_library: Make) -> None:
    library = make_library(max_in_memory=2)
    load(library, "one", shelf.write("one", 1))
    load(library, "copy", shelf.write("copy", 1))
    load(library, "two", shelf.write("two", 2))
    assert in_memory(library) == "one copy two"
    one, copy = acquire(library, "one"), acquire(library, "copy")
    assert one.terms[0].adapter is copy.terms[0].adapter
    assert [info.num_users for info in library.list()] == [1, 1, 0]
    library.unload("one")
    one.release()
    assert in_memory(library) == "copy two"
    copy.release()


def test_unloading_lets_go_of_what_nobody_uses_at_once_and_of_the_rest_when_they_end(
    shelf: Any, make_library: Make
) -> None:
    library = make_library(max_in_memory=2)
    fill(library, shelf, "ab")
    held = acquire(library, "a")
    seen = {name: weakref.ref(adapter_of(library, name)) for name in "ab"}
    info = library.unload("a")
    assert (info.num_users, info.is_in_memory) == (1, True)
    library.unload("b")
    gc.collect()
    assert [seen[name]() is not None for name in "ab"] == [True, False]
    held.hold()  # as the engine does
    held.release()
    held.release()
    del held
    gc.collect()
    assert seen["a"]() is None


def test_what_no_name_stands_for_and_nobody_uses_is_forgotten(shelf: Any, make_library: Make) -> None:
    """Not what memory lets go of for a while, and not before its last request ends."""
    forgotten: list[str] = []
    library = make_library(max_in_memory=1, forget=forgotten.append)
    for number in range(3):
        load(library, "bot", shelf.write("bot", number), in_place=True)
    assert forgotten == [shelf.digest(0)]  # the one before the last could be rolled back to
    held = acquire(library, "bot")
    library.unload("bot")
    assert forgotten == [shelf.digest(0), shelf.digest(1)]
    held.release()
    assert forgotten == [shelf.digest(number) for number in range(3)]
    fill(library, shelf, "p", pin=True)
    with pytest.raises(AdapterRefused):  # read and warmed in vain
        load(library, "bot", shelf.write("bot", 4))
    assert forgotten[3:] == [shelf.digest(4)]


def adapter_of(library: AdapterLibrary, name: str) -> Adapter:
    held = acquire(library, name)
    held.release()
    return held.terms[0].adapter


def test_changed_files_are_told_and_not_served(shelf: Any, make_library: Make) -> None:
    library = make_library(max_in_memory=1)
    fill(library, shelf, "ab")
    shelf.write("a", 99)
    with pytest.raises(
        AdapterRefused, match="the files of adapter 'a' have changed since it was loaded; load it again"
    ):
        acquire(library, "a")
    shelf.damage("a")
    with pytest.raises(
        AdapterRefused, match=r"'a' is in memory no more and could not be read again: .*no safetensors"
    ):
        acquire(library, "a")
    assert in_memory(library) == "b"
    shelf.write("a", ord("a"))
    acquire(library, "a").release()
    assert in_memory(library) == "a"


def test_what_lies_in_memory_needs_no_files(shelf: Any, make_library: Make) -> None:
    library = make_library()
    fill(library, shelf, "a")
    shutil.rmtree(shelf.root / "a")
    acquire(library, "a").release()


def test_the_content_to_roll_back_to_is_in_memory_while_there_is_room(shelf: Any, make_library: Make) -> None:
    library = make_library(max_in_memory=2)
    path = shelf.write("bot", 1)
    load(library, "bot", path)
    shelf.write("bot", 2)
    load(library, "bot", path, in_place=True)
    fill(library, shelf, "a")  # the older one had to go
    with pytest.raises(AdapterRefused, match="'bot' have changed"):
        library.roll_back("bot").result(SECONDS)
    assert library.list()[0].generation == 2
    shelf.write("bot", 1)
    info = library.roll_back("bot").result(SECONDS)
    assert (info.generation, info.digest, info.previous_generation) == (3, shelf.digest(1), 2)


def test_more_pinned_ones_than_fit_are_refused_with_numbers(shelf: Any, make_library: Make) -> None:
    library = make_library(max_in_memory=2)
    paths = fill(library, shelf, "ab", pin=True)
    paths["c"] = shelf.write("c", 3)
    for pin, numbers in (
        (True, "3 adapters would be pinned and 0 not"),
        (False, "2 adapters would be pinned and 1 not"),
    ):
        with pytest.raises(AdapterRefused, match=f"'c' does not fit: .*{numbers}, and memory holds 2"):
            load(library, "c", paths["c"], pin=pin)
    assert in_memory(library) == "a b"
    load(library, "copy", paths["a"])  # a content that is pinned already takes no room
    library.unload("copy")
    assert load(library, "a", shelf.write("a", 4), in_place=True).is_pinned
    load(library, "b", paths["b"], in_place=True, pin=False)
    assert [info.is_pinned for info in library.list()] == [True, False]


def test_a_set_of_more_than_memory_holds_is_refused_at_once(shelf: Any, make_library: Make) -> None:
    library = make_library(max_in_memory=3)
    fill(library, shelf, "p", pin=True)
    fill(library, shelf, "abc")
    held = acquire(library, "a", "c", "p")
    assert len(held.terms) == 3
    with pytest.raises(
        RequestError, match="lora names 3 adapters; memory holds 2 beside the 1 that are pinned"
    ):
        library.acquire([(name, 1.0) for name in "abc"])
    held.release()


def test_publishing_needs_no_room_beyond_the_read(shelf: Any, make_library: Make) -> None:
    """Requests hold all that memory has: a swap must not wait for them, nor let go of what it has just published."""
    library = make_library(max_in_memory=1)
    path = shelf.write("bot", 1)
    load(library, "bot", path)
    old = acquire(library, "bot")
    shelf.write("bot", 2)
    assert load(library, "bot", path, in_place=True).is_in_memory
    shelf.damage("bot")
    new = acquire(library, "bot")
    assert [held.terms[0].adapter.digest for held in (old, new)] == [shelf.digest(1), shelf.digest(2)]
    old.release()
    new.release()
    assert in_memory(library) == "bot"


def test_refusals_keep_nothing_alive(shelf: Any, make_library_by_hand: Callable[..., Any]) -> None:
    """Whoever holds one, or its future, does not hold what was read; nor does it take the garbage collector."""
    read: list[weakref.ref[Adapter]] = []

    def note(path: str) -> Adapter:
        adapter: Adapter = shelf.read(path)
        read.append(weakref.ref(adapter))
        if path.endswith("damaged"):
            raise ModelError("a tensor is missing")
        return adapter

    library, work = make_library_by_hand(read=note, max_in_memory=2)
    gc.disable()
    try:
        futures = [library.load("p", shelf.write("p", 1), pin=True), library.load("a", shelf.write("a", 2))]
        work()
        futures += [library.load("b", shelf.write("b", 3), pin=True)]
        futures += [library.load("c", shelf.write("damaged", 4)), library.load("d", shelf.write("d", 5))]
        work()
        shelf.write("a", 6)
        futures += [library.acquire([("a", 1.0)])]
        work()
        kinds = [type(future.exception(0)) for future in futures]
        assert kinds == [type(None), type(None), AdapterRefused, AdapterRefused, type(None), AdapterRefused]
        assert [adapter() is not None for adapter in read] == [True, False, False, False, True, False]
    finally:
        gc.enable()


def test_every_read_is_within_the_bound(shelf: Any, make_library: Make) -> None:
    """While sets come and go on four threads there is never more than what is being read beside the bound."""
    capacity, counts = 3, []
    alive: weakref.WeakSet[Adapter] = weakref.WeakSet()

    def read(path: str) -> Adapter:
        counts.append(len(in_memory(library).split()))
        adapter: Adapter = shelf.read(path)
        alive.add(adapter)
        return adapter

    library = make_library(read=read, max_in_memory=capacity)
    fill(library, shelf, "abcdef")

    def use(start: int) -> None:
        for step in range(40):
            acquire(library, "abcdef"[(start + step) % 6], "abcdef"[(start + 5 * step) % 6]).release()

    threads = [threading.Thread(target=use, args=(start,)) for start in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(SECONDS)
    assert len(counts) > 6
    assert max(counts) == capacity
    assert len(in_memory(library).split()) == capacity
    for name in "abcdef":
        library.unload(name)
    gc.collect()
    assert not alive
