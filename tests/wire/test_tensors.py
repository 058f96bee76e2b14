"""Trees and sums as bytes: equal values give equal bytes, and strange bytes give our errors and no others."""

import json
import re
import struct
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import save

from sumus.aggregate import Aggregate, Part, Update
from sumus.errors import ParticipantError
from sumus.fixed_point import FixedPoint
from sumus.types import Array, Tree
from sumus.wire.tensors import (
    MAX_HEADER,
    decode_aggregate,
    decode_tree,
    encode_aggregate,
    encode_tree,
    tree_pieces,
    view_tree,
)

DTYPES = ["float32", "float64", "float16", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "bool"]
PARTS = (Part("params"), Part("steps", content="scalar", weight="uniform"))
SIGNED = ["float32", "float64", "float16", "int8", "int16", "int32", "int64"]
READERS: list[Callable[[bytes], Any]] = [decode_tree, decode_aggregate, view_tree]


@st.composite
def leaves(draw: st.DrawFn) -> Array:
    shape = tuple(draw(st.lists(st.integers(0, 3), max_size=3)))
    body = np.random.default_rng(draw(st.integers(0, 99))).integers(0, 2, shape)
    return body.astype(draw(st.sampled_from(DTYPES)))


def trees() -> st.SearchStrategy[Tree]:
    return st.dictionaries(st.text(max_size=5).filter(lambda name: name != "__metadata__"), leaves(), max_size=4)


def an_aggregate(seed: int = 0) -> Aggregate:
    rng = np.random.default_rng(seed)
    parts = {
        "params": {"fc.weight": rng.normal(size=(3, 2)), "fc.bias": rng.normal(size=3)},
        "steps": {"": np.array(3.0)},
    }
    return FixedPoint.fit(9).encode(Update("c", parts, 5, {"loss": (1.5, 5), "accuracy": (2.0, 4)}), PARTS)


def same(one: Tree, two: Tree) -> bool:
    return {n: (a.dtype.name, a.shape, a.tobytes()) for n, a in one.items()} == {
        n: (a.dtype.name, a.shape, a.tobytes()) for n, a in two.items()
    }


def body_of(header: Any, data: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


# ── there and back ───────────────────────────────────────────────────────────────────────────────────────────────────


@given(trees())
def test_a_tree_comes_back_bit_for_bit(tree: Tree) -> None:
    assert same(decode_tree(encode_tree(tree)), tree)
    assert encode_tree(decode_tree(encode_tree(tree))) == encode_tree(tree)


@given(trees())
def test_a_tree_has_the_bytes_that_safetensors_gives_it(tree: Tree) -> None:
    assert encode_tree(tree) == save(
        {name: np.ascontiguousarray(leaf).reshape(leaf.shape) for name, leaf in tree.items()}
    )


def test_the_pieces_of_a_tree_lie_in_its_leaves() -> None:
    tree: Tree = {"b": np.arange(3.0), "a": np.arange(4, dtype=np.int64)}
    *head, a, b = tree_pieces(tree)
    assert b"".join([*head, a, b]) == encode_tree(tree)
    assert np.shares_memory(np.frombuffer(a, np.int64), tree["a"])
    assert np.shares_memory(np.frombuffer(b), tree["b"])


@given(trees())
def test_a_tree_is_seen_in_its_body_without_a_copy(tree: Tree) -> None:
    signed = {name: leaf for name, leaf in tree.items() if leaf.dtype.name in SIGNED}
    body = bytearray(encode_tree(signed))
    seen = view_tree(memoryview(body))
    assert same(seen, signed)
    for name, leaf in seen.items():
        assert not leaf.flags.writeable
        assert leaf.size == 0 or np.shares_memory(leaf, np.frombuffer(body, np.uint8)), name
    if len(signed) < len(tree):
        with pytest.raises(ParticipantError, match="not safetensors"):
            view_tree(encode_tree(tree))


@given(trees())
def test_the_order_of_leaves_does_not_show(tree: Tree) -> None:
    assert encode_tree(dict(reversed(list(tree.items())))) == encode_tree(tree)


def test_the_memory_layout_does_not_show() -> None:
    plain = np.arange(12, dtype=np.float32).reshape(3, 4)
    for other in (np.asfortranarray(plain), plain.astype(">f4"), np.repeat(plain, 2, axis=1)[:, ::2]):
        assert encode_tree({"w": other}) == encode_tree({"w": plain})


def test_nan_and_minus_zero_keep_their_bits() -> None:
    tree = {"w": np.array([np.nan, -0.0, np.inf, 1e-45], np.float32)}
    assert same(decode_tree(encode_tree(tree)), tree)


@given(st.integers(0, 9))
def test_an_aggregate_comes_back_with_equal_bytes(seed: int) -> None:
    total = an_aggregate(seed)
    again = decode_aggregate(encode_aggregate(total))
    assert same(again.slots(), total.slots())
    assert encode_aggregate(again) == encode_aggregate(total)


def test_the_empty_aggregate_comes_back_empty() -> None:
    assert decode_aggregate(encode_aggregate(Aggregate())).empty


def test_what_came_back_can_be_merged_and_merging_does_not_depend_on_the_journey() -> None:
    one, two = an_aggregate(1), an_aggregate(2)
    far = decode_aggregate(encode_aggregate(one)).merge(decode_aggregate(encode_aggregate(two)))
    assert encode_aggregate(far) == encode_aggregate(one.merge(two))


# ── what is expected ─────────────────────────────────────────────────────────────────────────────────────────────────


def test_exactly_what_is_expected_is_let_in() -> None:
    body = encode_tree({"w": np.zeros((2, 3), np.float32), "b": np.zeros(3, np.float32)})
    good = {"w": ("float32", (2, 3)), "b": ("float32", (3,))}
    decode_tree(body, good)
    for leaf, wrong in {
        "w": good | {"w": ("float64", (2, 3))},
        "b": good | {"b": ("float32", (4,))},
        "c": good | {"c": ("float32", (1,))},
    }.items():
        with pytest.raises(ParticipantError, match=f"leaf `{leaf}` .*this plan expects"):
            decode_tree(body, wrong)
    with pytest.raises(ParticipantError, match="leaf `b` .*this plan expects None"):
        decode_tree(body, {"w": good["w"]})


# ── what is refused ──────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"short",
        bytes(8),
        struct.pack("<Q", 100) + b"{}",
        struct.pack("<Q", 2**63),
        body_of(b" " * (MAX_HEADER + 1)),
        body_of(b"\xff\xfe"),
        body_of(b"["),
        body_of(b"[" * 500_000),
        body_of(b'{"a":' * 100_000),
        body_of([]),
        body_of(None),
        body_of("text"),
        body_of({"__metadata__": 5}),
        body_of({"__metadata__": [1]}),
    ],
    ids=lambda body: repr(body[:24]) if isinstance(body, bytes) else "",
)
def test_a_header_that_is_none_is_refused(reader: Callable[[bytes], Any], body: bytes) -> None:
    with pytest.raises(ParticipantError, match=r"^(the tensor header is |not safetensors: )") as error:
        reader(body)
    assert error.value.client is None


def test_a_header_may_be_as_long_as_the_cap_and_no_longer() -> None:
    def padded(length: int) -> bytes:
        return body_of(b"{}" + b" " * (length - 2))

    assert decode_tree(padded(MAX_HEADER)) == {}
    with pytest.raises(ParticipantError, match=str(MAX_HEADER)):
        decode_tree(padded(MAX_HEADER + 1))


@pytest.mark.parametrize(
    ("dtype", "shape", "offsets"),
    [
        ("F32", [2], [0, 4]), ("F32", [2], [4, 0]), ("F32", [2], [8, 16]), ("F32", [3], [0, 8]), ("F32", [2**63], [0, 8]),
        ("F32", [2**62, 8], [0, 8]), ("F32", [-2], [0, 8]), ("F32", [2.0], [0, 8]), ("F32", "2", [0, 8]), ("F32", None, [0, 8]),
        ("F32", [2], "08"), ("F32", [2], [0]), ("F99", [2], [0, 8]), (4, [2], [0, 8]), (None, [2], [0, 8]),
        ("F8_E4M3", [8], [0, 8]), ("C64", [1], [0, 8]),
    ],
)  # fmt: skip
def test_a_leaf_that_does_not_fit_its_bytes_is_refused(dtype: Any, shape: Any, offsets: Any) -> None:
    body = body_of({"w": {"dtype": dtype, "shape": shape, "data_offsets": offsets}}, bytes(8))
    with pytest.raises(ParticipantError):
        decode_tree(body, {"w": ("float32", (2,))})
    with pytest.raises(ParticipantError, match="not safetensors"):
        view_tree(body)


def slots(**changes: Any) -> dict[str, Array]:
    good = {"sum/params/w": [1, 2], "weight/params": 3, "count": 1, "metric/loss": [5, 6]}
    return {name: np.array(value, np.int64) for name, value in (good | changes).items() if value is not None}


@pytest.mark.parametrize(
    ("what", "said", "bad"),
    [
        ("no count", "the slot `count` is missing or not a single number", slots(count=None)),
        ("a count that is a vector", "the slot `count` is missing or not a single number", slots(count=[1])),
        ("a negative count", "`count` is -1", slots(count=-1)),
        (
            "a part without weight",
            "the weights are of [], but the sums of ['params']",
            slots(**{"weight/params": None}),
        ),
        ("a weight without part", "`weight/other` does not belong in a sum", slots(**{"weight/other": 1})),
        ("a weight that is a vector", "`weight/params` has the shape (1,)", slots(**{"weight/params": [3]})),
        ("a negative weight", "`weight/params` is -3", slots(**{"weight/params": -3})),
        ("a metric without its count", "`metric/loss` has the shape ()", slots(**{"metric/loss": 5})),
        ("a metric of three", "`metric/loss` has the shape (3,)", slots(**{"metric/loss": [5, 6, 7]})),
        ("people without a sum", "the weights are of [], but the sums of []", {"count": np.array(1)}),
        ("a slot of another name", "`other` does not belong in a sum", slots(other=1)),
        ("a sum without a leaf", "`sum` does not belong in a sum", slots(sum=1)),
        ("a sum without a part", "`sum//w` does not belong in a sum", slots(**{"sum//w": 1})),
        ("floats", "the slots have the dtypes ['float64', 'int64']", slots() | {"sum/params/w": np.zeros(2)}),
        (
            "two dtypes",
            "the slots have the dtypes ['int64', 'uint32']",
            slots() | {"sum/params/w": np.zeros(2, np.uint32)},
        ),
        (
            "narrow integers",
            "the slots have the dtypes ['int32']",
            {name: slot.astype(np.int32) for name, slot in slots().items()},
        ),
        (
            "unsigned integers",
            "the slots have the dtypes ['uint32']",
            {name: slot.astype(np.uint32) for name, slot in slots().items()},
        ),
    ],
)
def test_a_body_that_is_no_aggregate_is_refused(what: str, said: str, bad: Tree) -> None:
    with pytest.raises(ParticipantError, match=re.escape(said)) as error:
        decode_aggregate(encode_tree(bad))
    assert error.value.client is None, what
    decode_aggregate(encode_tree(slots()))


@pytest.mark.parametrize(
    "header",
    [
        b' {"w":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}',
        b'{"w":{"dtype":"F32","shape":[2],"data_offsets":[-0,8]}}',
        b'{"w":{"dtype":"F32","shape":[2],"data_offsets":[0,8],"more":1}}',
        b'{"w":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"w":{"dtype":"F32","shape":[1],"data_offsets":[4,8]}}',
        b'{"\\ud800":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}',
        b'{"w":{"dtype":"F32","shape":[' + b"1," * 32 + b'2],"data_offsets":[0,8]}}',
        b'{"__metadata__":{"a":"b"},"w":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}',
        b'{"w":{"dtype":"U32","shape":[2],"data_offsets":[0,8]}}',
    ],
)
def test_a_view_is_of_the_one_form_that_we_write(header: bytes) -> None:
    view_tree(body_of(b'{"w":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}', bytes(8)))
    with pytest.raises(ParticipantError, match="not safetensors"):
        view_tree(body_of(header, bytes(8)))


def survives(reader: Callable[[bytes], Any], body: bytes) -> None:
    """It reads the body or refuses it; any other exception fails the test. What is seen is what the library reads."""
    try:
        read = reader(body)
    except ParticipantError:
        return
    if reader is view_tree:
        assert same(read, decode_tree(body))


@given(st.binary(max_size=200))
def test_random_bytes_are_read_or_refused(body: bytes) -> None:
    for reader in READERS:
        survives(reader, body)
        survives(reader, struct.pack("<Q", len(body)) + body)


@given(st.data())
def test_damaged_bodies_are_read_or_refused(data: st.DataObject) -> None:
    body = bytearray(encode_aggregate(an_aggregate()))
    for _ in range(data.draw(st.integers(1, 4))):
        where = data.draw(st.integers(0, len(body) - 1))
        what = data.draw(st.sampled_from(["change", "cut", "insert", "end"]))
        if what == "change":
            body[where] = data.draw(st.integers(0, 255))
        elif what == "cut":
            del body[where : where + data.draw(st.integers(1, 9))]
        elif what == "insert":
            body[where:where] = data.draw(st.binary(min_size=1, max_size=9))
        else:
            del body[where:]
        body = body or bytearray(b"{")
    for reader in READERS:
        survives(reader, bytes(body))


@given(
    st.dictionaries(
        st.sampled_from(["w", "count", "sum/params/w", "weight/params", "metric/loss", "__metadata__"]),
        st.fixed_dictionaries(
            {},
            optional={
                "dtype": st.sampled_from(["F32", "I64", "U16", "U32", "BF16", "F8_E5M2", "BOOL", "F4", 3, None]),
                "shape": st.one_of(st.lists(st.sampled_from([0, 1, 2, -1, 2**31, 2**63]), max_size=3), st.none()),
                "data_offsets": st.one_of(
                    st.lists(st.sampled_from([0, 4, 8, 16, 2**63]), max_size=3), st.text(max_size=1)
                ),
            },
        ),
        max_size=3,
    ),
    st.sampled_from([0, 4, 8, 16]),
)
def test_headers_of_the_right_form_and_the_wrong_content_are_read_or_refused(header: Any, length: int) -> None:
    for reader in READERS:
        survives(reader, body_of(header, bytes(length)))
