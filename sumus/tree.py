"""Trees of arrays: leaf name → array, with `sorted` names as the one canonical order."""

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
    """The shape of every leaf."""
    return {name: tuple(leaf.shape) for name, leaf in tree.items()}


def size(shapes: Layout) -> int:
    """How many numbers a tree of these shapes holds."""
    return sum(int(np.prod(shape, dtype=np.int64)) for shape in shapes.values())


def flatten(tree: Tree) -> Array:
    """All leaves as one vector, in canonical order; the dtype is numpy's common one. Shape `(size,)`."""
    if not tree:
        return np.zeros(0)
    return np.concatenate([np.asarray(tree[name]).reshape(-1) for name in sorted(tree)])


def unflatten(vector: Array, shapes: Layout) -> dict[str, Array]:
    """The inverse of `flatten`: views into `vector` with the given shapes."""
    leaves: dict[str, Array] = {}
    start = 0
    for name in sorted(shapes):
        stop = start + int(np.prod(shapes[name], dtype=np.int64))
        leaves[name] = vector[start:stop].reshape(shapes[name])
        start = stop
    return leaves


def blocks(tree: Tree, most: int) -> Iterator[tuple[int, list[Array]]]:
    """The vector that `flatten` makes, in blocks: where each begins, and the flat arrays of one dtype that lie there one after
    another, together at most `most` numbers."""
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
    """Bytes of all leaves, as they would travel."""
    return sum(int(leaf.nbytes) for leaf in tree.values())


def sha256(tree: Tree) -> str:
    """A hash of names, dtypes, shapes and little-endian bytes: equal trees, and only they, share it."""
    digest = hashlib.sha256()
    for name in sorted(tree):
        leaf = np.asarray(tree[name])
        little = np.ascontiguousarray(leaf, dtype=leaf.dtype.newbyteorder("<"))
        head = f"{name}\0{leaf.dtype.name}\0{','.join(map(str, leaf.shape))}\0"
        digest.update(len(head).to_bytes(8, "little") + head.encode() + little.tobytes())
    return digest.hexdigest()


def first_non_finite(tree: Tree) -> str | None:
    """The name of a leaf that holds a NaN or an infinity, or None."""
    for name in sorted(tree):
        if not np.isfinite(tree[name]).all():
            return name
    return None


def narrowed(leaf: Array, dtype: np.dtype[Any]) -> Array:
    """A float64 leaf in another dtype, each entry rounded towards zero: no norm grows."""
    if leaf.dtype == dtype:
        return leaf
    near = leaf.astype(dtype)
    over = np.abs(near, dtype=np.float64) > np.abs(leaf)
    return np.where(over, np.nextafter(near, np.zeros_like(near)), near)


def unnested(trees: Mapping[str, Mapping[str, A]]) -> dict[str, A]:
    """Trees by name as one flat tree: `name/leaf`. UsageError where `nested` could not undo it."""
    for name, tree in trees.items():
        if "/" in name or not tree:
            raise UsageError(f"{name!r} names a tree that is kept or sent: give it a name without a slash, and leaves")
    return {f"{name}/{leaf}": array for name, tree in trees.items() for leaf, array in tree.items()}


def nested(flat: Mapping[str, A]) -> dict[str, dict[str, A]]:
    """The inverse of `unnested`; names hold no slash."""
    trees: dict[str, dict[str, A]] = {}
    for path, array in flat.items():
        name, _, leaf = path.partition("/")
        trees.setdefault(name, {})[leaf] = array
    return trees
