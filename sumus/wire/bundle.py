"""A bundle: a plan with its first model. A server needs nothing else to run the plan; it does not need the code of the task.

It is a zip file. Its members are not compressed and all their dates are the same, so equal content gives equal bytes. Its
members:
    plan.json             canonical JSON; its SHA-256 is the plan's id
    model.safetensors     the initial values of every leaf: shared, personal and frozen
"""

import io
import struct
import zipfile
from dataclasses import dataclass

from sumus.errors import ParticipantError, UsageError
from sumus.plan import Plan
from sumus.types import Tree
from sumus.wire.tensors import decode_tree, encode_tree

MAX_BYTES = 8 * 2**30
NOT_A_ZIP = (
    zipfile.BadZipFile,
    struct.error,
    EOFError,
    RuntimeError,
    NotImplementedError,
    OSError,
    ValueError,
    IndexError,
)
"""The errors that `zipfile` raises for bytes that are not an archive: for example, ValueError for impossible offsets and
names, and IndexError for an encrypted member without a name."""
_EPOCH = (1980, 1, 1, 0, 0, 0)
_UNIX = 3


@dataclass(frozen=True)
class Bundle:
    """A plan and its first model."""

    plan: Plan
    model: Tree

    def to_bytes(self) -> bytes:
        """Encode the bundle as the bytes of a file."""
        buffer = io.BytesIO()
        with zipfile.ZipFile(buffer, "w", zipfile.ZIP_STORED) as archive:
            for name, body in (
                ("plan.json", self.plan.to_json().encode()),
                ("model.safetensors", encode_tree(self.model)),
            ):
                info = zipfile.ZipInfo(name, _EPOCH)
                info.create_system = _UNIX  # otherwise the bytes would be different on Windows
                archive.writestr(info, body)
        return buffer.getvalue()

    @staticmethod
    def from_bytes(content: bytes) -> "Bundle":
        """Read a bundle from the bytes of a file.

        Raises:
            UsageError: The bytes are not a bundle, or the model's leaves are not exactly those of the plan.
        """
        try:
            with zipfile.ZipFile(io.BytesIO(content)) as archive:
                infos = archive.infolist()
                if sorted(info.filename for info in infos) != ["model.safetensors", "plan.json"]:
                    names = ", ".join(info.filename for info in infos)
                    raise UsageError(f"a bundle holds exactly plan.json and model.safetensors; this file holds {names}")
                if any(info.compress_type != zipfile.ZIP_STORED for info in infos):
                    raise UsageError("the members of a bundle must not be compressed; make a bundle with `sumus pack`")
                if sum(info.file_size for info in infos) > MAX_BYTES:
                    raise UsageError(f"the content of the bundle has more than {MAX_BYTES} bytes")
                plan = Plan.from_json(archive.read("plan.json").decode())
                body = archive.read("model.safetensors")
        except NOT_A_ZIP as error:
            raise UsageError(f"this is not a bundle: {error}; make one with `sumus pack`") from error
        expected = {leaf.name: (leaf.sum_dtype, leaf.shape) for leaf in plan.description.leaves}
        try:
            return Bundle(plan, decode_tree(body, expected))
        except ParticipantError as error:
            raise UsageError(
                f"the model in the bundle does not match the bundle's plan: {error}; make the bundle again with `sumus pack`"
            ) from error
