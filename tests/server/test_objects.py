"""Objects for answers: one copy in memory however many read it, a bound on all of them, files where there are any."""

import asyncio
import hashlib
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from sumus.server.objects import LARGE, MEMORY, HeldObject, ObjectReader
from sumus.storage.blobs import Blobs, DirectoryBlobs, MemoryBlobs
from sumus.wire.messages import Refused

Play = Callable[[ObjectReader], Awaitable[None]]


class Counted:
    """Calls in a thread, counted by the function's name."""

    def __init__(self) -> None:
        self.calls: list[str] = []

    async def __call__(self, function: Callable[..., Any], *arguments: Any) -> Any:
        self.calls.append(function.__name__)
        return await asyncio.to_thread(function, *arguments)


def put(blobs: Blobs, size: int, number: int = 0) -> str:
    """An object of so many bytes."""
    blobs.put(body := bytes([number]) * size)
    return hashlib.sha256(body).hexdigest()


def test_many_readers_share_one_copy(tmp_path: Path) -> None:
    blobs, counted = DirectoryBlobs(tmp_path), Counted()
    name = put(blobs, 1000)

    async def play() -> None:
        objects = ObjectReader(blobs, MEMORY, counted)
        found = await asyncio.gather(*(objects.open(name) for _ in range(20)))
        assert len({id(each) for each in found}) == 1
        assert counted.calls.count("get") == 1
        assert await objects.open(name) is found[0]

    asyncio.run(play())


def test_large_objects_and_those_for_which_there_is_no_memory_come_from_their_files(tmp_path: Path) -> None:
    blobs = DirectoryBlobs(tmp_path)
    large, several = put(blobs, LARGE + 1), [put(blobs, LARGE, number) for number in range(1, 7)]

    async def play() -> None:
        objects = ObjectReader(blobs, MEMORY, Counted())
        assert isinstance(await objects.open(large), Path)
        read = [await objects.open(name) for name in several]
        assert [isinstance(each, HeldObject) for each in read] == [True] * 4 + [False] * 2
        del read
        assert isinstance(await objects.open(several[5]), HeldObject), "the oldest that nobody reads makes room"

    asyncio.run(play())


def test_without_files_it_is_busy_until_others_have_read() -> None:
    blobs = MemoryBlobs()
    first, second = put(blobs, 1000, 1), put(blobs, 1000, 2)

    async def play() -> None:
        objects = ObjectReader(blobs, 1500, Counted())
        reading = await objects.open(first)
        with pytest.raises(Refused, match="busy"):
            await objects.open(second)
        del reading
        assert isinstance(await objects.open(second), HeldObject)
        alone = ObjectReader(blobs, 10, Counted())
        assert isinstance(await alone.open(first), HeldObject), "what is longer than the bound may be there alone"

    asyncio.run(play())


def test_an_object_that_cannot_be_read_is_read_again_the_next_time(tmp_path: Path) -> None:
    blobs, fails = DirectoryBlobs(tmp_path), [True]
    name = put(blobs, 1000)

    async def flaky(function: Callable[..., Any], *arguments: Any) -> Any:
        if function.__name__ == "get" and fails.pop():
            fails.append(False)
            raise OSError("the disk is away")
        return function(*arguments)

    async def play() -> None:
        objects = ObjectReader(blobs, MEMORY, flaky)
        with pytest.raises(OSError, match="away"):
            await objects.open(name)
        assert isinstance(await objects.open(name), HeldObject)

    asyncio.run(play())
