"""What callers and workers say to each other, as bytes: whole, or refused."""

import json
import math
import struct
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sumus.errors import ParticipantError
from sumus.virtual.messages import (
    DTYPE_NAMES,
    MAX_CONTROL,
    STATUS,
    Backward,
    BeginAnswer,
    BeginRequest,
    Call,
    Code,
    CountHeld,
    Dtype,
    EllipsisIndex,
    EmptyAnswer,
    FetchAnswer,
    FetchTensor,
    Gradient,
    HeldAnswer,
    Items,
    NotFinite,
    Ref,
    RefusalAnswer,
    SendTensor,
    SetGradient,
    SetRequiresGrad,
    Slice,
    TensorMade,
    TensorsMade,
    UseOffered,
    WorkerAnswer,
    WorkerRequest,
    number,
    read,
    read_tensor,
    write,
)
from sumus.virtual.policy import Policy
from sumus.virtual.workbench import Workbench

IDS = st.integers(0, 2**53)
WHOLE = st.integers(-(2**63), 2**63 - 1)
TEXT = st.text(max_size=64)
ENDS = st.none() | WHOLE
DTYPES = st.sampled_from(DTYPE_NAMES)
PLAIN = (
    st.none()
    | st.booleans()
    | WHOLE
    | st.floats(allow_nan=False, allow_infinity=False)
    | TEXT
    | st.builds(Ref, IDS)
    | st.builds(Dtype, DTYPES)
    | st.builds(Slice, ENDS, ENDS, ENDS)
    | st.builds(EllipsisIndex)
    | st.builds(NotFinite, st.sampled_from(["inf", "-inf", "nan"]))
)
VALUES = st.recursive(PLAIN, lambda inner: st.builds(Items, st.lists(inner, max_size=4).map(tuple), st.booleans()))
ASKS = (
    st.builds(SendTensor, st.booleans())
    | st.builds(UseOffered, TEXT)
    | st.builds(
        Call, TEXT, st.lists(VALUES, max_size=4).map(tuple), st.dictionaries(TEXT, VALUES, max_size=3), st.booleans()
    )
    | st.builds(Backward, IDS, st.none() | IDS, st.booleans())
    | st.builds(Gradient, IDS)
    | st.builds(SetGradient, IDS, st.none() | IDS)
    | st.builds(SetRequiresGrad, IDS, st.booleans())
    | st.builds(FetchTensor, IDS)
    | st.just(CountHeld())
)
MADE = st.builds(TensorMade, IDS, st.lists(IDS, max_size=4).map(tuple), DTYPES, st.booleans(), st.booleans())
ANSWERS = (
    MADE
    | st.builds(TensorsMade, st.lists(MADE, max_size=3).map(tuple))
    | st.builds(FetchAnswer, st.booleans())
    | st.builds(HeldAnswer, IDS, IDS)
    | st.builds(BeginAnswer, TEXT, TEXT, st.lists(TEXT, max_size=3).map(tuple))
    | st.just(EmptyAnswer())
    | st.builds(RefusalAnswer, st.sampled_from(sorted(STATUS)), st.text())
)


@given(st.builds(WorkerRequest, IDS, ASKS, st.lists(IDS, max_size=5).map(tuple)))
def test_a_request_comes_back_as_it_was(asked: WorkerRequest) -> None:
    assert read(WorkerRequest, write(asked)) == (asked, b"")


@given(st.builds(WorkerAnswer, ANSWERS))
def test_an_answer_comes_back_as_it_was(said: WorkerAnswer) -> None:
    assert read(WorkerAnswer, write(said)) == (said, b"")


@given(st.floats())
def test_every_float_travels_to_the_bit(value: float) -> None:
    asked = WorkerRequest(1, Call("add", (number(value),)))
    found = read(WorkerRequest, write(asked))[0].ask
    assert isinstance(found, Call)
    again: Any = found.arguments[0]
    again = float(again.text) if isinstance(again, NotFinite) else again
    assert struct.pack("<d", again) == struct.pack("<d", value) or (math.isnan(again) and math.isnan(value))
    assert type(again) is float


def test_whole_numbers_and_floats_stay_what_they_are() -> None:
    found = read(WorkerRequest, write(WorkerRequest(1, Call("add", (1, 1.0, True)))))[0].ask
    assert isinstance(found, Call)
    assert [type(value) for value in found.arguments] == [int, float, bool]


@given(st.sampled_from(DTYPE_NAMES), st.lists(st.integers(0, 3), max_size=4), st.randoms(use_true_random=False))
def test_a_tensor_travels_to_the_bit(dtype: str, shape: list[int], random: Any) -> None:
    items = math.prod(shape) * np.dtype(dtype).itemsize
    sent = np.frombuffer(random.randbytes(items), np.uint8 if dtype == "bool" else dtype).reshape(shape)
    sent = (sent % 2).astype(bool) if dtype == "bool" else sent
    message, behind = read(WorkerAnswer, write(WorkerAnswer(FetchAnswer()), sent))
    found = read_tensor(behind)
    assert message == WorkerAnswer(FetchAnswer())
    assert (found.dtype, found.shape, found.tobytes()) == (sent.dtype, sent.shape, sent.tobytes())
    assert found.flags.writeable


@given(st.binary(max_size=200))
def test_whatever_else_is_refused(body: bytes) -> None:
    for form in (WorkerRequest, BeginRequest, WorkerAnswer):
        with pytest.raises(ParticipantError):
            read(form, b"x" + body)


@given(st.binary(max_size=200), st.integers(0, 2**32 - 1))
def test_a_worker_answers_whatever_comes(body: bytes, length: int) -> None:
    bench = Workbench({}, Policy())
    for sent in (body, b"svw1" + body, b"svw1" + struct.pack("<I", length) + body):
        said, _ = read(WorkerAnswer, bench.answer(sent))
        assert isinstance(said.answer, RefusalAnswer)
        assert said.answer.code == "malformed"


def framed(control: bytes) -> bytes:
    return b"svw1" + struct.pack("<I", len(control)) + control


@pytest.mark.parametrize(
    "control",
    [
        b"{}",
        b'{"serial": -1, "ask": {"type": "count"}}',
        b'{"serial": 1, "ask": {"type": "pickle"}}',
        b'{"serial": 1, "ask": {"type": "call", "operation": "add", "arguments": [{"type": "dtype", "name": "complex64"}]}}',
        b'{"serial": 1, "ask": {"type": "call", "operation": "add", "arguments": [99999999999999999999]}}',
        b'{"serial": 1, "ask": {"type": "call", "operation": "' + b"a" * 65 + b'", "arguments": []}}',
        b'{"serial": 1, "ask": {"type": "count"}, "forget": ' + json.dumps([1] * 10_001).encode() + b"}",
        b'{"serial": 1, "ask": {"type": "call", "operation": "add", "arguments": ['
        + b'{"type":"items","items":[' * 5000
        + b"]}" * 5000
        + b"]}}",
        b" " * (MAX_CONTROL + 1),
    ],
    ids=["empty", "negative", "no such request", "dtype", "large number", "long name", "many", "deep", "long"],
)
def test_a_form_that_is_not_given_is_refused(control: bytes) -> None:
    with pytest.raises(ParticipantError):
        read(WorkerRequest, framed(control))


def test_behind_a_message_is_one_tensor_of_a_dtype_that_travels() -> None:
    from sumus.wire.tensors import encode_tree

    for tree in ({"a": np.ones(1)}, {"tensor": np.ones(1), "b": np.ones(1)}, {"tensor": np.ones(1, np.uint32)}):
        with pytest.raises(ParticipantError, match="tensor"):
            read_tensor(encode_tree(tree))
    with pytest.raises(ParticipantError, match="tensor header"):
        read_tensor(struct.pack("<Q", 2**40) + b"{}")


def test_every_code_has_a_status() -> None:
    assert set(STATUS) == set(Code.__args__)  # pyright: ignore[reportAttributeAccessIssue]
