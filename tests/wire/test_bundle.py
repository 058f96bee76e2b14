"""A bundle: a plan and its first model in one file, the same bytes for the same content."""

import dataclasses
import io
import struct
import zipfile

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import sumus
from sumus.errors import PlanError, SumusError, UsageError
from sumus.plan import Plan
from sumus.task import Data, Description, Leaf
from sumus.wire.bundle import Bundle
from sumus.wire.tensors import encode_tree

TASK = Description(
    "digits",
    (
        Leaf("fc.weight", (3, 2), "float32", "shared", True),
        Leaf("fc.scale", (), "bfloat16", "shared", True),
        Leaf("head.weight", (2,), "float32", "personal", True),
        Leaf("norm.counter", (), "int64", "frozen", False),
    ),
    "cross_entropy",
    (),
    Data((2,), "float32", (), "int64", 3),
)
PLAN = Plan(TASK, sumus.fedavg(sumus.sgd(0.1)), sumus.Pacing(20))
MODEL = {
    "fc.weight": np.arange(6, dtype=np.float32).reshape(3, 2),
    "fc.scale": np.array(0.5, np.float32),
    "head.weight": np.ones(2, np.float32),
    "norm.counter": np.array(3),
}
BUNDLE = Bundle(PLAN, MODEL)
CONTENT = BUNDLE.to_bytes()


def same(one: Bundle, two: Bundle) -> bool:
    return one.plan == two.plan and encode_tree(one.model) == encode_tree(two.model)


def packed(members: list[tuple[str, bytes]], compression: int = zipfile.ZIP_STORED) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compression) as archive:
        for name, body in members:
            archive.writestr(zipfile.ZipInfo(name), body, compression)
    return buffer.getvalue()


JSON, BODY = PLAN.to_json().encode(), encode_tree(MODEL)


def test_a_bundle_comes_back_whole() -> None:
    again = Bundle.from_bytes(CONTENT)
    assert same(again, BUNDLE)
    assert again.plan.id == PLAN.id
    assert again.to_bytes() == CONTENT


def test_equal_content_gives_equal_bytes() -> None:
    turned = dict(reversed(list(MODEL.items())))
    assert Bundle(Plan.from_json(PLAN.to_json()), turned).to_bytes() == CONTENT


def test_a_bundle_is_a_plain_zip_file_without_dates_and_without_the_machine() -> None:
    with zipfile.ZipFile(io.BytesIO(CONTENT)) as archive:
        for info in archive.infolist():
            assert info.date_time == (1980, 1, 1, 0, 0, 0)
            assert (info.create_system, info.compress_type) == (3, zipfile.ZIP_STORED)
        assert archive.read("plan.json") == JSON
        assert archive.read("model.safetensors") == BODY


def test_another_plan_or_another_model_gives_other_bytes() -> None:
    other_plan = dataclasses.replace(PLAN, min_contributors=11)
    other_model = MODEL | {"fc.scale": np.array(0.25, np.float32)}
    assert len({Bundle(other_plan, MODEL).to_bytes(), Bundle(PLAN, other_model).to_bytes(), CONTENT}) == 3


# ── what is refused ──────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("what", "members"),
    [
        ("nothing", []),
        ("no model", [("plan.json", JSON)]),
        ("no plan", [("model.safetensors", BODY)]),
        ("something more", [("plan.json", JSON), ("model.safetensors", BODY), ("run.py", b"")]),
        ("another name", [("../plan.json", JSON), ("model.safetensors", BODY)]),
    ],
)
def test_other_contents_are_refused(what: str, members: list[tuple[str, bytes]]) -> None:
    with pytest.raises(UsageError, match="a bundle holds exactly plan.json and model.safetensors"):
        Bundle.from_bytes(packed(members))


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_a_second_plan_beside_the_first_is_refused() -> None:
    with pytest.raises(UsageError, match="exactly plan.json"):
        Bundle.from_bytes(packed([("plan.json", JSON), ("plan.json", JSON), ("model.safetensors", BODY)]))


@pytest.mark.parametrize("compression", [zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_compressed_contents_are_refused_before_they_are_unpacked(compression: int) -> None:
    with pytest.raises(UsageError, match="must not be compressed"):
        Bundle.from_bytes(packed([("plan.json", JSON), ("model.safetensors", BODY)], compression))


@pytest.mark.parametrize(
    "model",
    [
        {},
        MODEL | {"fc.scale": np.array(0.5, np.float64)},
        MODEL | {"fc.weight": np.zeros((2, 3), np.float32)},
        MODEL | {"tail.weight": np.zeros(2, np.float32)},
        {name: leaf for name, leaf in MODEL.items() if name != "head.weight"},
    ],
)
def test_a_model_that_is_not_the_plans_is_refused(model: dict[str, np.ndarray]) -> None:
    with pytest.raises(UsageError, match="does not match the bundle's plan"):
        Bundle.from_bytes(Bundle(PLAN, model).to_bytes())


@pytest.mark.parametrize(
    "plan", [b"", b"{}", JSON[:-1], JSON.replace(b"fedavg", b"").replace(b"client/sgd", b"client/x")]
)
def test_a_plan_that_is_none_is_refused(plan: bytes) -> None:
    with pytest.raises(PlanError):
        Bundle.from_bytes(packed([("plan.json", plan), ("model.safetensors", BODY)]))


def test_text_that_is_no_text_and_a_model_that_is_none_are_refused() -> None:
    with pytest.raises(UsageError):
        Bundle.from_bytes(packed([("plan.json", b"\xff"), ("model.safetensors", BODY)]))
    with pytest.raises(UsageError):
        Bundle.from_bytes(packed([("plan.json", JSON), ("model.safetensors", struct.pack("<Q", 9))]))


def read_or_refused(content: bytes) -> None:
    """What is read after damage is what was packed; any exception that is not ours fails the test."""
    try:
        again = Bundle.from_bytes(content)
    except SumusError:
        return
    assert same(again, BUNDLE)


@given(st.integers(0, len(CONTENT) - 1), st.integers(1, 255))
def test_no_changed_byte_goes_unnoticed(where: int, change: int) -> None:
    damaged = bytearray(CONTENT)
    damaged[where] ^= change
    read_or_refused(bytes(damaged))


def test_every_byte_of_the_plan_and_of_the_model_is_guarded() -> None:
    for body in (JSON, BODY):
        start = CONTENT.index(body)
        for where in range(start, start + len(body), 17):
            damaged = bytearray(CONTENT)
            damaged[where] ^= 1
            with pytest.raises(UsageError):
                Bundle.from_bytes(bytes(damaged))


@given(st.integers(0, len(CONTENT)))
def test_a_bundle_cut_short_is_refused(length: int) -> None:
    if length < len(CONTENT):
        with pytest.raises(UsageError):
            Bundle.from_bytes(CONTENT[:length])


@given(st.data())
def test_damaged_directories_are_read_or_refused(data: st.DataObject) -> None:
    """Most of what a zip reader trusts stands in the last bytes."""
    damaged = bytearray(CONTENT)
    for _ in range(data.draw(st.integers(1, 5))):
        where = data.draw(st.integers(CONTENT.rindex(BODY) + len(BODY), len(damaged) - 1))
        damaged[where] = data.draw(st.integers(0, 255))
    read_or_refused(bytes(damaged))


@given(st.binary(max_size=100))
def test_random_bytes_are_refused(content: bytes) -> None:
    with pytest.raises(UsageError):
        Bundle.from_bytes(content)
