"""The messages between processes, as bytes. They may hold code from scripts and notebooks; large arrays are sent only once.

    file, spans = packed(setting)      # in this process
    setting = unpacked(fd, spans)      # in each other process: all of them share the memory of the arrays

Code of `__main__`, and of modules that another process cannot import, is sent by value.
"""

import importlib.machinery
import io
import mmap
import pickle
import sys
import tempfile
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from types import FunctionType, ModuleType
from typing import IO, Any, cast

import cloudpickle  # pyright: ignore[reportMissingTypeStubs]
import numpy as np

from sumus.types import Array

SMALLEST = 1024
"""The smallest size in bytes of an array that is written apart from the pickle."""
_ALIGNED = 64
_registry: Any = cloudpickle

Spans = Sequence[tuple[int, int]]
"""(start, stop) of each large array in a file, and last those of the pickle."""


def dumps(value: object, apart: Callable[[pickle.PickleBuffer], object] | None = None) -> bytes:
    """Turn a value into bytes for `pickle.loads`.

    Args:
        value: The value.
        apart: Function that takes the memory of large arrays. It returns a false value for memory to leave out of the bytes.
    """
    written = io.BytesIO()
    with _by_value() as met:
        pickler: Any = _Pickler(written, met, apart)
        pickler.dump(value)
    return written.getvalue()


def packed(value: object) -> tuple[IO[bytes], Spans]:
    """Write a value to an unnamed temporary file.

    The file disappears when no process has it open or mapped.

    Returns:
        The file, and where each part is in it.
    """
    arrays: list[memoryview] = []

    def apart(buffer: pickle.PickleBuffer) -> bool:
        raw = buffer.raw()
        if raw.nbytes < SMALLEST:
            return True
        arrays.append(raw)
        return False

    rest = dumps(value, apart)
    spans: list[tuple[int, int]] = []
    file = tempfile.TemporaryFile()  # noqa: SIM115 - the caller closes it
    try:
        for part in (*arrays, rest):
            start = file.seek(-(-file.tell() // _ALIGNED) * _ALIGNED)
            file.write(part)
            spans.append((start, file.tell()))
        file.flush()
    except BaseException:
        file.close()
        raise
    return file, spans


def unpacked(descriptor: int, spans: Spans) -> Any:
    """Read a value from a file of `packed`. Processes share the memory of large arrays until one of them writes to it.

    The process that writes then has its own copy.
    """
    memory = memoryview(mmap.mmap(descriptor, 0, access=mmap.ACCESS_COPY))
    *arrays, rest = (memory[start:stop] for start, stop in spans)
    return pickle.loads(rest, buffers=arrays)


class _Pickler(cloudpickle.Pickler):
    """cloudpickle's pickler, extended for three kinds of objects: code of modules, arrays in files, and tensors.

    `met` maps each module that was checked to whether another process finds it.
    """

    def __init__(
        self, file: IO[bytes], met: dict[str, bool], apart: Callable[[pickle.PickleBuffer], object] | None
    ) -> None:
        cast(Any, super()).__init__(file, protocol=5, buffer_callback=apart)
        self._met = met

    def reducer_override(self, obj: Any) -> Any:
        if isinstance(obj, FunctionType | type):
            self._look_at(getattr(obj, "__module__", None))
        elif type(cast(object, obj)) in (np.ndarray, np.memmap) and (found := _in_file(cast(Array, obj))) is not None:
            return found
        elif (array := _of_tensor(obj)) is not None:
            return cast(Any, sys.modules["torch"]).from_numpy, (array,)
        return cast(Any, super()).reducer_override(obj)

    def _look_at(self, module: object) -> None:
        """Send a module's functions by value if another process would not find the module."""
        top = module.partition(".")[0] if isinstance(module, str) else ""
        if top not in self._met and top in sys.modules and top != "__main__":
            self._met[top] = _is_found(top)
            if not self._met[top]:
                _registry.register_pickle_by_value(sys.modules[top])


@contextmanager
def _by_value() -> Generator[dict[str, bool], None, None]:
    """Return a context with a dict of whether another process finds each module; it undoes registrations at its end."""
    met: dict[str, bool] = {}
    before: set[str] = _registry.list_registry_pickle_by_value()
    try:
        yield met
    finally:
        for name, found in met.items():
            if not found and name not in before:
                _registry.unregister_pickle_by_value(sys.modules[name])


def _is_found(module: str) -> bool:
    finders: list[Any] = [finder for finder in sys.meta_path if hasattr(finder, "find_spec")]
    found: importlib.machinery.ModuleSpec | None
    found = next((spec for finder in finders if (spec := finder.find_spec(module, None)) is not None), None)
    own: ModuleType = sys.modules[module]
    return found is not None and (found.origin is None or found.origin == getattr(own.__spec__, "origin", found.origin))


def _in_file(array: Array) -> Any:
    """Return the function and arguments that map an array in a file again (`np.load(mmap_mode=)`); None for other arrays."""
    origin: Any = None
    base: Any = array
    while base is not None:
        if isinstance(base, np.memmap) and cast(Any, base).filename is not None:
            origin = cast(Any, base)
        base = getattr(cast(Any, base), "base", None)
    if origin is None or origin.mode == "c" or not array.flags.c_contiguous:
        return None  # the process may have changed a copy-on-write array, which does not change the file
    start = origin.offset + array.__array_interface__["data"][0] - origin.__array_interface__["data"][0]
    return np.memmap, (origin.filename, array.dtype, "r" if origin.mode == "r" else "c", start, array.shape)


def _of_tensor(value: Any) -> Array | None:
    """Return the memory of a plain tensor on the CPU as an array; None for anything else. torch is not imported here."""
    torch: Any = sys.modules.get("torch")
    if torch is None or type(value) is not torch.Tensor or not value.is_contiguous():
        return None
    try:
        return value.numpy()
    except (TypeError, RuntimeError):  # on a GPU, with a gradient, of a dtype that numpy does not have
        return None
