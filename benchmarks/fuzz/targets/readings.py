"""Common code of the targets for a node's files: reading a file and writing a part of it."""

from typing import Any

import numpy as np

from sumus.node.formats import is_whole, read_file
from sumus.node.reading import BadReading


def check_file(name: str, body: bytes) -> None:
    """Assert that a part of a file that was read is such a file, with the same readings."""
    is_whole(name, body)
    try:
        batch = read_file(name, body)
    except BadReading:
        return
    good = [number for number, one in enumerate(batch.found) if not isinstance(one, BadReading)][:3]
    if not good:
        return
    written = batch.subset(good)
    assert is_whole(name, written)
    assert shown(read_file(name, written).found) == shown([batch.found[number] for number in good])


def shown(found: Any) -> Any:
    """Return readings as values that can be compared, with NaN equal to NaN."""
    if isinstance(found, list | tuple):
        return [shown(each) for each in found]
    if isinstance(found, dict):
        return {name: shown(value) for name, value in found.items()}
    if isinstance(found, np.ndarray | np.generic):
        return found.dtype.newbyteorder("<").str, found.shape, found.astype(found.dtype.newbyteorder("<")).tobytes()
    return repr(found)
