"""What callers and virtual workers say to each other: JSON, and a tensor behind it.

The first byte of an input chooses the form.
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
    Asked,
    Begin,
    Begun,
    Call,
    Dots,
    Dtype,
    Fetched,
    Held,
    Items,
    Learn,
    Made,
    MadeSeveral,
    NotFinite,
    Nothing,
    Ref,
    Refusal,
    Said,
    Send,
    Slice,
    number,
    read,
    read_tensor,
    write,
)
from sumus.wire.tensors import encode_tree

FORMS: tuple[Any, ...] = (Asked, Begin, Said)
_FIRST = {Asked: b"A", Begin: b"B", Said: b"C"}


def check(data: bytes) -> None:
    """A message that is read can be written, and is read again as it was; and so is the tensor behind it."""
    form = FORMS[(data[0] - ord("A")) % len(FORMS)] if data else Asked
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
    """Return a body for JSON, a line feed and readable safetensors; other bytes as they are."""
    if data[:1] != b"{":
        return data
    control, _, behind = data.partition(b"\n")
    return MAGIC + struct.pack("<I", len(control)) + control + tensors(behind)


def _input(form: Any, message: Any, behind: bytes = b"") -> bytes:
    body = write(message)
    return _FIRST[form] + body[len(MAGIC) + 4 :] + b"\n" + behind


def seeds() -> Mapping[str, bytes]:
    """Return requests and answers with and without tensors, and bytes that are none."""
    values = (
        True,
        -1,
        1.5,
        "a",
        Ref(3),
        Dtype("float32"),
        Slice(0, None, 2),
        Dots(),
        NotFinite("nan"),
        Items((None, Ref(1))),
    )
    call = Asked(1, Call("add", values, {"alpha": Items((1, 2), as_list=True)}, graph=False), (4, 5))
    made = Made(1, (2, 3), "float32", learns=True, leaf=False)
    tensor = readable(encode_tree({LEAF: np.ones((2, 1), np.float32)}))
    found = {
        "call": _input(Asked, call),
        "send": _input(Asked, Asked(1, Send(True)), tensor),
        "learn": _input(Asked, Asked(2, Learn(3, False))),
        "begin": _input(Begin, Begin()),
        "made": _input(Said, Said(MadeSeveral((made, made)))),
        "held": _input(Said, Said(Held(1, 2))),
        "begun": _input(Said, Said(Begun("c", "w", ("inputs",)))),
        "fetched": _input(Said, Said(Fetched(True)), tensor),
        "nothing": _input(Said, Said(Nothing())),
        "refusal": _input(Said, Said(Refusal("too_large", "é"))),
        "raw": b"A" + write(call, np.ones(2, np.int8)),
    }
    for name in (*DTYPE_NAMES, "uint16"):
        leaf = {LEAF: np.ones(2, name)}
        found[f"tensor-{name}"] = _input(Asked, Asked(1, Send()), readable(encode_tree(leaf)))
    for name, value in (("nan", np.nan), ("inf", np.inf), ("minus-inf", -np.inf)):
        found[f"tensor-{name}"] = _input(Asked, Asked(1, Send()), readable(encode_tree({LEAF: np.array([value])})))
    return found | {
        "tensor-empty": _input(Asked, Asked(1, Send()), readable(encode_tree({LEAF: np.ones((0, 2))}))),
        "two-tensors": _input(Asked, Asked(1, Send()), readable(encode_tree({LEAF: np.ones(2), "more": np.ones(2)}))),
        "no-tensor": _input(Asked, Asked(1, Send()), b"{}\n"),
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
