"""The messages between a caller and a worker, as bytes: a small JSON object, followed by at most one tensor.

    body = write(WorkerRequest(1, Call("add", (Ref(3), 1.0))))
    request, behind = read(WorkerRequest, body)          raises ParticipantError if the body has another form

A body is the letters `svw1`, the length of the JSON (4 bytes, little-endian), the JSON, and then nothing or safetensors
with one leaf. An operation is sent as its registered name, and a tensor at the worker as its number. No code and no
pickle is sent.
"""

import math
import struct
from typing import Annotated, Any, Literal, TypeAlias, TypeVar, cast

import msgspec
import numpy as np

from sumus.errors import ParticipantError
from sumus.types import Array
from sumus.wire.tensors import MAX_HEADER, decode_tree, encode_tree

MAGIC = b"svw1"
MAX_CONTROL = 2**20
"""The largest JSON that is read, in bytes."""
OVERHEAD = len(MAGIC) + 4 + MAX_CONTROL + MAX_HEADER
"""The largest number of bytes of a body in addition to those of its tensor."""
MOST_FORGOTTEN = 10_000
LEAF = "tensor"

DtypeName: TypeAlias = Literal[
    "float64", "float32", "float16", "int64", "int32", "int16", "int8", "uint8", "bool"
]  # fmt: skip
Id: TypeAlias = Annotated[int, msgspec.Meta(ge=0, le=2**53)]
Whole: TypeAlias = Annotated[int, msgspec.Meta(ge=-(2**63), le=2**63 - 1)]
Text: TypeAlias = Annotated[str, msgspec.Meta(max_length=64)]
Name: TypeAlias = Annotated[str, msgspec.Meta(max_length=256)]
Code: TypeAlias = Literal[
    "malformed",
    "not_allowed",
    "unknown_tensor",
    "unknown_name",
    "too_large",
    "too_many",
    "private",
    "not_yours",
    "impossible",
    "replayed",
    "bad_token",
    "unknown_caller",
    "busy",
    "slow",
    "not_found",
    "failed",
]

STATUS: dict[str, int] = {
    "malformed": 400,  # the message has another form than the classes below
    "not_allowed": 403,  # the policy does not allow this operation, or no operation has this name
    "unknown_tensor": 404,  # this caller has no tensor with this number
    "unknown_name": 404,  # the owner offers no tensor with this name
    "too_large": 413,  # a tensor or a body exceeds the policy's limit
    "too_many": 403,  # the caller would hold more tensors or bytes than allowed
    "private": 403,  # the tensor depends on the owner's data, and may not be fetched
    "not_yours": 403,  # the operation would change the owner's data
    "impossible": 422,  # torch cannot do this with these tensors
    "replayed": 409,  # the request is older than the last one
    "bad_token": 401,
    "unknown_caller": 401,  # the caller has not begun, has ended, or was idle for too long
    "busy": 503,  # the largest number of callers or bodies is reached
    "slow": 408,  # the body took too long
    "not_found": 404,  # no such path
    "failed": 500,  # a defect of the worker
}
"""Every code of a refusal, and its HTTP status."""

# ── values ───────────────────────────────────────────────────────────────────────────────────────────────────────────


class Ref(msgspec.Struct, frozen=True, tag="ref"):
    """A tensor of the caller at this worker."""

    id: Id


class Dtype(msgspec.Struct, frozen=True, tag="dtype"):
    """A dtype, by its name."""

    name: DtypeName


class Slice(msgspec.Struct, frozen=True, tag="slice"):
    """A slice start:stop:step of an index."""

    start: Whole | None = None
    stop: Whole | None = None
    step: Whole | None = None


class EllipsisIndex(msgspec.Struct, frozen=True, tag="dots"):
    """The ellipsis of an index."""


class NotFinite(msgspec.Struct, frozen=True, tag="float"):
    """A float that JSON cannot write as a number."""

    text: Literal["inf", "-inf", "nan"]


class Items(msgspec.Struct, frozen=True, tag="items"):
    """Several values.

    Attributes:
        items: The values.
        as_list: Whether they are a list. As an index, a list differs from a tuple.
    """

    items: tuple["Value", ...]
    as_list: bool = False


Value: TypeAlias = bool | Whole | float | Text | Ref | Dtype | Slice | EllipsisIndex | NotFinite | Items | None

# ── requests ────────────────────────────────────────────────────────────────────────────────────────────────────


class SendTensor(msgspec.Struct, frozen=True, tag="send"):
    """Keep the tensor that follows this message.

    Attributes:
        learns: Whether the tensor requires a gradient.
    """

    learns: bool = False


class UseOffered(msgspec.Struct, frozen=True, tag="offered"):
    """Use the tensor that the owner offers under this name."""

    name: Name


class Call(msgspec.Struct, frozen=True, tag="call"):
    """Perform an operation.

    Attributes:
        operation: The operation's registered name.
        arguments: Its arguments, in order.
        named: Its arguments by name.
        graph: Whether autograd records it.
    """

    operation: Text
    arguments: tuple[Value, ...]
    named: dict[Text, Value] = {}
    graph: bool = True


class Backward(msgspec.Struct, frozen=True, tag="backward"):
    """Compute the gradients of a tensor, and add them to the gradients of the leaves from which it was computed.

    Attributes:
        id: The tensor.
        gradient: The tensor with the gradient of `id`; None if `id` has only one element.
        keep: Whether the graph is kept for another backward pass.
    """

    id: Id
    gradient: Id | None = None
    keep: bool = False


class Gradient(msgspec.Struct, frozen=True, tag="gradient"):
    """Return the gradient of a leaf, or an EmptyAnswer if it has none."""

    id: Id


class SetGradient(msgspec.Struct, frozen=True, tag="set_gradient"):
    """Set the gradient of a leaf to the tensor `to`, or remove it if `to` is None."""

    id: Id
    to: Id | None = None


class SetRequiresGrad(msgspec.Struct, frozen=True, tag="learn"):
    """Set whether a leaf requires a gradient."""

    id: Id
    learns: bool


class FetchTensor(msgspec.Struct, frozen=True, tag="fetch"):
    """Return the numbers of a tensor."""

    id: Id


class CountHeld(msgspec.Struct, frozen=True, tag="count"):
    """Count the tensors and bytes that the caller holds."""


Ask: TypeAlias = (
    SendTensor | UseOffered | Call | Backward | Gradient | SetGradient | SetRequiresGrad | FetchTensor | CountHeld
)


class WorkerRequest(msgspec.Struct, frozen=True):
    """The envelope of every request of a caller.

    Attributes:
        serial: A number that grows with each request. A repeated request is done once, and gets the same response.
        ask: The request itself.
        forget: Tensors to which the caller no longer has a pointer; they are deleted first.
    """

    serial: Id
    ask: Ask
    forget: Annotated[tuple[Id, ...], msgspec.Meta(max_length=MOST_FORGOTTEN)] = ()


class BeginRequest(msgspec.Struct, frozen=True):
    """Begin as a new caller at a worker in another process."""


# ── responses ─────────────────────────────────────────────────────────────────────────────────────────────────


class TensorMade(msgspec.Struct, frozen=True, tag="made"):
    """The response that describes a tensor at the worker.

    Attributes:
        id: Its number at the worker.
        shape: Its shape.
        dtype: Its dtype.
        learns: Whether it requires a gradient.
        leaf: Whether it is a leaf of autograd's graph.
    """

    id: Id
    shape: tuple[Id, ...]
    dtype: DtypeName
    learns: bool = False
    leaf: bool = True


class TensorsMade(msgspec.Struct, frozen=True, tag="several"):
    """The response to an operation that has several results."""

    made: tuple[TensorMade, ...]


class FetchAnswer(msgspec.Struct, frozen=True, tag="fetched"):
    """The response to FetchTensor. The tensor follows this message.

    Attributes:
        learns: Whether the tensor requires a gradient at the worker.
    """

    learns: bool = False


class HeldAnswer(msgspec.Struct, frozen=True, tag="held"):
    """The response to CountHeld: the number of tensors and bytes that the caller holds at the worker.

    Attributes:
        tensors: The number of tensors.
        bytes: An upper bound of the bytes of these tensors and of the memory that autograd keeps for them.
    """

    tensors: Id
    bytes: Id


class BeginAnswer(msgspec.Struct, frozen=True, tag="begun"):
    """The response to BeginRequest: the worker has admitted a new caller.

    Attributes:
        caller: A secret that every request must contain.
        worker: The worker's name.
        names: The names of the tensors that the owner offers.
    """

    caller: Name
    worker: Name
    names: tuple[Name, ...]


class EmptyAnswer(msgspec.Struct, frozen=True, tag="nothing"):
    """The response to a request that was done and has no result."""


class RefusalAnswer(msgspec.Struct, frozen=True, tag="refusal"):
    """The response to a request that was refused, and not done.

    Attributes:
        code: A key of `STATUS`.
        detail: A sentence for a person.
    """

    code: Code
    detail: str = ""


class WorkerAnswer(msgspec.Struct, frozen=True):
    """The envelope of every response of a worker.

    Attributes:
        answer: The response itself.
    """

    answer: TensorMade | TensorsMade | FetchAnswer | HeldAnswer | BeginAnswer | EmptyAnswer | RefusalAnswer


# ── bytes ────────────────────────────────────────────────────────────────────────────────────────────────────────────

M = TypeVar("M")
_READERS: dict[Any, msgspec.json.Decoder[Any]] = {
    form: msgspec.json.Decoder(form) for form in (WorkerRequest, BeginRequest, WorkerAnswer)
}
"""The decoders are made at import: msgspec (0.22) crashes if several threads are the first to decode one form at the
same time."""


def write(message: Any, tensor: Array | None = None) -> bytes:
    """Write a message as bytes, followed by the bytes of a tensor if one is given."""
    control = msgspec.json.encode(message)
    behind = b"" if tensor is None else encode_tree({LEAF: tensor})
    return b"".join((MAGIC, struct.pack("<I", len(control)), control, behind))


def read(form: type[M], body: bytes) -> tuple[M, bytes]:
    """Read a message from bytes.

    Returns:
        The message, and the bytes that follow it.

    Raises:
        ParticipantError: The bytes are not a message of this form.
    """
    if body[: len(MAGIC)] != MAGIC or len(body) < len(MAGIC) + 4:
        raise ParticipantError(
            None, "this is not a message of a sumus worker: do both sides run the same version of sumus?"
        )
    (length,) = cast(tuple[int], struct.unpack_from("<I", body, len(MAGIC)))
    begin = len(MAGIC) + 4
    if length > MAX_CONTROL or begin + length > len(body):
        raise ParticipantError(None, f"a message of {length} bytes is incomplete, or larger than {MAX_CONTROL} bytes")
    try:
        return _READERS[form].decode(memoryview(body)[begin : begin + length]), body[begin + length :]
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:  # a ValidationError is a DecodeError
        raise ParticipantError(None, f"not a {form.__name__}: {error!s:.200}") from error


def read_tensor(behind: bytes) -> Array:
    """Read the tensor that follows a message. The result is a new array, which may be written to."""
    tree = decode_tree(behind)
    if tree.keys() != {LEAF}:
        raise ParticipantError(None, f"one tensor must follow the message, not {len(tree)}")
    found = np.array(tree[LEAF])
    if found.dtype.name not in DTYPE_NAMES:
        raise ParticipantError(
            None, f"a tensor of {found.dtype.name} cannot be sent: use one of {', '.join(DTYPE_NAMES)}"
        )
    return found


DTYPE_NAMES: tuple[str, ...] = DtypeName.__args__  # pyright: ignore[reportAttributeAccessIssue]


def number(value: float) -> float | NotFinite:
    """Return a float in the form in which it is sent."""
    if math.isfinite(value):
        return value
    return NotFinite("nan" if math.isnan(value) else "inf" if value > 0 else "-inf")
