"""Messages between callers and virtual workers: JSON, followed by a tensor.

The first byte of an input chooses the message's form.
"""

import struct
from collections.abc import Mapping
from typing import Any

import numpy as np

from benchmarks.fuzz.framing import readable, tensors, text
from benchmarks.fuzz.target import Target
from sumus.errors import ParticipantError
from sumus.virtual.messages import (
    DTYPE_NAMES,
    LEAF,
    MAGIC,
    BeginAnswer,
    BeginRequest,
    Call,
    Dtype,
    EllipsisIndex,
    EmptyAnswer,
    FetchAnswer,
    HeldAnswer,
    Items,
    NotFinite,
    Ref,
    RefusalAnswer,
    SendTensor,
    SetRequiresGrad,
    Slice,
    TensorMade,
    TensorsMade,
    WorkerAnswer,
    WorkerRequest,
    number,
    read,
    read_tensor,
    write,
)
from sumus.wire.tensors import encode_tree

FORMS: tuple[Any, ...] = (WorkerRequest, BeginRequest, WorkerAnswer)
_FIRST = {WorkerRequest: b"A", BeginRequest: b"B", WorkerAnswer: b"C"}


def check(data: bytes) -> None:
    """Check that a message that is read can be written and is read again unchanged, with the tensor that follows it."""
    form = FORMS[(data[0] - ord("A")) % len(FORMS)] if data else WorkerRequest
    try:
        message, behind = read(form, _framed(data[1:]))
    except ParticipantError:
        return
    assert read(form, write(message)) == (message, b"")
    try:
        tensor = read_tensor(behind)
    except ParticipantError:
        return
    assert tensor.flags.writeable
    again = read_tensor(read(form, write(message, tensor))[1])
    assert (again.dtype, again.shape, again.tobytes()) == (tensor.dtype, tensor.shape, tensor.tobytes())
    value = number(float(tensor.flat[0])) if tensor.size else 0.0
    assert isinstance(value, float | NotFinite)


def _framed(data: bytes) -> bytes:
    """Return a body for JSON, a line feed and readable safetensors; return other bytes unchanged."""
    if data[:1] != b"{":
        return data
    control, _, behind = data.partition(b"\n")
    return MAGIC + struct.pack("<I", len(control)) + control + tensors(behind)


def _input(form: Any, message: Any, behind: bytes = b"") -> bytes:
    body = write(message)
    return _FIRST[form] + body[len(MAGIC) + 4 :] + b"\n" + behind


def seeds() -> Mapping[str, bytes]:
    """Return requests and answers with and without tensors, and bytes that are neither."""
    values = (
        True,
        -1,
        1.5,
        "a",
        Ref(3),
        Dtype("float32"),
        Slice(0, None, 2),
        EllipsisIndex(),
        NotFinite("nan"),
        Items((None, Ref(1))),
    )
    call = WorkerRequest(1, Call("add", values, {"alpha": Items((1, 2), as_list=True)}, graph=False), (4, 5))
    made = TensorMade(1, (2, 3), "float32", learns=True, leaf=False)
    tensor = readable(encode_tree({LEAF: np.ones((2, 1), np.float32)}))
    found = {
        "call": _input(WorkerRequest, call),
        "send": _input(WorkerRequest, WorkerRequest(1, SendTensor(True)), tensor),
        "learn": _input(WorkerRequest, WorkerRequest(2, SetRequiresGrad(3, False))),
        "begin": _input(BeginRequest, BeginRequest()),
        "made": _input(WorkerAnswer, WorkerAnswer(TensorsMade((made, made)))),
        "held": _input(WorkerAnswer, WorkerAnswer(HeldAnswer(1, 2))),
        "begun": _input(WorkerAnswer, WorkerAnswer(BeginAnswer("c", "w", ("inputs",)))),
        "fetched": _input(WorkerAnswer, WorkerAnswer(FetchAnswer(True)), tensor),
        "nothing": _input(WorkerAnswer, WorkerAnswer(EmptyAnswer())),
        "refusal": _input(WorkerAnswer, WorkerAnswer(RefusalAnswer("too_large", "é"))),
        "raw": b"A" + write(call, np.ones(2, np.int8)),
    }
    for name in (*DTYPE_NAMES, "uint16"):
        leaf = {LEAF: np.ones(2, name)}
        found[f"tensor-{name}"] = _input(WorkerRequest, WorkerRequest(1, SendTensor()), readable(encode_tree(leaf)))
    for name, value in (("nan", np.nan), ("inf", np.inf), ("minus-inf", -np.inf)):
        found[f"tensor-{name}"] = _input(
            WorkerRequest, WorkerRequest(1, SendTensor()), readable(encode_tree({LEAF: np.array([value])}))
        )
    return found | {
        "tensor-empty": _input(
            WorkerRequest, WorkerRequest(1, SendTensor()), readable(encode_tree({LEAF: np.ones((0, 2))}))
        ),
        "two-tensors": _input(
            WorkerRequest, WorkerRequest(1, SendTensor()), readable(encode_tree({LEAF: np.ones(2), "more": np.ones(2)}))
        ),
        "no-tensor": _input(WorkerRequest, WorkerRequest(1, SendTensor()), b"{}\n"),
        "deep": b'A{"serial":1,"ask":' + b"[" * 3000 + b"}\n",
        "items-in-items": b"A" + text(_nested(200)) + b"\n",
        "not-of-this-form": b'A{"serial":-1}\n',
        "no-text": b'A{"serial":"\xff"}\n',
        "too-long": b"A" + MAGIC + struct.pack("<I", 2**31),
        "cut": b"A" + MAGIC + struct.pack("<I", 10) + b"{}",
        "magic-alone": b"A" + MAGIC,
        "another-program": b"AGET / HTTP/1.1\r\n",
        "empty": b"",
    }


def _nested(depth: int) -> Any:
    value: Any = None
    for _ in range(depth):
        value = {"type": "items", "items": [value]}
    return {"serial": 1, "ask": {"type": "call", "operation": "add", "arguments": [value]}}


TARGET = Target(
    "virtual",
    check,
    seeds,
    {"sumus.virtual.messages": ()},
    (
        b'{"type":"ref","id":1}',
        b'"items":[',
        b'"slice"',
        b'"dtype"',
        b'"float","text":"nan"',
        b'"forget":[',
        b'"tensor"',
        b"svw1",
    ),
)
