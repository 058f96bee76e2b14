"""Places where code can keep state: lists, mappings, variables, the attributes of an object. A place remembers its
content, checks whether the content has changed, and restores it.

    place = Sequence("loss.seen", seen)
    ...                                  the code runs
    list(place.changed())                the path, if the list is different now
    place.restore()                      the list holds its first content again

`sumus.training.hidden` finds the places.
"""

import collections
import contextvars
import enum
import io
import math
import operator
import pickle
import random
import types
import warnings
import zlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from sumus.errors import TaskError

LONGEST = 10_000
"""The content of a list, mapping or set longer than this is compared as a whole, and only occasionally."""
LONGEST_PICKLED = 1_000_000
"""A list, mapping or set longer than this is compared only by the identity of its objects, and not by their content."""
SMALL_BYTES = 2**22
"""Tensors and arrays of at most this many bytes are compared each time; larger ones occasionally."""
_PICKLED = 2**16
"""The number of bytes at the start of a pickle that are compared."""
_DEEPEST = 8

PLAIN = (
    *(bool, int, float, complex, str, bytes, type(None), type(Ellipsis), range, enum.Enum),
    *(np.generic, np.dtype, torch.dtype, torch.device, torch.Size),
)
MISSING = object()


def _same(now: Any, then: Any) -> bool:
    """Return whether a value is the same object as before, or an equal number or text."""
    if now is then:
        return True
    if type(now) is not type(then) or not isinstance(now, (*PLAIN, tuple)):
        return False
    if isinstance(now, tuple):
        return len(now) == len(then) and all(map(_same, now, then))
    return bool(now == then) or (isinstance(now, float) and math.isnan(now) and math.isnan(then))


class Place:
    """A place where code can keep state.

    Attributes:
        rare: Whether comparing takes long, so that the place is compared only occasionally.
        missed: The number of comparisons that have been skipped since the last one.
    """

    rare = False
    missed = 0

    def changed(self) -> Iterator[str]:
        """Yield the paths in this place whose values have changed."""
        raise NotImplementedError

    def is_other_at_a_glance(self) -> bool:
        """Return whether a quick check shows that this place has changed: its length, or torch's count of writes, differs."""
        return False

    def restore(self) -> None:
        """Restore the content.

        Raises:
            TaskError: It cannot be restored.
        """
        raise NotImplementedError

    def end(self) -> None:
        """If this is a container, put back the items that the code has added to it: the container may be a user's log."""

    def log(self) -> Any:
        """Return the items that the code has added to a container so far; None for other places."""
        return None

    def put_log(self, log: Any) -> None:
        """Put back the items that `log` returned, in place of those that were added since then."""

    def _expect_looked_at(self, path: str) -> None:
        """Refuse a change of this place if comparisons of it were skipped since the last one. The client at which the place
        changed is then not known, and some clients may have begun with changed content.

        From now on the place is compared each time.
        """
        missed, self.rare, self.missed = self.missed, False, 0
        if missed:
            raise TaskError(
                f"`{path}` changed while clients trained, but it is too large to be compared before each client: some clients "
                "may have begun with values that other clients left there. Make it a buffer of the model, with "
                "register_buffer, or leave it unchanged"
            )


class Names(Place):
    """The namespace of an object, a module or a class, or some names in it.

    Args:
        path: Function that returns the path of a name.
        read: Function that returns the values by name.
        put: Function that sets the value of a name.
        drop: Function that removes a name.
        whole: The whole namespace, if `read` returns only a part of it. If its length and these values are the same as
            before, it has not changed.
    """

    def __init__(
        self,
        path: Callable[[Any], str],
        read: Callable[[], Mapping[Any, Any]],
        put: Callable[[Any, Any], object],
        drop: Callable[[Any], object],
        whole: Mapping[str, Any] | None = None,
    ) -> None:
        self._path, self._read, self._put, self._drop = path, read, put, drop
        self._whole, self._length = whole, len(whole or ())
        self.then = dict(read())

    def changed(self) -> Iterator[str]:
        then, whole = self.then, self._whole
        if whole is not None and len(whole) == self._length and all(whole.get(name) is then[name] for name in then):
            return
        now = self._read()
        if len(now) == len(then) and all(now.get(name, MISSING) is value for name, value in then.items()):
            return
        for name in {**then, **now}:
            if not _same(now.get(name, MISSING), then.get(name, MISSING)):
                yield self._path(name)

    def restore(self) -> None:
        now = dict(self._read())
        for name in now.keys() - self.then.keys():
            self._drop(name)
        for name, value in self.then.items():
            if now.get(name, MISSING) is not value:
                self._put(name, value)


class Entries(Place):
    """A mapping, with the order of its keys. A path names only the mapping, since its keys may be a user's data."""

    def __init__(self, path: str, held: dict[Any, Any]) -> None:
        self._path, self._held = path, held
        self._kind: Any = collections.OrderedDict if isinstance(held, collections.OrderedDict) else dict
        self.then = dict(self._kind.items(held))
        self.rare = len(self.then) > LONGEST
        self._log: dict[Any, Any] = {}

    def changed(self) -> Iterator[str]:
        kind, held, then = self._kind, self._held, self.then
        pairs = (kind.keys(held), then.keys()), (kind.values(held), then.values())
        if len(held) != len(then) or not all(
            all(map(operator.is_, *pair)) or all(map(_same, *pair))
            for pair in pairs  # the first comparison is fast
        ):
            yield self._path

    def restore(self) -> None:
        now = dict(self._kind.items(self._held))
        if len(now) > len(self.then) and all(map(_same, list(now.items())[: len(self.then)], self.then.items())):
            self._log |= {key: now[key] for key in now.keys() - self.then.keys()}
        self._put(self.then)
        self._expect_looked_at(self._path)

    def end(self) -> None:
        if self._log:
            self.then = {**self.then, **self._log}
            self._log = {}
            self._put(self.then)

    def log(self) -> dict[Any, Any]:
        return dict(self._log)

    def put_log(self, log: dict[Any, Any]) -> None:
        self._log = dict(log)

    def is_other_at_a_glance(self) -> bool:
        return len(self._held) != len(self.then)

    def _put(self, entries: Mapping[Any, Any]) -> None:
        """Set the entries with the methods of dict or OrderedDict, so that methods of a user's subclass do not run."""
        kind, held = self._kind, self._held
        for key in [key for key in kind.keys(held) if key not in entries]:
            kind.__delitem__(held, key)
        if list(kind.keys(held)) != [key for key in entries if key in held]:
            kind.clear(held)
        for key, value in entries.items():
            if kind.get(held, key, MISSING) is not value:
                kind.__setitem__(held, key, value)
        if list(kind.keys(held)) != list(entries):
            kind.clear(held)
            kind.update(held, entries)


class Sequence(Place):
    """A list, a deque, a set or a bytearray, as a whole."""

    def __init__(self, path: str, held: Any) -> None:
        self._path, self._held = path, held
        self._kind: Any = next(kind for kind in (list, collections.deque, set, bytearray) if isinstance(held, kind))
        self.then = self._now()
        self.rare = len(self.then) > LONGEST
        self._log: list[Any] = []
        self._added = set[Any]()

    def _now(self) -> tuple[Any, ...]:
        return tuple(self._kind.__iter__(self._held))

    def changed(self) -> Iterator[str]:
        held, then = self._held, self.then
        if len(held) != len(then) or (
            not all(map(held.__contains__, then))
            if self._kind is set
            else not all(map(_same, self._kind.__iter__(held), then))
        ):
            yield self._path

    def restore(self) -> None:
        now = self._now()
        if self._kind is set:
            if (added := {*now} - {*self.then}) and len(added) + len(self.then) == len(now):
                self._added |= added
        elif all(map(_same, now, self.then)):
            self._log += now[len(self.then) :]
        self._put(self.then)
        self._expect_looked_at(self._path)

    def end(self) -> None:
        if self._log or self._added:
            self._put((*self.then, *self._log, *self._added))
            self._log, self._added, self.then = [], set(), self._now()

    def log(self) -> tuple[list[Any], set[Any]]:
        return list(self._log), set(self._added)

    def put_log(self, log: tuple[list[Any], set[Any]]) -> None:
        self._log, self._added = list(log[0]), set(log[1])

    def is_other_at_a_glance(self) -> bool:
        return len(self._held) != len(self.then)

    def _put(self, values: tuple[Any, ...]) -> None:
        self._kind.clear(self._held)
        (self._kind.update if self._kind is set else self._kind.extend)(self._held, values)


class Depths(Place):
    """The content of the objects in a long container, as a checksum; None if they cannot be pickled."""

    rare = True

    def __init__(self, path: str, held: Any) -> None:
        self._path, self._held = path, held
        self.then = self._now()

    def _now(self) -> int | None:
        checksum = _Checksum()
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                _PlainPickler(checksum, protocol=5).dump(self._held)
        except Exception:  # a user's class may raise anything
            return None
        return checksum.value

    def changed(self) -> Iterator[str]:
        if self._now() != self.then:
            yield self._path

    def restore(self) -> None:
        raise TaskError(
            f"the content of `{self._path}` changes while clients train, but is too large to be restored for each client: "
            "keep less there, or make it a buffer of the model, with register_buffer"
        )


class _Checksum(io.RawIOBase):
    """A file that keeps only a checksum of what is written to it."""

    value = 0

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        self.value = zlib.crc32(data, self.value)
        return memoryview(data).nbytes


class _PlainPickler(pickle.Pickler):
    def reducer_override(self, obj: Any) -> Any:
        if isinstance(obj, Tensor) and obj.layout is torch.strided:
            return bytes, (_bits(obj).tobytes(),)
        return NotImplemented


class OneValue(Place):
    """A place that holds one value under one path, or no value."""

    _path: str
    then: Any

    def _now(self) -> Any:
        raise NotImplementedError

    def changed(self) -> Iterator[str]:
        if not _same(self._now(), self.then):
            yield self._path


class Cell(OneValue):
    """A variable that a function encloses."""

    def __init__(self, path: str, cell: types.CellType) -> None:
        self._path, self._cell = path, cell
        self.then = self._now()

    def _now(self) -> Any:
        try:
            return self._cell.cell_contents
        except ValueError:
            return MISSING

    def restore(self) -> None:
        if self.then is MISSING:
            del self._cell.cell_contents
        else:
            self._cell.cell_contents = self.then


class Variable(OneValue):
    """A context variable, in the context of the thread that trains."""

    def __init__(self, path: str, held: contextvars.ContextVar[Any]) -> None:
        self._path, self._held = path, held
        self.then = self._now()

    def _now(self) -> Any:
        try:
            return self._held.get()
        except LookupError:
            return MISSING

    def restore(self) -> None:
        if self.then is MISSING:
            raise TaskError(
                f"the context variable `{self._path}` is set while clients train, but it had no value before, so it cannot be "
                "restored: give it a default, or set it before the run"
            )
        self._held.set(self.then)


class Memory(Place):
    """Memory that is written through a view, such as a number that processes share."""

    def __init__(self, path: str, held: Any) -> None:
        self._path, self._held = path, held
        self.then = self._view().tobytes()

    def _view(self) -> memoryview:
        return memoryview(self._held).cast("B")

    def changed(self) -> Iterator[str]:
        if self._view().tobytes() != self.then:
            yield self._path

    def restore(self) -> None:
        self._view()[:] = self.then


class Numbers(Place):
    """A tensor or an array.

    Args:
        path: Its path.
        held: The tensor or array.
        room: The most bytes to copy. A larger tensor or array cannot be restored.
        each_time: The most bytes to compare each time.
    """

    def __init__(self, path: str, held: Any, room: int, each_time: int = SMALL_BYTES) -> None:
        self._path, self._held = path, held
        self._version = self._of(held)
        size = held.nelement() * held.element_size() if isinstance(held, Tensor) else held.nbytes
        self.nbytes = size if size <= room else 0
        self.rare = size > min(each_time, room)
        self._kept = None if size > room else _copied(held)
        self._checksum = None if size <= room else zlib.crc32(_bits(held))

    @staticmethod
    def _of(held: Any) -> int:
        return held._version if isinstance(held, Tensor) and not held.is_inference() else 0

    def changed(self) -> Iterator[str]:
        if self._of(self._held) != self._version:
            yield self._path
        elif self._kept is not None:
            if not _same_bits(self._held, self._kept):
                yield self._path
        elif zlib.crc32(_bits(self._held)) != self._checksum:
            yield self._path

    def is_other_at_a_glance(self) -> bool:
        return self._of(self._held) != self._version

    def restore(self) -> None:
        if self._kept is None:
            raise TaskError(
                f"`{self._path}` changes while clients train, but it is not a leaf of the model, and it is too large to be "
                "restored for each client: make it a buffer of the model, with register_buffer"
            )
        if isinstance(self._held, Tensor):
            with torch.no_grad():
                if self._held.shape != self._kept.shape:
                    self._held.set_(self._kept.clone())  # pyright: ignore[reportUnknownMemberType]
                else:
                    self._held.copy_(self._kept)
        elif self._held.shape != self._kept.shape:
            self._held.resize(self._kept.shape, refcheck=False)
            self._held[...] = self._kept
        else:
            self._held[...] = self._kept
        self._version = self._of(self._held)
        self._expect_looked_at(self._path)


class Sparse(Place):
    """A sparse tensor: its indices and values."""

    def __init__(self, path: str, held: Tensor) -> None:
        self._path, self._held = path, held
        self._kept = held.detach().clone()

    def changed(self) -> Iterator[str]:
        if not all(map(_same_bits, _parts_of(self._held), _parts_of(self._kept))):
            yield self._path

    def restore(self) -> None:
        now, then = _parts_of(self._held), _parts_of(self._kept)
        with torch.no_grad():
            if all(one.shape == other.shape for one, other in zip(now, then, strict=True)):
                for one, other in zip(now, then, strict=True):
                    one.copy_(other)
            else:
                self._held.copy_(self._kept)


class ObjectArray(Place):
    """A numpy array of objects."""

    def __init__(self, path: str, held: Any) -> None:
        self._path, self._held, self.then = path, held, held.copy()

    def changed(self) -> Iterator[str]:
        if not all(map(_same, self._held.flat, self.then.flat)):
            yield self._path

    def restore(self) -> None:
        self._held[...] = self.then


class RandomGenerator(Place):
    """A random generator."""

    def __init__(self, path: str, held: Any) -> None:
        self._path, self._held = path, held
        self.then = self._now()

    def _now(self) -> Any:
        held = self._held
        if isinstance(held, random.Random):
            return held.getstate()
        if isinstance(held, torch.Generator):
            return held.get_state().numpy().tobytes()
        return held.bit_generator.state if isinstance(held, np.random.Generator) else held.get_state()

    def changed(self) -> Iterator[str]:
        if pickle.dumps(self._now()) != pickle.dumps(self.then):
            yield self._path

    def restore(self) -> None:
        held = self._held
        if isinstance(held, random.Random):
            held.setstate(self.then)
        elif isinstance(held, np.random.Generator):
            held.bit_generator.state = self.then
        elif isinstance(held, torch.Generator):
            held.set_state(torch.frombuffer(bytearray(self.then), dtype=torch.uint8))
        else:
            held.set_state(self.then)


class Opaque(Place):
    """An object of an extension. It cannot be restored, but its pickle shows whether it has changed."""

    def __init__(self, path: str, held: Any) -> None:
        self._path, self._held = path, held
        self.then = self._now()

    def _now(self) -> Any:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                return pickle.dumps(self._held)[:_PICKLED]
        except Exception:  # its class may raise anything
            return None

    def changed(self) -> Iterator[str]:
        if self._now() != self.then:
            yield self._path

    def restore(self) -> None:
        raise TaskError(
            f"`{self._path}` is a {type(self._held).__name__} that advances while clients train, but it cannot be "
            "restored for each client: compute its values from a buffer of the model instead, such as a count of steps"
        )


class Iterating(Opaque):
    """An iterator. It is refused as soon as it moves; or immediately, if its position cannot be read."""

    def _now(self) -> Any:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                return _standing(self._held, 0)
            except _Unseen:
                return None

    def changed(self) -> Iterator[str]:
        if self.then is None or self._now() != self.then:
            yield self._path

    def restore(self) -> None:
        if self.then is not None:
            super().restore()
        raise TaskError(
            f"`{self._path}` is a {type(self._held).__name__} whose position cannot be read, so it cannot be restored "
            "for each client: compute its values from a buffer of the model instead, such as a count of "
            "steps, or make a new one each time in the code that uses it"
        )


class _Unseen(Exception):
    """An iterator's position cannot be read."""


def _standing(value: Any, depth: int) -> Any:
    """Return an iterator's position as plain values that can be compared, with the positions of the iterators that it
    reads from."""
    if isinstance(value, PLAIN):
        return repr(value)
    if isinstance(value, tuple):
        return tuple(_standing(part, depth + 1) for part in cast(tuple[Any, ...], value))
    if not isinstance(value, Iterator):
        return type(value).__qualname__, len(cast(Any, value)) if isinstance(value, list | dict | set | str) else 0
    if isinstance(value, types.GeneratorType):
        frame = value.gi_frame
        if frame is not None and (value.gi_running or value.gi_suspended):
            raise _Unseen
        return "ended" if frame is None else "fresh"
    if depth > _DEEPEST:
        raise _Unseen
    own = getattr(value, "__dict__", None)
    if isinstance(own, dict) and own:
        held = cast(dict[str, Any], own)
        if shown := [
            (n, _standing(part, depth + 1)) for n, part in held.items() if isinstance(part, (*PLAIN, Iterator))
        ]:
            return shown
    try:
        reduced = value.__reduce__()
    except Exception as error:  # its class may raise anything; some iterators show their position in their text
        if type(value).__module__ == "itertools" and " object at " not in repr(value):
            return repr(value)
        raise _Unseen from error
    if isinstance(reduced, str):
        return reduced
    return type(value).__qualname__, *(_standing(part, depth + 1) for part in reduced[1:])


def inside_of(iterator: Any) -> list[Any]:
    """Return the objects that an iterator goes through, and the functions that it calls."""
    if isinstance(iterator, types.GeneratorType):
        return list(iterator.gi_frame.f_locals.values()) if iterator.gi_frame else []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            reduced: Any = iterator.__reduce__()
        except Exception:  # its class may raise anything
            return []
    return [
        part
        for part in (reduced[1] if isinstance(reduced, tuple) else ())
        if callable(part) or isinstance(part, list | dict | set | tuple)
    ]


def _copied(held: Any) -> Any:
    return held.detach().clone() if isinstance(held, Tensor) else held.copy()


def _parts_of(held: Tensor) -> tuple[Tensor, ...]:
    """Return the tensors that make up a sparse tensor."""
    held = held.detach()
    if held.layout is torch.sparse_coo:
        return held._indices(), held._values()
    if held.layout in (torch.sparse_csr, torch.sparse_bsr):
        return held.crow_indices(), held.col_indices(), held.values()
    return held.ccol_indices(), held.row_indices(), held.values()


def _bits(held: Any) -> Any:
    """Return the bytes of a tensor or an array as uint8 `(bytes,)`. The result is a view if they are contiguous on the CPU."""
    if isinstance(held, Tensor):
        if not held.nelement():
            return np.empty(0, np.uint8)
        plain = held.detach().resolve_conj().resolve_neg().cpu().contiguous().reshape(-1)
        return (torch.int_repr(plain) if plain.is_quantized else plain).view(torch.uint8).numpy()
    if not held.nbytes:
        return np.empty(0, np.uint8)
    return np.ascontiguousarray(held).reshape(-1).view(np.uint8)


def bytes_of(held: Any) -> bytes:
    """Return the numbers of a tensor or an array as the bytes in memory."""
    return _bits(held).tobytes()


def _same_bits(one: Any, other: Any) -> bool:
    if one.shape != other.shape:
        return False
    if isinstance(one, Tensor) and one.device.type != "cpu" and torch.equal(one.detach(), other):
        return True
    return bool(np.array_equal(_bits(one), _bits(other)))
