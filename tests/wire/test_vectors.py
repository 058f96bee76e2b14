"""Values and their bytes: docs/wire.md in numbers, for whoever writes the other end.

Run as a program, this writes them anew.
"""

import hashlib
import json
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sumus.aggregate import Aggregate, Part, Update
from sumus.evaluation import EDGES, LOSS_EDGES, evaluation_report
from sumus.first_hop import FirstHop
from sumus.fixed_point import FixedPoint
from sumus.rng import key, signs
from sumus.types import Array, Tree
from sumus.wire.messages import digest_of, enrolment_text, signed_text
from sumus.wire.reports import decode_report, encode_report
from sumus.wire.signing import device_id, public_key_of, sign, to_base64url
from sumus.wire.tensors import decode_aggregate, decode_tree, encode_aggregate, encode_tree

PATH = Path(__file__).parents[1] / "vectors" / "wire.json"
PARTS = (Part("params"), Part("steps", content="scalar", weight="uniform"))
HOP = FirstHop(
    PARTS, ((("fc.bias", (2,)), ("fc.weight", (2, 3))), (("", ()),)), FixedPoint(10, 4.0, 100, 8), None, None, ("loss",)
)
CODED = FirstHop(PARTS[:1], ((("fc.bias", (3,)),),), FixedPoint(10, 4.0, 100, 8), None, 8, ("loss",))

TREES: Mapping[str, Tree] = {
    "empty": {},
    "one of each dtype": {
        "a": np.array([1, -2, 3], np.int8),
        "b": np.array([[1.5, -2.0], [0.25, 3.0]], np.float32),
        "c": np.array(-7, np.int64),
        "d": np.array([1e300, -0.0]),
        "e": np.array([65535], np.uint16),
        "f": np.array([2**32 - 1], np.uint32),
        "g": np.array([True, False]),
        "h": np.array([], np.int16),
        "i": np.array([-(2**31)], np.int32),
        "j": np.array([200], np.uint8),
    },
    "names beyond ASCII are ordered by their bytes": {
        "é": np.array([1.0], np.float32),
        "z": np.array([2.0], np.float32),
        "漢": np.array([3.0], np.float32),
        "𝒳": np.array([4.0], np.float32),
    },
}
REPORTS: Mapping[str, tuple[FirstHop, Update]] = {
    "floats": (
        HOP,
        Update(
            "alice",
            {
                "params": {
                    "fc.weight": np.arange(6, dtype=np.float32).reshape(2, 3) / 8,
                    "fc.bias": np.array([-1.5, 0.1], np.float32),
                },
                "steps": {"": np.array(3.0, np.float32)},
            },
            37,
            {"loss": (52.25, 37)},
        ),
    ),
    "codes": (CODED, Update("bob", {"params": {"fc.bias": np.array([-127, 0, 127], np.int8)}}, 5)),
}
WORDS: tuple[tuple[Any, ...], ...] = (
    (),
    (0,),
    ("0",),
    (7, "round", 3, "client", "alice"),
    ("ab", "c"),
    ("a", "bc"),
    ("é",),
    (-7, 2**63),
    (b"",),
    (bytes(range(256)),),
    (b'it\'s "quoted"', "noise", 1, 0),
)
"""Words of keys. Bytes stand in hexadecimal: their printed form is Python's alone."""

MEASURED: tuple[dict[str, tuple[float, int]], ...] = (
    {"loss": (12.5, 8), "accuracy": (5.0, 8)},
    {"loss": (0.0, 4), "accuracy": (4.0, 4)},
    {"loss": (1e6, 1), "accuracy": (0.0, 0)},
)

SECRETS = (
    "9d61b19deffd5a60ba844af492ec2cc44449c5697b326919703bac031cae7f60",
    "4ccd089b28ff96da9db6c346ec114e0f5b8a319f35aba624da8cf6ed4fb8a6fb",
)
"""Of RFC 8032, 7.1."""
REQUESTS: tuple[tuple[str, str, str, bytes], ...] = (
    ("POST", "/v1/checkins", "phones", b'{"serial":1,"session":"s-1","fingerprints":[]}'),
    ("PUT", "/v1/tasks/health/train/s-1", "phones", bytes(range(256))),
    ("POST", "/v1/withdrawals", "edges.2", b"{}"),
)


def shown(array: Array) -> dict[str, Any]:
    """An array in JSON; 64-bit integers as text, since JavaScript's numbers do not hold them."""
    values = [
        str(value) if array.dtype.itemsize == 8 and array.dtype.kind in "iu" else value
        for value in array.reshape(-1).tolist()
    ]
    return {"dtype": array.dtype.name, "shape": list(array.shape), "values": values}


def shown_word(word: int | str | bytes) -> int | str | dict[str, str]:
    """A word of a key in JSON; bytes as an object, and whole numbers that JavaScript's numbers do not hold too."""
    if isinstance(word, bytes):
        return {"bytes": word.hex()}
    return {"int": str(word)} if isinstance(word, int) and abs(word) >= 2**53 else word


def shown_tree(tree: Tree) -> dict[str, Any]:
    return {name: shown(tree[name]) for name in sorted(tree)}


def made() -> dict[str, Any]:
    """All of it, as the code makes it now."""
    trees = [
        {"name": name, "leaves": shown_tree(tree), "body": encode_tree(tree).hex()} for name, tree in TREES.items()
    ]
    reports = [
        {
            "name": name,
            "parts": {part: shown_tree(tree) for part, tree in update.parts.items()},
            "examples": update.examples,
            "metrics": {metric: list(pair) for metric, pair in update.metrics.items()},
            "body": encode_report(update).hex(),
            "sum": {
                "slots": shown_tree(hop.count_in(update).slots()),
                "body": encode_aggregate(hop.count_in(update)).hex(),
            },
        }
        for name, (hop, update) in REPORTS.items()
    ]
    keys = [{"words": [shown_word(word) for word in words], "key": key(*words).hex()} for words in WORDS]
    seeds = [bytes(32), hashlib.sha256(b"sumus").digest()]
    some = [{"seed": seed.hex(), "signs": signs(seed, 300).astype(int).tolist()} for seed in seeds]
    return {
        "version": 1,
        "trees": trees,
        "reports": reports,
        "keys": keys,
        "signs": some,
        "edges": {
            name: edges[np.isfinite(edges)].tolist() for name, edges in (("loss", LOSS_EDGES), ("others", EDGES))
        },
        "evaluations": [shown_evaluation(measured) for measured in MEASURED],
        "requests": [shown_request(bytes.fromhex(secret), *request) for secret in SECRETS for request in REQUESTS],
        "enrolments": [shown_enrolment(bytes.fromhex(secret)) for secret in SECRETS],
    }


def shown_evaluation(measured: dict[str, tuple[float, int]]) -> dict[str, Any]:
    """A report of an evaluation. bins: by metric, counted from 0; none where nothing was measured."""
    update = evaluation_report("carol", measured, 10)
    return {
        "measured": {name: list(pair) for name, pair in measured.items()},
        "bins": {name: np.flatnonzero(leaf).tolist() for name, leaf in update.parts["histogram"].items()},
        "body": encode_report(update).hex(),
    }


def shown_request(secret: bytes, method: str, path: str, population: str, body: bytes) -> dict[str, Any]:
    """A signed request. body: in hexadecimal.  digest: what Sumus-Digest says of it."""
    device = device_id(public_key_of(secret))
    text = signed_text(method, path, population, device, body)
    return {
        "secret": secret.hex(),
        "device": device,
        "method": method,
        "path": path,
        "population": population,
        "body": body.hex(),
        "digest": digest_of(body),
        "text": text.decode(),
        "signature": to_base64url(sign(secret, text)),
    }


def shown_enrolment(secret: bytes) -> dict[str, Any]:
    """An enrolment's signature."""
    nonce, token = (to_base64url(hashlib.sha256(word).digest()) for word in (b"nonce", b"token"))
    key = public_key_of(secret)
    text = enrolment_text(nonce, to_base64url(key), token)
    return {
        "secret": secret.hex(),
        "public_key": to_base64url(key),
        "device": device_id(key),
        "nonce": nonce,
        "token": token,
        "text": text.decode(),
        "signature": to_base64url(sign(secret, text)),
    }


@pytest.mark.parametrize(
    "kind", ["version", "trees", "reports", "keys", "signs", "edges", "evaluations", "requests", "enrolments"]
)
def test_the_code_makes_the_bytes_of_the_page(kind: str) -> None:
    assert json.loads(PATH.read_text(encoding="utf-8"))[kind] == json.loads(json.dumps(made()[kind]))


def test_the_bytes_are_read_back() -> None:
    for tree in TREES.values():
        assert shown_tree(decode_tree(encode_tree(tree))) == shown_tree(tree)
    for hop, update in REPORTS.values():
        assert decode_report(encode_report(update), update.client, hop).examples == update.examples
        assert shown_tree(decode_aggregate(encode_aggregate(hop.count_in(update))).slots()) == shown_tree(
            hop.count_in(update).slots()
        )


BREAKS: Mapping[str, Callable[[], Tree]] = {
    "int64 before float64": lambda: {"a": np.zeros(1), "b": np.zeros(1, np.int64)},
    "int8 before uint8": lambda: {"a": np.zeros(1, np.uint8), "b": np.zeros(1, np.int8)},
}


@pytest.mark.parametrize("name", sorted(BREAKS))
def test_dtypes_come_before_names(name: str) -> None:
    tree = BREAKS[name]()
    header = json.loads(encode_tree(tree)[8:].split(b"}}")[0] + b"}}")
    assert list(header) == ["b", "a"]


def test_the_empty_sum_has_a_body() -> None:
    assert decode_aggregate(encode_aggregate(Aggregate())).empty


if __name__ == "__main__":
    sys.exit(not PATH.write_text(json.dumps(made(), indent=1, ensure_ascii=False) + "\n", encoding="utf-8"))
