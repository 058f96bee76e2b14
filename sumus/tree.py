"""Functions on trees. A tree maps leaf names to arrays; its canonical order is that of the sorted names."""

import hashlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar, overload

import numpy as np

from sumus.errors import UsageError
from sumus.types import Array, Layout, Tensors, Tree

A = TypeVar("A")
B = TypeVar("B")


@overload
def tree_map(function: Callable[[A], B], tree: Mapping[str, A], /) -> dict[str, B]: ...


@overload
def tree_map(function: Callable[[A, A], B], tree: Mapping[str, A], other: Mapping[str, A], /) -> dict[str, B]: ...


def tree_map(function: Callable[..., Any], *trees: Mapping[str, Any]) -> dict[str, Any]:
    """Apply `function` leaf by leaf to one or two trees with the same leaves."""
    first, *others = trees
    return {name: function(leaf, *(other[name] for other in others)) for name, leaf in first.items()}


def layout(tree: Tensors) -> dict[str, tuple[int, ...]]:
    """Return the shape of every leaf."""
    return {name: tuple(leaf.shape) for name, leaf in tree.items()}


def size(shapes: Layout) -> int:
    """Return the total number of entries in a tree with these shapes."""
    return sum(int(np.prod(shape, dtype=np.int64)) for shape in shapes.values())


def flatten(tree: Tree) -> Array:
    """Join all leaves, in canonical order, into one vector of shape `(size,)`. Its dtype is the leaves' common dtype by
    numpy's rules.
    """
    if not tree:
        return np.zeros(0)
    return np.concatenate([np.asarray(tree[name]).reshape(-1) for name in sorted(tree)])


def unflatten(vector: Array, shapes: Layout) -> dict[str, Array]:
    """Undo `flatten`: return views into `vector` with the given shapes."""
    leaves: dict[str, Array] = {}
    start = 0
    for name in sorted(shapes):
        stop = start + int(np.prod(shapes[name], dtype=np.int64))
        leaves[name] = vector[start:stop].reshape(shapes[name])
        start = stop
    return leaves


def blocks(tree: Tree, most: int) -> Iterator[tuple[int, list[Array]]]:
    """Yield the vector that `flatten` makes, in blocks, without copying the leaves.

    Args:
        tree: The tree.
        most: The most numbers in a block.

    Yields:
        The position at which a block starts in the vector, and the flat arrays of the block, in order. The arrays of
        one block have one dtype and hold at most `most` numbers together.
    """
    start, held = 0, list[Array]()
    size = 0
    for name in sorted(tree):
        leaf = tree[name].reshape(-1)
        for first in range(0, leaf.size, most):
            piece = leaf[first : first + most]
            if held and (size + piece.size > most or piece.dtype != held[0].dtype):
                yield start, held
                start, size, held = start + size, 0, []
            held.append(piece)
            size += piece.size
    if held:
        yield start, held


def nbytes(tree: Tree) -> int:
    """Return the number of bytes of all leaves together."""
    return sum(int(leaf.nbytes) for leaf in tree.values())


def sha256(tree: Tree) -> str:
    """Hash the names, dtypes, shapes and little-endian bytes of a tree. Two trees have the same hash if and only if
    they are equal.
    """
    digest = hashlib.sha256()
    for name in sorted(tree):
        leaf = np.asarray(tree[name])
        little = np.ascontiguousarray(leaf, dtype=leaf.dtype.newbyteorder("<"))
        head = f"{name}\0{leaf.dtype.name}\0{','.join(map(str, leaf.shape))}\0"
        digest.update(len(head).to_bytes(8, "little") + head.encode() + little.tobytes())
    return digest.hexdigest()


def first_non_finite(tree: Tree) -> str | None:
    """Return the name of the first leaf that holds NaN or infinity; None if there is none."""
    for name in sorted(tree):
        if not np.isfinite(tree[name]).all():
            return name
    return None


def narrowed(leaf: Array, dtype: np.dtype[Any]) -> Array:
    """Convert a float64 leaf to a narrower float dtype, rounding each entry towards zero, so that no norm grows."""
    if leaf.dtype == dtype:
        return leaf
    near = leaf.astype(dtype)
    over = np.abs(near, dtype=np.float64) > np.abs(leaf)
    return np.where(over, np.nextafter(near, np.zeros_like(near)), near)


def unnested(trees: Mapping[str, Mapping[str, A]]) -> dict[str, A]:
    """Flatten trees by name into one tree with leaves called `name/leaf`.

    Raises:
        UsageError: A name holds a slash, or a tree has no leaves: `nested` could not undo the result.
    """
    for name, tree in trees.items():
        if "/" in name or not tree:
            raise UsageError(
                f"{name!r} cannot be kept or sent: give the tree a name without a slash, and at least one leaf"
            )
    return {f"{name}/{leaf}": array for name, tree in trees.items() for leaf, array in tree.items()}


def nested(flat: Mapping[str, A]) -> dict[str, dict[str, A]]:
    """Undo `unnested`. The names of the trees hold no slash."""
    trees: dict[str, dict[str, A]] = {}
    for path, array in flat.items():
        name, _, leaf = path.partition("/")
        trees.setdefault(name, {})[leaf] = array
    return trees
